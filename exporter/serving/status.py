"""The status page: all runs on one self-contained page, rendered here, for people without Grafana.

A script in the page loads it again and shows changes.
"""

import math
import statistics
import time
from base64 import b64encode
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from typing import Any

from prometheus_client.utils import floatToGoString

from exporter.gradient_cv import unreachable_critical_warning
from exporter.health import STALLED_INTERVALS, STALLED_SECONDS, HealthLevel, Thresholds, cv_text
from exporter.metrics import GRADIENT_LEVEL_SINCE, LAST_UPDATE_TIMESTAMP, METRIC_FAMILIES, MetricFamily
from exporter.serving.state import State
from exporter.snapshot import HISTORY_UPDATES, GradientQuality, RunSnapshot

RELOAD_SECONDS = 5
"""Without JavaScript, the browser reloads the page at this interval."""
_SIGNALS = [
    family
    for family in METRIC_FAMILIES
    if family.is_per_run
    and family.kind in ("gauge", "counter")
    and not family.labels
    and family not in (LAST_UPDATE_TIMESTAMP, GRADIENT_LEVEL_SINCE)  # these are shown as times
]


class StatusPage:
    """The page about the runs of `state`, with a policy that allows only its own style and script."""

    def __init__(self, state: State) -> None:
        self._state = state

    def answer(self) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body for the current runs."""
        runs = list(self._state.snapshot.runs.values())
        states = {run.run: _Headline.of(run, time.time()) for run in runs}
        worst = max(runs, key=lambda run: states[run.run].urgency, default=None)
        counts = Counter((state.word, state.color) for state in states.values())
        body = self._template.render(
            runs=runs,
            states=states,
            counts=[(count, word, color) for (word, color), count in counts.items()],
            icon=states[worst.run].color if worst else _DIM,
            title=f"{states[worst.run].text} · {worst.run}" if worst else "PPO gradient health",
            charts={
                run.run: _Chart(run.recent_gradient_cvs, run.updates, run.gradient_quality.thresholds) for run in runs
            },
        )
        return 200, self._headers, body.encode()

    @cached_property
    def _sources(self) -> dict[str, str]:
        return {kind: Path(__file__).with_name(f"status.{kind}").read_text() for kind in ("html", "css", "js")}

    @cached_property
    def _headers(self) -> dict[str, str]:
        css, js = (
            "sha256-" + b64encode(sha256(self._sources[kind].encode()).digest()).decode() for kind in ("css", "js")
        )
        policy = f"default-src 'none'; style-src '{css}'; script-src '{js}'; connect-src 'self'; img-src data:"
        return {
            "Content-Type": "text/html; charset=utf-8",
            "Content-Security-Policy": f"{policy}; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cache-Control": "no-store",
            "Vary": "Accept-Encoding",
        }

    @cached_property
    def _template(self) -> Any:
        from jinja2 import Environment, StrictUndefined  # import it only when somebody opens the page
        from markupsafe import Markup

        environment = Environment(autoescape=True, undefined=StrictUndefined)
        environment.globals.update(
            css=Markup(self._sources["css"]),
            js=Markup(self._sources["js"]),
            exact=floatToGoString,
            short=_short,
            iso=_iso,
            cv_text=cv_text,
            heads=_heads,
            unreachable=_unreachable,
            signals=_signals,
            families=METRIC_FAMILIES,
            default_lower_bounds=Thresholds().lower_bounds.items(),
            stalled_seconds=STALLED_SECONDS,
            stalled_intervals=STALLED_INTERVALS,
            reload_seconds=RELOAD_SECONDS,
        )
        return environment.from_string(self._sources["html"])


_DIM = "dim"
_UNKNOWN = "without an update"


@dataclass(frozen=True)
class _Headline:
    """The headline of a run.

    Attributes:
        text: the full text.
        word: the text where space is short.
        color: a class of the style sheet.
        urgency: larger means more urgent.
    """

    text: str
    word: str
    color: str
    urgency: tuple[int, float]

    @classmethod
    def of(cls, run: RunSnapshot, now: float) -> "_Headline":
        quality = run.gradient_quality
        # A non-finite gradient or a lack of measured steps may be known before the first update.
        if run.last_update_timestamp_seconds is None and math.isfinite(quality.gradient_cv):
            text = "No update since the resume" if run.resumes else "No update yet"
            return cls(text, _UNKNOWN, _DIM, (0, 0.0))
        if now - (run.last_update_timestamp_seconds or now) > run.stalled_after_seconds:
            return cls("stalled", "stalled", "red", (3, quality.gradient_cv))
        rank = {HealthLevel.HEALTHY: 1, HealthLevel.WARNING: 2, HealthLevel.CRITICAL: 4}[quality.health]
        text = cv_text(quality.gradient_cv, quality.thresholds)
        return cls(text, quality.health.word, quality.health.color, (rank, quality.gradient_cv))

    @property
    def is_unknown(self) -> bool:
        """Whether the run has no level yet."""
        return self.word == _UNKNOWN

    @property
    def is_news(self) -> bool:
        """Whether the run's values are current."""
        return self.word in {level.word for level in HealthLevel}


