"""A run in a file for the real node_exporter, while it trains, when it is killed and when it ends."""

import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from conftest import _with_short_durations as with_short_durations
from conftest import fetch, free_ports, wait_until
from endpoint import UPDATE, trained_aggregator
from prometheus_client.parser import text_string_to_metric_families

from exporter import RunAggregator, delivery, emit_ppo_update
from exporter.delivery import Textfile
from exporter.metrics import METRIC_FAMILIES
from stack.servers import ROOT

TINY = ("--num-envs", "4", "--rollout-steps", "16", "--minibatch-size", "32", "--checkpoint-every", "0")


def samples(text: str) -> dict[str, dict[tuple, float]]:
    """Sample name -> (label, value) pairs -> value.

    Go writes some bounds of buckets in another way than Python, and node_exporter adds empty labels.
    """
    result: dict[str, dict[tuple, float]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = {name: str(float(value)) if name == "le" else value for name, value in sample.labels.items()}
            key = tuple(sorted((name, value) for name, value in labels.items() if value))
            result.setdefault(sample.name, {})[key] = sample.value
    return result


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "textfiles"


def names(folder: Path) -> set[str]:
    """What node_exporter may look at."""
    return {path.name for path in folder.iterdir() if not path.name.startswith(".")}


def start_node_exporter(start, executable: Path, folder: Path, port: int) -> None:
    command = [executable, f"--web.listen-address=127.0.0.1:{port}", f"--collector.textfile.directory={folder}"]
    command += ["--collector.disable-defaults", "--collector.textfile"]
    start("node_exporter", command, f"http://127.0.0.1:{port}/")


@pytest.fixture
def scrape(start, node_exporter: Path, folder: Path) -> Callable[[], dict]:
    """What node_exporter says of the folder."""
    port = free_ports().metrics
    start_node_exporter(start, node_exporter, folder, port)
    return lambda: samples(fetch(f"http://127.0.0.1:{port}/metrics")[1])


@pytest.fixture
def train(folder: Path, tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen]]:
    processes = []

    def start(run: str, *flags: str) -> subprocess.Popen:
        command = [sys.executable, "-m", "trainer", "--run", run, "--metrics-port", "0", *TINY]
        command += ["--textfile-dir", folder, "--textfile-interval", "0.2", "--targets-dir", tmp_path / "targets"]
        command += flags
        processes.append(
            subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        )
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.wait()
        process.stdout.close()


def test_node_exporter_says_what_the_run_says_of_any_number_of_runs(scrape, folder):
    runs = ["walker/17", "walker-17", 'ünï "code"\\\n']
    aggregators, files = [], []
    for index, name in enumerate(runs):
        aggregator = RunAggregator()
        aggregator.register_run(name, ["op", "slot"], {"environment": "e"} if index else {"seed": "1"})
        emit_ppo_update(UPDATE, run=name, handler=aggregator, environment_steps=index)
        aggregators.append(aggregator)
        files.append(Textfile(folder, aggregator, name))
    told = scrape()
    for file in files:
        file.close(remove=False)
    assert told["node_textfile_scrape_error"] == {(): 0.0}
    families = {name: values for name, values in told.items() if name.startswith("ppo_")}
    written: dict[str, dict] = {}
    for file in files:
        for name, values in samples(file.path.read_text()).items():
            assert not written.setdefault(name, {}).keys() & values.keys()
            written[name].update(values)
    assert families == written
    assert families["ppo_updates_total"] == {(("run", name),): 1.0 for name in runs}
    per_run = {family.name for family in METRIC_FAMILIES if family.is_per_run}
    shown = {line.split()[2] for line in files[0].path.read_text().splitlines() if line.startswith("# TYPE")}
    assert shown == per_run  # and nothing of the process, which node_exporter says of itself
    assert len(told["node_textfile_mtime_seconds"]) == len(runs)


