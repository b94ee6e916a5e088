"""Health levels of the gradient CV, the two thresholds between them, and the time after which a run is stalled.

This is the only place where these numbers stand. Alert rules, dashboards and
documents that carry them are generated from here or checked against it.
"""

from enum import StrEnum

WARNING_THRESHOLD = 0.5
CRITICAL_THRESHOLD = 2.0
STALLED_SECONDS = 300
"""A run without an update for longer is stalled: not ready, and an alert."""


class HealthLevel(StrEnum):
    """Level of a gradient CV; the value is the `health` label on `/metrics`."""

    HEALTHY = "healthy"
    WARNING = "warning"
    CRITICAL = "critical"

    @classmethod
    def of(cls, cv: float) -> "HealthLevel":
        """Level of `cv` (dimensionless, >= 0): half-open bounds, exact at 0.5 and 2.0.

        NaN is critical: what cannot be compared must never look healthy.
        """
        if cv < WARNING_THRESHOLD:
            return cls.HEALTHY
        if cv < CRITICAL_THRESHOLD:
            return cls.WARNING
        return cls.CRITICAL

    @property
    def word(self) -> str:
        """What an operator reads: stable, warn or BAD."""
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


def cv_text(cv: float) -> str:
    """`CV:0.312 stable`: the CV with three decimals and its level's word.

    The level is that of the exact value, so 1.9996 reads `CV:2.000 warn`.
    """
    return f"CV:{cv:.3f} {HealthLevel.of(cv).word}"