@dataclass(frozen=True)
class _Chart:
    """The CVs of the last updates, the newest at the right edge, as paths in a box of `width` x `height`.

    Args:
        cvs: CVs, oldest first; a non-finite CV is not on the line, but a vertical line.
        updates: number of the last update.
        thresholds: thresholds of the run.
    """

    cvs: Sequence[float]
    updates: int
    thresholds: Thresholds
    width = HISTORY_UPDATES - 1
    height = 1000

    @cached_property
    def _finite(self) -> list[float]:
        return [cv for cv in self.cvs if math.isfinite(cv)]

    @cached_property
    def _top(self) -> float:
        return max(1.25 * self.thresholds.critical, 1.05 * max(self._finite, default=0.0))

    def _y(self, cv: float) -> int:
        return round(self.height * (1 - cv / self._top))

    @property
    def _points(self) -> Iterator[tuple[int, float]]:
        return enumerate(self.cvs, HISTORY_UPDATES - len(self.cvs))

    @property
    def line(self) -> str:
        parts, is_down = [], False
        for x, cv in self._points:
            if math.isfinite(cv):
                # An update without a finite neighbor is a line of length zero, drawn as a dot.
                parts.append(f"L{x} {self._y(cv)}" if is_down else f"M{x} {self._y(cv)}h0")
            is_down = math.isfinite(cv)
        return "".join(parts)

    @property
    def nonfinite(self) -> str:
        return "".join(f"M{x} 0V{self.height}" for x, cv in self._points if not math.isfinite(cv))

    @property
    def threshold_lines(self) -> list[tuple[HealthLevel, float, str]]:
        """(level, threshold, distance from the top) of each threshold."""
        bounds = self.thresholds.lower_bounds.items()
        return [(level, cv, f"{self._y(cv) / self.height:.1%}") for level, cv in bounds if cv]

    @property
    def stops(self) -> list[tuple[HealthLevel, float]]:
        """Where the line changes its color, from top to bottom."""
        bounds = self.thresholds.lower_bounds
        edges = [0.0, *(self._y(cv) / self.height for cv in reversed(bounds.values()))]
        return [(level, edge) for level, band in zip(reversed(bounds), pairwise(edges), strict=True) for edge in band]

    @property
    def summary(self) -> str:
        if not self.cvs:
            return "none yet"
        nonfinite = len(self.cvs) - len(self._finite)
        parts = [f"{nonfinite} not finite"] if nonfinite else []
        if self._finite:
            low, middle, high = min(self._finite), statistics.median(self._finite), max(self._finite)
            parts = [f"lowest {low:.3f}", f"median {middle:.3f}", f"highest {high:.3f}", *parts]
        return ", ".join(parts)

    @property
    def caption(self) -> str:
        first = self.updates - len(self.cvs) + 1
        return f"Gradient CV, updates {first:,} to {self.updates:,}: {self.summary}" if self.cvs else "No update yet"


def _signals(run: RunSnapshot) -> list[tuple[MetricFamily, float]]:
    """The known metrics with one number per run, as on `/metrics`."""
    return [(family, value) for family in _SIGNALS for _, value in family.samples(run)]


def _unreachable(quality: GradientQuality) -> str | None:
    """The warning about thresholds that the CV cannot reach, once heads are known."""
    heads = len(_heads(quality))
    return unreachable_critical_warning(heads, quality.thresholds) if heads else None


def _heads(quality: GradientQuality) -> list[str]:
    """All heads in the order of registration, including those without a gradient."""
    return list({**quality.nonfinite_steps, **quality.head_norms})


def _short(value: float) -> str:
    """Four digits of a measurement, all digits of a count."""
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:#.4g}".removesuffix(".") if math.isfinite(value) else floatToGoString(value)


def _iso(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
