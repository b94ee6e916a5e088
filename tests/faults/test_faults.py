"""Faults around a run, with real parts: who is notified, and what is lost. docs/faults.md has the table."""

import fcntl
import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.client import HTTPConnection
from pathlib import Path

import pytest
import yaml
from conftest import GENTLY, Observability, fetch, free_ports, wait_until
from prometheus_client.parser import text_string_to_metric_families

from stack.servers import ROOT, Servers

TINY = ("--num-envs", "16", "--rollout-steps", "16", "--minibatch-size", "64", "--total-timesteps", "100000000")
CRITICAL = {"alertname": "PPOGradientCVHigh", "severity": "critical"}

# A trainer whose clock differs from the true one by the seconds in a file.
WRONG_CLOCK = """
import pathlib, runpy, sys, time
offset, real = pathlib.Path(sys.argv.pop(1)), time.time
time.time = lambda: real() + float(offset.read_text())
runpy.run_module("trainer", run_name="__main__", alter_sys=True)
"""


@pytest.fixture
def servers(servers: Servers, request) -> Servers:
    """Prometheus with options of the test's own."""
    return replace(servers, prometheus_options=(*servers.prometheus_options, *getattr(request, "param", ())))


@pytest.fixture
def observability(start_observability, request) -> Observability:
    return start_observability(getattr(request, "param", 30))


@pytest.fixture
def train(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen]]:
    """Starts a trainer whose target file lies where `observability` looks."""
    processes = []

    def start(run: str, *flags: str, python: tuple = ("-m", "trainer"), stdout: int = subprocess.DEVNULL):
        command = [*GENTLY, sys.executable, *python, "--run", run, "--metrics-port", "0", *TINY]
        command += ["--targets-dir", tmp_path / "targets", "--checkpoint-dir", tmp_path / "checkpoints", *flags]
        processes.append(subprocess.Popen(command, cwd=ROOT, stdout=stdout, stderr=subprocess.PIPE, text=True))
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.wait()
        process.stderr.close()


def value(observability: Observability, expression: str) -> float | None:
    """The one value of an instant query; None where there is none."""
    result = observability.query(expression)
    return float(result[0]["value"][1]) if result else None


def address(observability: Observability, run: str) -> str:
    """`host:port` of the run, from its target file."""

    def announced() -> list[str]:
        entries = [json.loads(path.read_text())[0] for path in observability.targets.glob("*.json")]
        return [entry["targets"][0] for entry in entries if entry["labels"]["run"] == run]

    return wait_until(announced, f"target file of {run}")[0]


def samples(address: str) -> dict[str, list]:
    """Sample name -> samples of /metrics."""
    found: dict[str, list] = {}
    for family in text_string_to_metric_families(fetch(f"http://{address}/metrics")[1]):
        for sample in family.samples:
            found.setdefault(sample.name, []).append(sample)
    return found


def test_a_killed_trainer_is_told_and_its_series_end_and_go_on_with_the_resume(observability, train):
    first = train("killed", "--metrics-port", str(observability.ports.metrics), "--checkpoint-every", "2")
    updates = 'ppo_updates_total{run="killed"}'
    wait_until(lambda: (value(observability, updates) or 0) > 4, "updates")
    first.kill()
    wait_until(lambda: observability.notified("firing", alertname="PPOTrainerDown", run="killed"), "down")
    assert value(observability, updates) is None  # stale: nobody takes old values for new ones
    last = value(observability, f"last_over_time({updates}[10m])")
    assert last > 4

    train("killed", "--metrics-port", str(observability.ports.metrics), "--resume")
    wait_until(lambda: (value(observability, updates) or 0) > last, "going on")
    wait_until(lambda: observability.notified("resolved", alertname="PPOTrainerDown", run="killed"), "resolved")
    # One series over both processes, in which nothing went backwards.
    assert [each["value"][1] for each in observability.query(f"resets({updates}[10m])")] == ["0"]
    assert value(observability, 'ppo_resumes_total{run="killed"}') == 1


