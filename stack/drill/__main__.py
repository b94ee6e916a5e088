"""Fire drill: does the running stack page somebody when a run goes bad?

Starts its own real trainer, drives it to critical and back, and follows its alert through Prometheus,
Alertmanager and the receiver. The exit code is 0 only if every step was seen. Everything after `--` goes to the
drilled trainer: `make drill ARGS="-- --device cuda"`.
"""

import argparse
import contextlib
import sys
import tempfile
import time
import urllib.parse
from datetime import datetime
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from stack.configuration import Ports
from stack.drill.clients import ALERT, NO_ANSWER, Alertmanager, DrillError, Event, Notifications, Prometheus, reason
from stack.drill.steps import CROSSED, NOTIFIED, NOTIFIED_RESOLVED, RECOVERED, Drill, DrilledRun, Step
from stack.processes import POLL_INTERVAL, StopRequested, StopSignal

_CAUSES = {NOTIFIED: CROSSED, NOTIFIED_RESOLVED: RECOVERED}


class Command:
    """One drill, and its report. `run()` is called once, from the main thread."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.console = Console()
        self.seen: dict[str, Event] = {}
        self.stop_signal = StopSignal()
        self.drilled: DrilledRun | None = None

    def run(self) -> int:
        """Drill and clean up. Returns the exit code."""
        try:
            with tempfile.TemporaryDirectory(prefix="fire-drill-") as work:
                try:
                    self._drill(Path(work))
                finally:
                    if self.drilled:
                        self.drilled.end()
        except StopRequested:
            self._say("Interrupted; the drill's trainer and target are gone.")
            return 128 + self.stop_signal.number
        except DrillError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        return 0

    def _say(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _drill(self, work: Path) -> None:
        options = self.options
        prometheus = Prometheus(options.prometheus_url, vars(options).get("prometheus_http_config"))
        alertmanager = Alertmanager(options.alertmanager_url, vars(options).get("alertmanager_http_config"))
        rule = self._check_stack(prometheus, alertmanager)
        notifications = Notifications(options.receiver_log)
        self._say(
            f"Fire drill {options.run}: critical from the first scrape until the notification arrives. "
            f"The alert waits {rule['duration']:g} s before it fires, {rule['keepFiringFor']:g} s before it resolves.\n"
            f"\n{'step':<35}{'time':<10}{'at [s]':>8}{'delta [s]':>11}   seen"
        )
        self.stop_signal.check()
        self.drilled = DrilledRun(options.run, options.head, options.targets_dir, work, options.trainer_arguments)
        drill = Drill(self.drilled, prometheus, alertmanager, notifications, rule, options.notification_wait)
        self._report("drill started", Event(drill.began))
        for step in drill.steps():
            self._report(step.name, self._follow(step))

    def _check_stack(self, prometheus: Prometheus, alertmanager: Alertmanager) -> dict:
        """The drilled rule. Raises DrillError if something that a drill needs is missing."""
        server = prometheus
        try:
            rule = prometheus.rule()
            server = alertmanager
            alertmanager.alert(ALERT)
        except NO_ANSWER as error:
            name = type(server).__name__
            raise DrillError(
                f"{name} does not answer at {server.url}: {reason(error)}\n"
                f"`make run` starts the stack; --{name.lower()}-url names another one"
            ) from error
        if not self.options.targets_dir.is_dir():
            raise DrillError(
                f"there is no folder {self.options.targets_dir}, in which Prometheus would find the drilled trainer; "
                "--targets-dir names another one"
            )
        if not self.options.receiver_log.is_file():
            raise DrillError(
                f"there is no file {self.options.receiver_log}, into which the receiver of `make run` writes "
                "notifications; --receiver-log names another one, from `python -m stack.receiver --output FILE`"
            )
        if rule is None:
            raise DrillError(
                f"Prometheus at {prometheus.url} has no rule {ALERT['alertname']} with severity {ALERT['severity']}: "
                "load alerts/ppo.rules.yml (`rule_files`)"
            )
        return rule

    def _follow(self, step: Step) -> Event:
        """Wait for `step`.

        Raises:
            DrillError: the step did not come in time, with what to check; or the trainer has ended.
            StopRequested: a signal came.
        """
        started, allowed = time.monotonic(), step.seconds + self.options.patience
        with self.console.status("") as status:
            while True:
                self.stop_signal.check()
                if (code := self.drilled.process.exit_code) is not None:
                    raise DrillError(f"the trainer has ended with exit code {code}:\n{self.drilled.process.log_tail()}")
                trouble = ""
                try:
                    if event := step.look():
                        return event
                except NO_ANSWER as error:
                    trouble = f" (the last check failed: {reason(error)})"
                waited = time.monotonic() - started
                if waited > allowed:
                    raise DrillError(
                        f"this step did not come within {allowed:.0f} s: {step.name}{trouble}\n{_advice(step)}"
                    )
                status.update(escape(f"waiting for: {step.name}, {waited:.0f} s of at most {allowed:.0f} s{trouble}"))
                time.sleep(POLL_INTERVAL)

    def _report(self, name: str, event: Event) -> None:
        times, note = [seen.time for seen in self.seen.values()] or [event.time], event.note
        if name in _CAUSES:
            note += f", {event.time - self.seen[_CAUSES[name]].time:.1f} s after the {_CAUSES[name]}"
        clock = datetime.fromtimestamp(event.time).strftime("%H:%M:%S")
        row = f"{name:<35}{clock:<10}{event.time - times[0]:8.1f}{event.time - times[-1]:+11.1f}   {note}"
        self._say(row.rstrip())
        self.seen[name] = event


def _advice(step: Step) -> str:
    try:
        return step.advice()
    except NO_ANSWER as error:
        return f"Asking why failed as well: {reason(error)}"


def _url(text: str) -> str:
    with contextlib.suppress(ValueError):
        parts = urllib.parse.urlsplit(text)
        if parts.scheme in ("http", "https") and parts.netloc and "@" not in text:
            return text.rstrip("/")
    # Do not show the text: it may hold a password.
    raise argparse.ArgumentTypeError(
        "give an address such as http://127.0.0.1:9090; for a password, name a file with --...-http-config"
    )


def _seconds(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 < (number := float(text)) < 1e6:
            return number
    raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above 0 and below 1000000")


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    split = arguments.index("--") if "--" in arguments else len(arguments)
    parser = argparse.ArgumentParser(
        prog="python -m stack.drill",
        usage="%(prog)s [options] [-- trainer options]",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add, ports = parser.add_argument, Ports()
    for name in ("prometheus", "alertmanager"):
        add(f"--{name}-url", type=_url, default=ports.url(name), metavar="URL", help=name.capitalize())
        text = "file with its credentials and CA, in the format of `promtool --http.config.file`"
        add(f"--{name}-http-config", type=Path, default=argparse.SUPPRESS, metavar="FILE", help=text)
    text = "folder that Prometheus watches for target files"
    add("--targets-dir", type=Path, default=Path("targets"), metavar="FOLDER", help=text)
    text = "file of the notification receiver, one webhook JSON a line"
    add("--receiver-log", type=Path, default=Path(".stack/notifications.jsonl"), metavar="FILE", help=text)
    text = "how long Alertmanager may hold a notification back: at least `group_wait` plus `group_interval`"
    add("--notification-wait", type=_seconds, default=300.0, metavar="SECONDS", help=text)
    text = "extra time for every step, beyond the waits of rule and Alertmanager: at least two scrape intervals"
    add("--patience", type=_seconds, default=120.0, metavar="SECONDS", help=text)
    add("--head", default="op", help="action head that gets the whole gradient")
    add("--run", default=time.strftime("fire-drill-%Y%m%d-%H%M%S"), metavar="NAME", help="name of the drilled run")
    options = parser.parse_args(arguments[:split])
    options.trainer_arguments = arguments[split + 1 :]
    for flag, instead in (("--run", "--run"), ("--targets-dir", "--targets-dir"), ("--drill", "--head")):
        if any(argument.split("=")[0] == flag for argument in options.trainer_arguments):
            parser.error(f"the trainer's {flag} is set by the drill: use {instead} before the --")
    return Command(options).run()


if __name__ == "__main__":
    sys.exit(main())
