"""Which receiver gets what, asked of amtool with the labels that the rules really set."""

import subprocess

import pytest
import yaml

from mixin.__main__ import REPOSITORY

CONFIGURATION = REPOSITORY / "alerts/alertmanager.yml"


def every_alert() -> list[dict[str, str]]:
    """Labels of every alert of both evaluators, as they arrive."""
    where = {"job": "ppo", "instance": "127.0.0.1:9842", "run": "demo"}
    groups = yaml.safe_load((REPOSITORY / "alerts/ppo.rules.yml").read_text())["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    grafana = yaml.safe_load((REPOSITORY / "grafana/provisioning/alerting/ppo.yml").read_text())["groups"]
    return [
        *({"alertname": rule["alert"], **rule["labels"], **where} for rule in rules if "alert" in rule),
        *(
            {"alertname": rule["title"], **rule["labels"], **where, "grafana_folder": group["folder"]}
            for group in grafana
            for rule in group["rules"]
        ),
    ]


def receiver(servers, labels: dict[str, str], configuration=CONFIGURATION) -> str:
    pairs = [f"{name}={value}" for name, value in labels.items()]
    command = [servers.amtool, "config", "routes", "test", f"--config.file={configuration}", *pairs]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.mark.parametrize(
    "labels", every_alert(), ids=lambda labels: "-".join(labels[n] for n in ("alertname", "severity", "evaluator"))
)
def test_critical_alerts_reach_the_pager_and_all_others_the_team(servers, labels):
    assert receiver(servers, labels) == ("pager" if labels["severity"] == "critical" else "team")


def test_alerts_of_other_systems_are_delivered_too(servers):
    assert receiver(servers, {"alertname": "Disk", "severity": "critical"}) == "pager"
    assert receiver(servers, {"alertname": "Fan"}) == "team"


def test_both_evaluators_and_all_severities_are_asked_about():
    asked = {(labels["evaluator"], labels["severity"]) for labels in every_alert()}
    assert len(asked) == 6 and len(every_alert()) == 18
