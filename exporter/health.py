"""Health levels of the gradient CV, the two thresholds between them, and the time after which a run is stalled.

A run may have its own thresholds; the two here are the defaults. Tests compare this file
with the thresholds and the limits of a stall in alerts/ppo.rules.yml, and with the
thresholds in the README's tables of levels and alerts. The run dashboard's queries use
the thresholds from here. Nothing checks these numbers in other documents.
"""

import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from enum import StrEnum
from numbers import Real

WARNING_THRESHOLD = 0.5
CRITICAL_THRESHOLD = 2.0
STALLED_SECONDS = 300
STALLED_INTERVALS = 5
"""For `/-/ready` and the status page a run is stalled after STALLED_SECONDS without an update, or after
STALLED_INTERVALS of its update intervals if that is longer. PPOTrainingStalled has these limits in steps, so it may
fire later."""


class HealthLevel(StrEnum):
    """Level of a gradient CV; the value is the `health` label on `/metrics`."""

    HEALTHY = "healthy"
    WARNING = "warning"
    CRITICAL = "critical"

    @property
    def word(self) -> str:
        """The word for operators: stable, warn or BAD."""
        return _WORDS[self]

    @property
    def color(self) -> str:
        """green, yellow or red; the same names in the terminal and in Grafana."""
        return _COLORS[self]


_WORDS = {
    HealthLevel.HEALTHY: "stable",
    HealthLevel.WARNING: "warn",
    HealthLevel.CRITICAL: "BAD",
}
_COLORS = {
    HealthLevel.HEALTHY: "green",
    HealthLevel.WARNING: "yellow",
    HealthLevel.CRITICAL: "red",
}


@dataclass(frozen=True)
class Thresholds:
    """The CVs from which a run's level is warning and critical (dimensionless, finite, 0 < warning < critical).

    Raises:
        TypeError: a threshold is not a number.
        ValueError: a threshold is out of its range.
    """

    warning: float = WARNING_THRESHOLD
    critical: float = CRITICAL_THRESHOLD

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, bool) or not isinstance(value, Real):
                raise TypeError(f"the {name} threshold must be a number, got {value!r}")
        if not 0 < self.warning < self.critical <= sys.float_info.max:  # NaN fails too
            raise ValueError(
                f"thresholds must be finite, and 0 < warning < critical, got warning {self.warning} and critical "
                f"{self.critical}"
            )
        for name, value in tuple(vars(self).items()):
            object.__setattr__(self, name, float(value))  # from a NumPy scalar, for example

    @classmethod
    def of(cls, thresholds: "Thresholds | Sequence[float]") -> "Thresholds":
        """`thresholds` unchanged, or made from a pair (warning, critical).

        Raises:
            TypeError: it is neither.
            ValueError: as `Thresholds`.
        """
        if isinstance(thresholds, cls):
            return thresholds
        if isinstance(thresholds, str) or not isinstance(thresholds, Sequence) or len(thresholds) != 2:
            raise TypeError(f"thresholds must be Thresholds(warning, critical) or such a pair, got {thresholds!r}")
        return cls(*thresholds)

    def level(self, cv: float) -> HealthLevel:
        """Level of `cv` (dimensionless, >= 0): half-open bounds, exact at the thresholds.

        NaN is critical: it must never look healthy.
        """
        if cv < self.warning:
            return HealthLevel.HEALTHY
        if cv < self.critical:
            return HealthLevel.WARNING
        return HealthLevel.CRITICAL

    def steps_by_level(self, cvs: Collection[float]) -> dict[HealthLevel, int]:
        """Number of `cvs` at each level."""
        healthy = sum(cv < self.warning for cv in cvs)
        below_critical = sum(cv < self.critical for cv in cvs)
        return {
            HealthLevel.HEALTHY: healthy,
            HealthLevel.WARNING: below_critical - healthy,
            HealthLevel.CRITICAL: len(cvs) - below_critical,
        }

    @property
    def lower_bounds(self) -> dict[HealthLevel, float]:
        """The smallest CV of each level, lowest level first."""
        return {HealthLevel.HEALTHY: 0.0, HealthLevel.WARNING: self.warning, HealthLevel.CRITICAL: self.critical}


def cv_text(cv: float, thresholds: Thresholds = Thresholds()) -> str:
    """`CV:0.312 stable`: the CV with three decimals and its level's word.

    The level is that of the exact value, so 1.9996 gives `CV:2.000 warn`.
    """
    return f"CV:{cv:.3f} {thresholds.level(cv).word}"