@pytest.mark.parametrize("observability", [50], indirect=True)
def test_a_trainer_that_is_stopped_or_stands_still_is_stalled_and_not_down(observability, train, tmp_path):
    # Nobody reads what it prints, so it stands still as soon as the pipe is full.
    read_end, write_end = os.pipe()
    fcntl.fcntl(write_end, fcntl.F_SETPIPE_SZ, 4096)
    train("blocked", "--log-interval", "1", stdout=write_end)
    os.close(write_end)
    stopped = train("stopped")
    wait_until(lambda: value(observability, 'ppo_updates_total{run="stopped"}'), "updates")
    stopped.send_signal(signal.SIGSTOP)
    standing = {}
    for run in ("stopped", "blocked"):
        told = {"alertname": "PPOTrainingStalled", "run": run}
        wait_until(lambda told=told: observability.notified("firing", **told), f"{run} is stalled")
        standing[run] = value(observability, f'ppo_updates_total{{run="{run}"}}')
        wait_until(lambda run=run: value(observability, f'up{{run="{run}"}}') == 1, f"{run} is not down")

    stopped.send_signal(signal.SIGCONT)
    # It ends with the trainer, by whom the pipe is closed.
    threading.Thread(target=os.fdopen(read_end, "rb").read, daemon=True).start()
    for run, before in standing.items():
        told = {"alertname": "PPOTrainingStalled", "run": run}
        wait_until(lambda told=told: observability.notified("resolved", **told), f"{run} moves")
        # A scrape may time out on a busy machine: then the value is away for one.
        wait_until(
            lambda run=run, before=before: (value(observability, f'ppo_updates_total{{run="{run}"}}') or 0) > before,
            f"{run} makes updates",
        )


def exporter_process(trainer: subprocess.Popen) -> int | None:
    """Its process id; None while there is none."""
    children = Path(f"/proc/{trainer.pid}/task").glob("*/children")
    return next((int(pid) for path in children for pid in path.read_text().split()), None)


def test_a_run_goes_on_when_its_exporter_process_is_killed_or_stopped(observability, train, tmp_path):
    log, down = tmp_path / "log", {"alertname": "PPOTrainerDown", "run": "served"}
    with log.open("wb") as file:
        pushgateway = ("--pushgateway", "http://127.0.0.1:9")
        trainer = train("served", "--log-interval", "1", *pushgateway, stdout=file.fileno())
    updates = 'ppo_updates_total{run="served"}'
    before = wait_until(lambda: value(observability, updates), "updates")
    target, first = address(observability, "served"), exporter_process(trainer)
    os.kill(first, signal.SIGKILL)
    wait_until(lambda: exporter_process(trainer) not in (first, None), "another one")
    since = time.time()
    wait_until(lambda: (value(observability, f"timestamp({updates})") or 0) > since, "it serves")
    assert value(observability, updates) > before
    assert address(observability, "served") == target
    assert value(observability, f"resets({updates}[10m])") == 0

    os.kill(exporter_process(trainer), signal.SIGSTOP)
    printed = log.stat().st_size
    wait_until(lambda: observability.notified("firing", **down), "down")
    assert log.stat().st_size > printed
    began = time.monotonic()
    trainer.terminate()
    assert trainer.wait(30) == 143
    assert time.monotonic() - began < 15  # it is waited for once, for five seconds
    assert "stopped by SIGTERM" in log.read_text() and list((tmp_path / "checkpoints").glob("served/*.pt"))
    assert trainer.stderr.read().splitlines() == [
        f"the exporter process has ended (exit code -9); a new one serves http://{target}/metrics",
        "the exporter process does not answer to 'end'; the files of run served stay",
        "the exporter process does not answer to 'push'",
    ]


