"""What a site may want to change: every field is an option of `python -m mixin`."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Any, NamedTuple

from exporter.health import CRITICAL_THRESHOLD, STALLED_SECONDS, WARNING_THRESHOLD
from exporter.snapshot import CV_BUCKET_BOUNDS

WARNING, CRITICAL, INFO = "warning", "critical", "info"

# Grafana's own alerts begin later than their Prometheus twins by the first, and are let go within the
# other two: one evaluation of the rule and one sending of its notification policy. All in seconds.
GRAFANA_EXTRA_HOLD = 60
GRAFANA_INTERVAL = 30
GRAFANA_GROUP_INTERVAL = 30


class AlertKey(NamedTuple):
    """An alert at one depth; as text `name/severity`."""

    name: str
    severity: str

    def __str__(self) -> str:
        return "/".join(self)


class Timing(NamedTuple):
    """In seconds: how long a condition must be met before the alert fires (Prometheus' `for`), and how
    long the alert stays afterwards (`keep_firing_for`), so that flapping is one alert."""

    hold: int
    keep: int


CV_WARNING, CV_CRITICAL = AlertKey("PPOGradientCVHigh", WARNING), AlertKey("PPOGradientCVHigh", CRITICAL)
CRITICAL_STEPS = AlertKey("PPOCriticalGradientSteps", WARNING)
NONFINITE, SKIPPED = AlertKey("PPONonFiniteGradients", WARNING), AlertKey("PPONonFiniteGradients", CRITICAL)
STARVED = AlertKey("PPOHeadStarved", WARNING)
DOWN = AlertKey("PPOTrainerDown", CRITICAL)
STALLED = AlertKey("PPOTrainingStalled", WARNING)
UNREACHABLE = AlertKey("PPOCriticalThresholdUnreachable", INFO)

TIMINGS: Mapping[AlertKey, Timing] = MappingProxyType(
    {
        CV_WARNING: Timing(300, 120),
        CV_CRITICAL: Timing(60, 180),
        CRITICAL_STEPS: Timing(120, 180),
        NONFINITE: Timing(0, 300),
        SKIPPED: Timing(60, 120),
        STARVED: Timing(900, 300),
        DOWN: Timing(60, 120),
        # Longer than the limit itself: a run whose every update takes too long is one alert, not one an update.
        STALLED: Timing(0, 360),
        UNREACHABLE: Timing(300, 120),
    }
)
"""Every alert with its default times."""


def duration(seconds: int) -> str:
    """`seconds` as Prometheus writes a duration: 90 -> 90s, 300 -> 5m."""
    return f"{seconds // 60}m" if seconds % 60 == 0 and seconds else f"{seconds}s"


def parse_duration(text: str | int) -> int:
    """Whole seconds of a duration as Prometheus writes it: 90s, 5m, 1h30m, 0.

    Raises:
        ValueError: anything else, also milliseconds, which no alert of this project needs.
    """
    units = {"w": 604800, "d": 86400, "h": 3600, "m": 60, "s": 1}
    match = re.fullmatch("".join(rf"(?:(\d+){unit})?" for unit in units), str(text))
    if str(text) == "0":
        return 0
    if not match or not any(match.groups()):
        raise ValueError(f"{text!r} is no duration such as 90s, 5m or 1h30m")
    return sum(int(number or 0) * size for number, size in zip(match.groups(), units.values(), strict=True))


def parse_times(text: str) -> dict[str, int]:
    """`NAME=DURATION` or `NAME/SEVERITY=DURATION`, as `--for` takes it.

    Raises:
        ValueError: not of that form.
    """
    alert, equals, time = text.partition("=")
    if not equals:
        raise ValueError(f"{text!r} is not of the form ALERT[/SEVERITY]=DURATION")
    return {alert: parse_duration(time)}


def _option(default: Any, documentation: str, parse: Callable[[str], Any] = str, metavar: str = "TEXT") -> Any:
    return field(default=default, metadata={"help": documentation, "parse": parse, "metavar": metavar})


def _times(kind: str, documentation: str) -> Any:
    return field(
        default_factory=dict,
        metadata={"help": documentation, "parse": parse_times, "metavar": "ALERT[/SEVERITY]=DURATION", "flag": kind},
    )


@dataclass(frozen=True)
class MixinConfig:
    """Addresses, names, thresholds and times that the generated files carry.

    `hold` and `keep` hold only what differs from `TIMINGS`: seconds by `ALERT` or `ALERT/SEVERITY`.

    Raises:
        ValueError: a value out of its range, or times that contradict each other; the message names
            the option.
    """

    job: str = _option("ppo", "name of the scrape job in Prometheus")
    prometheus_url: str = _option("http://127.0.0.1:9090", "Prometheus, as Grafana's server reaches it", metavar="URL")
    alertmanager_url: str = _option(
        "http://127.0.0.1:9093", "Alertmanager, as Grafana's server reaches it", metavar="URL"
    )
    grafana_url: str = _option("http://127.0.0.1:3000", "Grafana, as people open it from a notification", metavar="URL")
    pager_webhook_url: str = _option(
        "http://127.0.0.1:9843/", "where Alertmanager sends critical alerts", metavar="URL"
    )
    team_webhook_url: str = _option("http://127.0.0.1:9843/", "where Alertmanager sends all others", metavar="URL")
    dashboards_path: str = _option(
        "$PPO_DASHBOARDS_PATH",
        "folder of the dashboards on Grafana's server; by default Grafana reads it from that environment variable",
        metavar="DIR",
    )
    runbook_base_url: str = _option(
        "docs/runbooks", "where the runbooks are published; by default their folder in this repository", metavar="URL"
    )
    warning_threshold: float = _option(
        WARNING_THRESHOLD,
        f"gradient CV from which a run is in warning; one of {', '.join(map(str, CV_BUCKET_BOUNDS))}",
        float,
        "CV",
    )
    critical_threshold: float = _option(
        CRITICAL_THRESHOLD,
        "gradient CV from which a run is critical; one of the same. With thresholds other than the exporter's own, "
        "gradient steps are told apart by histogram buckets, whose bounds are inclusive: a step exactly at a "
        "threshold then still counts for the level below",
        float,
        "CV",
    )
    critical_step_share: float = _option(0.1, "part of the gradient steps of 10 minutes", float, "SHARE")
    skipped_step_share: float = _option(0.5, "skipped part of the gradient steps of 5 minutes", float, "SHARE")
    starved_part: float = _option(0.1, "below this part of an equal part a head is starved", float, "SHARE")
    stalled_seconds: int = field(
        default=STALLED_SECONDS,
        metadata={
            "help": "time without an update after which a run is stalled",
            "parse": parse_duration,
            "metavar": "DURATION",
            "flag": "--stalled-after",
        },
    )
    hold: Mapping[str, int] = _times("--for", "for how long an alert's condition must be met; repeatable")
    keep: Mapping[str, int] = _times("--keep-firing-for", "for how long an alert stays afterwards; repeatable")

    def __post_init__(self) -> None:
        for option in fields(self):
            if option.type is str and not getattr(self, option.name):
                raise ValueError(f"{flag(option)} must not be empty")
        for name in ("prometheus_url", "alertmanager_url", "grafana_url", "pager_webhook_url", "team_webhook_url"):
            address = getattr(self, name)
            # Grafana reads environment variables.
            if "$" not in address and not re.match(r"https?://[^/\s]", address):
                raise ValueError(f"--{name.replace('_', '-')} {address} is no address such as http://127.0.0.1:9090")
        self._check_thresholds()
        for name, most in (("critical_step_share", 1.0), ("skipped_step_share", 1.0), ("starved_part", 0.9)):
            if not 0 < getattr(self, name) <= most:
                raise ValueError(f"--{name.replace('_', '-')} must be above 0 and at most {most}")
        if self.stalled_seconds < 30:
            raise ValueError("--stalled-after must be at least 30s: a scrape may take that long to see an update")
        self._check_times()

    def _check_thresholds(self) -> None:
        for name in ("warning_threshold", "critical_threshold"):
            if getattr(self, name) not in CV_BUCKET_BOUNDS:
                bounds = ", ".join(map(str, CV_BUCKET_BOUNDS))
                raise ValueError(
                    f"--{name.replace('_', '-')} {getattr(self, name)} is no bound of a histogram bucket: {bounds}"
                )
        if not self.warning_threshold < self.critical_threshold:
            raise ValueError("--warning-threshold must be below --critical-threshold")

    def _check_times(self) -> None:
        for option, times in (("--for", self.hold), ("--keep-firing-for", self.keep)):
            for name, seconds in times.items():
                if not any(name in (key.name, str(key)) for key in TIMINGS):
                    raise ValueError(f"{option} {name}: no such alert; there are {', '.join(map(str, TIMINGS))}")
                if not isinstance(seconds, int) or seconds < 0:
                    raise ValueError(f"{option} {name}: {seconds!r} is no time in whole seconds")
        # Where both evaluators run, Prometheus lets go last, so that Alertmanager's inhibition covers the
        # Grafana-managed alert to its end.
        shortest = GRAFANA_INTERVAL + GRAFANA_GROUP_INTERVAL
        for key in TIMINGS:
            if self.timing(key).keep <= shortest:
                raise ValueError(
                    f"--keep-firing-for {key} must be above {duration(shortest)}: Grafana's equal alert resolves that "
                    "much later, and would notify a second time"
                )
        if self.timing(NONFINITE).hold > 300:
            raise ValueError(f"--for {NONFINITE} must be at most 5m: a single NaN is seen for 10 minutes only")
        if self.timing(CRITICAL_STEPS).hold < self.timing(CV_CRITICAL).hold:
            raise ValueError(
                f"--for {CRITICAL_STEPS} must not be below that of {CV_CRITICAL}: one long rise would notify twice"
            )
        # Outliving its critical alert, the warning would no longer be inhibited and notify after everything is well.
        if self.timing(CV_WARNING).keep >= self.timing(CV_CRITICAL).keep:
            raise ValueError(f"--keep-firing-for {CV_WARNING} must be below that of {CV_CRITICAL}")
        if self.timing(STALLED).keep <= self.stalled_seconds:
            raise ValueError(
                f"--keep-firing-for {STALLED} must be above --stalled-after ({duration(self.stalled_seconds)}): a run "
                "whose every update takes too long would notify once an update"
            )

    @property
    def uses_exporter_levels(self) -> bool:
        """Whether the thresholds are those by which the exporter sets the label `health`."""
        return (self.warning_threshold, self.critical_threshold) == (WARNING_THRESHOLD, CRITICAL_THRESHOLD)

    def timing(self, key: AlertKey) -> Timing:
        """Times of one alert; what is said of `name/severity` wins over what is said of `name`."""
        defaults = TIMINGS[key]
        if key == STALLED:
            defaults = defaults._replace(keep=self.stalled_seconds + 60)
        hold, keep = (
            next((times[name] for name in (str(key), key.name) if name in times), default)
            for times, default in zip((self.hold, self.keep), defaults, strict=True)
        )
        return Timing(hold, keep)

    def runbook_url(self, alert: str) -> str:
        """Address of the page about `alert`."""
        return f"{self.runbook_base_url.rstrip('/')}/{alert}.md"


def flag(option: Any) -> str:
    """The command line option of a field of `MixinConfig`."""
    return option.metadata.get("flag", f"--{option.name.replace('_', '-')}")
