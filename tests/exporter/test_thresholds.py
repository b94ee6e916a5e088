"""Thresholds belong to the run: everything that shows its level uses them."""

import math

import numpy as np
import pytest
from endpoint import ask
from prometheus_client.parser import text_string_to_metric_families

from exporter import HealthLevel, MetricsServer, RunAggregator, Thresholds, emit_ppo_update
from trainer.display import flow_line

THREE = Thresholds(critical=1.5)


@pytest.fixture
def aggregator() -> RunAggregator:
    """With a run `r` of three heads, which is critical from 1.5 on."""
    aggregator = RunAggregator()
    aggregator.register_run("r", ["a", "b", "c"], thresholds=THREE)
    return aggregator


def update(aggregator: RunAggregator, cv: float, *per_step: float, at: float = 1000.0) -> None:
    metrics = {"gradient_cv": cv, "gradient_cv_per_step": per_step, "contributing_heads": 3}
    emit_ppo_update(metrics, run="r", handler=aggregator, timestamp_seconds=at)


def samples(text: str) -> dict[tuple[str, ...], float]:
    """By name and label values."""
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_a_run_of_three_heads_is_critical_at_its_own_threshold_on_metrics_in_the_terminal_and_on_the_page(aggregator):
    aggregator.register_run("usual", ["a", "b", "c"])
    with MetricsServer(aggregator, port=0) as server:
        # From the first scrape on.
        assert samples(ask(server.url).text)["ppo_gradient_cv_threshold", "critical", "r"] == 1.5
        update(aggregator, 1.5, 0.4, math.nextafter(1.5, 0), 1.5, math.inf)
        emit_ppo_update({"gradient_cv": 1.5}, run="usual", handler=aggregator)
        server.flush()
        served = samples(ask(server.url).text)
        page = ask(server.url, "/").text
    assert served["ppo_gradient_cv", "critical", "r"] == served["ppo_gradient_cv", "warning", "usual"] == 1.5
    assert [served["ppo_gradient_steps_total", level, "r"] for level in HealthLevel] == [1.0, 1.0, 2.0]
    assert {key[1:]: value for key, value in served.items() if key[0] == "ppo_gradient_cv_threshold"} == {
        ("warning", "r"): 0.5,
        ("critical", "r"): 1.5,
        ("warning", "usual"): 0.5,
        ("critical", "usual"): 2.0,
    }
    quality = aggregator.snapshot.runs["r"].gradient_quality
    assert flow_line(quality).plain == "Flow: CV:1.500 BAD" and "red" in str(flow_line(quality).spans[0].style)
    ours, usual = page.split('data-key="run r"')[1].split('data-key="run usual"')
    assert ">CV:1.500 BAD</data>" in ours and ">1.5 BAD</text>" in ours and "Thresholds: 0.5 warning, 1.5 cri" in ours
    assert ">CV:1.500 warn</data>" in usual and ">2.0 BAD</text>" in usual
    assert "critical at 2.0 can never be reached" in usual and "never be reached" not in ours


def test_a_level_began_with_the_update_that_reached_it(aggregator):
    def since() -> float | None:
        return aggregator.snapshot.runs["r"].level_since_timestamp_seconds

    assert since() is None
    for at, cv, began in [
        (10.0, 0.1, 10.0),
        (20.0, 0.4999, 10.0),
        (30.0, 0.5, 30.0),
        (40.0, 1.4999, 30.0),
        (50.0, 1.5, 50.0),
        (60.0, math.inf, 50.0),
        (70.0, 0.1, 70.0),
    ]:
        update(aggregator, cv, at=at)
        assert since() == began, at
    # A gradient step within an update is no update.
    aggregator.note_progress("r", 75.0)
    assert since() == 70.0


def test_a_process_that_resumes_says_since_when_it_has_seen_the_level(aggregator):
    update(aggregator, 1.7, at=10.0)
    state = aggregator.snapshot.runs["r"].plain()
    aggregator.remove_run("r")
    aggregator.register_run("r", ["a", "b", "c"], thresholds=Thresholds(critical=1.75))
    aggregator.resume_run("r", state)
    run = aggregator.snapshot.runs["r"]
    assert run.gradient_quality.health is HealthLevel.WARNING and run.level_since_timestamp_seconds is None
    update(aggregator, 1.7, at=20.0)
    assert aggregator.snapshot.runs["r"].level_since_timestamp_seconds == 20.0


def test_the_update_interval_is_the_recent_maximum_whatever_the_time_of_day_says(aggregator, monkeypatch):
    now = 0.0
    monkeypatch.setattr("exporter.aggregator.time.monotonic", lambda: now)

    def after(seconds: float) -> float | None:
        nonlocal now
        now += seconds
        update(aggregator, 0.1, at=5000.0 - now)  # a clock that is set back
        return aggregator.snapshot.runs["r"].update_interval_seconds

    seen = [after(seconds) for seconds in (0.0, 10.0, 1.0, 1.0, 8.5, 8.0)]
    assert seen == [None, 10.0, pytest.approx(9.0), pytest.approx(8.1), pytest.approx(8.5), pytest.approx(8.0)]
    for _ in range(20):
        last = after(1.0)
    assert last == 1.0
    assert aggregator.snapshot.runs["r"].stalled_after_seconds == 300.0
    after(360.0)
    assert aggregator.snapshot.runs["r"].stalled_after_seconds == 1800.0
    aggregator.remove_run("r")
    aggregator.register_run("r", ["a"])
    assert after(1.0) is None


@pytest.mark.parametrize(
    ("thresholds", "error", "message"),
    [
        ((0.0, 2.0), ValueError, "0 < warning < critical, got warning 0.0 and critical 2.0"),
        ((2.0, 0.5), ValueError, "got warning 2.0 and critical 0.5"),
        ((1.0, 1.0), ValueError, "got warning 1.0"),
        ((math.nan, 2.0), ValueError, "must be finite"),
        ((0.5, math.nan), ValueError, "must be finite"),
        ((0.5, math.inf), ValueError, "must be finite"),
        ((0.5, 10**400), ValueError, "must be finite"),
        (("0.5", 2.0), TypeError, "the warning threshold must be a number, got '0.5'"),
        ((0.5, True), TypeError, "the critical threshold must be a number, got True"),
        ((0.5,), TypeError, "such a pair"),
        (0.5, TypeError, "such a pair, got 0.5"),
        (None, TypeError, "such a pair, got None"),
    ],
)
def test_impossible_thresholds_are_refused(thresholds, error, message):
    with pytest.raises(error, match=message):
        RunAggregator().register_run("r", ["a"], thresholds=thresholds)


def test_thresholds_are_plain_numbers():
    thresholds = Thresholds.of([np.float32(0.25), 3])
    assert thresholds == Thresholds(0.25, 3.0) and {type(value) for value in vars(thresholds).values()} == {float}
    assert [thresholds.level(cv) for cv in (0.2, 0.25, 3.0, math.nan)] == [
        HealthLevel.HEALTHY,
        HealthLevel.WARNING,
        HealthLevel.CRITICAL,
        HealthLevel.CRITICAL,
    ]
