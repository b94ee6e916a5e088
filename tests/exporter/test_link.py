"""The life of the exporter process beside that of the training process: start, stop, kill, fork, end."""

import contextlib
import json
import os
import re
import resource
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import fetch, wait_until
from endpoint import UPDATE, trained_aggregator
from runs import exporter_process, names

from exporter import GradientMonitor, MetricsServer, RunAggregator, emit_ppo_update
from exporter.child import PROTOCOL_VERSION, WebConfigError
from exporter.health import STALLED_SECONDS
from stack.servers import ROOT

# Trains no more; its last update was some seconds ago.
TRAINING = """
import ctypes, os, signal, sys, time
from urllib.request import urlopen
from endpoint import trained_aggregator
from exporter import MetricsServer
folder, age, then = sys.argv[1:]
with MetricsServer(trained_aggregator(timestamp_seconds=time.time() - float(age)), port=0) as server:
    server.deliver("r", targets_dir=folder)
    print(server.port, flush=True)
    exec(then)
"""
WAIT = "signal.pause()"
# It has the pipes too. Closing, as a clean end of the worker would, is not its business.
WORKER = """
if os.fork() == 0:
    server.close()
    signal.alarm(60)
    print(os.getpid(), flush=True)
signal.pause()
"""
HANG = "print('hangs', flush=True); ctypes.PyDLL(None).pause()"  # which keeps the interpreter lock
INTERRUPTED = """
try:
    signal.pause()
except KeyboardInterrupt:
    print(urlopen(server.url).status, flush=True)
    raise
"""


class Training:
    """A process that serves a run `r`; `exporter` is the id of its exporter process."""

    def __init__(self, process: subprocess.Popen) -> None:
        self.process = process
        self.port = int(process.stdout.readline())
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        (self.exporter,) = [
            int(pid) for pid in children if b"-m\0exporter" in Path(f"/proc/{pid}/cmdline").read_bytes()
        ]

    def get(self, path: str) -> tuple[int, str]:
        return fetch(f"http://127.0.0.1:{self.port}{path}")

    def is_refused(self) -> bool:
        with socket.socket() as client:
            return client.connect_ex(("127.0.0.1", self.port)) != 0

    def has_exporter(self) -> bool:
        with contextlib.suppress(OSError):
            return Path(f"/proc/{self.exporter}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
        return False


@contextlib.contextmanager
def training(folder: Path, then: str, age: float = 0.0) -> Iterator[Training]:
    with subprocess.Popen(
        [sys.executable, "-c", TRAINING, folder, str(age), then],
        env={**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), str(Path(__file__).parent)))},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        process_group=0,
    ) as process:
        try:
            yield Training(process)
        finally:
            process.kill()


def updates(server: MetricsServer) -> float | None:
    """None while nobody answers."""
    with contextlib.suppress(OSError):
        return float(re.search(r'^ppo_updates_total{run="r"} (\S+)$', fetch(server.url)[1], re.MULTILINE)[1])
    return None


def run_samples(server: MetricsServer) -> list[str]:
    return [line for line in fetch(server.url)[1].splitlines() if 'run="r"' in line]


def test_the_exporter_process_is_there_soon_is_small_and_comes_last():
    with MetricsServer(trained_aggregator(), port=0) as server:
        assert updates(server) == 1.0
        pid = exporter_process()
        usage = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        mapped = set(re.findall(r"site-packages/(\w+)", Path(f"/proc/{pid}/maps").read_text()))
        # Its CPU time, for a machine under test is not quiet.
        assert (int(usage[11]) + int(usage[12])) / os.sysconf("SC_CLK_TCK") < 1.0
        assert not mapped & {"torch", "numpy"}
        assert os.getpriority(os.PRIO_PROCESS, pid) == 19
        assert resource.prlimit(pid, resource.RLIMIT_NOFILE)[0] <= 1024
        assert 0 < resource.prlimit(pid, resource.RLIMIT_DATA)[0] <= 2**30
        assert os.getsid(pid) == os.getsid(0), "the kernel would give a session of its own a share of its own"


def test_a_stopped_exporter_process_costs_training_no_time_and_then_shows_what_is_newest():
    aggregator = trained_aggregator()
    for index in range(100):  # a snapshot that no pipe holds
        aggregator.register_run(f"other-{index}", ["op", "slot"])
    with MetricsServer(aggregator, port=0) as server:
        os.kill(exporter_process(), signal.SIGSTOP)
        longest, sent, until = 0.0, 1, time.monotonic() + 0.5
        while time.monotonic() < until:
            began = time.monotonic()
            emit_ppo_update(UPDATE, run="r", handler=aggregator)
            longest, sent = max(longest, time.monotonic() - began), sent + 1
        assert longest < 5
        os.kill(exporter_process(), signal.SIGCONT)
        wait_until(lambda: updates(server) == sent, "the newest snapshot")


