"""Notifications of a real Alertmanager with the repository's configuration and a real receiver."""

import json
import signal
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import pytest
import yaml
from conftest import free_ports, wait_until

from stack import configuration
from stack.servers import ROOT


@dataclass(frozen=True)
class Desk:
    """Sends alerts as Prometheus does, and reads what arrives at the receiver."""

    url: str
    jsonl: Path
    restart: Callable[[], None]

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
        """Wait until everything that was sent before has had its time: a warning waits longest."""
        self.send(alert("Sentinel", "warning", name))
        self.wait_for("firing", "Sentinel", "warning", name)

    def about(self, run: str) -> list[tuple[str, str, str, str]]:
        return [each for each in self.delivered() if each[3] == run]


@pytest.fixture
def desk(start_receiver: Callable, start_alertmanager: Callable) -> Desk:
    ports = free_ports()
    content = configuration.alertmanager_configuration(ports)
    # In seconds; the real ones are longer, and keep the same order.
    content["route"].update(group_wait="2s", group_interval="1s")
    for route in content["route"]["routes"]:
        route.update(group_wait="1s", group_interval="1s")
    _, jsonl = start_receiver(ports.receiver)
    running = [start_alertmanager(ports.alertmanager, content)]

    def restart() -> None:
        running.pop().stop(signal.SIGKILL)
        running.append(start_alertmanager(ports.alertmanager, content))

    return Desk(ports.url("alertmanager"), jsonl, restart)


def alert(name: str, severity: str, run: str, instance: str = "127.0.0.1:9842") -> dict[str, str]:
    return {"alertname": name, "severity": severity, "job": "ppo", "instance": instance, "run": run}


def test_a_critical_alert_silences_the_warnings_of_its_own_run_only(desk: Desk):
    desk.send(
        alert("PPOGradientCVHigh", "warning", "sick"),
        alert("PPOHeadStarved", "warning", "sick"),
        alert("PPOGradientCVHigh", "critical", "sick"),
        alert("PPOGradientCVHigh", "warning", "other"),
        # Somebody else's run of the same name.
        alert("PPOHeadDead", "warning", "sick", "127.0.0.2:9842"),
    )
    desk.settle("one")
    assert sorted(desk.about("sick")) == [
        ("firing", "PPOGradientCVHigh", "critical", "sick"),
        ("firing", "PPOHeadDead", "warning", "sick"),
    ]
    desk.wait_for("firing", "PPOGradientCVHigh", "warning", "other")

    desk.send(alert("PPOGradientCVHigh", "critical", "sick"), resolved=True)
    desk.wait_for("firing", "PPOGradientCVHigh", "warning", "sick")


def test_alerts_of_other_systems_without_a_run_do_not_silence_each_other(desk: Desk):
    desk.send({"alertname": "Disk", "severity": "critical"}, {"alertname": "Fan", "severity": "warning"})
    desk.wait_for("firing", "Disk", "critical", "")
    desk.wait_for("firing", "Fan", "warning", "")


def test_a_warning_that_was_told_is_not_told_again_after_the_critical_alert(desk: Desk):
    desk.send(alert("PPONonFiniteGradients", "warning", "nan"))
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


def test_the_warning_is_held_back_when_alertmanager_restarts_and_hears_of_it_first(desk: Desk):
    sick = alert("PPOGradientCVHigh", "warning", "sick"), alert("PPOGradientCVHigh", "critical", "sick")
    desk.send(*sick)
    desk.wait_for("firing", "PPOGradientCVHigh", "critical", "sick")
    desk.restart()
    desk.send(sick[0])
    # Later, for Prometheus sends each alert again after a minute of its own.
    time.sleep(1)
    desk.send(sick[1])
    desk.settle("one")
    assert {severity for _, _, severity, _ in desk.about("sick")} == {"critical"}


def test_the_wait_for_warnings_is_longer_than_prometheus_takes_to_send_all_alerts_again():
    wait = yaml.safe_load((ROOT / "alerts/alertmanager.yml").read_text())["route"]["group_wait"]
    groups = yaml.safe_load((ROOT / "alerts/ppo.rules.yml").read_text())["groups"]
    evaluation = max(
        int(group["interval"].removesuffix("s")) for group in groups if any("alert" in rule for rule in group["rules"])
    )
    assert int(wait.removesuffix("s")) > 60 + evaluation  # --rules.alert.resend-delay is a minute
