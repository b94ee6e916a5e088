"""The drilled trainer, and the steps of its alert from the gradient to the notification and back."""

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from exporter.health import HealthLevel
from exporter.metrics import GRADIENT_CV, GRADIENT_LEVEL_SINCE, HEALTH_LABEL, RUN_LABEL, MetricFamily
from stack.drill.clients import ALERT, NO_ANSWER, Alertmanager, Event, Notifications, Prometheus, quoted
from stack.processes import START_TIMEOUT, ChildProcess
from stack.servers import ROOT

STOP_TIMEOUT = 30.0  # seconds; the trainer first finishes its gradient step
LOOK_BACK = 300.0  # seconds; the rule also holds while most gradient steps within them were critical
# Short updates, for an exact timeline.
TRAINER_FLAGS = ("--num-envs", "16", "--rollout-steps", "64", "--minibatch-size", "256")

CROSSED, NOTIFIED = "gradient crossed the threshold", "notification received"
RECOVERED, NOTIFIED_RESOLVED = "gradient fell below the threshold", "resolved notification received"


@dataclass(frozen=True)
class Step:
    """A step of the drill.

    Attributes:
        name: its name in the timeline.
        seconds: the waits of the rule or Alertmanager in this step; every step gets the patience on top.
        look: returns the event, or None until it comes.
        advice: returns what to check if it does not come.
    """

    name: str
    seconds: float
    look: Callable[[], Event | None]
    advice: Callable[[], str]


class DrilledRun:
    """The trainer of the drill.

    Args:
        run: its name.
        head: the head that gets the whole gradient while the run is critical.
        targets: folder that Prometheus watches.
        work: folder for the trainer's output, and for the file that makes the run critical.
        arguments: further flags of the trainer.
    """

    def __init__(self, run: str, head: str, targets: Path, work: Path, arguments: list[str]) -> None:
        self.run = run
        self.targets = targets.resolve()
        self.fault = work / "critical"
        command = [sys.executable, "-m", "trainer", "--metrics-port", "0", *TRAINER_FLAGS]
        command += ["--total-timesteps", str(10**9), "--no-anneal-learning-rate", "--checkpoint-every", "0", *arguments]
        command += ["--run", run, "--targets-dir", self.targets, "--drill", f"dominate:{head}:@{self.fault}"]
        self.process = ChildProcess("trainer", command, "", output=work / "trainer.log", directory=ROOT)

    def target_file(self) -> Path | None:
        """This run's target file."""
        for path in self.targets.glob("ppo-*.json"):
            with contextlib.suppress(*NO_ANSWER):  # a file of somebody else, in any form
                if json.loads(path.read_text())[0]["labels"][RUN_LABEL] == self.run:
                    return path
        return None

    def end(self) -> None:
        """End the trainer and remove its target, however it ended."""
        self.process.stop(seconds=STOP_TIMEOUT)
        if path := self.target_file():
            path.unlink(missing_ok=True)


