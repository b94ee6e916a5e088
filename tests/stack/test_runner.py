"""`python -m stack` with the real trainer and servers."""

import json
import os
import pty
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import fetch, free_ports, wait_until
from stand_in import stand_in_grafana

from stack.configuration import Ports
from stack.servers import ROOT, Servers

LONG_RUN = ["--env", "CartPole-v1", "--num-envs", "8", "--total-timesteps", "1000000000"]
SHORT_RUN = ["--env", "CartPole-v1", "--num-envs", "8", "--rollout-steps", "64", "--minibatch-size", "256"]
SHORT_RUN += ["--total-timesteps", "4096"]


class Runner:
    def __init__(
        self, directory: Path, trainer_arguments: list[str], terminal: int | None = None, path: str = os.environ["PATH"]
    ) -> None:
        self.ports = free_ports()
        self.state = directory / "state"
        self.output = directory / "output"
        flags = [f"--{name}-port={getattr(self.ports, name)}" for name in vars(self.ports)]
        command = [sys.executable, "-m", "stack", *flags, f"--state-dir={self.state}", "--", *trainer_arguments]
        with self.output.open("wb") as output:
            self.process = subprocess.Popen(
                command,
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=output if terminal is None else terminal,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
            )

    @property
    def text(self) -> str:
        return self.output.read_text(errors="replace")

    def children(self) -> set[int]:
        pid = self.process.pid
        return {int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()}

    def is_training(self) -> bool:
        assert self.process.poll() is None, self.text
        try:
            metrics = fetch(f"{self.ports.url('metrics')}/metrics")[1]
            return re.search(r"^ppo_updates_total\{.*\} [1-9]", metrics, re.MULTILINE) is not None
        except OSError:
            return False

    def says(self, text: str) -> bool:
        assert self.process.poll() is None, self.text
        return text in self.text

    def wait(self) -> int:
        return self.process.wait(60)


def assert_gone(pids: set[int]) -> None:
    def gone() -> bool:
        return not any(Path(f"/proc/{pid}").exists() for pid in pids)

    wait_until(gone, f"none of the processes {pids} is left", 20)


@pytest.fixture
def run(tmp_path: Path, servers: Servers) -> Iterator:
    runners = []

    def start(trainer_arguments: list[str], **options) -> Runner:
        runners.append(Runner(tmp_path, trainer_arguments, **options))
        return runners[-1]

    yield start
    for runner in runners:
        if runner.process.poll() is None:
            runner.process.terminate()
            runner.process.wait(60)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_all_processes_end_with_the_runner(run, number, code):
    runner = run(LONG_RUN)
    wait_until(runner.is_training, "training")
    children = runner.children()
    assert len(children) >= 4, runner.text
    targets = list((runner.state / "targets").glob("*.json"))
    assert len(targets) == 1

    # Like Ctrl-C in a terminal: to the foreground process group, twice.
    os.killpg(runner.process.pid, number)
    if number != signal.SIGKILL:
        time.sleep(0.3)
        try:
            os.killpg(runner.process.pid, number)
        except ProcessLookupError:
            pass
    assert runner.wait() == code, runner.text
    assert_gone(children)
    if number == signal.SIGKILL:
        assert targets[0].exists(), "after a crash the trainer must stay in service discovery, so that it is seen"
    else:
        assert not targets[0].exists(), "the trainer was not given the time to end cleanly"
        assert list((runner.state / "checkpoints").rglob("*.pt")), "nothing to go on from"
        assert "Traceback" not in runner.text
    for name in ("prometheus", "alertmanager", "receiver", "metrics"):
        socket.create_server(("127.0.0.1", getattr(runner.ports, name))).close()


def test_the_servers_outlive_training(run, tmp_path):
    path = f"{stand_in_grafana(tmp_path) / 'bin'}:{os.environ['PATH']}"
    runner = run([*SHORT_RUN, "--checkpoint-dir", str(tmp_path / "own")], path=path)
    wait_until(lambda: runner.says("The servers stay up"), "the end of training is said")
    api = runner.ports.url("prometheus") + "/api/v1"

    def jobs() -> set[str]:
        targets = json.loads(fetch(f"{api}/targets")[1])["data"]["activeTargets"]
        return {target["labels"]["job"] for target in targets if target["health"] == "up"}

    wait_until(lambda: jobs() == {"prometheus", "alertmanager"}, "the servers are scraped")
    rules = json.loads(fetch(f"{api}/rules")[1])["data"]["groups"]
    assert rules, "the alert rules are not loaded"
    assert fetch(runner.ports.url("alertmanager") + "/-/ready")[0] == 200
    assert list((tmp_path / "own").rglob("*.pt")) and not (runner.state / "checkpoints").exists()
    for name in ("prometheus", "alertmanager"):
        assert runner.ports.url(name) in runner.text

    assert runner.text.startswith(f"Dashboard      {runner.ports.url('grafana')}/d/ppo-gradient-health\n")
    settings = json.loads(fetch(runner.ports.url("grafana") + "/environment")[1])
    provisioning = Path(settings["GF_PATHS_PROVISIONING"])
    assert runner.ports.url("prometheus") in (provisioning / "datasources/ppo.yml").read_text()
    assert (provisioning / "plugins").is_dir() and Path(settings["GF_PATHS_PLUGINS"]).is_dir()
    assert list(Path(settings["PPO_DASHBOARDS_PATH"]).glob("*.json"))

    body = {"alerts": [{"status": "firing", "labels": {"alertname": "Example"}, "annotations": {"summary": "seen"}}]}
    assert fetch(runner.ports.url("receiver") + "/", json.dumps(body).encode())[0] == 200
    wait_until(lambda: runner.says("FIRING    Example  seen"), "the notification is shown")
    assert json.loads((runner.state / "notifications.jsonl").read_text()) == body

    runner.process.send_signal(signal.SIGTERM)
    assert runner.wait() == 143