def test_the_file_is_rewritten_whole_without_open_handles_and_its_end_is_chosen(folder):
    aggregator = trained_aggregator()
    stale = Textfile(folder, aggregator, "r", {"rank": "1"})
    stale.close(remove=False)
    file = Textfile(folder, aggregator, "r", interval=0.01)
    assert names(folder) == {"ppo-r.prom", "ppo-r,rank=1.prom"}
    first = file.path.stat()
    wait_until(lambda: file.path.stat().st_mtime_ns > first.st_mtime_ns, "rewritten without news")
    for update in range(200):
        emit_ppo_update(UPDATE, run="r", handler=aggregator)
        assert len(samples(file.path.read_text())["ppo_gradient_cv"]) == 1, update
    wait_until(lambda: samples(file.path.read_text())["ppo_updates_total"] == {(("run", "r"),): 201.0}, "last update")
    emit_ppo_update(UPDATE, run="r", handler=aggregator)
    file.close(remove=False)
    assert samples(file.path.read_text())["ppo_updates_total"] == {(("run", "r"),): 202.0}
    assert not [link for link in Path("/proc/self/fd").iterdir() if str(folder) in os.path.realpath(link)]
    file.close(remove=True)
    assert [path.name for path in folder.iterdir()] == ["ppo-r,rank=1.prom"]  # the lock is gone too


def test_a_file_that_cannot_be_written_is_told_once_and_caught_up_with(folder, caplog):
    with pytest.raises(ValueError, match="interval must be above 0"):
        Textfile(folder, trained_aggregator(), "r", interval=0.0)
    aggregator = trained_aggregator()
    file = Textfile(folder, aggregator, "r", interval=0.01)
    before = file.path.read_text()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))  # as on a full disk: Python ignores SIGXFSZ
    try:
        emit_ppo_update(UPDATE, run="r", handler=aggregator)
        wait_until(lambda: caplog.records, "warning")
        time.sleep(0.1)
        assert len(caplog.records) == 1 and "File too large" in caplog.text
        assert file.path.read_text() == before and names(folder) == {"ppo-r.prom"}
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    wait_until(lambda: file.path.read_text() != before, "written again")
    file.close(remove=True)


def test_two_live_runs_of_one_name_do_not_write_one_file(train, folder, tmp_path):
    first = train("r", "--total-timesteps", "100000000")
    path = folder / "ppo-r.prom"
    wait_until(path.exists, "the first one writes")
    second = train("r", "--total-timesteps", "640")
    output, _ = second.communicate(timeout=60)
    assert second.returncode == 1
    assert f"cannot write a file to {folder}: another process writes a run of the name r there" in output
    assert first.poll() is None and path.exists() and len(list((tmp_path / "targets").glob("*.json"))) == 1
    first.kill()
    first.wait()
    (folder / "ppo-r.prom.123.456").write_text("half a")  # as a kill in the middle of a write leaves it
    assert train("r", "--total-timesteps", "640").wait(60) == 0  # a name is free when its process is gone
    assert list(folder.iterdir()) == []


def test_a_forked_child_and_a_name_that_is_too_long(folder):
    with pytest.raises(OSError, match="the name of the run is too long"):
        Textfile(folder, trained_aggregator(), "r" * 300)
    file = Textfile(folder, trained_aggregator(), "r")
    child = os.fork()
    if child == 0:
        file.close(remove=True)
        os._exit(any(str(folder) in os.path.realpath(link) for link in Path("/proc/self/fd").iterdir()))
    assert os.waitpid(child, 0)[1] == 0
    assert file.path.exists()
    file.close(remove=True)
    assert list(folder.iterdir()) == []


def test_a_file_system_that_does_not_answer_holds_up_nobody_for_long(folder, caplog, monkeypatch):
    is_asked, answers = threading.Event(), threading.Event()
    file = Textfile(folder, trained_aggregator(), "r", interval=0.01)
    monkeypatch.setattr(delivery, "write_to_textfile", lambda *given: (is_asked.set(), answers.wait()))
    monkeypatch.setattr(delivery, "_CLOSE_SECONDS", 0.1)
    assert is_asked.wait(20)
    file.close(remove=True)
    assert "its file system has not answered" in caplog.text
    answers.set()
    wait_until(lambda: list(folder.iterdir()) == [], "removed when it does")


def test_a_lock_whose_file_has_gone_is_none(folder, monkeypatch):
    first = Textfile(folder, trained_aggregator(), "r")
    real, ends = os.open, [lambda: first.close(remove=False)]

    def opened(path: Path, *given: int) -> int:
        descriptor = real(path, *given)
        if Path(path).suffix == ".lock" and ends:
            ends.pop()()  # between the opening of the file and its locking
        return descriptor

    monkeypatch.setattr(os, "open", opened)
    second = Textfile(folder, trained_aggregator(), "r")
    with pytest.raises(OSError, match="another process writes a run of the name r"):
        Textfile(folder, trained_aggregator(), "r")
    second.close(remove=True)
    assert list(folder.iterdir()) == []