def test_another_exporter_process_takes_the_place_of_one_that_is_killed(tmp_path, caplog):
    aggregator = trained_aggregator()
    with MetricsServer(aggregator, port=0) as server:
        server.deliver("r", targets_dir=tmp_path, textfile_dir=tmp_path)
        before = run_samples(server)
        os.kill(exporter_process(), signal.SIGKILL)
        wait_until(lambda: caplog.messages and updates(server), "another one serves")
        assert run_samples(server) == before
        assert caplog.messages == [f"the exporter process has ended (exit code -9); a new one serves {server.url}"]
        assert names(tmp_path) == {"ppo-r.json", "ppo-r.prom"}
        os.kill(exporter_process(), signal.SIGKILL)
        server.end("r")
        assert names(tmp_path) == set()


def test_exporter_processes_that_end_at_once_are_started_ever_more_rarely():
    killed, until = set(), time.monotonic() + 3.0
    with MetricsServer(trained_aggregator(), port=0):
        while time.monotonic() < until:
            with contextlib.suppress(ValueError):  # there is none now
                killed.add(pid := exporter_process())
                os.kill(pid, signal.SIGKILL)
            time.sleep(0.01)
    assert 2 <= len(killed) <= 4


def test_a_port_that_is_taken_by_others_meanwhile_is_told_once_and_served_when_it_is_free(caplog, monkeypatch):
    monkeypatch.setattr("exporter.link.LONGEST_PAUSE_SECONDS", 0.1)

    def take() -> socket.socket | None:
        with contextlib.suppress(OSError):
            return socket.create_server(("127.0.0.1", server.port))

    aggregator = trained_aggregator()
    with MetricsServer(aggregator, port=0) as server:
        os.kill(exporter_process(), signal.SIGKILL)
        with wait_until(take, "the port is free"):
            for _ in range(3):
                emit_ppo_update(UPDATE, run="r", handler=aggregator)
                with pytest.raises(OSError, match="Address already in use"):
                    server.flush()
            (message,) = caplog.messages
            assert "a new one cannot start: cannot serve /metrics on 127.0.0.1:" in message
        wait_until(lambda: updates(server) == 4.0, "it serves again")


@pytest.mark.parametrize("then", [WAIT, WORKER], ids=["alone", "with a worker that still has the pipe"])
def test_the_exporter_process_of_a_killed_trainer_leaves_at_once_and_its_target_file_stays(tmp_path, then):
    with training(tmp_path, then) as trainer:
        worker = int(trainer.process.stdout.readline()) if then == WORKER else None
        assert trainer.has_exporter() and trainer.get("/metrics")[0] == 200
        trainer.process.kill()
        # After a fifth of a second, where the machine is quiet.
        wait_until(trainer.is_refused, "the connection is refused", seconds=5)
        wait_until(lambda: not trainer.has_exporter(), "it has gone", seconds=5)
        assert names(tmp_path) == {"ppo-r.json"}
        if worker:
            os.kill(worker, signal.SIGKILL)  # it was there all the time


def test_a_second_ctrl_c_ends_the_push_of_a_monitor_and_leaves_no_file(tmp_path):
    heads = {name: torch.nn.Linear(2, 1) for name in ("left", "right")}
    optimizer = torch.optim.SGD([parameter for head in heads.values() for parameter in head.parameters()])
    held = []
    with socket.create_server(("127.0.0.1", 0)) as silent:
        pushgateway = f"http://127.0.0.1:{silent.getsockname()[1]}"
        monitor = GradientMonitor(heads, run="r", aggregator=RunAggregator()).attach(optimizer)
        monitor.serve(port=0, targets_dir=tmp_path, pushgateway=pushgateway)

        def interrupt() -> None:
            held.append(silent.accept())
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

        threading.Thread(target=interrupt).start()
        began = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            monitor.close()
        assert time.monotonic() - began < 5 and names(tmp_path) == set()


@pytest.mark.parametrize("then", [WAIT, HANG], ids=["stopped", "hangs in C"])
def test_a_trainer_that_is_stopped_or_hangs_is_still_served_and_no_longer_ready(tmp_path, then):
    with training(tmp_path, then, age=STALLED_SECONDS - 2) as trainer:
        before = trainer.get("/metrics?run=r")[1]
        if then == HANG:
            assert trainer.process.stdout.readline() == "hangs\n"
        else:
            trainer.process.send_signal(signal.SIGSTOP)
        status, text = wait_until(lambda: (ready := trainer.get("/-/ready"))[0] == 503 and ready, "not ready")
        assert "run r: no update for 30" in text
        status, text = trainer.get("/metrics?run=r")
        assert status == 200
        assert [line for line in text.splitlines() if 'run="r"' in line] == [
            line for line in before.splitlines() if 'run="r"' in line
        ]


def test_signals_of_the_terminal_leave_the_exporter_process_to_the_trainers_goodbye(tmp_path):
    with training(tmp_path, INTERRUPTED) as trainer:
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGTTOU):
            os.kill(trainer.exporter, signum)
        assert trainer.get("/metrics")[0] == 200
        os.killpg(trainer.process.pid, signal.SIGINT)  # Ctrl-C
        assert trainer.process.stdout.readline() == "200\n"
        trainer.process.wait(20)
        assert trainer.is_refused() and names(tmp_path) == set()


