"""Fire drill: does the stack that is running page somebody when a run goes bad?

Starts a real trainer of its own, drives it to critical and back, and follows its alert through Prometheus,
Alertmanager and the receiver. The exit code is 0 only if every step was seen. Everything after `--` goes to the
drilled trainer: `make drill ARGS="-- --device cuda"`.
"""

import argparse
import json
import re
import signal
import sys
import tempfile
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml
from prometheus_client.parser import text_string_to_metric_families
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from exporter.health import HealthLevel
from exporter.metrics import GRADIENT_CV, HEALTH_LABEL, LAST_UPDATE_TIMESTAMP, RUN_LABEL, UPDATES
from mixin.config import CV_CRITICAL
from mixin.promql import quoted
from stack.configuration import Ports
from stack.processes import ChildProcess
from stack.servers import ROOT

POLL_INTERVAL = 0.2  # seconds
START_TIMEOUT = 120.0  # seconds; a cold import of torch from a slow disk takes its time
STOP_TIMEOUT = 30.0  # seconds; the trainer ends after the running gradient step
DISCOVERY = 10.0  # seconds; Prometheus gathers changes of its targets for five before it applies them
# Updates short enough for a timeline, long enough that none passes unseen between two looks.
TRAINER_FLAGS = ("--num-envs", "16", "--rollout-steps", "64", "--minibatch-size", "256")

CROSSED, NOTIFIED = "gradient crossed the threshold", "notification received"
RECOVERED, TOLD_OVER = "gradient no longer critical", "resolved notification received"

# No proxy from the environment stands between us and the stack.
_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class DrillError(Exception):
    """What keeps the drill from starting or from going on."""


class StopRequested(Exception):
    """A signal asked for the end."""


@dataclass(frozen=True)
class Event:
    """A step that was seen.

    Attributes:
        time: Unix time, by the clock of the server that told of it.
        note: what was seen.
    """

    time: float
    note: str = ""


@dataclass(frozen=True)
class Step:
    """A step of the drill.

    Attributes:
        name: its row of the timeline.
        waiting: what progress says while it has not come.
        seconds: how long it takes at most by what the servers are configured to do.
        look: the event, or None while it has not come.
        advice: what to check when it does not come.
    """

    name: str
    waiting: str
    seconds: float
    look: Callable[[], Event | None]
    advice: Callable[[], str]


@dataclass(frozen=True)
class Rule:
    """The critical alert as Prometheus has loaded it. Durations are in seconds."""

    query: str
    hold: float
    keep: float
    interval: float
    labels: Mapping[str, str]
    error: str


class Prometheus:
    """What the drill asks a Prometheus. Methods raise OSError or ValueError where it gives no answer."""

    def __init__(self, url: str) -> None:
        self.url = url

    def get(self, path: str, **parameters: str) -> Any:
        return _json(f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}")["data"]

    def critical_rule(self) -> Rule | None:
        for group in self.get("rules", type="alert")["groups"]:
            for rule in group["rules"]:
                if (rule["name"], rule["labels"].get("severity")) == (CV_CRITICAL.name, CV_CRITICAL.severity):
                    keep = rule.get("keepFiringFor", 0)
                    error = rule.get("lastError", "")
                    return Rule(rule["query"], rule["duration"], keep, group["interval"], rule["labels"], error)
        return None

    def target_jobs(self) -> list[dict[str, Any]]:
        """Scrape jobs that read target files, `scrape_interval` in seconds."""
        configuration = yaml.safe_load(self.get("status/config")["yaml"])
        return [
            {**job, "scrape_interval": _seconds(job["scrape_interval"])}
            for job in configuration.get("scrape_configs", [])
            if job.get("file_sd_configs")
        ]

    def target(self, run: str) -> dict[str, Any] | None:
        """The scrape target of `run`, with its last error."""
        targets = self.get("targets", state="active")["activeTargets"]
        return next((target for target in targets if target["labels"].get(RUN_LABEL) == run), None)

    def sample_times(self, selector: str, seconds: float) -> list[float]:
        """Unix times of the samples within the last `seconds`, in order."""
        result = self.get("query", query=f"{selector}[{seconds:.0f}s]")["result"]
        return sorted(float(when) for series in result for when, _ in series["values"])

    def has(self, selector: str) -> bool:
        return bool(self.get("query", query=selector)["result"])


