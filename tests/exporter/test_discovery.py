"""The target file in a folder that Prometheus watches."""

import fcntl
import json
import logging
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import free_ports, wait_until
from endpoint import ask, trained_aggregator

from exporter import MetricsServer, TargetFile, discovery
from exporter.discovery import PROCESS_LABEL, STALE_AFTER_SECONDS, ProcessIdentity
from stack import configuration

START = """
import sys
from pathlib import Path
from exporter import TargetFile
TargetFile(Path(sys.argv[1]), sys.argv[2], "crashed")
print("ready", flush=True)
sys.stdin.read()
"""


def content(file: TargetFile) -> dict:
    (entry,) = json.loads(file.path.read_text())
    del entry["labels"][PROCESS_LABEL]
    return entry


def test_a_target_file_is_whole_labeled_and_gone_with_its_last_run(tmp_path: Path):
    directory = tmp_path / "targets"
    file = TargetFile(directory, "127.0.0.1:9842", "walker/17")
    labels = {"run": "walker/17", "instance": "127.0.0.1:9842"}
    assert content(file) == {"targets": ["127.0.0.1:9842"], "labels": labels}
    assert list(directory.iterdir()) == [file.path]
    file.add("b", "b", "walker/17")
    file.discard("walker/17")
    assert content(file)["labels"]["run"] == "b"
    file.discard("b")
    file.discard("b")
    assert list(directory.iterdir()) == []


def test_the_next_run_at_an_address_replaces_the_file_that_a_crash_left(tmp_path: Path):
    TargetFile(tmp_path, "[::1]:9842", "crashed")
    file = TargetFile(tmp_path, "[::1]:9842", "next")
    assert list(tmp_path.iterdir()) == [file.path]
    assert content(file)["labels"]["run"] == "next"


