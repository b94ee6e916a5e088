"""Grafana dashboards, built with Grafana's own SDK: one for a run, one for the fleet."""

from mixin.config import CRITICAL, WARNING, MixinConfig
from mixin.dashboards.fleet import fleet_dashboard
from mixin.dashboards.panels import FLEET_DASHBOARD_UID, RUN_DASHBOARD_UID
from mixin.dashboards.run import CV_PANEL_ID, run_dashboard

__all__ = ["CV_PANEL_ID", "DASHBOARD_UID", "EMPTY_IN_HEALTH", "FLEET_DASHBOARD_UID", "dashboards"]

DASHBOARD_UID = RUN_DASHBOARD_UID
"""Where links from alerts lead."""

EMPTY_IN_HEALTH = {
    "Firing alerts": "no alert fires",
    f"Alerts: {CRITICAL}": "no alert fires",
    f"Alerts: {WARNING}": "no alert fires",
    "Down or stalled": "every run is up and makes updates",
}
"""Panels and annotations, by title, whose queries have no result when all is well, and why."""


def dashboards(config: MixinConfig) -> list[dict]:
    """Every dashboard as the JSON that Grafana imports."""
    return [run_dashboard(config), fleet_dashboard(config)]
