"""Pieces of PromQL that rules and dashboards share."""

from exporter.health import CRITICAL_THRESHOLD, WARNING_THRESHOLD
from exporter.metrics import GRADIENT_CV, HEALTH_LABEL, RUN_LABEL, MetricFamily

IDENTITY = f"job, instance, {RUN_LABEL}"
"""The labels that tell one run from another, as PromQL writes them in by, on and ignoring."""


def quoted(text: str) -> str:
    """`text` as a PromQL string."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def select(family: MetricFamily, matchers: str, suffix: str = "") -> str:
    """The series of `family` that match; `suffix` is _bucket, _sum or _count of a histogram."""
    return f"{family.name}{suffix}{{{matchers}}}"


def gradient_cv(matchers: str) -> str:
    """The CV without its level: a level change must not look like another series."""
    return f"max without ({HEALTH_LABEL}) ({select(GRADIENT_CV, matchers)})"


def level_index(matchers: str) -> str:
    """0 healthy, 1 warning, 2 critical."""
    cv = gradient_cv(matchers)
    return f"({cv} >= bool {WARNING_THRESHOLD}) + ({cv} >= bool {CRITICAL_THRESHOLD})"


def per_run(aggregation: str, expression: str) -> str:
    """`expression` aggregated over everything but the run's identity, for instance over its heads."""
    return f"{aggregation} by ({IDENTITY}) ({expression})"
