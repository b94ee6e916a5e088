"""Grafana's file provisioning: data sources, dashboard provider, alert rules and where alerts go."""

from mixin.alerts import GRAFANA, Alert, alerts, grafana_template
from mixin.config import GRAFANA_EXTRA_HOLD, GRAFANA_GROUP_INTERVAL, GRAFANA_INTERVAL, MixinConfig, duration
from mixin.dashboards import CV_PANEL_ID, DASHBOARD_UID

PROMETHEUS_UID = "prometheus"
ALERTMANAGER_UID = "alertmanager"
CONTACT_POINT = "PPO Alertmanager"


def datasources(config: MixinConfig) -> dict:
    return {
        "apiVersion": 1,
        "datasources": [
            {
                "name": "Prometheus",
                "type": "prometheus",
                "uid": PROMETHEUS_UID,
                "access": "proxy",
                "url": config.prometheus_url,
                "isDefault": True,
                "jsonData": {"httpMethod": "POST", "timeInterval": "5s", "alertmanagerUid": ALERTMANAGER_UID},
            },
            {
                "name": "Alertmanager",
                "type": "alertmanager",
                "uid": ALERTMANAGER_UID,
                "access": "proxy",
                "url": config.alertmanager_url,
                # Grafana-managed alerts come through the contact point below: only ours, and only once.
                "jsonData": {"implementation": "prometheus", "handleGrafanaManagedAlerts": False},
            },
        ],
    }


def dashboard_provider(config: MixinConfig) -> dict:
    return {
        "apiVersion": 1,
        "providers": [
            {
                "name": "ppo",
                "orgId": 1,
                "folder": "PPO",
                "type": "file",
                "disableDeletion": True,
                "allowUiUpdates": False,
                "updateIntervalSeconds": 30,
                "options": {"path": config.dashboards_path},
            }
        ],
    }


def alerting(config: MixinConfig) -> dict:
    """Rule groups, contact point and notification policy.

    A folder per severity: the alerts carry the same name in both evaluators, and up to
    version 11 Grafana wants rule titles to be unique within a folder.
    """
    declared = alerts(config)
    return {
        "apiVersion": 1,
        "groups": [
            {
                "orgId": 1,
                "name": "ppo",
                "folder": f"PPO {severity}",
                "interval": duration(GRAFANA_INTERVAL),
                "rules": [_grafana_rule(alert, config) for alert in declared if alert.severity == severity],
            }
            for severity in dict.fromkeys(alert.severity for alert in declared)
        ],
        "contactPoints": [
            {
                "orgId": 1,
                "name": CONTACT_POINT,
                "receivers": [
                    {
                        "uid": "ppo-alertmanager",
                        "type": "prometheus-alertmanager",
                        "settings": {"url": config.alertmanager_url},
                        "disableResolveMessage": False,
                    }
                ],
            }
        ],
        "policies": [
            {
                "orgId": 1,
                "receiver": CONTACT_POINT,
                "group_by": ["alertname", "grafana_folder", "run"],
                # Alertmanager does the grouping that people see. It takes an alert that is not sent
                # again within its resolve_timeout (5m) for resolved, hence the short repetition.
                "group_wait": "1s",
                "group_interval": duration(GRAFANA_GROUP_INTERVAL),
                "repeat_interval": "1m",
            }
        ],
    }


def _grafana_rule(alert: Alert, config: MixinConfig) -> dict:
    def query(ref_id: str, datasource_uid: str, **model: object) -> dict:
        return {
            "refId": ref_id,
            "relativeTimeRange": {"from": 300, "to": 0},
            "datasourceUid": datasource_uid,
            "model": {"refId": ref_id, **model},
        }

    expression = {"type": "__expr__", "uid": "__expr__"}
    return {
        "uid": f"{alert.name.lower()}-{alert.severity}",
        "title": alert.name,
        "condition": "C",
        "data": [
            query("A", PROMETHEUS_UID, expr=alert.raw_value, instant=True, range=False),
            query("B", "__expr__", type="reduce", datasource=expression, expression="A", reducer="last"),
            query("C", "__expr__", type="math", datasource=expression, expression=f"$B {alert.condition}"),
        ],
        "dashboardUid": DASHBOARD_UID,
        "panelId": CV_PANEL_ID,
        # No run is no alert: PPOTrainerDown tells a crash from a clean end.
        "noDataState": "OK",
        "execErrState": "Error",
        "for": duration(alert.hold + GRAFANA_EXTRA_HOLD),
        "annotations": {
            name: grafana_template(text)
            for name, text in {
                "summary": alert.summary,
                "description": f"{alert.description} The dashboard names the head that dominates.",
                "dashboard_url": alert.dashboard_url(config),
                "runbook_url": config.runbook_url(alert.name),
                "__dashboardUid__": DASHBOARD_UID,
                "__panelId__": str(CV_PANEL_ID),
            }.items()
        },
        "labels": {"severity": alert.severity, "evaluator": GRAFANA},
        "isPaused": False,
    }
