"""Runs trainer, Prometheus, Alertmanager, notification receiver and Grafana together.

Ctrl-C ends all of them, the trainer first. When training ends by itself the servers stay up.
Everything after `--` goes to the trainer: `make run ARGS="--prometheus-port 9091 -- --total-timesteps 100000"`.
"""

import argparse
import contextlib
import errno
import fcntl
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import IO

from grafana.panels import RUN_DASHBOARD_UID
from stack import configuration, grafana, servers
from stack.configuration import Ports
from stack.processes import POLL_INTERVAL, START_TIMEOUT, ChildProcess, StopRequested, StopSignal
from stack.servers import ROOT, Servers

TRAINER_STOP_TIMEOUT = 60.0  # seconds; the trainer first finishes its gradient step
RETENTION = "15d"


class StartError(Exception):
    """The stack cannot start; the message says why."""


class TerminalMessages:
    """A file with the messages that the terminal shows beside training, and how much of it was shown.

    The receiver writes notifications into it, the runner news of the servers. In a terminal the trainer
    prints new lines above its live display; at all other times the runner prints them.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._shown = 0

    def write(self, text: str) -> None:
        with self.path.open("a") as file:
            file.write(text.rstrip("\n") + "\n")

    def show(self) -> None:
        """Print new lines, if complete."""
        new = self._unread()
        if new:
            sys.stdout.write(new.decode(errors="replace"))
            sys.stdout.flush()

    def skip(self) -> None:
        """Leave new lines to the trainer."""
        self._unread()

    def _unread(self) -> bytes:
        with self.path.open("rb") as file:
            file.seek(self._shown)
            new = file.read()
        new = new[: new.rfind(b"\n") + 1]
        self._shown += len(new)
        return new


class Stack:
    """One run of everything. `run()` is called once, from the main thread."""

    def __init__(self, ports: Ports, state: Path, trainer_arguments: list[str]) -> None:
        self.ports = ports
        self.state = state
        self.trainer_arguments = trainer_arguments
        self.logs = state / "logs"
        self.targets = ROOT / "targets" if state.resolve() == ROOT / ".stack" else state / "targets"
        self.messages = TerminalMessages(self.logs / "messages.log")
        self.grafana: tuple[list[str], Path] | None = None  # its command and its home folder
        self.servers: list[ChildProcess] = []
        self.trainer: ChildProcess | None = None
        self.stop_signal = StopSignal()

    def run(self) -> int:
        """Start everything, wait for the end, stop everything. Returns the exit code."""
        code = 0
        try:
            self.grafana = grafana.find()
            _check_ports({name: port for name, port in vars(self.ports).items() if name != "grafana" or self.grafana})
            with self._lock(), contextlib.suppress(StopRequested):
                try:
                    self._start()
                    self._watch()
                finally:
                    self._stop()
        except (StartError, servers.ServersMissing) as error:
            print(f"error: {error}", file=sys.stderr)
            code = 1
        return 128 + self.stop_signal.number if self.stop_signal.number else code

    def _lock(self) -> IO[str]:
        self.logs.mkdir(parents=True, exist_ok=True)
        lock = (self.state / "lock").open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise StartError(f"another stack is running in {_shown(self.state)}; choose another --state-dir") from None
        return lock

    def _start(self) -> None:
        found = servers.provide()
        prometheus_yml, alertmanager_yml = self._configurations()
        _check(found.promtool, "check", "config", prometheus_yml)
        _check(found.amtool, "check-config", alertmanager_yml)
        self.targets.mkdir(parents=True, exist_ok=True)

        self._start_server("receiver", "/-/healthy", self._receiver_command(), output=self.messages.path)
        self._start_server("alertmanager", "/-/ready", self._alertmanager_command(found, alertmanager_yml))
        self._start_server("prometheus", "/-/ready", self._prometheus_command(found, prometheus_yml))
        if self.grafana:
            self._start_server("grafana", "/api/health", *self._grafana_command(*self.grafana))
        for server in self.servers:
            self._wait_until_ready(server)

        if self.grafana:
            print(f"Dashboard      {self.ports.url('grafana')}/d/{RUN_DASHBOARD_UID}")
            print(f"Status page    {self.ports.url('metrics')}/")
        else:
            why = "found no Grafana with its conf/defaults.ini; `make grafana` fetches one"
            print(f"Status page    {self.ports.url('metrics')}/  look here: {why}")
        print(f"Prometheus     {self.ports.url('prometheus')}")
        print(f"Alertmanager   {self.ports.url('alertmanager')}")
        print(f"Notifications  {_shown(self.state / 'notifications.jsonl')}")
        print(f"Server logs    {_shown(self.logs)}", flush=True)

        self.stop_signal.check()
        self.trainer = ChildProcess("trainer", self._trainer_command(), f"{self.ports.url('metrics')}/metrics")
        self._wait_until_ready(self.trainer)

    def _configurations(self) -> tuple[Path, Path]:
        """prometheus.yml and alertmanager.yml, for these ports and folders."""
        prometheus = configuration.prometheus_configuration(self.ports, self.targets)
        alertmanager = configuration.alertmanager_configuration(self.ports)
        return (
            configuration.write_yaml(self.state / "prometheus.yml", prometheus, "prometheus.yml"),
            configuration.write_yaml(self.state / "alertmanager.yml", alertmanager, "alerts/alertmanager.yml"),
        )

    def _start_server(
        self,
        name: str,
        ready_path: str,
        command: list[str | Path],
        environment: dict[str, str] | None = None,
        output: Path | None = None,
    ) -> None:
        log = self.logs / f"{name}.log"
        files = (output, log) if output else (log, None)
        try:
            server = ChildProcess(name, command, self.ports.url(name) + ready_path, *files, environment, ROOT)
            self.servers.append(server)
        except OSError as error:
            raise StartError(f"cannot start {name}: {error}") from error

    def _prometheus_command(self, found: Servers, configuration_file: Path) -> list[str | Path]:
        return [
            found.prometheus,
            f"--config.file={configuration_file.resolve()}",
            f"--storage.tsdb.path={self.state.resolve() / 'data/prometheus'}",
            f"--storage.tsdb.retention.time={RETENTION}",
            f"--web.listen-address=127.0.0.1:{self.ports.prometheus}",
            f"--web.external-url={self.ports.url('prometheus')}",
            *found.prometheus_options,
        ]

    def _alertmanager_command(self, found: Servers, configuration_file: Path) -> list[str | Path]:
        return [
            found.alertmanager,
            f"--config.file={configuration_file.resolve()}",
            f"--storage.path={self.state.resolve() / 'data/alertmanager'}",
            f"--web.listen-address=127.0.0.1:{self.ports.alertmanager}",
            f"--web.external-url={self.ports.url('alertmanager')}",
            "--cluster.listen-address=",  # a single instance needs no gossip port
        ]

    def _receiver_command(self) -> list[str | Path]:
        notifications = self.state.resolve() / "notifications.jsonl"
        color = "always" if sys.stdout.isatty() and not os.environ.get("NO_COLOR") else "never"
        command = [sys.executable, "-m", "stack.receiver", "--port", str(self.ports.receiver)]
        return [*command, "--output", notifications, "--color", color]

    def _grafana_command(self, command: list[str], home: Path) -> tuple[list[str | Path], dict[str, str]]:
        state = self.state.resolve()
        provisioning = configuration.copy_provisioning(self.ports, state / "grafana-provisioning")
        environment = grafana.environment(self.ports.grafana, state / "data/grafana", provisioning)
        return [*command, "--homepath", home], environment | {"PPO_DASHBOARDS_PATH": str(ROOT / "grafana/dashboards")}

    def _trainer_command(self) -> list[str | Path]:
        command = [sys.executable, "-m", "trainer", "--metrics-address", "127.0.0.1"]
        command += ["--metrics-port", str(self.ports.metrics), "--targets-dir", self.targets.resolve()]
        command += ["--checkpoint-dir", self.state.resolve() / "checkpoints"]
        if sys.stdout.isatty():
            command += ["--follow", self.messages.path.resolve()]
        return [*command, *self.trainer_arguments]

    def _wait_until_ready(self, process: ChildProcess) -> None:
        deadline = time.monotonic() + START_TIMEOUT
        while not process.is_ready:
            self.messages.show()  # the trainer does not show them while it starts
            if process.exit_code is not None:
                if process is self.trainer and process.exit_code == 0:
                    return  # training ended before the first check
                log = f"; the end of {_shown(process.log)}:\n{process.log_tail()}" if process.log else ""
                raise StartError(f"{process.name} ended with exit code {process.exit_code} before it was ready{log}")
            if time.monotonic() > deadline:
                raise StartError(f"{process.name} was not ready within {START_TIMEOUT:.0f} s\n{process.log_tail()}")
            time.sleep(POLL_INTERVAL)
            self.stop_signal.check()

    def _watch(self) -> None:
        """Show messages and report processes that end, until a signal comes."""
        trainer_shows = sys.stdout.isatty()
        running = list(self.servers)
        training = True
        while True:
            if training and (code := self.trainer.exit_code) is not None:
                training = False
                ended = "Training ended." if code == 0 else f"Training ended with exit code {code}."
                self.messages.write(f"{ended} The servers stay up; Ctrl-C ends them.")
            for server in [server for server in running if server.exit_code is not None]:
                running.remove(server)
                self.messages.write(
                    f"{server.name} has ended with exit code {server.exit_code}; the others continue. "
                    f"The end of {_shown(server.log)}:\n{server.log_tail()}"
                )
            if training and trainer_shows:
                self.messages.skip()
            else:
                self.messages.show()
            time.sleep(POLL_INTERVAL)
            self.stop_signal.check()

    def _stop(self) -> None:
        trainer = self.trainer
        if trainer and trainer.exit_code is None:
            if sys.stdout.isatty():
                self.messages.skip()  # the trainer prints earlier lines until it ends
            number = signal.SIGINT if self.stop_signal.number == signal.SIGINT else signal.SIGTERM
            trainer.stop(number, TRAINER_STOP_TIMEOUT)
        elif trainer:
            trainer.stop()
        if self.servers:
            for server in self.servers:
                server.send(signal.SIGTERM)
            for server in self.servers:
                server.stop()
            self.messages.show()
            print("All processes have ended.", flush=True)


def _check_ports(ports: dict[str, int]) -> None:
    """Raise StartError with every port that is not free, and its flag."""
    problems = []
    with contextlib.ExitStack() as held:  # hold all at once, to notice a port given twice
        for name, port in ports.items():
            probe = held.enter_context(socket.socket())
            # Like the servers, ignore lingering connections of an earlier run.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
                probe.listen()
            except OSError as error:
                reason = "is in use" if error.errno == errno.EADDRINUSE else f"cannot be used: {error.strerror}"
                problems.append(f"port {port} {reason}; choose another with --{name}-port")
    if problems:
        raise StartError("\n       ".join(problems))


def _check(tool: Path, *arguments: str | Path) -> None:
    done = subprocess.run([tool, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise StartError(f"{tool.name} {' '.join(map(str, arguments))} failed:\n{done.stdout}")


def _shown(path: Path) -> str:
    """`path` for people: relative to the current folder if it is below it."""
    path = path.resolve()
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def _port(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port from 1 to 65535")
    return int(text)


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    split = arguments.index("--") if "--" in arguments else len(arguments)
    description, _, usage = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m stack",
        usage="%(prog)s [options] [-- trainer options]",
        description=f"{description} {usage}",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    for name, what in (
        ("prometheus", "Prometheus"),
        ("alertmanager", "Alertmanager"),
        ("receiver", "the notification receiver"),
        ("grafana", "Grafana"),
        ("metrics", "the trainer's /metrics"),
    ):
        parser.add_argument(f"--{name}-port", type=_port, default=getattr(Ports, name), help=f"TCP port of {what}")
    parser.add_argument(
        "--state-dir", type=Path, default=Path(".stack"), help="logs, storage, checkpoints, adapted configuration"
    )
    options = parser.parse_args(arguments[:split])
    trainer_arguments = arguments[split + 1 :]
    if {"-h", "--help"} & set(trainer_arguments):
        return subprocess.run([sys.executable, "-m", "trainer", "--help"]).returncode
    for flag, instead in (
        ("--metrics-port", "--metrics-port before the --"),
        ("--metrics-address", "127.0.0.1, where Prometheus looks"),
        ("--metrics-target", "127.0.0.1, where Prometheus looks"),
        ("--targets-dir", "--state-dir before the --"),
    ):
        if any(argument.split("=")[0] == flag for argument in trainer_arguments):
            parser.error(f"the trainer's {flag} is set by the stack: use {instead}")
    ports = Ports(**{name: getattr(options, f"{name}_port") for name in vars(Ports())})
    return Stack(ports, options.state_dir, trainer_arguments).run()


if __name__ == "__main__":
    sys.exit(main())
