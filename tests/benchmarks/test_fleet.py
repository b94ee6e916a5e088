"""The fleet benchmark, with three runs: it measures everything, and leaves nothing behind."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import wait_until

from benchmarks.fleet import queries, round_interval, views
from benchmarks.replay import Recording, Schedule, encode_labels, encode_samples, encode_series, write
from stack.servers import ROOT

QUICK = ["--runs", "3", "--interval", "2s", "--settle", "8", "--repeats", "1", "--samples", "20"]


def start(folder: Path, *options: str) -> subprocess.Popen:
    """The benchmark, with `folder` for its temporary files."""
    return subprocess.Popen(
        [sys.executable, "-m", "benchmarks.fleet", *options],
        cwd=ROOT,
        # Torch keeps a cache of its own among temporary files.
        env={**os.environ, "TMPDIR": str(folder), "TORCHINDUCTOR_CACHE_DIR": str(folder.parent / "torch")},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def left_behind(folder: Path) -> list[str]:
    """Files in `folder`, and processes that were started with a path in it."""
    commands = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            commands.append(path.read_text())
        except OSError:  # it has just ended
            continue
    return [*map(str, folder.iterdir()), *(command for command in commands if str(folder) in command)]


def test_every_query_of_both_dashboards_is_timed_over_an_hour_of_data(tmp_path: Path, servers):
    (folder := tmp_path / "work").mkdir()
    results = tmp_path / "results.json"
    process = start(folder, *QUICK, "--results", str(results))
    output, errors = process.communicate(timeout=180)
    assert process.returncode == 0, output + errors
    assert not left_behind(folder)
    for word in ("### Goals", "rule group ppo-slow", "panel: Runs by level", "3 runs"):
        assert word in output

    (figures,) = json.loads(results.read_text())
    assert figures["up"] == 3
    assert set(figures["queries"]) == {"fleet", "one run", "run, all chosen"}
    timings = [seconds for panels in figures["queries"].values() for panel in panels.values() for seconds in panel]
    assert all(isinstance(seconds, float) for seconds in timings), timings
    boards = [json.loads(path.read_text()) for path in (ROOT / "grafana/dashboards").glob("*.json")]
    shown = {f"panel: {panel['title']}" for board in boards for panel in board["panels"] if panel.get("targets")}
    shown |= {f"annotation: {annotation['name']}" for board in boards for annotation in board["annotations"]["list"]}
    assert shown <= {title for panels in figures["queries"].values() for title in panels}


def test_ctrl_c_ends_all_processes_and_removes_all_files(tmp_path: Path, servers):
    (folder := tmp_path / "work").mkdir()
    process = start(folder, *QUICK, "--settle", "600")
    wait_until(lambda: list(folder.glob("ppo-fleet-*/targets")), "runs are scraped")
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 130
    assert not left_behind(folder)


def test_steps_are_those_that_grafana_would_choose():
    assert [round_interval(seconds) for seconds in (1.5, 1.6, 3.5, 4.5, 11.5, 12.6, 15.0, 100)] == [
        1,
        2,
        2,
        5,
        10,
        15,
        15,
        60,
    ]
    board, chosen = views("127.0.0.1:9842")["one run"]
    asked = list(queries(board, 1_000_003.0, 5.0, chosen))
    assert not any("$" in text for query in asked for text in query.parameters.values() if isinstance(text, str))
    (heatmap,) = (query.parameters for query in asked if query.title == "CV per gradient step")  # 960 pixels wide
    assert (heatmap["start"], heatmap["end"], heatmap["step"]) == (996_400, 1_000_000, 5)
    assert "[20s]" in heatmap["query"] and 'instance=~"127\\\\.0\\\\.0\\\\.1:9842"' in heatmap["query"]


def test_a_counter_goes_on_rising_in_the_next_round_of_the_recording():
    def answer(total: int, cv: float) -> str:
        return (
            f'# TYPE ppo_updates counter\nppo_updates_total{{run="recorded"}} {total}.0\n'
            f'# TYPE ppo_gradient_cv gauge\nppo_gradient_cv{{health="healthy",run="recorded"}} {cv}\n'
        )

    recording = Recording("text/plain", [0.0, 1.0, 2.0], [answer(3, 0.25), answer(5, 0.5), answer(8, 0.125)])
    answers = [recording.template(position).replace(b"\0", b"run-0001").decode().splitlines() for position in range(7)]
    assert [lines[1] for lines in answers] == [
        f'ppo_updates_total{{run="run-0001"}} {total}.0' for total in (3, 5, 8, 8, 10, 13, 13)
    ]
    assert [lines[3].split()[-1] for lines in answers] == ["0.25", "0.5", "0.125", "0.25", "0.5", "0.125", "0.25"]
    assert {Schedule(3, 3, 0.0, 5.0).position(run, 0) for run in range(3)} == {0, 1, 2}


def test_prometheus_reads_what_is_written_to_it(start_prometheus_with_receiver):
    ask, url = start_prometheus_with_receiver
    times = np.array([1_700_000_000_000, 1_700_000_005_000])
    values = np.array([1.5, np.inf])
    write(url, [encode_series(encode_labels({"__name__": "written", "run": 'ä"\\'}), encode_samples(times, values))])
    assert ask("written[1m]", 1_700_000_010) == [
        {"metric": {"__name__": "written", "run": 'ä"\\'}, "values": [[1_700_000_000, "1.5"], [1_700_000_005, "+Inf"]]}
    ]


@pytest.fixture
def start_prometheus_with_receiver(tmp_path: Path, start, servers):
    """Asks a Prometheus that takes remote writes; and its address."""
    from benchmarks.fleet import Prometheus, free_port

    (tmp_path / "prometheus.yml").write_text("{}\n")
    url = f"http://127.0.0.1:{(port := free_port())}"
    command = [
        servers.prometheus,
        f"--config.file={tmp_path / 'prometheus.yml'}",
        f"--storage.tsdb.path={tmp_path / 'tsdb'}",
        f"--web.listen-address=127.0.0.1:{port}",
        "--web.enable-remote-write-receiver",
        *servers.prometheus_options,
    ]
    start("prometheus", command, f"{url}/-/ready")

    def ask(expression: str, moment: float) -> list[dict]:
        return json.loads(Prometheus(url).post("/api/v1/query", query=expression, time=moment))["data"]["result"]

    return ask, url
