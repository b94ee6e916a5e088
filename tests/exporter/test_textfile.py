"""A run in a file for the real node_exporter, while it trains, when it is killed and when it ends."""

import re
import resource
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from conftest import fetch, free_ports, wait_until
from endpoint import UPDATE, trained_aggregator
from prometheus_client.parser import text_string_to_metric_families
from runs import exporter_process, names, script, trainer

from exporter import MetricsServer, RunAggregator, emit_ppo_update
from exporter.serving import deliveries
from exporter.serving.deliveries import Deliveries
from exporter.serving.state import State
from stack.servers import ROOT

RUN = (("run", "r"),)


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


def updates(path: Path) -> float:
    return samples(path.read_text())["ppo_updates_total"][RUN]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "textfiles"


@pytest.fixture
def node_exporter_url(start, node_exporter: Path, folder: Path) -> str:
    """Of a node_exporter that reads the folder."""
    url = f"http://127.0.0.1:{free_ports().metrics}"
    command = [node_exporter, f"--web.listen-address={url.removeprefix('http://')}"]
    command += [f"--collector.textfile.directory={folder}", "--collector.disable-defaults", "--collector.textfile"]
    start("node_exporter", command, f"{url}/")
    return url


@pytest.fixture
def scrape(node_exporter_url: str) -> Callable[[], dict]:
    """What node_exporter says of the folder."""
    return lambda: samples(fetch(f"{node_exporter_url}/metrics")[1])


def test_node_exporter_says_what_the_run_says_of_any_number_of_runs(scrape, folder):
    # The last two differ behind the 255 bytes that a file name can have.
    runs = ["walker/17", "walker-17", 'ünï "code"\\\n', "ü" * 200 + "1", "ü" * 200 + "2"]
    aggregator = RunAggregator()
    with MetricsServer(aggregator, port=0, process_labels={"site": "a/b"}) as server:
        for index, name in enumerate(runs):
            aggregator.register_run(name, ["op", "slot"], {"environment": "e"} if index else {"seed": "1"})
            emit_ppo_update(UPDATE, run=name, handler=aggregator, environment_steps=index)
            server.deliver(name, targets_dir=folder, textfile_dir=folder)
        told, served = scrape(), samples(fetch(server.url)[1])
        assert told["node_textfile_scrape_error"] == {(): 0.0}
        assert len(told["node_textfile_mtime_seconds"]) == len(list(folder.glob("*.json"))) == len(runs)
    families = {name: values for name, values in told.items() if name.startswith("ppo_")}
    # Not what is said of the process, which node_exporter says of itself.
    assert families == {name: values for name, values in served.items() if any("run" in dict(key) for key in values)}
    assert families["ppo_updates_total"] == {(("run", name), ("site", "a/b")): 1.0 for name in runs}
    assert list(folder.iterdir()) == []


def test_the_file_is_whole_at_every_moment_and_written_again_without_news(folder):
    aggregator, path = trained_aggregator(), folder / "ppo-r.prom"
    with MetricsServer(aggregator, port=0) as server:
        server.deliver("r", textfile_dir=folder, textfile_interval=0.01)
        first = path.stat().st_mtime_ns
        wait_until(lambda: path.stat().st_mtime_ns > first, "written again")
        for update in range(100):
            emit_ppo_update(UPDATE, run="r", handler=aggregator)
            assert len(samples(path.read_text())["ppo_gradient_cv"]) == 1, update
        wait_until(lambda: updates(path) == 101.0, "the last update")
    assert list(folder.iterdir()) == []


def test_what_cannot_be_written_at_the_start_is_refused_and_leaves_nothing(folder, tmp_path):
    other = tmp_path / "file"
    other.touch()
    with MetricsServer(trained_aggregator(), port=0) as server:
        with pytest.raises(OSError, match=f"cannot write a file to {other}: File exists"):
            server.deliver("r", targets_dir=folder, textfile_dir=other)
        assert list(folder.iterdir()) == []
        # As on a full disk: Python ignores SIGXFSZ.
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.prlimit(exporter_process(), resource.RLIMIT_FSIZE, (0, hard))
        for kind, what in (("targets_dir", "a target file"), ("textfile_dir", "a file")):
            with pytest.raises(OSError, match=f"cannot write {what} to {folder}: File too large"):
                server.deliver("r", **{kind: folder})
            assert list(folder.iterdir()) == []