class Alertmanager:
    """What the drill asks an Alertmanager. Methods raise OSError or ValueError where it gives no answer."""

    def __init__(self, url: str) -> None:
        self.url = url

    def waits(self, labels: Mapping[str, str]) -> tuple[float, float]:
        """How long the first notification of an alert with `labels` waits, and every later one, in seconds.

        A route that asks for further labels may be taken or not: the longest wait counts.
        """
        configuration = yaml.safe_load(_json(f"{self.url}/api/v2/status")["config"]["original"])
        # What Alertmanager takes where its configuration is silent.
        defaults = {"group_by": [], "group_wait": "30s", "group_interval": "5m"}
        routes = list(_routes(configuration["route"], labels, defaults))
        interval = max(_seconds(route["group_interval"]) for route in routes)
        first = [_seconds(route["group_wait"]) for route in routes]
        if any(RUN_LABEL not in route["group_by"] and "..." not in route["group_by"] for route in routes):
            first.append(interval)  # the alert may join others that have been told already
        return max(first), interval

    def alert(self, labels: Mapping[str, str]) -> dict[str, Any] | None:
        filters = [("filter", f"{name}={quoted(value)}") for name, value in labels.items()]
        return next(iter(_json(f"{self.url}/api/v2/alerts?{urllib.parse.urlencode(filters)}")), None)

    def silence(self, identifier: str) -> str:
        silence = _json(f"{self.url}/api/v2/silence/{identifier}")
        return f"{identifier} by {silence['createdBy']} until {silence['endsAt']}: {silence['comment']}"

    def failed_notifications(self) -> dict[str, float]:
        """Attempts to deliver that failed since it started, by integration, such as webhook."""
        failed: dict[str, float] = {}
        for sample in _samples(f"{self.url}/metrics"):
            if sample.name == "alertmanager_notification_requests_failed_total" and sample.value:
                integration = sample.labels["integration"]
                failed[integration] = failed.get(integration, 0) + sample.value
        return failed


