"""Gradient health of PPO runs, measured per action head and exported to Prometheus.

Names that need torch are imported on first use. So a process that only reads
snapshots or serves `/metrics` never imports torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from exporter.gradient_cv import gradient_cv, gradient_cv_ceiling, unreachable_critical_warning
from exporter.health import CRITICAL_THRESHOLD, WARNING_THRESHOLD, HealthLevel, Thresholds, cv_text

if TYPE_CHECKING:
    from exporter.action_spaces import space_heads
    from exporter.aggregator import RunAggregator
    from exporter.child import WebConfigError
    from exporter.heads import HeadGradientMeter, Rows, heads_from, row_heads
    from exporter.link import MetricsServer
    from exporter.monitor import GradientMonitor
    from exporter.one_call import watch
    from exporter.telemetry import PPOUpdatePayload, emit_ppo_update

__all__ = [
    "CRITICAL_THRESHOLD",
    "WARNING_THRESHOLD",
    "GradientMonitor",
    "HeadGradientMeter",
    "HealthLevel",
    "MetricsServer",
    "PPOUpdatePayload",
    "Rows",
    "RunAggregator",
    "Thresholds",
    "WebConfigError",
    "cv_text",
    "emit_ppo_update",
    "gradient_cv",
    "gradient_cv_ceiling",
    "heads_from",
    "row_heads",
    "space_heads",
    "unreachable_critical_warning",
    "watch",
]

_IMPORTED_ON_FIRST_USE = {
    "GradientMonitor": "exporter.monitor",
    "HeadGradientMeter": "exporter.heads",
    "MetricsServer": "exporter.link",
    "PPOUpdatePayload": "exporter.telemetry",
    "Rows": "exporter.heads",
    "RunAggregator": "exporter.aggregator",
    "WebConfigError": "exporter.child",
    "emit_ppo_update": "exporter.telemetry",
    "heads_from": "exporter.heads",
    "row_heads": "exporter.heads",
    "space_heads": "exporter.action_spaces",
    "watch": "exporter.one_call",
}


if not TYPE_CHECKING:  # for which every name would be there

    def __getattr__(name: str) -> object:
        if name not in _IMPORTED_ON_FIRST_USE:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(_IMPORTED_ON_FIRST_USE[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
