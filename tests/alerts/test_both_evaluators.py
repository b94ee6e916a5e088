"""Prometheus and Grafana evaluate the same run: people are told once.

Prometheus, Alertmanager and the receiver are real. Grafana does not run: its part is played by `GrafanaRule`, which
takes a provisioned rule, puts its query to Prometheus, and sends what Grafana's contact point for an Alertmanager
sends.
"""

import json
import math
import signal
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta

import pytest
import yaml
from conftest import Observability, wait_until

from exporter import MetricsServer, PPOUpdatePayload, RunAggregator, gradient_cv
from mixin.__main__ import REPOSITORY

HOLD = 5  # seconds; Prometheus waits for two here, so that it is first as it is with the real times
INTERVAL = 0.5


class GrafanaRule:
    """One provisioned rule with its query and its condition, evaluated against a real Prometheus."""

    def __init__(self, title: str, severity: str, observability: Observability) -> None:
        groups = yaml.safe_load((REPOSITORY / "grafana/provisioning/alerting/ppo.yml").read_text())["groups"]
        self._folder, self._rule = next(
            (group["folder"], rule)
            for group in groups
            for rule in group["rules"]
            if (rule["title"], rule["labels"]["severity"]) == (title, severity)
        )
        self._observability = observability
        self._since: dict[tuple, datetime] = {}

    def evaluate(self) -> None:
        """Once what Grafana does every interval: firing alerts are sent again each time, resolved ones once."""
        query, _, condition = (part["model"] for part in self._rule["data"])
        operator, threshold = condition["expression"].removeprefix("$B ").split()
        assert operator == ">="
        now = datetime.now(UTC)
        met = {
            tuple(sorted(sample["metric"].items()))
            for sample in self._observability.query(query["expr"])
            if float(sample["value"][1]) >= float(threshold)
        }
        for labels in met:
            self._since.setdefault(labels, now)
        alerts = []
        for labels, since in list(self._since.items()):
            if now - since >= timedelta(seconds=HOLD):
                ends = now + timedelta(minutes=2) if labels in met else now
                alerts.append(self._alert(dict(labels), since, ends))
            if labels not in met:
                del self._since[labels]
        if alerts:
            body, headers = json.dumps(alerts).encode(), {"Content-Type": "application/json"}
            url = f"{self._observability.alertmanager_url}/api/v2/alerts"
            with urllib.request.urlopen(urllib.request.Request(url, body, headers), timeout=10):
                pass  # an answer other than 2xx raises

    def _alert(self, labels: dict[str, str], starts: datetime, ends: datetime) -> dict:
        """With the labels that Grafana adds, and the fields that its JSON has beside those of the API."""
        return {
            "labels": {
                **labels,
                **self._rule["labels"],
                "alertname": self._rule["title"],
                "grafana_folder": self._folder,
                "__alert_rule_uid__": self._rule["uid"],
            },
            "annotations": {"summary": "from Grafana", "__value_string__": "[ var='B' ]"},
            "startsAt": starts.isoformat(),
            "endsAt": ends.isoformat(),
            "generatorURL": "http://127.0.0.1:3000/alerting/grafana/x/view",
            "UpdatedAt": starts.isoformat(),
            "Timeout": False,
        }


@contextmanager
def evaluating(rule: GrafanaRule) -> Iterator[None]:
    stop, failures = threading.Event(), []

    def work() -> None:
        while not stop.wait(INTERVAL):
            try:
                rule.evaluate()
            except Exception as error:  # noqa: BLE001 - shown by the test
                failures.append(error)
                return

    thread = threading.Thread(target=work)
    thread.start()
    yield
    stop.set()
    thread.join()
    assert not failures


class Run:
    """A run behind a real `/metrics`, whose gradient is as told."""

    def __init__(self, observability: Observability) -> None:
        self._aggregator = RunAggregator()
        self._aggregator.register_run("demo", ["slot", "op", "a", "b", "c", "d", "e"])
        self._server = MetricsServer(self._aggregator, port=observability.ports.metrics)
        self._server.deliver("demo", targets_dir=observability.targets)

    def update(self, **norms: float) -> None:
        cv = gradient_cv(norms.values())
        self._aggregator.handle_ppo_update(
            PPOUpdatePayload(
                run="demo",
                gradient_cv=cv,
                gradient_cv_per_step=(cv,) * 100,
                contributing_heads=len(norms),
                head_gradient_norms=norms,
                gradient_norm=math.hypot(*norms.values()),
                timestamp_seconds=time.time(),
            )
        )

    def close(self) -> None:
        self._server.close()


def heads(op: float) -> dict[str, float]:
    return dict.fromkeys(("slot", "a", "b", "c", "d", "e"), 1e-6) | {"op": op}


@pytest.fixture
def observability(start_observability: Callable) -> Observability:
    return start_observability()


@pytest.fixture
def run(observability: Observability) -> Iterator[Run]:
    run = Run(observability)
    yield run
    run.close()


def states(observability: Observability, evaluator: str) -> list[str]:
    wanted = {"alertname": "PPOGradientCVHigh", "severity": "critical", "evaluator": evaluator}
    return [alert["status"]["state"] for alert in observability.alerts() if wanted.items() <= alert["labels"].items()]


def test_two_evaluators_of_one_run_send_one_notification(observability: Observability, run: Run):
    run.update(**heads(1.0))
    with evaluating(GrafanaRule("PPOGradientCVHigh", "critical", observability)):
        wait_until(lambda: states(observability, "prometheus") == ["active"], "Prometheus' alert")
        wait_until(lambda: states(observability, "grafana") == ["suppressed"], "Grafana's alert, inhibited")
        wait_until(lambda: observability.notified("firing", alertname="PPOGradientCVHigh"), "notification")

        run.update(**heads(1e-6))
        wait_until(lambda: not states(observability, "grafana"), "the end of Grafana's alert")
        wait_until(
            lambda: observability.notified("resolved", alertname="PPOGradientCVHigh", severity="critical"), "resolved"
        )
    told = [
        (notification["receiver"], alert["status"], alert["labels"]["evaluator"])
        for notification in observability.notifications()
        for alert in notification["alerts"]
        if (alert["labels"]["alertname"], alert["labels"]["severity"]) == ("PPOGradientCVHigh", "critical")
    ]
    assert told == [("pager", "firing", "prometheus"), ("pager", "resolved", "prometheus")]


def test_where_prometheus_evaluates_no_rules_grafanas_notification_arrives(observability: Observability, run: Run):
    """Of another alert than above, so that the rule with a history of its own is evaluated too."""
    spike, calm = heads(1.0), dict.fromkeys(heads(1.0), 1.0)
    rules = observability.targets.parent / "alerts/ppo.rules.yml"
    rules.write_text("groups: []\n")
    observability.processes["prometheus"].send(signal.SIGHUP)  # read the rules again
    wait_until(lambda: not observability.rules(), "no rules")

    grafana = GrafanaRule("PPOCriticalGradientSteps", "warning", observability)
    with evaluating(grafana):
        run.update(**calm)
        wait_until(lambda: observability.query('ppo_gradient_steps_total{run="demo", health="healthy"} > 0'), "scrape")
        run.update(**spike)
        run.update(**calm)
        wait_until(
            lambda: observability.notified("firing", alertname="PPOCriticalGradientSteps", evaluator="grafana"),
            "Grafana's notification",
        )
    assert {notification["receiver"] for notification in observability.notifications()} == {"team"}
