"""The final state of a run in a real Pushgateway, and runs that end well without one."""

import shutil
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from conftest import fetch, free_ports, wait_until
from endpoint import trained_aggregator
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from exporter import GradientMonitor
from exporter.delivery import check_pushgateway_url, push_final_state
from exporter.metrics import METRIC_FAMILIES
from stack.servers import ROOT, package_root

TINY = ("--num-envs", "4", "--rollout-steps", "16", "--minibatch-size", "32", "--checkpoint-every", "0")


@pytest.fixture
def pushgateway(start) -> str:
    """URL of Debian's Pushgateway, from PATH or unpacked beside the other servers."""
    name = "prometheus-pushgateway"
    executable, assets = shutil.which(name), ()
    if executable is None:
        root = package_root(name)
        executable, assets = root / "usr/bin" / name, (f"--web.local-assets={root}/usr/share/prometheus/pushgateway",)
    url = f"http://127.0.0.1:{free_ports().metrics}"
    address = url.removeprefix("http://")
    start(name, [executable, f"--web.listen-address={address}", "--persistence.file=", *assets], f"{url}/-/ready")
    return url


def pushed(url: str, run: str) -> dict[str, list[Sample]]:
    families = {family.name: family for family in text_string_to_metric_families(fetch(f"{url}/metrics")[1])}
    found = {
        name: [sample for sample in family.samples if sample.labels.get("run") == run]
        for name, family in families.items()
    }
    return {name: samples for name, samples in found.items() if samples}