def test_a_killed_trainer_leaves_its_last_values_and_their_age(train, scrape, folder):
    trainer = train("killed", "--total-timesteps", "100000000")
    told = wait_until(lambda: (s := scrape()).get("ppo_last_update_timestamp_seconds") and s, "first update")
    assert told["process_start_time_seconds"].keys() == {()}  # node_exporter's own
    trainer.kill()
    trainer.wait()
    told = scrape()
    (mtime,) = told["node_textfile_mtime_seconds"].values()
    assert told["node_textfile_mtime_seconds"].keys() == {(("file", str(folder / "ppo-killed.prom")),)}
    assert len(told["ppo_gradient_cv"]) == 1
    time.sleep(0.5)
    later = scrape()
    assert later["node_textfile_mtime_seconds"] == told["node_textfile_mtime_seconds"]
    assert later["ppo_updates_total"] == told["ppo_updates_total"] and later["node_textfile_scrape_error"] == {(): 0.0}
    assert time.time() - mtime > 0.5


def test_a_clean_end_removes_the_file_and_an_error_leaves_its_last_state(train, folder):
    clean = train("clean", "--total-timesteps", "640")
    broken = train("broken", "--total-timesteps", "640000", "--drill", "nan:op:3-3", "--on-nonfinite", "raise")
    stopped = train("stopped", "--total-timesteps", "100000000")
    path = folder / "ppo-stopped.prom"
    wait_until(lambda: path.exists() and "ppo_updates_total" in samples(path.read_text()), "running")
    stopped.terminate()
    assert stopped.wait(60) == 143 and clean.wait(60) == 0 and broken.wait(60) == 1
    assert names(folder) == {"ppo-broken.prom"}
    left = samples((folder / "ppo-broken.prom").read_text())
    assert left["ppo_nonfinite_gradients_total"][(("head", "op"), ("run", "broken"))] == 1.0


def test_a_trainer_that_cannot_write_its_file_says_so_and_does_not_start(train, folder, tmp_path):
    folder.write_text("no folder")
    trainer = train("r", "--total-timesteps", "640")
    output, _ = trainer.communicate(timeout=60)
    assert trainer.returncode == 1 and f"cannot write a file to {folder}: File exists" in output
    assert list((tmp_path / "targets").iterdir()) == []


def test_a_stopped_trainer_is_notified_as_stalled_where_node_exporter_is_relabelled_as_documented(
    train, start, node_exporter, folder, tmp_path, start_observability
):
    observability = start_observability()
    command = [sys.executable, "-m", "mixin", "--output", tmp_path / "generated", "--stalled-after", "30s"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    with_short_durations(tmp_path / "generated/alerts/ppo.rules.yml", tmp_path / "alerts", "2s")
    port = free_ports().metrics
    start_node_exporter(start, node_exporter, folder, port)
    path = tmp_path / "prometheus.yml"
    settings = yaml.safe_load(path.read_text())
    relabelling = re.search(
        r"<!-- relabelling.*?```yaml\n(.*?)```", (ROOT / "docs/delivery.md").read_text(), re.DOTALL
    )[1]
    job = {"job_name": "node", "static_configs": [{"targets": [f"127.0.0.1:{port}"]}], **yaml.safe_load(relabelling)}
    settings["scrape_configs"].append(job)
    path.write_text(yaml.safe_dump(settings))
    observability.processes["prometheus"].send(signal.SIGHUP)

    # Prometheus does not reach the trainer itself.
    trainer = train("r", "--total-timesteps", "100000000", "--targets-dir", str(tmp_path / "elsewhere"))
    updates = 'ppo_updates_total{job="ppo", run="r"}'
    wait_until(lambda: observability.query(updates), "updates")
    trainer.send_signal(signal.SIGSTOP)
    (alert,) = wait_until(lambda: observability.notified("firing", alertname="PPOTrainingStalled", run="r"), "stalled")
    assert alert["labels"]["job"] == "ppo" and alert["labels"]["instance"] == f"127.0.0.1:{port}"
    assert observability.query('up{job="node"} == 1')
    assert observability.notified("firing", alertname="PPOTrainerDown") == []
    (before,) = observability.query(updates)
    trainer.send_signal(signal.SIGCONT)
    wait_until(lambda: observability.notified("resolved", alertname="PPOTrainingStalled", run="r"), "resolved")
    (after,) = observability.query(updates)
    assert float(after["value"][1]) > float(before["value"][1])
