"""Real servers for tests: each on a free port of 127.0.0.1, each ended with its test."""

import itertools
import json
import os
import random
import re
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import pytest
import yaml

import trainer.__main__
from stack import configuration
from stack.configuration import Ports
from stack.processes import ChildProcess
from stack.servers import ROOT, Servers, ServersMissing, package_root, provide

# In the background of a shell SIGINT is ignored, under nohup SIGHUP. Trainers would inherit that, but no handler.
signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
    signal.signal(signal.SIGHUP, lambda *_: None)

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run in parallel, and waiting torch threads use the CPU

# Put before the command of a trainer that trains until its test ends, so that other tests get the CPU first.
GENTLY = ("nice", "-n", "5")

Result = TypeVar("Result")
_MILLISECONDS = {"s": 1_000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}
_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def wait_until(probe: Callable[[], Result], what: str, seconds: float = 60.0) -> Result:
    """The first true result of `probe`; fails the test when there is none within `seconds`."""
    deadline = time.monotonic() + seconds
    while not (result := probe()):
        if time.monotonic() > deadline:
            pytest.fail(f"not within {seconds:.0f} s: {what}")
        time.sleep(0.1)
    return result


def fetch(url: str, body: bytes | None = None) -> tuple[int, str]:
    """Status and text of the answer to GET, or to POST where there is a body."""
    try:
        with _opener.open(urllib.request.Request(url, data=body), timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def _is_free(port: int) -> bool:
    with socket.socket() as candidate:
        candidate.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            candidate.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


# Ports of this pytest-xdist worker only, below those that Linux gives to connections.
_first = 20_000 + 1_500 * int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:])
_ports = filter(_is_free, itertools.cycle(random.sample(range(_first, _first + 1_500), 1_500)))


def free_ports() -> Ports:
    """Five different ports that are free, and that nobody else takes until they are used."""
    return Ports(*itertools.islice(_ports, 5))


@dataclass(frozen=True)
class Observability:
    """Prometheus, Alertmanager and receiver that run, configured by the repository's own files.

    Only ports and durations differ from those files: everything is scraped every second, and rules and routes are
    thirty times as fast, their windows too. Thresholds are untouched.
    """

    ports: Ports
    targets: Path  # folder that Prometheus watches for target files
    jsonl: Path  # what the receiver writes
    processes: dict[str, ChildProcess]

    @property
    def prometheus_url(self) -> str:
        return self.ports.url("prometheus")

    @property
    def alertmanager_url(self) -> str:
        return self.ports.url("alertmanager")

    @property
    def receiver_url(self) -> str:
        return self.ports.url("receiver")

    def query(self, expression: str) -> list[dict[str, Any]]:
        """Result of an instant query, as Prometheus' HTTP API gives it."""
        parameters = urllib.parse.urlencode({"query": expression})
        answer = json.loads(fetch(f"{self.prometheus_url}/api/v1/query?{parameters}")[1])
        assert answer["status"] == "success", answer
        return answer["data"]["result"]

    def rules(self) -> list[dict[str, Any]]:
        """All rules that Prometheus loaded, with health and state."""
        groups = json.loads(fetch(f"{self.prometheus_url}/api/v1/rules")[1])["data"]["groups"]
        return [rule for group in groups for rule in group["rules"]]

    def alerts(self) -> list[dict[str, Any]]:
        """Alerts in Alertmanager, with `labels` and `status` (`state`, `inhibitedBy`)."""
        return json.loads(fetch(f"{self.alertmanager_url}/api/v2/alerts")[1])

    def notifications(self) -> list[dict[str, Any]]:
        """Webhook messages that were delivered, in order."""
        return [json.loads(line) for line in self.jsonl.read_text().splitlines()] if self.jsonl.exists() else []

    def notified(self, status: str, **labels: str) -> list[dict[str, Any]]:
        """Delivered alerts with this status (firing, resolved) and these labels."""
        return [
            alert
            for notification in self.notifications()
            for alert in notification["alerts"]
            if alert["status"] == status and labels.items() <= alert["labels"].items()
        ]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--no-processes", action="store_true", help="skip tests where they start another process")