class Notifications:
    """Alerts that the receiver appends to its file from now on."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._read = path.stat().st_size if path.exists() else 0
        self._alerts: list[tuple[float, dict[str, Any]]] = []

    def find(self, status: str, labels: Mapping[str, str]) -> Event | None:
        """The first alert with this status and these labels: when it was written, and its summary."""
        self._poll()
        for when, alert in self._alerts:
            if alert.get("status") == status and labels.items() <= alert.get("labels", {}).items():
                return Event(when, f"{status.upper()} {alert.get('annotations', {}).get('summary', '')}")
        return None

    def _poll(self) -> None:
        with self.path.open("rb") as file:
            file.seek(self._read)
            new = file.read()
            written = self.path.stat().st_mtime
        new = new[: new.rfind(b"\n") + 1]
        self._read += len(new)
        for line in new.splitlines():
            self._alerts += [(written, alert) for alert in json.loads(line)["alerts"]]


class DrilledRun:
    """The trainer of the drill, and what its own /metrics say of it.

    Args:
        run: its name.
        drill: the trainer's `--drill`.
        targets: folder that Prometheus watches.
        log: file for the trainer's output.
        arguments: further flags of the trainer.
    """

    def __init__(self, run: str, drill: str, targets: Path, log: Path, arguments: list[str]) -> None:
        self.run = run
        self.started: Event | None = None
        self.crossed: Event | None = None
        self.recovered: Event | None = None
        self.trouble = "It has not said where it serves its metrics."
        self._targets = targets
        self._updates = 0
        command = [sys.executable, "-m", "trainer", "--metrics-port", "0", *TRAINER_FLAGS]
        command += ["--total-timesteps", str(10**9), "--no-anneal-learning-rate", "--checkpoint-every", "0", *arguments]
        command += ["--run", run, "--targets-dir", targets.resolve(), "--drill", drill]
        self.process = ChildProcess("trainer", command, "", output=log, directory=ROOT)

    def target_file(self) -> Path | None:
        """The file that names this run to Prometheus."""
        for path in self._targets.glob("*.json"):
            try:
                if any(entry["labels"].get(RUN_LABEL) == self.run for entry in json.loads(path.read_text())):
                    return path
            except (OSError, ValueError, TypeError, KeyError, AttributeError):
                continue  # somebody else's
        return None

    def observe(self) -> None:
        """Look at /metrics, and keep when the level changed: the time at which the update ended that changed it.

        Raises:
            DrillError: the trainer has ended.
        """
        if self.process.exit_code is not None:
            raise DrillError(
                f"the drilled trainer has ended with exit code {self.process.exit_code}:\n{self.process.log_tail()}"
            )
        # The target file may name an address that only Prometheus can reach.
        address = re.search(r"metrics at (\S+)", self.process.log.read_text(errors="replace"))
        if address is None:
            return
        try:
            samples = list(_samples(address[1]))
        except (OSError, ValueError) as error:
            self.trouble = f"Its metrics cannot be read from {address[1]}: {_reason(error)}."
            return
        self.trouble = ""
        values = {sample.name: sample for sample in samples if sample.labels.get(RUN_LABEL) == self.run}
        if LAST_UPDATE_TIMESTAMP.name not in values:
            return
        updates, cv = int(values[UPDATES.name].value), values[GRADIENT_CV.name]
        first, self._updates = self._updates + 1, max(updates, self._updates)
        which = f"update {first}" if first >= updates else f"update {first} to {updates}"
        event = Event(values[LAST_UPDATE_TIMESTAMP.name].value, f"{which}, CV {cv.value:.3f}")
        level = cv.labels[HEALTH_LABEL]
        self.started = self.started or event
        if level == HealthLevel.CRITICAL:
            self.crossed = self.crossed or event
        elif self.crossed:
            self.recovered = self.recovered or event

    def end(self) -> None:
        """End the trainer, and take its target from Prometheus, however it ended."""
        self.process.stop(seconds=STOP_TIMEOUT)
        if path := self.target_file():
            path.unlink(missing_ok=True)


class FireDrill:
    """One drill. `run()` is called once, from the main thread."""

    def __init__(self, options: argparse.Namespace, console: Console) -> None:
        self.options = options
        self.console = console
        self.prometheus = Prometheus(options.prometheus_url)
        self.alertmanager = Alertmanager(options.alertmanager_url)
        self.labels = {"alertname": CV_CRITICAL.name, "severity": CV_CRITICAL.severity, RUN_LABEL: options.run}
        self.timeline: list[tuple[Step, Event]] = []
        self.began = time.time()
        self.stop_signal: int | None = None
        self.drilled: DrilledRun | None = None
        self.receiver: ChildProcess | None = None

    def run(self) -> int:
        """Drill, clean up, print the timeline; the exit code."""
        # Set once and kept to the end: a second Ctrl-C must not interrupt the clean-up.
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self._on_signal)
        problem = None
        with tempfile.TemporaryDirectory(prefix="fire-drill-") as work:
            try:
                self._check_stack()
                notifications = self._open_notifications(Path(work))
                self._drill(notifications, Path(work))
            except StopRequested:
                pass
            except DrillError as error:
                problem = str(error)
            finally:
                if self.drilled:
                    self.drilled.end()
                if self.receiver:
                    self.receiver.stop()
        if self.timeline:
            self._print_timeline()
        if self.stop_signal is not None:
            self._say(f"Interrupted after {time.time() - self.began:.0f} s; the drill's trainer and target are gone.")
            return 128 + self.stop_signal
        if problem is not None:
            print(f"error: {problem}", file=sys.stderr)
            return 1
        return 0

    def _on_signal(self, number: int, frame: object) -> None:
        if self.stop_signal is None:
            self.stop_signal = number

    def _pause(self) -> None:
        if self.stop_signal is None:
            time.sleep(POLL_INTERVAL)
        if self.stop_signal is not None:
            raise StopRequested

    def _say(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _check_stack(self) -> None:
        """Raises DrillError where something is missing that a drill needs."""
        for name, url in (("prometheus", self.prometheus.url), ("alertmanager", self.alertmanager.url)):
            try:
                _opener.open(f"{url}/-/ready", timeout=5).close()
            except (OSError, ValueError) as error:
                raise DrillError(
                    f"{name.capitalize()} is not ready at {url}: {_reason(error)}\n"
                    f"`make run` starts the stack; another one is named with --{name}-url"
                ) from error
        if not self.options.targets_dir.is_dir():
            raise DrillError(
                f"there is no folder {self.options.targets_dir}, where Prometheus would find the drilled trainer; "
                "--targets-dir names another one"
            )
        try:
            rule = self.prometheus.critical_rule()
            if rule is None:
                raise DrillError(
                    f"Prometheus at {self.prometheus.url} has no rule {CV_CRITICAL.name} with severity "
                    f"{CV_CRITICAL.severity}: load alerts/ppo.rules.yml (`rule_files`)"
                )
            jobs = self.prometheus.target_jobs()
            self.group_wait, self.group_interval = self.alertmanager.waits({**rule.labels, **self.labels})
        except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError) as error:
            raise DrillError(f"cannot read the configuration of the servers: {_reason(error)}") from error
        if not jobs:
            raise DrillError(
                f"no scrape job of Prometheus at {self.prometheus.url} reads target files: "
                "take the job `ppo` from prometheus.yml (`file_sd_configs`)"
            )
        self.rule = rule
        self.jobs = jobs
        self.scrape_interval = max(job["scrape_interval"] for job in jobs)

    def _open_notifications(self, work: Path) -> Notifications:
        options = self.options
        if options.receiver_port is None:
            if not options.receiver_log.exists():
                raise DrillError(
                    f"there is no {options.receiver_log}, where the receiver of `make run` writes what it is sent; "
                    "--receiver-log names another one, --receiver-port listens here"
                )
            return Notifications(options.receiver_log)
        log = work / "notifications.jsonl"
        command = [sys.executable, "-m", "stack.receiver", "--address", options.receiver_address]
        command += ["--port", str(options.receiver_port), "--output", log]
        address = f"http://{options.receiver_address}:{options.receiver_port}"
        self.receiver = ChildProcess("receiver", command, address, output=work / "receiver.log", directory=ROOT)
        deadline = time.monotonic() + START_TIMEOUT
        # Not /-/healthy: a receiver that runs there already would answer.
        while "listening on" not in self.receiver.log_tail():
            if self.receiver.exit_code is not None or time.monotonic() > deadline:
                raise DrillError(f"cannot receive notifications:\n{self.receiver.log_tail()}")
            self._pause()
        self._say(f"Listening for notifications on {address}/")
        return Notifications(log)

    def _drill(self, notifications: Notifications, work: Path) -> None:
        options, rule, patience = self.options, self.rule, self.options.patience
        to_notice = self.scrape_interval + rule.interval
        hold = options.hold
        if hold is None:
            hold = to_notice + rule.hold + rule.interval + self.group_wait + patience
        healthy = DISCOVERY + 2 * self.scrape_interval
        expected = healthy + hold + to_notice + rule.keep + self.group_interval
        self._say(
            f"Fire drill {options.run}: healthy for {healthy:g} s, critical for {hold:g} s, then left to recover; "
            f"{CV_CRITICAL.name} waits {rule.hold:g} s before it fires and {rule.keep:g} s before it resolves. "
            f"All of it takes about {expected / 60:.0f} min."
        )
        drill = f"dominate:{options.head}:{healthy:.3f}s-{healthy + hold:.3f}s"
        self.began = time.time()
        self.drilled = DrilledRun(
            options.run, drill, options.targets_dir, work / "trainer.log", options.trainer_arguments
        )
        for step in self._steps(notifications, healthy, hold):
            self._follow(step)

    def _steps(self, notifications: Notifications, healthy: float, hold: float) -> Iterator[Step]:
        drilled, prometheus, rule, labels = self.drilled, self.prometheus, self.rule, self.labels
        run = f"{RUN_LABEL}={quoted(labels[RUN_LABEL])}"
        alerts = ",".join(f"{name}={quoted(value)}" for name, value in labels.items())
        firing = f'ALERTS{{{alerts},alertstate="firing"}}'

        def times(selector: str) -> list[float]:
            return prometheus.sample_times(selector, time.time() - self.began + 60)

        def sampled(selector: str) -> Callable[[], Event | None]:
            def look() -> Event | None:
                found = times(selector)
                return Event(found[0]) if found else None

            return look

        def resolved() -> Event | None:
            # The evaluation that found it resolved left no sample; it came one interval after the last that did.
            return None if prometheus.has(firing) else Event(times(firing)[-1] + rule.interval)

        yield Step(
            "training",
            "the first update",
            START_TIMEOUT,
            lambda: drilled.started,
            lambda: f"{drilled.trouble} The trainer's last lines:\n{drilled.process.log_tail()}",
        )
        yield Step(
            "Prometheus scrapes the run",
            "Prometheus to find and scrape the run",
            DISCOVERY + self.scrape_interval,
            sampled(f"{UPDATES.name}{{{run}}}"),
            self._why_not_scraped,
        )
        yield Step(
            CROSSED,
            "the drill to begin and an update to be critical",
            healthy,
            lambda: drilled.crossed,
            lambda: (
                "The trainer never called an update critical: "
                "has it heads enough, and does another setting of the trainer undo the drill?"
            ),
        )
        yield Step(
            "first scrape that saw it",
            "Prometheus to see it",
            self.scrape_interval,
            sampled(f"{GRADIENT_CV.name}{{{run},{HEALTH_LABEL}={quoted(HealthLevel.CRITICAL)}}}"),
            self._why_not_scraped,
        )
        if rule.hold:
            yield Step(
                "alert pending",
                f"{CV_CRITICAL.name} to be pending",
                rule.interval,
                sampled(f'ALERTS{{{alerts},alertstate="pending"}}'),
                self._why_no_alert,
            )
        yield Step(
            "alert firing",
            f"{CV_CRITICAL.name} to fire, which takes {rule.hold:g} s",
            rule.hold + rule.interval,
            sampled(firing),
            self._why_no_alert,
        )
        yield Step(
            "Alertmanager has it",
            "Alertmanager to be told",
            rule.interval,
            self._alert_in_alertmanager,
            self._why_not_in_alertmanager,
        )
        yield Step(
            NOTIFIED,
            f"the notification, which Alertmanager may hold back for {self.group_wait:g} s",
            self.group_wait,
            lambda: notifications.find("firing", labels),
            self._why_not_notified,
        )
        yield Step(
            RECOVERED,
            "the drill to end and an update not to be critical",
            healthy + hold,
            lambda: drilled.recovered,
            lambda: "The run stayed critical after the drill.",
        )
        yield Step(
            "alert resolved",
            f"{CV_CRITICAL.name} to resolve, which takes {rule.keep:g} s",
            self.scrape_interval + rule.keep + 2 * rule.interval,
            resolved,
            lambda: f"Does the rule fire for something else? It asks for: {rule.query}",
        )
        yield Step(
            TOLD_OVER,
            f"the resolved notification, which Alertmanager may hold back for {self.group_interval:g} s",
            self.group_interval + rule.interval,
            lambda: notifications.find("resolved", labels),
            lambda: f"Is `send_resolved` on for the receiver? {self._why_not_notified()}",
        )

    def _follow(self, step: Step) -> None:
        """Wait for `step`.

        Raises:
            DrillError: it did not come in time, and what to check; or the trainer has ended.
            StopRequested: a signal came.
        """
        started, trouble = time.monotonic(), ""
        allowed = step.seconds + self.options.patience
        if not self.console.is_terminal:
            self._say(f"waiting for {step.waiting} (at most {allowed:.0f} s)")
        with self.console.status("") as status:
            while True:
                self.drilled.observe()
                try:
                    event = step.look()
                    trouble = ""
                except (OSError, ValueError, LookupError) as error:
                    event, trouble = None, f" (the last look failed: {_reason(error)})"
                if event is not None:
                    break
                waited = time.monotonic() - started
                if waited > allowed:
                    raise DrillError(
                        f"this step did not come within {allowed:.0f} s: {step.name}{trouble}\n{self._advice(step)}"
                    )
                status.update(escape(f"waiting for {step.waiting}: {waited:.0f} s of at most {allowed:.0f} s{trouble}"))
                self._pause()
        self.timeline.append((step, event))
        self._say(f"{event.time - self.began:8.1f} s  {step.name}" + (f"  ({event.note})" if event.note else ""))

    def _advice(self, step: Step) -> str:
        try:
            return step.advice()
        except (OSError, ValueError, LookupError) as error:
            return f"Asking why failed as well: {_reason(error)}"

    def _alert_in_alertmanager(self) -> Event | None:
        alert = self.alertmanager.alert(self.labels)
        if alert is None:
            return None
        receivers = ", ".join(receiver["name"] for receiver in alert["receivers"])
        return Event(datetime.fromisoformat(alert["updatedAt"]).timestamp(), f"for {receivers}")

    def _why_not_scraped(self) -> str:
        target = self.prometheus.target(self.options.run)
        if target is not None:
            return (
                f"Prometheus knows the target {target['scrapeUrl']}, health {target['health']}"
                + (f": {target['lastError']}" if target["lastError"] else "")
                + f". Can it be reached from Prometheus, and do relabelings keep the label {RUN_LABEL} and the metrics?"
            )
        files = [pattern for job in self.jobs for discovery in job["file_sd_configs"] for pattern in discovery["files"]]
        return (
            f"Prometheus does not know the target. It reads {', '.join(files)}; the drill's target file is "
            f"{self.drilled.target_file()} (--targets-dir)."
        )

    def _why_no_alert(self) -> str:
        rule = self.prometheus.critical_rule()
        if rule is None:
            return f"Prometheus no longer has the rule {CV_CRITICAL.name}; was its configuration changed?"
        if rule.error:
            return f"The rule fails: {rule.error}"
        if self.drilled.recovered is not None:
            return (
                "The gradient was no longer critical before the alert fired: let it be critical for longer with --hold."
            )
        series = self.prometheus.get("query", query=f"{GRADIENT_CV.name}{{{RUN_LABEL}={quoted(self.options.run)}}}")
        seen = [f"{sample['metric']} is {sample['value'][1]}" for sample in series["result"]]
        return f"The rule asks for {rule.query}; the run's series: {'; '.join(seen) or 'none'}."

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
        to = ", ".join(receiver["name"] for receiver in alert["receivers"]) if alert else "its receivers"
        failed = self.alertmanager.failed_notifications()
        attempts = "; ".join(f"{count:.0f} by {integration}" for integration, count in failed.items()) or "none"
        return (
            f"Alertmanager routes the alert to {to}; attempts to deliver that failed since it started: {attempts}. "
            f"Does this receiver's webhook lead to the one that writes {self._receiver()}, and does that run? "
            "Has its route `mute_time_intervals`?"
        )

    def _receiver(self) -> str:
        if self.receiver is None:
            return f"{self.options.receiver_log} (--receiver-log)"
        return f"to port {self.options.receiver_port} (--receiver-port)"

    def _print_timeline(self) -> None:
        table = Table(box=box.SIMPLE_HEAD, title=f"Fire drill {self.options.run}", title_justify="left")
        for column, justify in (("step", "left"), ("time", "left"), ("at [s]", "right"), ("delta [s]", "right")):
            table.add_column(escape(column), justify=justify, no_wrap=True)
        table.add_column("seen", overflow="fold")
        seen = {step.name: event for step, event in self.timeline}
        before = self.began
        for name, event in {"drill started": Event(self.began), **seen}.items():
            table.add_row(
                name,
                datetime.fromtimestamp(event.time).strftime("%H:%M:%S"),
                f"{event.time - self.began:.1f}",
                f"{event.time - before:+.1f}",
                escape(event.note) if name not in (NOTIFIED, TOLD_OVER) else "",
            )
            before = event.time
        self.console.print(table)
        for told, cause, after in (
            (NOTIFIED, CROSSED, "after the gradient crossed the threshold"),
            (TOLD_OVER, RECOVERED, "after the gradient was no longer critical"),
        ):
            if told in seen:
                self._say(f"Told {seen[told].time - seen[cause].time:.1f} s {after}: {seen[told].note}")


def _json(url: str) -> Any:
    with _opener.open(url, timeout=5) as answer:
        return json.load(answer)


def _samples(url: str) -> Iterator[Any]:
    with _opener.open(url, timeout=5) as answer:
        text = answer.read().decode()
    for family in text_string_to_metric_families(text):
        yield from family.samples


def _reason(error: Exception) -> str:
    reason = getattr(error, "reason", None) or error
    return str(getattr(reason, "strerror", None) or reason) or type(error).__name__


_UNITS = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800, "y": 31536000}


def _seconds(duration: str) -> float:
    """Seconds of a duration as Prometheus and Alertmanager write it: 1m30s -> 90.0."""
    return sum(float(number) * _UNITS[unit] for number, unit in re.findall(r"(\d+)(ms|[smhdwy])", duration))


def _routes(route: dict[str, Any], labels: Mapping[str, str], inherited: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Routes that an alert with `labels`, and perhaps others, takes through Alertmanager's routing tree."""
    own = {name: route.get(name, value) for name, value in inherited.items()}
    taken = False
    for child in route.get("routes", []):
        matchers = list(_matchers(child))
        if all(match(labels[name]) for name, match in matchers if name in labels):
            yield from _routes(child, labels, own)
            certain = all(name in labels for name, _ in matchers)
            taken |= certain
            if certain and not child.get("continue"):
                break
    if not taken:
        yield own


