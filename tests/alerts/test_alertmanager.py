"""What a person is told, by a real Alertmanager with the repository's configuration and a real receiver."""

import json
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import pytest
from conftest import free_ports, wait_until

from stack import configuration

# In seconds; the real ones are longer, and keep the same order.
GROUP_WAIT, GRAFANA_GROUP_WAIT, GROUP_INTERVAL = 1, 3, 1


@dataclass(frozen=True)
class Desk:
    """Sends alerts as Prometheus and Grafana do, and reads what arrives at the receiver."""

    url: str
    jsonl: Path

    def send(self, *alerts: dict[str, str], resolved: bool = False) -> None:
        now = datetime.now(UTC).isoformat()
        body = [{"labels": labels, **({"endsAt": now} if resolved else {})} for labels in alerts]
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{self.url}/api/v2/alerts", json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=10):
            pass  # an answer other than 2xx raises

    def delivered(self) -> list[tuple[str, str, str, str]]:
        """(status, alert, severity, run) of every alert in every notification, in order."""
        lines = self.jsonl.read_text().splitlines() if self.jsonl.exists() else []
        return [
            (alert["status"], *(alert["labels"].get(name, "") for name in ("alertname", "severity", "run")))
            for line in lines
            for alert in json.loads(line)["alerts"]
        ]

    def wait_for(self, *alert: str) -> None:
        wait_until(lambda: alert in self.delivered(), f"notification of {alert}")

    def settle(self, name: str) -> None:
        """Wait until everything that was sent before has had its time: a Grafana alert waits longest."""
        self.send(alert("Sentinel", "warning", name, "grafana"))
        self.wait_for("firing", "Sentinel", "warning", name)

    def about(self, run: str) -> list[tuple[str, str, str, str]]:
        return [each for each in self.delivered() if each[3] == run]


@pytest.fixture
def desk(start_receiver: Callable, start_alertmanager: Callable) -> Desk:
    ports = free_ports()
    content = configuration.alertmanager_configuration(ports)
    content["route"].update(group_wait=f"{GROUP_WAIT}s", group_interval=f"{GROUP_INTERVAL}s")
    (grafana,) = (route for route in content["route"]["routes"] if "group_wait" in route)
    grafana["group_wait"] = f"{GRAFANA_GROUP_WAIT}s"
    _, jsonl = start_receiver(ports.receiver)
    start_alertmanager(ports.alertmanager, content)
    return Desk(ports.url("alertmanager"), jsonl)


def alert(name: str, severity: str, run: str, evaluator: str = "prometheus", **more: str) -> dict[str, str]:
    labels = {"alertname": name, "severity": severity, "job": "ppo", "instance": "127.0.0.1:9842", "run": run, **more}
    # Grafana adds the folder of the rule, so that the two are never the same alert to Alertmanager.
    extra = {"grafana_folder": f"PPO {severity}"} if evaluator == "grafana" else {}
    return {**labels, "evaluator": evaluator, **extra}


def test_two_evaluators_send_one_notification_even_when_grafana_is_first(desk: Desk):
    ours = alert("PPOGradientCVHigh", "critical", "demo")
    grafanas = alert("PPOGradientCVHigh", "critical", "demo", "grafana")
    desk.send(grafanas)
    desk.send(ours)
    desk.settle("one")
    assert desk.about("demo") == [("firing", "PPOGradientCVHigh", "critical", "demo")]

    desk.send(grafanas, resolved=True)
    desk.send(ours, resolved=True)
    desk.wait_for("resolved", "PPOGradientCVHigh", "critical", "demo")
    desk.settle("two")
    assert [status for status, *_ in desk.about("demo")] == ["firing", "resolved"]


def test_where_only_grafana_evaluates_its_alert_is_delivered_and_resolved(desk: Desk):
    grafanas = alert("PPOGradientCVHigh", "warning", "demo", "grafana")
    desk.send(grafanas)
    desk.wait_for("firing", "PPOGradientCVHigh", "warning", "demo")
    desk.send(grafanas, resolved=True)
    desk.wait_for("resolved", "PPOGradientCVHigh", "warning", "demo")


def test_a_critical_alert_silences_the_warnings_of_its_own_run_only(desk: Desk):
    desk.send(
        alert("PPOGradientCVHigh", "warning", "sick"),
        alert("PPOHeadStarved", "warning", "sick"),
        alert("PPOGradientCVHigh", "critical", "sick"),
        alert("PPOGradientCVHigh", "warning", "other"),
        alert("PPOCriticalThresholdUnreachable", "info", "sick"),
    )
    desk.settle("one")
    assert sorted(desk.about("sick")) == [
        ("firing", "PPOCriticalThresholdUnreachable", "info", "sick"),
        ("firing", "PPOGradientCVHigh", "critical", "sick"),
    ]
    assert desk.about("other") == [("firing", "PPOGradientCVHigh", "warning", "other")]

    desk.send(alert("PPOGradientCVHigh", "critical", "sick"), resolved=True)
    desk.wait_for("firing", "PPOGradientCVHigh", "warning", "sick")


def test_alerts_of_other_systems_without_a_run_do_not_silence_each_other(desk: Desk):
    desk.send({"alertname": "Disk", "severity": "critical"}, {"alertname": "Fan", "severity": "warning"})
    desk.wait_for("firing", "Disk", "critical", "")
    desk.wait_for("firing", "Fan", "warning", "")


def test_a_warning_that_was_told_is_not_told_again_after_the_critical_alert(desk: Desk):
    desk.send(alert("PPONonFiniteGradients", "warning", "nan", head="op"))
    desk.wait_for("firing", "PPONonFiniteGradients", "warning", "nan")
    desk.send(alert("PPONonFiniteGradients", "critical", "nan"))
    desk.wait_for("firing", "PPONonFiniteGradients", "critical", "nan")
    desk.send(alert("PPONonFiniteGradients", "critical", "nan"), resolved=True)
    desk.wait_for("resolved", "PPONonFiniteGradients", "critical", "nan")
    desk.settle("one")
    assert [each[:3:2] for each in desk.about("nan")] == [
        ("firing", "warning"),
        ("firing", "critical"),
        ("resolved", "critical"),
    ]


def test_an_alert_about_one_head_does_not_hide_grafanas_about_another(desk: Desk):
    desk.send(alert("PPOHeadStarved", "warning", "heads", head="op"))
    desk.send(alert("PPOHeadStarved", "warning", "heads", "grafana", head="slot"))
    wait_until(lambda: len(desk.about("heads")) >= 2, "both heads")