@pytest.fixture(scope="session", autouse=True)
def _no_processes(request: pytest.FixtureRequest) -> None:
    def refuse(event: str, _: object) -> None:
        starts = event in ("subprocess.Popen", "os.fork", "os.forkpty")
        if starts and threading.current_thread() is threading.main_thread():  # elsewhere it would be a failure
            pytest.skip("starts another process")

    if request.config.getoption("--no-processes"):
        sys.addaudithook(refuse)


@pytest.fixture(scope="session", autouse=True)
def _temporary_files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What tests and their processes leave in the temporary directory goes with pytest's own folder."""
    with pytest.MonkeyPatch.context() as patch:
        folder = str(tmp_path_factory.mktemp("temporary"))
        patch.setenv("TMPDIR", folder)
        patch.setattr(tempfile, "tempdir", folder)
        yield


# Lets a test run twice: with the servers at hand, which on Debian 12 are the oldest that are supported, and with the
# newest that Debian has. Where those cannot be had the second run is skipped.
every_servers = pytest.mark.parametrize("servers", ["at hand", "newest"], indirect=True)
_used: set[str] = set()


@pytest.fixture(scope="session")
def servers(request: pytest.FixtureRequest) -> Servers:
    """Executables of Prometheus and Alertmanager."""
    newest = getattr(request, "param", None) == "newest"
    try:
        found = provide(newest=newest)
    except ServersMissing as error:
        if newest:
            pytest.skip(f"the newest servers: {error}")
        raise
    _used.add(found.versions())
    return found


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for versions in sorted(_used):
        terminalreporter.write_line(f"servers used: {versions}")


@pytest.fixture(scope="session")
def node_exporter() -> Path:
    """Debian's node_exporter, from PATH or unpacked beside the other servers."""
    name = "prometheus-node-exporter"
    return Path(shutil.which(name) or package_root(name) / "usr/bin" / name)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., ChildProcess]]:
    """Starts a process, waits until it is ready, and ends it after the test.

    Takes the arguments of `ChildProcess`; without `output`, a log in the test's folder.
    """
    processes: list[ChildProcess] = []

    def start_process(name: str, command: list[str | Path], ready_url: str, **options: Any) -> ChildProcess:
        options.setdefault("output", tmp_path / f"{name}.log")
        process = ChildProcess(name, command, ready_url, directory=options.pop("directory", ROOT), **options)
        processes.append(process)

        def ready() -> bool:
            assert process.exit_code is None, f"{name} ended with {process.exit_code}:\n{process.log_tail()}"
            return process.is_ready

        wait_until(ready, f"{name} is ready")
        return process

    yield start_process
    for process in reversed(processes):
        process.stop()


@pytest.fixture
def start_receiver(start: Callable[..., ChildProcess], tmp_path: Path) -> Callable[[int], tuple[ChildProcess, Path]]:
    """Starts a receiver on a port; gives the process and its JSON lines file. Its stdout is in the log."""

    def start_it(port: int) -> tuple[ChildProcess, Path]:
        jsonl = tmp_path / "notifications.jsonl"
        command = [sys.executable, "-m", "stack.receiver", "--port", str(port), "--output", jsonl]
        return start("receiver", command, f"http://127.0.0.1:{port}/-/healthy"), jsonl

    return start_it


@pytest.fixture
def start_alertmanager(start: Callable[..., ChildProcess], servers: Servers, tmp_path: Path):
    """Starts an Alertmanager with a configuration (as a dict) on a port."""

    def start_it(port: int, content: dict[str, Any]) -> ChildProcess:
        path = configuration.write_yaml(tmp_path / "alertmanager.yml", content, "alerts/alertmanager.yml")
        command = [
            servers.alertmanager,
            f"--config.file={path}",
            f"--storage.path={tmp_path / 'alertmanager'}",
            f"--web.listen-address=127.0.0.1:{port}",
            "--cluster.listen-address=",
        ]
        return start("alertmanager", command, f"http://127.0.0.1:{port}/-/ready")

    return start_it


