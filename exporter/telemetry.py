"""The contract: the report of one PPO update, in plain validated numbers."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from numbers import Integral, Real
from types import MappingProxyType
from typing import Any, Protocol, TypedDict

from exporter.gradient_cv import gradient_cv

_LAST_TIMESTAMP = datetime.max.replace(tzinfo=UTC).timestamp()


@dataclass(frozen=True)
class GradientStep:
    """Norms of one gradient step, taken after backward and before clipping.

    Attributes:
        head_norms: L2 norm of every head that has a gradient; heads whose
            gradient is None are absent, a zero gradient is 0.0.
        global_norm: L2 norm over everything measured, including heads; it is
            finite only if theirs are.
    """

    head_norms: Mapping[str, float]
    global_norm: float

    @property
    def cv(self) -> float:
        """CV of the heads; +Inf if any gradient of the step is NaN or infinite.

        A NaN in the trunk or the value head leaves the heads' own norms finite,
        but the step is lost and must not count as healthy.
        """
        return gradient_cv(self.head_norms.values()) if math.isfinite(self.global_norm) else math.inf


class GradientMetrics(TypedDict):
    """Summary of the gradient steps of one update; keys are fields of `PPOUpdatePayload`."""

    gradient_cv: float
    gradient_cv_per_step: tuple[float, ...]
    contributing_heads: int
    head_gradient_norms: dict[str, float]
    nonfinite_gradient_steps: dict[str, int]
    gradient_norm: float | None


class PPOUpdateMetrics(GradientMetrics):
    """Result of `PPOAgent.update()`; keys are fields of `PPOUpdatePayload`."""

    skipped_gradient_steps: int
    policy_loss: float
    value_loss: float
    entropy: float
    approx_kl: float
    clip_fraction: float
    explained_variance: float
    learning_rate: float
    head_entropy_ratios: dict[str, float]
    head_approx_kls: dict[str, float]
    head_clip_fractions: dict[str, float]
    head_update_ratios: dict[str, float]
    update_duration_seconds: float


def summarize_gradient_steps(steps: Sequence[GradientStep]) -> GradientMetrics:
    """Means over the gradient steps of one update.

    A head's mean is over the steps in which its norm was finite; it is NaN or infinite
    only if no norm was finite.
    """
    norms_of: dict[str, list[float]] = {}
    for step in steps:
        for head, norm in step.head_norms.items():
            norms_of.setdefault(head, []).append(norm)
    return summary_of_steps(
        [step.cv for step in steps],
        [step.global_norm for step in steps],
        norms_of,
        max((len(step.head_norms) for step in steps), default=0),
    )


def summary_of_steps(
    cvs: Sequence[float], global_norms: Sequence[float], norms_of: Mapping[str, Sequence[float]], heads: int
) -> GradientMetrics:
    """`summarize_gradient_steps()` from columns.

    Args:
        cvs: CV of every step; +Inf if a gradient was not finite.
        global_norms: global norm of every step.
        norms_of: head -> its norms in the steps in which it had a gradient.
        heads: number of heads with a gradient, the maximum over the steps.
    """
    finite_of, nonfinite = norms_of, dict.fromkeys(norms_of, 0)
    if not all(map(math.isfinite, cvs)):
        finite_of = {head: list(filter(math.isfinite, norms)) for head, norms in norms_of.items()}
        nonfinite = {head: len(norms) - len(finite_of[head]) for head, norms in norms_of.items()}
    return GradientMetrics(
        gradient_cv=_mean(cvs) if cvs else 0.0,
        gradient_cv_per_step=tuple(cvs),
        contributing_heads=heads,
        # One NaN would hide the norms of all other steps; the CV and the counter show it.
        head_gradient_norms={head: _mean(finite_of[head] or norms) for head, norms in norms_of.items()},
        nonfinite_gradient_steps=nonfinite,
        gradient_norm=_mean(global_norms) if global_norms else None,
    )


def _mean(values: Sequence[float]) -> float:
    mean = sum(values) / len(values)
    # The sum can overflow even if the mean does not.
    return mean if math.isfinite(mean) else sum(value / len(values) for value in values)


@dataclass(frozen=True, kw_only=True)
class PPOUpdatePayload:
    """One PPO update of one run. Counts are increments since the previous update.

    Numbers may be NumPy scalars; they are stored as plain `float` and `int`, because snapshots become JSON.

    Attributes:
        run: name of the run, the `run` label on `/metrics`.
        gradient_cv: mean CV over the update's gradient steps, >= 0; +Inf if one
            of them had a non-finite gradient; 0.0 without gradient steps.
        gradient_cv_per_step: CV of each gradient step, in order.
        contributing_heads: number of heads with a gradient (the maximum over the steps).
        head_gradient_norms: mean L2 norm per head that had a gradient; NaN or +Inf if it was never finite.
        nonfinite_gradient_steps: per head, number of steps in which its norm was NaN or infinite.
        head_entropy_ratios: per head, mean entropy divided by the logarithm of its number of choices, 0 to 1 or NaN;
            only for discrete heads.
        head_approx_kls: per head, approximate KL divergence between the policies before and during the update, in nats.
        head_clip_fractions: per head, fraction of samples for which the ratio of the head's own probabilities was
            outside the clip range, 0 to 1 or NaN.
        head_update_ratios: per head, L2 norm of the update's change of its weights, divided by their norm before it.
        gradient_norm: mean global L2 norm before clipping; None without gradient steps.
        skipped_gradient_steps: steps that did not change the weights because a gradient was not finite.
        environment_steps: environment steps collected for this update.
        episodes: episodes that ended during this collection.
        policy_loss ... episode_length_mean: training signals, None where not known (yet).
        update_duration_seconds: wall time of the update, >= 0.
        rollout_duration_seconds: wall time of collecting its experience, >= 0.
        rank_rollout_seconds: that time for every process that trains the run, in the order of the ranks.
        signals: additional training signals, by the trainer's own names.
        timestamp_seconds: Unix time at which the update ended.

    Raises:
        TypeError: a field has the wrong type.
        ValueError: a field is out of range, or too large for a float; the message names it.
    """

    run: str
    gradient_cv: float = 0.0
    gradient_cv_per_step: tuple[float, ...] = ()
    contributing_heads: int = 0
    head_gradient_norms: Mapping[str, float] = field(default_factory=dict)
    nonfinite_gradient_steps: Mapping[str, int] = field(default_factory=dict)
    head_entropy_ratios: Mapping[str, float] = field(default_factory=dict)
    head_approx_kls: Mapping[str, float] = field(default_factory=dict)
    head_clip_fractions: Mapping[str, float] = field(default_factory=dict)
    head_update_ratios: Mapping[str, float] = field(default_factory=dict)
    gradient_norm: float | None = None
    skipped_gradient_steps: int = 0
    environment_steps: int = 0
    episodes: int = 0
    policy_loss: float | None = None
    value_loss: float | None = None
    entropy: float | None = None
    approx_kl: float | None = None
    clip_fraction: float | None = None
    explained_variance: float | None = None
    learning_rate: float | None = None
    episode_return_mean: float | None = None
    episode_length_mean: float | None = None
    update_duration_seconds: float | None = None
    rollout_duration_seconds: float | None = None
    rank_rollout_seconds: tuple[float, ...] = ()
    signals: Mapping[str, float] = field(default_factory=dict)
    timestamp_seconds: float = field(default_factory=time.time)

    def __post_init__(self) -> None:
        require_label_value("run", self.run)
        # Plain copies, so that validated values cannot change later.
        plain: dict[str, object] = {
            "gradient_cv": _require_cv("gradient_cv", self.gradient_cv),
            "gradient_cv_per_step": tuple(_require_cv("gradient_cv_per_step", cv) for cv in self.gradient_cv_per_step),
            "head_gradient_norms": _require_named("head_gradient_norms", self.head_gradient_norms, _require_norm),
            "nonfinite_gradient_steps": _require_named(
                "nonfinite_gradient_steps", self.nonfinite_gradient_steps, _require_count
            ),
            **{
                name: _require_named(name, getattr(self, name), require)
                for name, require in zip(
                    HEAD_SIGNALS, (_require_fraction, _require_number, _require_fraction, _require_norm), strict=True
                )
            },
            "signals": _require_named("signals", self.signals, _require_number),
            "rank_rollout_seconds": tuple(
                _require_seconds("rank_rollout_seconds", seconds) for seconds in self.rank_rollout_seconds
            ),
            "timestamp_seconds": require_timestamp("timestamp_seconds", self.timestamp_seconds),
        }
        for name in ("contributing_heads", "skipped_gradient_steps", "environment_steps", "episodes"):
            plain[name] = _require_count(name, getattr(self, name))
        for name in TRAINING_SIGNALS + ("gradient_norm",):
            if getattr(self, name) is not None:
                plain[name] = _require_number(name, getattr(self, name))
        for name in ("update_duration_seconds", "rollout_duration_seconds"):
            if getattr(self, name) is not None:
                plain[name] = _require_seconds(name, getattr(self, name))
        for name, value in plain.items():
            object.__setattr__(self, name, value)
        if self.skipped_gradient_steps > len(self.gradient_cv_per_step):
            raise ValueError(
                f"skipped_gradient_steps is {self.skipped_gradient_steps}, "
                f"but the update had {len(self.gradient_cv_per_step)} gradient steps"
            )


HEAD_SIGNALS = ("head_entropy_ratios", "head_approx_kls", "head_clip_fractions", "head_update_ratios")
"""Fields of `PPOUpdatePayload` with a number per head, exported as one gauge each."""

TRAINING_SIGNALS = (
    "policy_loss",
    "value_loss",
    "entropy",
    "approx_kl",
    "clip_fraction",
    "explained_variance",
    "learning_rate",
    "episode_return_mean",
    "episode_length_mean",
)
"""Fields of `PPOUpdatePayload` that are exported as one gauge each, and left out if None."""


def require_label_value(name: str, value: object) -> None:
    """Check that `value` can be a label value: one that cannot be rendered would fail every scrape, also of other runs.

    Raises:
        TypeError: it is not a string.
        ValueError: it is empty, or cannot be encoded as UTF-8.
    """
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a string, got {value!r}")
    if not value:
        raise ValueError(f"{name} must not be empty")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{name} must be encodable as UTF-8, got {value!r}") from None


def require_timestamp(name: str, value: object) -> float:
    """`value`, a Unix time in seconds, as a plain float.

    Raises:
        TypeError: it is not a number.
        ValueError: it is negative, not finite, or after the year 9999, as a time in milliseconds would be.
    """
    seconds = _require_seconds(name, value)
    if seconds > _LAST_TIMESTAMP:
        raise ValueError(f"{name} must be Unix time in seconds, got {value!r}")
    return seconds


def _require_number(name: str, value: object) -> float:
    if type(value) is float:
        return value
    if isinstance(value, bool) or not isinstance(value, Real):  # NumPy's scalars are Real
        raise TypeError(f"{name} must be a number, got {value!r}")
    return _as_float(name, value)


def _as_float(name: str, value: Real) -> float:
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name} is too large for a float") from None


def _require_seconds(name: str, value: object) -> float:
    seconds = _require_number(name, value)
    if not (math.isfinite(seconds) and seconds >= 0):
        raise ValueError(f"{name} must be finite and >= 0, got {value!r}")
    return seconds


def _require_count(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be a whole number, got {value!r}")
    _as_float(name, value)  # a sample is a float
    if value < 0:
        raise ValueError(f"{name} must be >= 0, got {value!r}")
    return int(value)


def _require_cv(name: str, value: object) -> float:
    cv = _require_number(name, value)
    if not cv >= 0:  # NaN fails too
        raise ValueError(f"{name} must be >= 0 (+Inf for a non-finite gradient), got {value!r}")
    return cv


def _require_norm(name: str, value: object) -> float:
    norm = _require_number(name, value)
    if norm < 0:
        raise ValueError(f"{name} must be >= 0, got {value!r}")
    return norm


def _require_fraction(name: str, value: object) -> float:
    fraction = _require_number(name, value)
    if fraction < 0 or fraction > 1:
        raise ValueError(f"{name} must be from 0 to 1, got {value!r}")
    return fraction


def _require_named(
    name: str, values: Mapping[str, object], require: Callable[[str, object], float]
) -> Mapping[str, float]:
    for key in values:
        require_label_value(f"a {'name' if name == 'signals' else 'head'} of {name}", key)
    return MappingProxyType({key: require(f"{name}[{key!r}]", value) for key, value in values.items()})


class PPOUpdateHandler(Protocol):
    """Takes updates; in this package that is `exporter.aggregator.RunAggregator`."""

    def handle_ppo_update(self, payload: PPOUpdatePayload) -> None: ...


def emit_ppo_update(
    metrics: Mapping[str, Any], *, run: str, handler: PPOUpdateHandler, **progress: Any
) -> PPOUpdatePayload:
    """Pass one update to `handler` as a validated payload.

    Args:
        metrics: result of `PPOAgent.update()`, or any mapping of `PPOUpdatePayload` fields.
        run: name of the run.
        handler: takes the payload, usually a `RunAggregator`.
        **progress: payload fields that the update does not know,
            such as `environment_steps` or `episode_return_mean`.

    Raises:
        TypeError, ValueError: as `PPOUpdatePayload`.
    """
    payload = PPOUpdatePayload(run=run, **metrics, **progress)
    handler.handle_ppo_update(payload)
    return payload