@pytest.fixture
def train(tmp_path: Path):
    processes = []

    def start(url: str, *flags: str) -> subprocess.Popen:
        command = [sys.executable, "-m", "trainer", "--run", "r/1", "--metrics-port", "0", *TINY, *flags]
        command += ["--pushgateway", url, "--targets-dir", tmp_path / "targets"]
        processes.append(subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.wait()
        process.stdout.close()
        process.stderr.close()


def test_the_last_values_of_a_run_are_there_after_its_end_and_after_a_signal(train, pushgateway):
    ended = train(pushgateway, "--total-timesteps", "640")
    assert ended.wait(60) == 0
    found = pushed(pushgateway, "r/1")
    (updates,) = found["ppo_updates"]
    assert updates.value == 10.0 and updates.labels == {"job": "ppo_final", "run": "r/1", "instance": ""}
    assert len(found["ppo_gradient_cv"]) == 1
    assert {name for name in found if name.startswith(("process_", "python_"))} == set()

    stopped = train(pushgateway, "--total-timesteps", "100000000")
    wait_until(lambda: stopped.stdout.readline().startswith("update"), "the first updates")
    stopped.send_signal(signal.SIGTERM)
    assert stopped.wait(60) == 143
    (updates,) = pushed(pushgateway, "r/1")["ppo_updates"]  # the group was replaced
    assert f"stopped by SIGTERM after update {updates.value:.0f} " in stopped.stdout.read()
    assert stopped.stderr.read() == ""


def test_all_families_arrive_and_runs_stand_side_by_side(pushgateway):
    push_final_state(pushgateway, trained_aggregator(), "r", {"rank": "0"})
    push_final_state(pushgateway + "/", trained_aggregator(), "r", {"rank": "1"})
    found = pushed(pushgateway, "r")
    assert {sample.labels["rank"] for sample in found["ppo_updates"]} == {"0", "1"}
    run = trained_aggregator().snapshot.runs["r"]
    sampled = {family.name for family in METRIC_FAMILIES if family.is_per_run and list(family.samples(run))}
    names = {sample.name.removesuffix("_bucket") for samples in found.values() for sample in samples}
    assert sampled <= names


def test_a_run_without_its_pushgateway_ends_as_well_and_says_so(train):
    url = f"http://127.0.0.1:{free_ports().metrics}"
    trainer = train(url, "--total-timesteps", "640")
    output, errors = trainer.communicate(timeout=60)
    assert trainer.returncode == 0 and "finished after update 10 of 10" in output
    assert errors == f"warning: cannot push the final state to {url}: [Errno 111] Connection refused\n"


def test_a_run_that_failed_pushes_nothing(train, pushgateway):
    trainer = train(pushgateway, "--total-timesteps", "6400", "--drill", "nan:op:3-3", "--on-nonfinite", "raise")
    assert trainer.wait(60) == 1
    assert pushed(pushgateway, "r/1") == {}


def test_a_monitor_pushes_when_it_is_closed_and_keeps_its_file_until_then(pushgateway, tmp_path):
    heads = {name: torch.nn.Linear(2, 1) for name in ("left", "right")}
    optimizer = torch.optim.SGD([parameter for head in heads.values() for parameter in head.parameters()])
    path = tmp_path / "ppo-walker.prom"
    with pytest.raises(RuntimeError, match="on purpose"), GradientMonitor(heads, run="walker") as monitor:
        monitor.attach(optimizer).serve(port=0, textfile_dir=tmp_path, pushgateway=pushgateway)
        raise RuntimeError("on purpose")
    assert "ppo_updates_total" in path.read_text() and pushed(pushgateway, "walker") == {}

    with GradientMonitor(heads, run="walker") as monitor:
        monitor.attach(optimizer).serve(port=0, textfile_dir=tmp_path, pushgateway=pushgateway)
        sum(head(torch.ones(2)).sum() for head in heads.values()).backward()
        optimizer.step()
        monitor.update_completed()
    assert not path.exists()
    assert [sample.value for sample in pushed(pushgateway, "walker")["ppo_updates"]] == [1.0]


def failing_push(port: int, timeout: float) -> str:
    url = f"http://127.0.0.1:{port}"
    with pytest.raises(OSError, match=f"cannot push the final state to {url}: ") as caught:
        push_final_state(url, trained_aggregator(), "r", timeout=timeout)
    return str(caught.value).removeprefix(f"cannot push the final state to {url}: ")


def test_a_pushgateway_that_is_silent_costs_no_more_than_the_timeout():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        assert failing_push(listener.getsockname()[1], 0.2) in ("no answer within 0.2 s", "timed out")


@pytest.mark.parametrize("between", [0.02, 0.5], ids=["a byte now and then", "and then none"])
def test_a_pushgateway_that_drips_costs_no_more_than_the_timeout(between: float):
    ended = threading.Event()

    def drip(listener: socket.socket) -> None:
        client, _ = listener.accept()
        with client:
            while not ended.wait(between):
                client.sendall(b"H")

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=drip, args=(listener,))
        thread.start()
        assert failing_push(listener.getsockname()[1], 0.3) in ("no answer within 0.3 s", "timed out")
        ended.set()
        thread.join()


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (b"", "Remote end closed connection without response"),
        (b"HTTP/1.1 503 Not now\r\n\r\n", "503 Not now"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "SSH-2.0-OpenSSH_9.2"),
    ],
)
def test_whatever_else_answers_is_told(answer: bytes, reason: str):
    def serve(listener: socket.socket) -> None:
        client, _ = listener.accept()
        with client:
            client.recv(1 << 20)
            client.sendall(answer)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, args=(listener,))
        thread.start()
        told = failing_push(listener.getsockname()[1], 5.0)
        thread.join()
    assert told.strip() == reason or "reset" in told


@pytest.mark.parametrize(
    "url",
    [
        "",
        "localhost:9091",
        "ftp://a",
        "http://",
        "http://a:b",
        "http://a:0",
        "http://a/?x",
        "http://u:p@a",
        "http://[a",
    ],
)
def test_what_is_no_url_of_a_pushgateway_is_refused_before_training(url: str):
    with pytest.raises(ValueError, match="Pushgateway"):
        check_pushgateway_url(url)