def test_a_prometheus_that_is_killed_in_the_middle_of_a_drill_tells_its_end(
    observability, train, start_prometheus, tmp_path
):
    (fault := tmp_path / "fault").touch()
    train("drilled", "--drill", f"dominate:op:@{fault}")
    (told,) = wait_until(lambda: observability.notified("firing", **CRITICAL, run="drilled"), "critical")
    observability.processes["prometheus"].stop(signal.SIGKILL)
    start_prometheus(observability.ports.prometheus, yaml.safe_load((tmp_path / "prometheus.yml").read_text()))

    wait_until(lambda: value(observability, 'ppo_updates_total{run="drilled"}'), "scraped again")
    critical = 'ppo_gradient_steps_total{run="drilled", health="critical"}'
    at_restart = value(observability, critical)
    wait_until(lambda: value(observability, critical) > at_restart, "it goes on")
    fault.unlink()
    (resolved,) = wait_until(lambda: observability.notified("resolved", **CRITICAL, run="drilled"), "resolved")
    assert resolved["fingerprint"] == told["fingerprint"]
    assert (
        len(observability.notified("firing", **CRITICAL, run="drilled")) == 1
    )  # told once, not again after the restart
    assert value(observability, critical) > at_restart > 0 and value(observability, f"resets({critical}[10m])") == 0


# By default Prometheus sends an alert that nobody took again after a minute.
@pytest.mark.parametrize("servers", [("--rules.alert.resend-delay=2s",)], indirect=True)
def test_an_alert_that_fires_without_alertmanager_and_receiver_arrives_when_they_are_back(
    observability, train, start_alertmanager, start_receiver, tmp_path
):
    for name in ("alertmanager", "receiver"):
        observability.processes[name].stop(signal.SIGKILL)
    train("drilled", "--drill", "dominate:op:1s-600s")
    firing = 'ALERTS{alertname="PPOGradientCVHigh", severity="critical", alertstate="firing", run="drilled"}'
    wait_until(lambda: observability.query(firing), "firing in Prometheus")

    settings = yaml.safe_load((tmp_path / "alertmanager.yml").read_text())
    start_alertmanager(observability.ports.alertmanager, settings)

    def failures() -> float:
        text = fetch(f"{observability.alertmanager_url}/metrics")[1]
        return float(
            re.search(r'^alertmanager_notifications_total{integration="webhook"} (\S+)', text, re.MULTILINE)[1]
        )

    wait_until(lambda: [alert for alert in observability.alerts() if alert["labels"].get("run") == "drilled"], "alert")
    wait_until(failures, "attempts to notify")
    assert observability.notifications() == []
    start_receiver(observability.ports.receiver)
    wait_until(lambda: observability.notified("firing", **CRITICAL, run="drilled"), "notification")


def test_a_clock_that_steps_backwards_takes_nothing_with_it(observability, train, tmp_path):
    offset = tmp_path / "offset"
    offset.write_text("7200")
    train("clock", python=("-c", WRONG_CLOCK, offset))
    target = address(observability, "clock")
    last = 'ppo_last_update_timestamp_seconds{run="clock"}'
    wait_until(lambda: (value(observability, f"{last} - time()") or 0) > 7000, "updates of a clock that is ahead")
    before = samples(target)
    offset.write_text("0")
    wait_until(lambda: abs(value(observability, f"{last} - time()") or 7200) < 10, "updates of a clock that is right")
    after = samples(target)
    assert fetch(f"http://{target}/-/ready")[0] == 200
    assert len(after["ppo_gradient_cv"]) == 1
    counters = [name for name in before if name.endswith(("_total", "_sum", "_count", "_bucket")) and "ppo_" in name]
    assert len(counters) > 10
    for name in counters:
        assert all(now.value >= then.value for then, now in zip(before[name], after[name], strict=True)), name

    offset.write_text("-3600")
    wait_until(lambda: (value(observability, f"{last} - time()") or 0) < -3000, "updates of a clock that is behind")
    time.sleep(3)  # a rule that trusts its clock would have seen it
    assert not observability.query('ALERTS{alertname="PPOTrainingStalled"}')
    told = {alert["labels"]["alertname"] for alert in observability.notified("firing", run="clock")}
    assert not told - {"PPOTrainerDown"}  # scrapes of a busy machine may time out