@pytest.fixture
def start_prometheus(start: Callable[..., ChildProcess], servers: Servers, tmp_path: Path):
    """Starts a Prometheus with a configuration (as a dict) on a port."""

    def start_it(port: int, content: dict[str, Any]) -> ChildProcess:
        path = configuration.write_yaml(tmp_path / "prometheus.yml", content, "prometheus.yml")
        command = [
            servers.prometheus,
            f"--config.file={path}",
            f"--storage.tsdb.path={tmp_path / 'prometheus'}",
            f"--web.listen-address=127.0.0.1:{port}",
            *servers.prometheus_options,
        ]
        return start("prometheus", command, f"http://127.0.0.1:{port}/-/ready")

    return start_it


@pytest.fixture
def start_observability(
    start_receiver, start_alertmanager, start_prometheus, tmp_path: Path
) -> Callable[..., Observability]:
    """Starts all three with copies of the repository's files, in which rules and routes are `speed` times as fast."""

    def start_all(speed: int = 30) -> Observability:
        ports, targets = free_ports(), tmp_path / "targets"
        targets.mkdir()

        alertmanager = configuration.alertmanager_configuration(ports)
        alertmanager["route"] = yaml.safe_load(hurried(yaml.safe_dump(alertmanager["route"]), speed))
        for route in alertmanager["route"]["routes"]:
            if "group_by" in route:
                route["group_wait"] = "4s"  # for a crowd that comes within some scrapes, which are no faster

        prometheus = configuration.prometheus_configuration(ports, targets)
        prometheus["global"].update(scrape_interval="1s", evaluation_interval="1s")
        for job in prometheus["scrape_configs"]:
            job.pop("scrape_interval", None)
            job.pop("scrape_timeout", None)
        prometheus["rule_files"] = []
        for source in sorted((ROOT / "alerts").glob("*.rules.yml")):
            rules = tmp_path / source.name
            rules.write_text(hurried(source.read_text(), speed))
            prometheus["rule_files"].append(str(rules))

        receiver, jsonl = start_receiver(ports.receiver)
        processes = {
            "receiver": receiver,
            "alertmanager": start_alertmanager(ports.alertmanager, alertmanager),
            "prometheus": start_prometheus(ports.prometheus, prometheus),
        }
        return Observability(ports, targets, jsonl, processes)

    return start_all


def hurried(text: str, speed: int) -> str:
    """`text` with every duration, such as 5m, divided by `speed`."""
    return re.sub(
        r"(?<![\w.])(\d+)([smhd])(?!\w)", lambda found: f"{int(found[1]) * _MILLISECONDS[found[2]] // speed}ms", text
    )


@pytest.fixture
def cli(monkeypatch, capsys) -> Callable[..., tuple[str, str]]:
    """Runs `python -m trainer ...` to its end, in this process, which has torch already; output and errors."""

    def run(*arguments: object, code: int = 0) -> tuple[str, str]:
        monkeypatch.setattr(sys, "argv", ["trainer", *map(str, arguments)])
        capsys.readouterr()
        exit_code = trainer.__main__.main()
        out, err = capsys.readouterr()
        assert exit_code == code, (out, err)
        return out, err

    return run


@pytest.fixture
def clock(monkeypatch) -> SimpleNamespace:
    """The monitor's time, which moves only when the test moves it."""
    clock = SimpleNamespace(now=1000.0)
    stand_in = SimpleNamespace(monotonic=lambda: clock.now, time=lambda: 1.7e9 + clock.now)
    monkeypatch.setattr("exporter.monitor.time", stand_in)
    return clock