def test_a_folder_that_breaks_down_is_told_once_and_caught_up_with(folder, tmp_path, capfd):
    aggregator, path = trained_aggregator(), folder / "ppo-r.prom"
    with MetricsServer(aggregator, port=0) as server:
        server.deliver("r", textfile_dir=folder, textfile_interval=0.01)
        folder.rename(tmp_path / "away")
        told = wait_until(lambda: capfd.readouterr().err, "a warning")
        assert told == f"{path} is out of date: No such file or directory; it is tried again, training continues\n"
        emit_ppo_update(UPDATE, run="r", handler=aggregator)
        server.flush()
        assert samples(fetch(server.url)[1])["ppo_updates_total"] == {RUN: 2.0}
        (tmp_path / "away").rename(folder)
        wait_until(lambda: updates(path) == 2.0, "caught up")
        wait_until(lambda: names(folder) == {"ppo-r.prom"}, "nothing else stays")  # versions come every 10 ms
    assert capfd.readouterr().err == ""


def test_a_file_system_that_does_not_answer_holds_up_the_end_of_a_run_for_a_moment_only(folder, monkeypatch, caplog):
    is_asked, answers = threading.Event(), threading.Event()
    kept = Deliveries(State({}), "http")
    kept.add("r", "127.0.0.1:1", None, str(folder), 0.01)
    monkeypatch.setattr(deliveries, "write_to_textfile", lambda *given: (is_asked.set(), answers.wait(20)))
    monkeypatch.setattr(deliveries, "END_SECONDS", 0.1)
    assert is_asked.wait(20)
    kept.end("r", crashed=False)
    assert f"{folder / 'ppo-r.prom'} stays as it is: its folder has not answered for 0.1 s" in caplog.text
    answers.set()
    wait_until(lambda: list(folder.iterdir()) == [], "removed when it does")


def test_a_second_process_does_not_write_the_file_of_a_living_one(folder):
    path = folder / "ppo-r.prom"
    with script(folder) as first, MetricsServer(trained_aggregator(), port=0) as second:
        before = path.read_text()
        with pytest.raises(OSError, match=f"cannot write a file to {folder}: another process writes a run named"):
            second.deliver("r", targets_dir=folder, textfile_dir=folder)
        assert names(folder) == {"ppo-r.json", "ppo-r.prom"} and path.read_text() == before
        first.kill()
        (folder / "ppo-r.prom.123.456").write_text("half a")  # as a kill in the middle of a write leaves it
        second.deliver("r", targets_dir=folder, textfile_dir=folder)
        assert names(folder) == {"ppo-r.json", "ppo-r.prom"}
    assert list(folder.iterdir()) == []


def test_a_killed_trainer_leaves_its_last_values(scrape, folder):
    with script(folder) as process:
        process.update()
        assert scrape()["ppo_updates_total"] == {RUN: 1.0}  # the next version is due in an hour
        process.kill()
    told = wait_until(lambda: (told := scrape())["ppo_updates_total"] == {RUN: 2.0} and told, "the last version")
    assert told["node_textfile_scrape_error"] == {(): 0.0}
    assert told["node_textfile_mtime_seconds"].keys() == {(("file", str(folder / "ppo-r.prom")),)}


def test_a_stopped_trainer_is_notified_as_stalled_where_node_exporter_is_relabelled_as_documented(
    node_exporter_url, folder, tmp_path, start_observability
):
    observability = start_observability(50)
    path, node = tmp_path / "prometheus.yml", node_exporter_url.removeprefix("http://")
    settings = yaml.safe_load(path.read_text())
    relabelling = re.search(
        r"<!-- relabelling.*?```yaml\n(.*?)```", (ROOT / "docs/delivery.md").read_text(), re.DOTALL
    )[1]
    job = {"job_name": "node", "static_configs": [{"targets": [node]}], **yaml.safe_load(relabelling)}
    settings["scrape_configs"].append(job)
    path.write_text(yaml.safe_dump(settings))
    observability.processes["prometheus"].send(signal.SIGHUP)

    stalled = {"alertname": "PPOTrainingStalled", "run": "r"}
    # Prometheus does not reach the trainer itself.
    with trainer("r", folder, "--total-timesteps", "100000000") as process:
        trained = 'ppo_updates_total{job="ppo", run="r"}'
        wait_until(lambda: observability.query(trained), "updates")
        process.send_signal(signal.SIGSTOP)
        (alert,) = wait_until(lambda: observability.notified("firing", **stalled), "stalled")
        assert alert["labels"]["job"] == "ppo" and alert["labels"]["instance"] == node
        # The exporter process goes on: neither the file nor the endpoint of node_exporter is old.
        (age,) = observability.query("time() - node_textfile_mtime_seconds")
        assert float(age["value"][1]) < 5.0
        assert observability.notified("firing", alertname="PPOTrainerDown") == []
        (before,) = observability.query(trained)
        process.send_signal(signal.SIGCONT)
        wait_until(lambda: observability.notified("resolved", **stalled), "resolved")
        (after,) = observability.query(trained)
        assert float(after["value"][1]) > float(before["value"][1])