@dataclass(frozen=True)
class Drill:
    """One drill: the run, and the servers that show its alert.

    Attributes:
        rule: from `Prometheus.rule`.
        notification_wait: how long Alertmanager may hold a notification back, in seconds.
    """

    drilled: DrilledRun
    prometheus: Prometheus
    alertmanager: Alertmanager
    notifications: Notifications
    rule: dict[str, Any]
    notification_wait: float
    began: float = field(default_factory=time.time)

    @property
    def labels(self) -> dict[str, str]:
        return {**ALERT, RUN_LABEL: self.drilled.run}

    def steps(self) -> Iterator[Step]:
        """All steps in order. Between them the run becomes critical and recovers."""
        hold, keep = self.rule["duration"], self.rule["keepFiringFor"]
        interval = 2 * self.rule["interval"]  # the rule reads series that are recorded once per interval
        cv, critical = self._of_run(GRADIENT_CV), self._of_run(GRADIENT_CV, **{HEALTH_LABEL: HealthLevel.CRITICAL})
        pending, firing = (_selector("ALERTS", alertstate=state, **self.labels) for state in ("pending", "firing"))

        yield Step("trainer serves its metrics", START_TIMEOUT, self._served, self.drilled.process.log_tail)
        yield Step("Prometheus scrapes the run", 0, self._sampled(cv), self._why_not_scraped)
        self.drilled.fault.touch()
        yield Step(CROSSED, 0, lambda: self._level(critical=True), self._why_not_critical)
        yield Step("first scrape that saw it", 0, self._sampled(critical), self._why_not_scraped)
        if hold:
            yield Step("alert pending", interval, self._sampled(pending), self._why_no_alert)
        yield Step("alert firing", hold + interval, self._sampled(firing), self._why_no_alert)
        yield Step("Alertmanager has it", interval, self._in_alertmanager, self._why_not_in_alertmanager)
        yield Step(NOTIFIED, self.notification_wait, lambda: self._notified("firing"), self._why_not_notified)
        self.drilled.fault.unlink()
        yield Step(RECOVERED, 0, lambda: self._level(critical=False), self._why_not_critical)
        yield Step("alert resolved", LOOK_BACK + keep + interval, lambda: self._over(firing), self._why_no_alert)
        yield Step(
            NOTIFIED_RESOLVED, self.notification_wait, lambda: self._notified("resolved"), self._why_not_notified
        )

    def _of_run(self, family: MetricFamily, **labels: str) -> str:
        return _selector(family.name, **{RUN_LABEL: self.drilled.run}, **labels)

    def _times(self, selector: str) -> list[float]:
        return self.prometheus.sample_times(selector, time.time() - self.began + 60)

    def _sampled(self, selector: str) -> Callable[[], Event | None]:
        return lambda: Event(times[0]) if (times := self._times(selector)) else None

    def _served(self) -> Event | None:
        return Event(path.stat().st_mtime) if (path := self.drilled.target_file()) else None

    def _level(self, critical: bool) -> Event | None:
        """When the run reached its level; None unless that level is critical, or not, as asked."""
        cv, since = (self.prometheus.query(self._of_run(family)) for family in (GRADIENT_CV, GRADIENT_LEVEL_SINCE))
        if not cv or not since or (cv[0]["metric"][HEALTH_LABEL] == HealthLevel.CRITICAL) != critical:
            return None
        return Event(float(since[0]["value"][1]), f"CV {float(cv[0]['value'][1]):.3f}")

    def _in_alertmanager(self) -> Event | None:
        alert = self.alertmanager.alert(self.labels)
        return alert and Event(datetime.fromisoformat(alert["updatedAt"]).timestamp(), f"for {_receivers(alert)}")

    def _notified(self, status: str) -> Event | None:
        return self.notifications.find(status, self.labels)

    def _over(self, firing: str) -> Event | None:
        if self.prometheus.query(firing):
            return None
        # The resolving evaluation left no sample; it came one interval after the last sample.
        return Event(self._times(firing)[-1] + self.rule["interval"])

    def _why_not_scraped(self) -> str:
        target = self.prometheus.target(self.drilled.run)
        if target is None:
            return (
                f"Prometheus has no target from {self.drilled.target_file()}: does a scrape job read this folder "
                "(`file_sd_configs`; see the job `ppo` in prometheus.yml) under the same name (--targets-dir)?"
            )
        return (
            f"Prometheus has the target {target['scrapeUrl']} in {target['scrapePool']}, health {target['health']}: "
            f"{target['lastError'] or 'no error'}. Can Prometheus reach it, is it scraped often enough "
            f"(--patience), and do `metric_relabel_configs` keep the label {RUN_LABEL} and the metrics?"
        )

    def _why_not_critical(self) -> str:
        return (
            f"{self._series()} Has the run enough heads to reach the threshold? Does another setting of the trainer "
            f"undo the drill? {self._why_not_scraped()}"
        )

    def _why_no_alert(self) -> str:
        rule = self.prometheus.rule()
        if rule is None:
            return f"Prometheus no longer has the rule {ALERT['alertname']}; was its configuration changed?"
        if rule.get("lastError"):
            return f"The rule fails: {rule['lastError']}"
        return f"The rule's expression is {' '.join(rule['query'].split())}. {self._series()}"

    def _series(self) -> str:
        series = self.prometheus.query(self._of_run(GRADIENT_CV))
        return f"In Prometheus: {'; '.join('{metric} {value[1]}'.format(**each) for each in series) or 'no CV'}."

    def _why_not_in_alertmanager(self) -> str:
        active = [entry["url"] for entry in self.prometheus.get("alertmanagers")["activeAlertmanagers"]]
        return (
            f"Prometheus sends alerts to {', '.join(active) or 'no Alertmanager'} (`alerting` in its configuration); "
            f"the drill looks at {self.alertmanager.url} (--alertmanager-url). Do `alert_relabel_configs` drop it?"
        )

    def _why_not_notified(self) -> str:
        alert = self.alertmanager.alert(self.labels)
        status = alert["status"] if alert else {}
        if status.get("silencedBy"):
            return f"The alert is silenced: {'; '.join(map(self.alertmanager.silence, status['silencedBy']))}"
        if status.get("inhibitedBy"):
            return f"The alert is inhibited by {', '.join(status['inhibitedBy'])} (`inhibit_rules` of Alertmanager)."
        if status.get("mutedBy"):
            return f"The alert is muted by the time intervals {', '.join(status['mutedBy'])}."
        failed = "; ".join(self.alertmanager.failed_notifications()) or "none"
        return (
            f"Alertmanager routes the alert to {_receivers(alert) if alert else 'its receivers'}; failed "
            f"deliveries since it started: {failed}. Does this receiver's webhook lead to the process that writes "
            f"{self.notifications.path} (--receiver-log), with `send_resolved`, and does that run? Has its route "
            "`mute_time_intervals`, or a `group_wait` or `group_interval` above --notification-wait?"
        )


def _receivers(alert: dict[str, Any]) -> str:
    return ", ".join(receiver["name"] for receiver in alert["receivers"])


def _selector(name: str, **labels: str) -> str:
    return f"{name}{{{','.join(f'{label}={quoted(value)}' for label, value in labels.items())}}}"