@pytest.fixture
def other(tmp_path: Path):
    """Another process that has announced itself in the folder; it waits for the end of its stdin."""
    process = subprocess.Popen(
        [sys.executable, "-c", START, tmp_path, "127.0.0.1:9001"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout.readline() == b"ready\n"
    yield process
    process.kill()
    process.communicate()


def let_age(path: Path, seconds: float = STALE_AFTER_SECONDS + 1) -> None:
    os.utime(path, (time.time() - seconds,) * 2)


def test_the_file_of_a_dead_process_is_removed_by_the_next_start_once_it_is_old(other, tmp_path: Path, caplog):
    path = tmp_path / "127.0.0.1-9001.json"
    let_age(path)
    TargetFile(tmp_path, "127.0.0.1:9002", "next")
    assert path.exists()  # it lives

    other.kill()
    os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)
    let_age(path, STALE_AFTER_SECONDS - 60)
    TargetFile(tmp_path, "127.0.0.1:9002", "next")
    assert path.exists()  # somebody may not have been told yet

    let_age(path)  # and what is left is a zombie, as under a parent that does not care
    with caplog.at_level(logging.WARNING):
        TargetFile(tmp_path, "127.0.0.1:9002", "next")
    assert [p.name for p in tmp_path.iterdir()] == ["127.0.0.1-9002.json"]
    assert str(path) in caplog.text


def test_what_cannot_be_known_to_be_dead_stays(tmp_path: Path):
    own = ProcessIdentity.own()
    dead = own._replace(started=own.started - 1)  # its number has gone to another
    reboot = dead._replace(boot="another")
    initial = own.pid_namespace == "pid:[4026531836]"
    cases = {
        "reused": (dead, True),
        "reboot": (reboot, initial),
        "container": (dead._replace(pid_namespace="pid:[1]"), False),
        "rebooted-container": (reboot._replace(pid_namespace="pid:[1]"), False),
        "host": (dead._replace(host="x/y"), False),
        "alive": (own._replace(pid=os.getppid(), started=discovery._start_ticks(os.getppid())), False),
    }
    for name, (process, _) in cases.items():
        labels = {"run": name, PROCESS_LABEL: str(process)}
        (tmp_path / f"{name}.json").write_text(json.dumps([{"targets": [f"{name}:1"], "labels": labels}]))
    for name, text in {"empty": "[]", "broken": "{", "other": '[{"targets": ["a:1"]}]', "odd": "[3]"}.items():
        (tmp_path / f"{name}.json").write_text(text)
        cases[name] = None, False
    (tmp_path / "note.txt").write_text("hello")
    for path in tmp_path.iterdir():
        let_age(path)
    TargetFile(tmp_path, "127.0.0.1:9842", "next")
    left = {path.stem for path in tmp_path.iterdir()}
    assert left == {name for name, (_, is_gone) in cases.items() if not is_gone} | {"127.0.0.1-9842", "note"}


def test_the_file_that_the_same_run_has_left_elsewhere_goes_at_once(other, tmp_path: Path):
    path = tmp_path / "127.0.0.1-9001.json"
    TargetFile(tmp_path, "127.0.0.1:9002", "crashed")
    assert path.exists()  # two live runs of one name
    other.kill()
    other.wait()
    TargetFile(tmp_path, "127.0.0.1:9003", "crashed")
    assert not path.exists()


def test_a_living_process_keeps_its_file_young_and_cleans_up_and_a_deleted_file_stays_deleted(
    other, tmp_path: Path, monkeypatch
):
    monkeypatch.setattr(discovery, "TOUCH_SECONDS", 0.01)
    monkeypatch.setattr(discovery, "_CLEAN_UP_TOUCHES", 2)
    file = TargetFile(tmp_path, "127.0.0.1:9842", "r")
    left = tmp_path / "127.0.0.1-9001.json"
    let_age(file.path)
    wait_until(lambda: time.time() - file.path.stat().st_mtime < 60, "touched")
    other.kill()
    other.wait()
    assert left.exists()
    let_age(left)
    wait_until(lambda: not left.exists(), "cleaned up")
    file.path.unlink()
    time.sleep(0.1)
    assert list(tmp_path.iterdir()) == []


def test_nothing_in_the_folder_keeps_a_run_from_its_start(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(discovery, "_LOCK_SECONDS", 0.2)
    os.mkfifo(tmp_path / "fifo.json")
    (tmp_path / "deep.json").write_text("[" * 60_000)
    with (tmp_path / "sparse.json").open("wb") as sparse:
        sparse.truncate(2**40)
    own = ProcessIdentity.own()
    labels = {"run": "r", PROCESS_LABEL: str(own._replace(pid=10**20))}
    (tmp_path / "pid.json").write_text(json.dumps([{"targets": ["x:1"], "labels": labels}]))
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "loop.json").symlink_to("loop.json")
    before = set(os.listdir(tmp_path))
    held = os.open(tmp_path, os.O_RDONLY)
    for locks in ((), (held,)):
        for descriptor in locks:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        TargetFile(tmp_path, "127.0.0.1:9842", "next").discard("next")
    os.close(held)
    assert set(os.listdir(tmp_path)) == before


def test_a_process_whose_name_was_cut_within_a_character_has_an_identity(tmp_path: Path):
    code = "import ctypes; ctypes.CDLL(None).prctl(15, b'abcdefghijklmn\\xc3', 0, 0, 0)\n" + START.strip()
    process = subprocess.run(
        [sys.executable, "-c", code, tmp_path, "127.0.0.1:9001"], stdin=subprocess.DEVNULL, capture_output=True
    )
    assert (process.returncode, process.stdout) == (0, b"ready\n"), process.stderr


def test_a_forked_child_leaves_the_file_alone(tmp_path: Path):
    file = TargetFile(tmp_path, "127.0.0.1:9842", "r")
    child = os.fork()
    if child == 0:
        file.discard("r")
        os._exit(0)
    os.waitpid(child, 0)
    assert file.path.exists()


def test_prometheus_keeps_the_series_over_a_restart_and_sees_nothing_of_the_process(start_prometheus, tmp_path: Path):
    targets = tmp_path / "targets"
    ports = free_ports()
    settings = configuration.prometheus_configuration(ports, targets)
    settings["global"].update(scrape_interval="1s", evaluation_interval="1s")
    settings["scrape_configs"] = settings["scrape_configs"][:1]
    del settings["rule_files"]
    start_prometheus(ports.prometheus, settings)

    def series() -> list[dict]:
        matcher = "series?match[]=up%7Bjob%3D%22ppo%22%7D&match[]=ppo_updates_total&match[]=process_start_time_seconds"
        answer = ask(f"http://127.0.0.1:{ports.prometheus}", f"/api/v1/{matcher}")
        return json.loads(answer.text)["data"]

    def target() -> dict | None:
        answer = ask(f"http://127.0.0.1:{ports.prometheus}", "/api/v1/targets?state=active")
        return next(iter(json.loads(answer.text)["data"]["activeTargets"]), None)

    def discovered(process: str) -> bool:
        found = target()
        return found is not None and found["discoveredLabels"].get(PROCESS_LABEL) == process and found["health"] == "up"

    with MetricsServer(trained_aggregator(), port=ports.metrics):
        file = TargetFile(targets, f"127.0.0.1:{ports.metrics}", "r")
        wait_until(lambda: discovered(str(ProcessIdentity.own())), "first")
        wait_until(lambda: len(series()) == 3, "series")
        before = series()
        expected = {"job": "ppo", "instance": f"127.0.0.1:{ports.metrics}", "run": "r"}
        assert all(labels == {**expected, "__name__": labels["__name__"]} for labels in before)
        # The same address, another process.
        another = str(ProcessIdentity.own()._replace(pid=1))
        file.path.write_text(file.path.read_text().replace(str(ProcessIdentity.own()), another))
        wait_until(lambda: discovered(another), "second")
        assert series() == before