def test_of_two_trainers_that_want_the_same_port_one_trains_and_the_other_says_why_not(train, tmp_path):
    port = str(free_ports().metrics)
    both = {name: train(name, "--metrics-port", port) for name in ("a", "b")}
    (loser,) = wait_until(
        lambda: [name for name, process in both.items() if process.poll() is not None], "one has ended"
    )
    assert both[loser].returncode == 1
    assert f"cannot serve /metrics on 127.0.0.1:{port}: Address already in use" in both[loser].stderr.read()
    (winner,) = both.keys() - {loser}
    (path,) = wait_until(lambda: list((tmp_path / "targets").glob("*.json")), "target file")
    assert json.loads(path.read_text())[0]["labels"]["run"] == winner
    wait_until(lambda: f'run="{winner}"' in fetch(f"http://127.0.0.1:{port}/metrics")[1], "the winner serves")


def test_a_port_that_is_taken_after_it_was_found_free_ends_all_and_is_named(servers, tmp_path):
    ports = free_ports()
    flags = [f"--{name}-port={port}" for name, port in vars(ports).items()]
    with subprocess.Popen(
        [sys.executable, "-u", "-m", "stack", *flags, f"--state-dir={tmp_path}"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as runner:
        while not runner.stdout.readline().startswith("Server logs"):  # after which it starts the trainer
            assert runner.poll() is None
        with socket.create_server(("127.0.0.1", ports.metrics)):
            output = runner.stdout.read()
    assert runner.returncode == 1
    assert f"cannot serve /metrics on 127.0.0.1:{ports.metrics}: Address already in use" in output
    assert "error: trainer ended with exit code 1 before it was ready" in output
    for name in ("prometheus", "alertmanager", "receiver"):
        socket.create_server(("127.0.0.1", getattr(ports, name))).close()  # nothing was left behind
    assert list((tmp_path / "targets").iterdir()) == []


UPDATES = 10_000
EMIT = f"""
import itertools, time
from exporter import MetricsServer, RunAggregator, emit_ppo_update
from exporter.telemetry import GradientStep, summarize_gradient_steps
aggregator = RunAggregator()
aggregator.register_run("r", ["op", "slot", "alpha", "blueprint", "curve"])
kinds = ([1.0, 1.1, 0.9, 1.0, 1.0], [1.0, 0.2, 0.2, 0.9, 0.3], [1.0, 0.0, 0.0, 0.0, 0.0], [float("nan")] + [1.0] * 4)
steps = [GradientStep(dict(zip(("op", "slot", "alpha", "blueprint", "curve"), norms)), sum(norms)) for norms in kinds]
with MetricsServer(aggregator, port=0) as server:
    print(server.port, flush=True)
    for step in itertools.islice(itertools.cycle(steps), {UPDATES}):
        emit_ppo_update(summarize_gradient_steps([step] * 4), run="r", handler=aggregator)
        time.sleep(0.0003)
    open(0).read()
"""


@pytest.mark.soak
def test_ten_thousand_updates_under_a_scrape_every_ten_milliseconds_leave_memory_flat_and_one_level_each():
    with subprocess.Popen(
        [sys.executable, "-c", EMIT], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        connection = HTTPConnection("127.0.0.1", int(process.stdout.readline()), timeout=20)
        pages = [Path(f"/proc/{pid}/statm") for pid in (process.pid, exporter_process(process))]
        levels, memory, updates = set(), [], [0.0]
        while updates[-1] < UPDATES:
            connection.request("GET", "/metrics")
            text = connection.getresponse().read().decode()
            (level,) = re.findall(r'^ppo_gradient_cv{health="(\w+)",run="r"} ', text, re.MULTILINE)
            levels.add(level)
            updates.append(float(re.search(r"^ppo_updates_total\S* (\S+)$", text, re.MULTILINE)[1]))
            memory.append([int(path.read_text().split()[1]) * resource.getpagesize() for path in pages])
            time.sleep(0.01)
        connection.close()
        process.stdin.close()
    assert updates == sorted(updates) and len(updates) > 100
    assert levels == {"healthy", "warning", "critical"}
    quarter = len(memory) // 4
    for of_one in zip(*memory, strict=True):
        assert max(of_one[-quarter:]) - max(of_one[:quarter]) < 2**20, of_one[:: quarter // 4]
