"""`python -m stack.drill` against real servers."""

import os
import re
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from conftest import fetch, free_ports, wait_until

from stack.drill import Alertmanager
from stack.servers import ROOT

STEPS = [
    "drill started",
    "training",
    "Prometheus scrapes the run",
    "gradient crossed the threshold",
    "first scrape that saw it",
    "alert pending",
    "alert firing",
    "Alertmanager has it",
    "notification received",
    "gradient no longer critical",
    "alert resolved",
    "resolved notification received",
]
RUN = "fire-drill-test"


@pytest.fixture
def drill(tmp_path):
    """Starts a drill; `output(process)` is what it has said."""
    processes = []

    def start(observability, *flags: str) -> subprocess.Popen:
        with (tmp_path / "drill.log").open("w") as output:
            process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "stack.drill", "--run", RUN, "--patience", "10"),
                    *("--prometheus-url", observability.prometheus_url),
                    *("--alertmanager-url", observability.alertmanager_url),
                    *("--targets-dir", observability.targets, "--receiver-log", observability.jsonl, *flags),
                ],
                cwd=ROOT,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, "COLUMNS": "160", "PYTHONUNBUFFERED": "1"},
                start_new_session=True,
            )
        processes.append(process)
        return process

    yield start
    for process in processes:
        if process.poll() is None:
            process.terminate()
            process.wait(60)


@pytest.fixture
def output(tmp_path):
    return lambda: (tmp_path / "drill.log").read_text()


def timeline(text: str) -> dict[str, tuple[float, float]]:
    """Seconds and delta of each row of the table."""
    rows = re.findall(r"^ +(\S.*?) +\d\d:\d\d:\d\d +(-?[\d.]+) +([+-][\d.]+)", text, re.MULTILINE)
    return {name: (float(at), float(delta)) for name, at, delta in rows}


def nothing_is_left(observability, trainers: set[int]) -> bool:
    return not list(observability.targets.iterdir()) and not any(Path(f"/proc/{pid}").exists() for pid in trainers)


def children(process: subprocess.Popen) -> set[int]:
    return {int(child) for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()}


def test_a_drill_sees_every_step_in_its_order_and_says_when(start_observability, drill, output):
    observability = start_observability()
    process = drill(observability, "--hold", "9")
    assert process.wait(180) == 0, output()
    seen = timeline(output())
    assert list(seen) == STEPS, output()
    at = [seconds for seconds, _ in seen.values()]
    # Prometheus may scrape before the first update has ended.
    # It stamps a sample with the time at which the scrape began, which may be shortly before the update that it shows.
    assert all(then <= now + 0.5 for then, now in pairwise(at[3:])) and at[1] < at[3], output()
    assert sum(delta for _, delta in seen.values()) == pytest.approx(at[-1], abs=0.05 * len(seen))
    at = dict(zip(seen, at, strict=True))
    assert at["alert firing"] - at["alert pending"] == pytest.approx(2, abs=0.2), "`for` of the rule"
    (paged, text), (over, end) = re.findall(r"Told ([\d.]+) s after the gradient .*?: (.*)", output())
    assert re.fullmatch(rf"FIRING Gradient CV 2\.\d{{3}} is BAD in run {RUN}", text)
    assert end == text.replace("FIRING", "RESOLVED")
    assert float(paged) == pytest.approx(at["notification received"] - at["gradient crossed the threshold"], abs=0.11)
    assert float(over) == pytest.approx(
        at["resolved notification received"] - at["gradient no longer critical"], abs=0.11
    )

    # What the drill read as crossing and recovery is what the run went through: 16 gradient steps an update.
    crossed, recovered = (
        [int(number) for number in re.search(rf"{step} .*?update (\d+)(?: to (\d+))?,", output()).groups() if number]
        for step in ("gradient crossed the threshold", "gradient no longer critical")
    )
    critical = f'max_over_time(ppo_gradient_steps_total{{run="{RUN}",health="critical"}}[5m])'
    (sample,) = observability.query(critical)
    fewest, most = recovered[0] - crossed[-1] - 1, recovered[-1] - crossed[0] + 1
    assert 0 < 16 * fewest <= float(sample["value"][1]) <= 16 * most
    assert observability.notified("firing", run=RUN, severity="critical")
    assert observability.notified("resolved", run=RUN, severity="critical")
    assert nothing_is_left(observability, set())