def test_a_server_that_dies_is_named_with_the_end_of_its_log(run):
    runner = run(LONG_RUN)
    wait_until(runner.is_training, "training")
    for pid in runner.children():
        if "alertmanager" in Path(f"/proc/{pid}/cmdline").read_text():
            os.kill(pid, signal.SIGKILL)
    wait_until(lambda: runner.says("alertmanager has ended with exit code 137"), "the death is told")
    assert "alertmanager.log" in runner.text and "Listening on" in runner.text
    assert runner.is_training(), "training must go on"
    query = runner.ports.url("prometheus") + "/api/v1/query?query=ppo_gradient_cv{job=%22ppo%22,run=~%22.%2B%22}"
    wait_until(lambda: json.loads(fetch(query)[1])["data"]["result"], "the run is scraped and known by its name")


def test_in_a_terminal_notifications_appear_beside_the_display(run):
    controller, terminal = pty.openpty()
    runner = run(LONG_RUN, terminal=terminal)
    os.close(terminal)
    os.set_blocking(controller, False)
    shown = bytearray()

    def read() -> bytes:
        try:
            while chunk := os.read(controller, 65536):
                shown.extend(chunk)
        except OSError:  # nothing to read now, or the other side is closed
            pass
        return bytes(shown)

    wait_until(lambda: b"Flow:" in read(), "the live display")
    body = {"alerts": [{"status": "firing", "labels": {"alertname": "Example"}, "annotations": {"summary": "seen"}}]}
    fetch(runner.ports.url("receiver") + "/", json.dumps(body).encode())
    wait_until(lambda: b"Example" in read(), "the notification is shown")
    runner.process.send_signal(signal.SIGINT)
    wait_until(lambda: (read(), runner.process.poll())[1] is not None, "the end")
    assert runner.process.returncode == 130
    assert read().count(b"seen") == 1, "a notification is shown once"
    os.close(controller)


def test_a_trainer_that_cannot_start_ends_all(run):
    runner = run(["--no-such-option"])
    assert runner.wait() == 1
    assert "trainer ended with exit code 2 before it was ready" in runner.text


@pytest.mark.parametrize("name", ["prometheus", "alertmanager", "receiver", "metrics"])
def test_a_taken_port_is_named_with_its_flag_before_anything_starts(name, tmp_path):
    ports = free_ports()
    with socket.create_server(("127.0.0.1", getattr(ports, name))):
        flags = [f"--{each}-port={getattr(ports, each)}" for each in vars(ports)]
        command = [sys.executable, "-m", "stack", *flags, f"--state-dir={tmp_path / 'state'}"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.strip() == (f"error: port {getattr(ports, name)} is in use; choose another with --{name}-port")
    assert not (tmp_path / "state").exists()


def test_default_ports_are_those_of_the_files_in_the_repository():
    prometheus = (ROOT / "prometheus.yml").read_text()
    assert f"127.0.0.1:{Ports().prometheus}" in prometheus and f"127.0.0.1:{Ports().alertmanager}" in prometheus
    assert f"127.0.0.1:{Ports().receiver}" in (ROOT / "alerts/alertmanager.yml").read_text()


def test_prometheus_accepts_the_configuration(servers):
    command = [servers.promtool, "check", "config", ROOT / "prometheus.yml"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    "flag", ["--metrics-port=1", "--metrics-address=::", "--targets-dir=x", "--metrics-target=a:1"]
)
def test_what_the_stack_sets_itself_is_refused_behind_the_dashes(flag):
    done = subprocess.run(
        [sys.executable, "-m", "stack", "--", flag], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2 and f"the trainer's {flag.split('=')[0]} is set by the stack" in done.stderr


def test_help_for_the_trainer_starts_nothing():
    done = subprocess.run(
        [sys.executable, "-m", "stack", "--", "--help"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0 and done.stdout.startswith("usage: python -m trainer")
