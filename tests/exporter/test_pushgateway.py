"""The final state of a run in a real Pushgateway, and runs that end well without one."""

import contextlib
import errno
import os
import shutil
import signal
import socket
import threading
import time
from pathlib import Path

import pytest
import torch
from conftest import fetch, free_ports, wait_until
from endpoint import UPDATE, trained_aggregator
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample
from runs import arguments, names, trainer

from exporter import GradientMonitor, MetricsServer, emit_ppo_update
from exporter.link import check_pushgateway_url
from exporter.serving import deliveries
from exporter.serving.deliveries import Deliveries
from exporter.serving.state import State
from stack.servers import package_root


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
    """Sample name -> samples of the run that the Pushgateway has."""
    found: dict[str, list[Sample]] = {}
    for family in text_string_to_metric_families(fetch(f"{url}/metrics")[1]):
        for sample in family.samples:
            if sample.labels.get("run") == run:
                found.setdefault(sample.name, []).append(sample)
    return found


def test_the_end_of_a_trainer_decides_what_is_pushed_and_which_files_stay(cli, pushgateway, tmp_path: Path):
    folder, push = tmp_path / "folder", ("--pushgateway", pushgateway)
    with trainer("stopped/1", folder, *push, "--total-timesteps", "100000000") as process:
        _, quiet = cli(*arguments("finished", folder, *push, "--total-timesteps", "640"))
        cli(*arguments("failed", folder, *push, "--drill", "nan:op:3-3", "--on-nonfinite", "raise"), code=1)
        wait_until(lambda: process.stdout.readline().startswith("update"), "updates")
        process.send_signal(signal.SIGTERM)
        said, errors = process.communicate(timeout=60)
    assert (process.returncode, errors, quiet) == (143, "", "")

    (updates,) = pushed(pushgateway, "finished")["ppo_updates_total"]
    assert updates.value == 10.0 and updates.labels == {"job": "ppo_final", "run": "finished", "instance": ""}
    (updates,) = pushed(pushgateway, "stopped/1")["ppo_updates_total"]
    assert f"stopped by SIGTERM after update {updates.value:.0f} " in said
    assert pushed(pushgateway, "failed") == {}

    assert names(folder) == {"ppo-failed.json", "ppo-failed.prom"}
    assert len(list(folder.iterdir())) == 4  # the locks of the others are gone too
    last = (folder / "ppo-failed.prom").read_text()
    assert 'ppo_nonfinite_gradients_total{head="op",run="failed"} 1.0\n' in last


def test_a_push_replaces_what_is_there_of_its_run_and_rank_and_says_nothing_of_the_process(pushgateway):
    aggregator = trained_aggregator()
    with (
        MetricsServer(aggregator, port=0, process_labels={"rank": "0"}) as first,
        MetricsServer(trained_aggregator(), port=0, process_labels={"rank": "1"}) as second,
    ):
        first.push("r", pushgateway)
        second.push("r", pushgateway + "/")
        emit_ppo_update(UPDATE, run="r", handler=aggregator)
        first.push("r", pushgateway)
    found = pushed(pushgateway, "r")
    assert {sample.labels["rank"]: sample.value for sample in found["ppo_updates_total"]} == {"0": 2.0, "1": 1.0}
    assert {name for name in found if not name.startswith("ppo_")} == {"push_time_seconds", "push_failure_time_seconds"}
    assert len(found["ppo_gradient_cv"]) == 2 and "ppo_gradient_cv_per_step_bucket" in found


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
    assert not path.exists()
    assert [sample.value for sample in pushed(pushgateway, "walker")["ppo_updates_total"]] == [1.0]


def test_a_pushgateway_that_is_away_is_told(caplog):
    url = f"http://127.0.0.1:{free_ports().metrics}"
    refused = ConnectionRefusedError(errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED))
    with MetricsServer(trained_aggregator(), port=0) as server:
        server.push("r", url)
    assert caplog.messages == [f"cannot push the final state to {url}: {refused}"]


def failing_push(answer: bytes, pause: float) -> str:
    """What is told of a push to a server that answers this, by a byte each `pause` seconds where that is not 0."""
    url, ended = f"http://127.0.0.1:{free_ports().metrics}", threading.Event()

    def serve() -> None:
        client, _ = listener.accept()
        with client, contextlib.suppress(OSError):
            for part in [bytes([byte]) for byte in answer] if pause else [answer]:
                client.sendall(part)
                if ended.wait(pause):
                    break
            client.shutdown(socket.SHUT_WR)
            while client.recv(1 << 16):  # a close with something unread would be a reset
                pass

    with socket.create_server(("127.0.0.1", int(url.rpartition(":")[2]))) as listener:
        thread = threading.Thread(target=serve)
        thread.start()
        with pytest.raises(OSError, match=f"^cannot push the final state to {url}: ") as caught:
            Deliveries(State({}), "http").push("r", url)
        ended.set()
        thread.join()
    return str(caught.value).removeprefix(f"cannot push the final state to {url}: ")


@pytest.mark.parametrize("pause", [0.02, 10.0], ids=["a byte now and then", "and then none"])
def test_a_pushgateway_that_is_silent_or_drips_costs_no_more_than_the_timeout(pause: float, monkeypatch):
    monkeypatch.setattr(deliveries, "PUSH_SECONDS", 0.3)
    began = time.monotonic()
    assert failing_push(b"H" * 1000, pause) in ("no answer within 0.3 s", "timed out")
    assert time.monotonic() - began < 5


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (b"", "Remote end closed connection without response"),
        (b"HTTP/1.1 503 Not now\r\n\r\n", "503 Not now"),
        (b"HTTP/1.1 400 Bad Request\r\n\r\npushed metrics are\ninvalid", "400 Bad Request: pushed metrics are invalid"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "SSH-2.0-OpenSSH_9.2"),
    ],
)
def test_whatever_else_answers_is_told(answer: bytes, reason: str):
    assert failing_push(answer, 0.0).strip() == reason


@pytest.mark.parametrize(
    "url",
    ["", "localhost:91", "ftp://a", "http://", "http://a:b", "http://a:0", "http://a/?x", "http://u:p@a", "http://[a"],
)
def test_what_is_no_url_of_a_pushgateway_is_refused_before_training(url: str):
    with pytest.raises(ValueError, match="Pushgateway"):
        check_pushgateway_url(url)
