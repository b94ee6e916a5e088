"""The state of every run at one moment: frozen, replaced as a whole, safe to read from any thread."""

import builtins
import math
from bisect import bisect_left
from collections import abc
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, is_dataclass, replace
from functools import cache
from itertools import accumulate
from types import MappingProxyType, NoneType
from typing import Any, get_args, get_origin, get_type_hints

from exporter.gradient_cv import gradient_cv_ceiling
from exporter.health import (
    CRITICAL_THRESHOLD,
    STALLED_INTERVALS,
    STALLED_SECONDS,
    WARNING_THRESHOLD,
    HealthLevel,
    Thresholds,
)
from exporter.telemetry import HEAD_SIGNALS

CV_BUCKET_BOUNDS = (
    *(0.1, 0.2, 0.3, 0.4),
    WARNING_THRESHOLD,
    *(0.6, 0.8, 1.0, 1.25, 1.5, 1.75),
    CRITICAL_THRESHOLD,
    *(2.25, 2.5, 3.0, 5.0),
)
DURATION_BUCKET_BOUNDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
HISTORY_UPDATES = 300
"""Number of updates of a run whose CV is kept: about 10 KiB."""


@dataclass(frozen=True)
class Histogram:
    """Counts of observations by upper bound (inclusive, the last one unbounded), and their sum `total`.

    Non-finite observations are in neither: one +Inf in the sum would make every
    later mean useless, and only in the counts it would make the mean wrong.
    """

    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    total: float = 0.0

    def __post_init__(self) -> None:
        if len(self.counts) != len(self.bounds) + 1:
            raise ValueError(f"{len(self.bounds)} bounds need {len(self.bounds) + 1} counts, got {len(self.counts)}")

    @classmethod
    def empty(cls, bounds: tuple[float, ...]) -> "Histogram":
        return cls(bounds, (0,) * (len(bounds) + 1))

    def observe(self, values: Iterable[float]) -> "Histogram":
        """A new histogram with the finite ones of `values` added."""
        counts = list(self.counts)
        total = self.total
        for value in values:
            if math.isfinite(value):
                counts[bisect_left(self.bounds, value)] += 1
                total += value
        return Histogram(self.bounds, tuple(counts), total)

    def continuing(self, earlier: "Histogram") -> "Histogram":
        """`earlier`, or this one if the bounds differ: counts of other buckets cannot be used."""
        return earlier if earlier.bounds == self.bounds else self

    def cumulative(self) -> list[tuple[float, int]]:
        """(upper bound, observations at or below it) for every bucket, ending with +Inf."""
        return list(zip((*self.bounds, math.inf), accumulate(self.counts), strict=True))


@dataclass(frozen=True)
class GradientQuality:
    """Gradient health of a run: the last update's means and the run's totals."""

    gradient_cv: float = 0.0
    thresholds: Thresholds = Thresholds()
    contributing_heads: int = 0
    gradient_norm: float | None = None
    head_norms: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))
    steps_by_level: Mapping[HealthLevel, int] = field(
        default_factory=lambda: MappingProxyType(dict.fromkeys(HealthLevel, 0))
    )
    cv_per_step: Histogram = Histogram.empty(CV_BUCKET_BOUNDS)
    nonfinite_steps: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))
    skipped_steps: int = 0
    head_entropy_ratios: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))
    head_approx_kls: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))
    head_clip_fractions: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))
    head_update_ratios: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))

    @property
    def health(self) -> HealthLevel:
        return self.thresholds.level(self.gradient_cv)

    @property
    def ceiling(self) -> float:
        """Largest CV that the contributing heads could reach."""
        return gradient_cv_ceiling(self.contributing_heads)

    @property
    def head_shares(self) -> dict[str, float]:
        """Each head's part of the sum of norms, 0 to 1; all 0.0 when every norm is zero.

        Heads with a non-finite norm divide the whole between them: that is the limit
        as their norms grow. So they dominate, and no share is NaN.
        """
        nonfinite = [head for head, norm in self.head_norms.items() if not math.isfinite(norm)]
        if nonfinite:
            return {head: (head in nonfinite) / len(nonfinite) for head in self.head_norms}
        # The sum of very large norms could overflow; the sum of n norms divided by n cannot.
        parts = 1 if max(self.head_norms.values(), default=0.0) < 1e300 else len(self.head_norms)
        norms = {head: norm / parts for head, norm in self.head_norms.items()}
        total = math.fsum(norms.values())
        return {head: norm / total if total else 0.0 for head, norm in norms.items()}