def test_a_silence_fails_the_drill_which_names_it_and_leaves_nothing(start_observability, servers, drill, output):
    observability = start_observability()
    url = f"--alertmanager.url={observability.alertmanager_url}"
    words = ["--author=night shift", "--comment=too loud", "--duration=1h", "run=~fire-drill-.*"]
    subprocess.run([servers.amtool, url, "silence", "add", *words], check=True)
    process = drill(observability, "--patience", "4", "--hold", "60")
    assert process.wait(120) == 1, output()
    assert list(timeline(output())) == STEPS[: STEPS.index("notification received")], output()
    assert "did not come within 5 s: notification received" in output()
    assert re.search(r"The alert is silenced: \S+ by night shift until \S+: too loud", output()), output()
    assert nothing_is_left(observability, set())


def test_ctrl_c_ends_the_trainer_takes_its_target_away_and_shows_the_timeline_so_far(
    start_observability, drill, output
):
    observability = start_observability()
    process = drill(observability, "--receiver-port", str(observability.ports.metrics))
    wait_until(lambda: "s  Prometheus scrapes the run" in output(), "the run is scraped")
    (sample,) = observability.query(f'up{{run="{RUN}"}}')
    assert sample["value"][1] == "1"
    assert fetch(f"http://127.0.0.1:{observability.ports.metrics}/-/healthy")[0] == 200
    started = children(process)
    assert len(started) == 2
    for _ in range(2):
        os.killpg(process.pid, signal.SIGINT)
    assert process.wait(60) == 130, output()
    assert list(timeline(output()))[:3] == STEPS[:3] and "Interrupted after" in output()
    assert "Traceback" not in output() and nothing_is_left(observability, started)


def test_a_drill_without_a_stack_or_with_half_of_one_says_what_is_missing(start_observability, drill, output):
    observability = start_observability()

    def failed_with(*flags: str) -> str:
        assert drill(observability, *flags).wait(60) == 1, output()
        assert nothing_is_left(observability, set()) and "Traceback" not in output()
        return output()

    nobody = f"http://127.0.0.1:{observability.ports.grafana}"
    text = failed_with("--prometheus-url", nobody)
    assert f"Prometheus is not ready at {nobody}: " in text and "`make run` starts the stack" in text
    assert "there is no folder" in failed_with("--targets-dir", "missing")
    assert "there is no missing.jsonl" in failed_with("--receiver-log", "missing.jsonl")
    assert "has no head 'opp'; its heads are slot" in failed_with("--head", "opp")
    taken = observability.ports.receiver
    assert f"cannot listen on 127.0.0.1:{taken}" in failed_with("--receiver-port", str(taken))
    observability.processes["alertmanager"].stop()
    assert f"Alertmanager is not ready at {observability.alertmanager_url}: " in failed_with()
    assert drill(observability, "--", "--run", "other").wait(60) == 2
    assert "the trainer's --run is set by the drill: use --run before the --" in output()


def test_what_a_notification_waits_for_is_read_from_the_routes_that_the_alert_takes(start_alertmanager):
    port = free_ports().alertmanager
    route = {
        "receiver": "all",
        "group_by": ["alertname", "run"],
        "group_wait": "5s",
        "group_interval": "1m30s",
        "routes": [
            {"matchers": ['evaluator="grafana"'], "group_wait": "1h"},
            {"matchers": ['severity=~"crit.*"', 'run!~"other|walker"'], "group_wait": "10s", "continue": True},
            {"match_re": {"team": ".*"}, "group_wait": "20s"},
            {"match": {"severity": "critical"}, "group_wait": "15s", "routes": [{"matchers": ["run=a"]}]},
            {"matchers": [], "group_wait": "2h"},
        ],
    }
    start_alertmanager(port, {"route": route, "receivers": [{"name": "all"}]})
    alertmanager = Alertmanager(f"http://127.0.0.1:{port}")
    known = {"evaluator": "prometheus", "severity": "critical"}
    # Nothing is known of the label `team`: both what asks for it and what comes after may be taken.
    assert alertmanager.waits({**known, "run": "a"}) == (20, 90)
    assert alertmanager.waits({**known, "run": "a", "team": "x"}) == (20, 90)
    assert alertmanager.waits({"evaluator": "grafana", "severity": "critical", "run": "a"}) == (3600, 90)
    assert alertmanager.waits({"evaluator": "prometheus", "severity": "info", "run": "b"}) == (7200, 90)