@pytest.mark.parametrize(
    ("address", "port", "reason"),
    [
        ("127.0.0.1", None, "Address already in use"),
        ("192.0.2.1", 0, "Cannot assign requested address"),
        ("127.0.0.1", 70000, "a port is 0 to 65535"),
        ("nobody.invalid", 0, "Name or service not known|Temporary failure in name resolution"),
    ],
)
def test_an_address_that_cannot_be_had_is_an_error_at_the_start(address, port, reason):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1] if port is None else port
        with pytest.raises(OSError, match=rf"^cannot serve /metrics on {address}:{port}: .*({reason})"):
            MetricsServer(trained_aggregator(), address, port)


def test_a_certificate_that_cannot_be_read_is_an_error_at_the_start(tmp_path):
    file = tmp_path / "web.yml"
    file.write_text("tls_server_config: {cert_file: missing.crt, key_file: missing.key}\n")
    with pytest.raises(WebConfigError, match="missing.crt"):
        MetricsServer(trained_aggregator(), port=0, web_config_file=file)


def test_a_frame_that_cannot_be_read_is_answered_logged_and_skipped():
    state = {"op": "state", "snapshot": trained_aggregator().snapshot.plain(), "metrics": {}}
    good = {"version": PROTOCOL_VERSION, **state}
    bad = [
        b"{",
        b"[]",
        b"\xff",
        {**good, "version": PROTOCOL_VERSION + 1},
        state,
        {**good, "op": "dance"},
        {**good, "snapshot": {"runs": 1}},
    ]
    with subprocess.Popen(
        [sys.executable, "-m", "exporter", "--port", "0"],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:

        def answer(frame: bytes | dict) -> dict:
            body = frame if isinstance(frame, bytes) else json.dumps(frame).encode()
            process.stdin.write(struct.pack("!I", len(body)) + body)
            process.stdin.flush()
            return json.loads(process.stdout.readline())

        try:
            port = json.loads(process.stdout.readline())["port"]
            assert answer(good) == {}
            assert all("error" in answer(frame) for frame in bad)
            assert 'ppo_updates_total{run="r"} 1.0' in fetch(f"http://127.0.0.1:{port}/metrics")[1]
            assert answer({"version": PROTOCOL_VERSION, "op": "close"}) == {}
            assert process.wait(20) == 0
            assert process.stderr.read().decode().count("cannot be read, and is skipped") == len(bad)
        finally:
            process.kill()


def test_a_file_beside_the_users_script_takes_no_librarys_place(tmp_path):
    (tmp_path / "priority.py").write_text("raise ImportError('a replay buffer, and no library of HTTP/2')")
    script = tmp_path / "train.py"
    script.write_text(
        "from exporter import MetricsServer, RunAggregator\nMetricsServer(RunAggregator(), port=0).close()\n"
    )
    done = subprocess.run(
        [sys.executable, script], env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("error", "is_crash"),
    [(SystemExit(0), False), (SystemExit(1), True), (KeyboardInterrupt(), False), (OSError(), True)],
)
def test_what_ends_a_run_decides_whether_its_files_stay(tmp_path, error, is_crash):
    with pytest.raises(type(error)), MetricsServer(trained_aggregator(), port=0) as server:
        server.deliver("r", targets_dir=tmp_path)
        raise error
    assert names(tmp_path) == ({"ppo-r.json"} if is_crash else set())


WORKERS = """
import multiprocessing, sys
from endpoint import trained_aggregator
from exporter import MetricsServer

def work(folder, name, then):
    server = MetricsServer(trained_aggregator(), port=0)
    server.deliver("r", targets_dir=f"{folder}/{name}")
    exec(then)

if __name__ == "__main__":
    for method in ("fork", "spawn"):
        for name, then in {"end": "", "error": "1 / 0", "exit": "sys.exit(1)"}.items():
            given = sys.argv[1], f"{method}-{name}", then
            worker = multiprocessing.get_context(method).Process(target=work, args=given)
            worker.start()
            worker.join()
"""


def test_workers_of_multiprocessing_say_goodbye_too(tmp_path):
    (tmp_path / "train.py").write_text(WORKERS)
    path = os.pathsep.join((str(ROOT), str(Path(__file__).parent)))
    command = [sys.executable, tmp_path / "train.py", tmp_path]
    subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, check=True)
    left = {path.parent.name for path in tmp_path.glob("*/ppo-r.json")}
    assert left == {"fork-error", "fork-exit", "spawn-error", "spawn-exit"}
    assert len([path for path in tmp_path.iterdir() if path.is_dir()]) == 6


def test_a_frame_that_no_memory_holds_ends_the_process():
    done = subprocess.run(
        [sys.executable, "-m", "exporter", "--port", "0"], cwd=ROOT, input=b"hello", capture_output=True, timeout=30
    )
    assert done.returncode == 0
