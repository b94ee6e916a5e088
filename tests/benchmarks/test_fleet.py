"""The fleet benchmark, with three runs: it measures everything, and leaves nothing behind."""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import hurried, wait_until

from benchmarks.fleet import free_port, queries, views
from benchmarks.prometheus import Prometheus, prometheus_command, seconds
from benchmarks.remote_write import encode_samples, encode_series, write
from benchmarks.replay import Runs
from stack.servers import ROOT


@pytest.fixture
def start_benchmark(tmp_path: Path, servers):
    """Starts it with rules that are 120 times as fast, and a folder of its own for temporary files."""
    (folder := tmp_path / "work").mkdir()
    (rules := tmp_path / "rules.yml").write_text(hurried((ROOT / "alerts/ppo.rules.yml").read_text(), 120))
    started = []

    def start(settle: int) -> tuple[subprocess.Popen, Path]:
        options = ("fleet:3", "--rules", rules, "--interval", "10", "--repeats", "1", "--settle", settle)
        command = [sys.executable, "-m", "benchmarks.fleet", *map(str, options)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        environment = {**os.environ, "TMPDIR": str(folder)}
        started.append(subprocess.Popen(command, cwd=ROOT, env=environment, text=True, **pipes))
        return started[-1], folder

    yield start
    for process in started:
        process.kill()
        process.communicate()


def left_behind(folder: Path) -> list[str]:
    """Files in `folder`, and processes that were started with a path in it."""
    commands = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            commands.append(path.read_text())
        except OSError:  # it has just ended
            continue
    return [*map(str, folder.iterdir()), *(command for command in commands if str(folder) in command)]


@pytest.mark.soak
def test_every_rule_and_every_query_of_both_dashboards_is_timed(start_benchmark):
    process, folder = start_benchmark(settle=6)
    output, errors = process.communicate(timeout=180)
    assert process.returncode == 0, output + errors
    assert not left_behind(folder)
    for words in (
        "| 3 fleet |",
        "| alerts firing | ",
        "| ppo.pages, every 0.125 s | ",
        "| Runs by level | ",
        "### Goals",
    ):
        assert words in output


def test_ctrl_c_ends_all_processes_and_removes_all_files(start_benchmark):
    process, folder = start_benchmark(settle=600)
    wait_until(lambda: list(folder.glob("ppo-fleet-*/tsdb/wal")), "Prometheus has started")

    def ended() -> bool:
        # The first one is lost now and then; why is not known. One presses again.
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(15)
        return process.returncode is not None

    wait_until(ended, "Ctrl-C ends it")
    assert process.returncode == 130
    assert not left_behind(folder)


def test_queries_are_those_that_grafana_would_send():
    board, chosen = views()["Run dashboard, one run"]
    asked = list(queries(board, 1_000_003.0, chosen))
    assert not any("$" in text for query in asked for text in query.parameters.values() if isinstance(text, str))
    unfolded = [panel for each in board["panels"] for panel in (each, *each.get("panels", []))]
    assert {panel["title"] for panel in unfolded if panel.get("targets")} <= {query.title for query in asked}
    (heatmap,) = (query.parameters for query in asked if query.title == "CV per gradient step")
    assert (heatmap["start"], heatmap["end"], heatmap["step"]) == (996_390, 999_990, 30)
    assert "[120s]" in heatmap["query"] and 'run="run-0000"' in heatmap["query"]
    assert [seconds(text) for text in ("250ms", "1m30s", "2h")] == [0.25, 90, 7200]


def test_counters_go_on_rising_and_times_stay_near_when_the_loop_begins_again():
    runs = Runs("fleet", 3, 1_000_000.0, 5.0)
    values = runs.values(1, range(2 * runs.length))
    is_counter = [name.startswith(("ppo_updates_total", "ppo_gradient_cv_per_step_sum")) for name in runs.series]
    assert (np.diff(values[:, is_counter], axis=0) > 0).all()
    column = next(i for i, name in enumerate(runs.series) if name.startswith("ppo_last_update_timestamp_seconds"))
    assert np.allclose(values[:, column], runs.moments(1, range(2 * runs.length)))
    lines = runs.answer(1, float(runs.moments(1, range(7, 8))[0]) + 0.1).decode().splitlines()
    names = [name.replace('"one"', '"run-0001"') for name in runs.series]
    assert lines == [f"{n} {v!r}" for n, v in zip(names, values[7].tolist(), strict=True) if v == v]


def test_prometheus_reads_what_is_written_to_it(tmp_path: Path, start, servers):
    (config := tmp_path / "prometheus.yml").write_text("{}\n")
    url = f"http://127.0.0.1:{(port := free_port())}"
    start("prometheus", prometheus_command(servers, config, port), f"{url}/-/ready")
    times = np.array([1_700_000_000_000, 1_700_000_005_000])
    labels = {"__name__": "written", "run": 'ä"\\'}
    write(url, [encode_series(labels, encode_samples(times, np.array([1.5, np.inf])))])
    assert Prometheus(url).ask("/api/v1/query", query="written[1m]", time=1_700_000_010)["result"] == [
        {"metric": labels, "values": [[1_700_000_000, "1.5"], [1_700_000_005, "+Inf"]]}
    ]