def _matchers(route: dict[str, Any]) -> Iterator[tuple[str, Callable[[str], bool]]]:
    """Label names of a route's conditions, each with the test of its value."""
    conditions = [(name, "=", value) for name, value in route.get("match", {}).items()]
    conditions += [(name, "=~", value) for name, value in route.get("match_re", {}).items()]
    for matcher in route.get("matchers", []):
        # Alertmanager gives its configuration back with every value quoted.
        name, operator, value = re.fullmatch(r"\s*(.+?)\s*(=~|!~|!=|=)\s*(.*?)\s*", matcher, re.DOTALL).groups()
        conditions.append((name, operator, json.loads(value) if value.startswith('"') else value))
    for name, operator, value in conditions:
        pattern = re.compile(value if operator.endswith("~") else re.escape(value))
        yield name, lambda text, pattern=pattern, wanted=operator[0] == "=": bool(pattern.fullmatch(text)) == wanted


def _url(text: str) -> str:
    parts = urllib.parse.urlsplit(text)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise argparse.ArgumentTypeError(f"{text!r} is no address such as http://127.0.0.1:9090")
    return text.rstrip("/")


def _port(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is no port from 1 to 65535")
    return int(text)


def _positive(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 < seconds < 1e6:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds above 0")
    return seconds


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    split = arguments.index("--") if "--" in arguments else len(arguments)
    description, _, usage = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m stack.drill",
        usage="%(prog)s [options] [-- trainer options]",
        description=f"{description} {usage}",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    ports = Ports()
    parser.add_argument(
        "--prometheus-url", type=_url, default=ports.url("prometheus"), metavar="URL", help="Prometheus"
    )
    parser.add_argument(
        "--alertmanager-url", type=_url, default=ports.url("alertmanager"), metavar="URL", help="Alertmanager"
    )
    parser.add_argument(
        "--targets-dir", type=Path, default=Path("targets"), help="folder that Prometheus watches for target files"
    )
    parser.add_argument(
        "--receiver-log",
        type=Path,
        default=Path(".stack/notifications.jsonl"),
        metavar="FILE",
        help="file of the running notification receiver, one webhook JSON a line",
    )
    parser.add_argument(
        "--receiver-port",
        type=_port,
        metavar="PORT",
        help="receive the notifications here instead, where a webhook of Alertmanager leads to this port",
        default=argparse.SUPPRESS,
    )
    parser.add_argument("--receiver-address", default="127.0.0.1", metavar="IP", help="address to listen on for them")
    parser.add_argument("--head", default="op", help="action head that gets the whole gradient")
    parser.add_argument(
        "--hold",
        type=_positive,
        metavar="SECONDS",
        help="how long the gradient is critical (default: as long as the notification may take, and the patience)",
        default=argparse.SUPPRESS,
    )
    parser.add_argument(
        "--patience",
        type=_positive,
        default=30.0,
        metavar="SECONDS",
        help="how much longer a step may take than the servers' configuration says",
    )
    parser.add_argument(
        "--run",
        metavar="NAME",
        help="name of the drilled run (default: fire-drill- and the time)",
        default=argparse.SUPPRESS,
    )
    options = parser.parse_args(arguments[:split], argparse.Namespace(receiver_port=None, hold=None, run=None))
    options.run = options.run or time.strftime("fire-drill-%Y%m%d-%H%M%S")
    options.trainer_arguments = arguments[split + 1 :]
    for flag, instead in (("--run", "--run"), ("--targets-dir", "--targets-dir"), ("--drill", "--head and --hold")):
        if any(argument.split("=")[0] == flag for argument in options.trainer_arguments):
            parser.error(f"the trainer's {flag} is set by the drill: use {instead} before the --")
    return FireDrill(options, Console()).run()


if __name__ == "__main__":
    sys.exit(main())