@dataclass(frozen=True)
class RunSnapshot:
    """One run.

    Attributes:
        recent_gradient_cvs: CVs of the last `HISTORY_UPDATES` updates, oldest first.
        signals: the known training signals.
        other_signals: signals with the trainer's own names.
        last_update_timestamp_seconds: Unix time; None before the first update of this process.
        level_since_timestamp_seconds: Unix time of the update with which the level began; None as above.
        update_interval_seconds: recent maximum of the time between the ends of two updates; None before the second
            update of this process.
    """

    run: str
    info: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    gradient_quality: GradientQuality = GradientQuality()
    recent_gradient_cvs: tuple[float, ...] = ()
    updates: int = 0
    environment_steps: int = 0
    episodes: int = 0
    signals: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))
    other_signals: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))
    update_duration_seconds: Histogram = Histogram.empty(DURATION_BUCKET_BOUNDS)
    rollout_duration_seconds: Histogram = Histogram.empty(DURATION_BUCKET_BOUNDS)
    rank_rollout_seconds: tuple[float, ...] = ()
    last_update_timestamp_seconds: float | None = None
    level_since_timestamp_seconds: float | None = None
    update_interval_seconds: float | None = None
    exporter_errors: int = 0
    resumes: int = 0

    @property
    def stalled_after_seconds(self) -> float:
        """Age of the last update from which the run is stalled: longer if its updates take minutes."""
        return max(STALLED_SECONDS, STALLED_INTERVALS * (self.update_interval_seconds or 0.0))

    def scalars(self) -> dict[str, float]:
        """The last update by names such as `gradient/cv`, `gradient/share/HEAD` and `policy_loss`, for loggers."""
        quality = self.gradient_quality
        return {
            "gradient/cv": quality.gradient_cv,
            **{f"gradient/share/{head}": share for head, share in quality.head_shares.items()},
            **{f"gradient/norm/{head}": norm for head, norm in quality.head_norms.items()},
            **self.signals,
            **self.other_signals,
        }

    def plain(self) -> dict[str, Any]:
        """The run as dicts, lists, numbers and strings, for `from_plain`, `resumed` and JSON."""
        return _plain(self)

    @classmethod
    def from_plain(cls, state: Mapping[str, Any]) -> "RunSnapshot":
        """The run of `plain()`; raises KeyError, TypeError or ValueError if `state` is something else."""
        return _from_plain(cls, state)

    def resumed(self, state: Mapping[str, Any]) -> "RunSnapshot":
        """This run, continued from `plain()` of an earlier process: all totals, the last values, and one more resume.

        The thresholds are those of this process. Times of updates are left out: they show whether this process trains.

        Raises:
            KeyError, TypeError, ValueError: `state` is something else, or of another version.
        """
        own = self.gradient_quality
        # Fields that an earlier version did not keep, and times, which belong to this process.
        times = dict.fromkeys(("level_since_timestamp_seconds", "update_interval_seconds"))
        no_signals: dict[str, dict[str, float]] = dict.fromkeys(HEAD_SIGNALS, {})
        gradient_quality = {**no_signals, **state["gradient_quality"], "thresholds": _plain(own.thresholds)}
        earlier = RunSnapshot.from_plain({"other_signals": {}, **state, **times, "gradient_quality": gradient_quality})
        quality = earlier.gradient_quality
        return replace(
            earlier,
            run=self.run,
            info=self.info,
            gradient_quality=replace(quality, cv_per_step=own.cv_per_step.continuing(quality.cv_per_step)),
            update_duration_seconds=self.update_duration_seconds.continuing(earlier.update_duration_seconds),
            rollout_duration_seconds=self.rollout_duration_seconds.continuing(earlier.rollout_duration_seconds),
            rank_rollout_seconds=self.rank_rollout_seconds,
            last_update_timestamp_seconds=None,
            resumes=earlier.resumes + 1,
        )


@dataclass(frozen=True)
class Snapshot:
    """Every run of this process, in order of registration."""

    runs: Mapping[str, RunSnapshot] = field(default_factory=lambda: MappingProxyType({}))

    def with_run(self, run: RunSnapshot) -> "Snapshot":
        """A snapshot with `run` added, or replacing the run of the same name."""
        return replace(self, runs=MappingProxyType({**self.runs, run.run: run}))

    def without_run(self, run: str) -> "Snapshot":
        """A snapshot without the run of that name."""
        return replace(self, runs=MappingProxyType({name: r for name, r in self.runs.items() if name != run}))

    def plain(self) -> dict[str, Any]:
        """All runs as dicts, lists, numbers and strings, for `from_plain` and JSON."""
        return {"runs": [run.plain() for run in self.runs.values()]}

    @classmethod
    def from_plain(cls, state: Mapping[str, Any]) -> "Snapshot":
        """The snapshot of `plain()`; raises KeyError, TypeError or ValueError if `state` is something else."""
        runs = map(RunSnapshot.from_plain, state["runs"])
        return cls(MappingProxyType({run.run: run for run in runs}))


def _plain(value: Any) -> Any:
    if isinstance(value, (RunSnapshot, GradientQuality, Histogram, Thresholds)):
        value = vars(value)
    if isinstance(value, (dict, MappingProxyType)):
        return {str(key): _plain(item) for key, item in value.items()}
    return list(value) if isinstance(value, tuple) else value


def _from_plain(kind: Any, value: Any) -> Any:
    """The inverse of `_plain`: a value of type `kind`."""
    arguments = get_args(kind)
    if isinstance(kind, type) and is_dataclass(kind):
        return kind(**{name: _from_plain(hint, value[name]) for name, hint in _hints(kind).items()})
    if NoneType in arguments:
        return None if value is None else _from_plain(arguments[0], value)
    match get_origin(kind) or kind:
        case builtins.tuple:
            return tuple(_from_plain(arguments[0], item) for item in value)
        case abc.Mapping if isinstance(value, Mapping):
            key_kind, item_kind = arguments
            return MappingProxyType({key_kind(key): _from_plain(item_kind, item) for key, item in value.items()})
        case builtins.float if type(value) is float or (type(value) is int and value.bit_length() < 1024):
            return float(value)
        case builtins.int if type(value) is int and value >= 0:  # all of them are counts
            return value
        case builtins.str if type(value) is str:
            return value
    raise TypeError(f"expected {kind}, got {value!r}")


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)
