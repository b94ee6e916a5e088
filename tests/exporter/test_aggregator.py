"""Runs begin, end, crash and begin again."""

import json
import math

import numpy as np
import pytest

from exporter import RunAggregator, emit_ppo_update


@pytest.fixture
def aggregator() -> RunAggregator:
    """With a run `r` that has completed an update at 1000 s."""
    aggregator = RunAggregator()
    aggregator.register_run("r", ["op", "slot"])
    update(aggregator)
    return aggregator


def update(aggregator: RunAggregator, run: str = "r", **values: object) -> None:
    emit_ppo_update({}, run=run, handler=aggregator, **{"timestamp_seconds": 1000.0, **values})


def test_what_comes_late_does_not_bring_a_removed_run_back(aggregator):
    aggregator.remove_run("r")
    update(aggregator)
    aggregator.count_error("r")
    aggregator.note_progress("r", 1001.0)
    aggregator.remove_run("r")
    assert not aggregator.snapshot.runs
    aggregator.register_run("r", ["op"])
    update(aggregator)
    aggregator.count_error("r")
    assert (aggregator.snapshot.runs["r"].updates, aggregator.snapshot.runs["r"].exporter_errors) == (1, 1)
    with pytest.raises(ValueError, match="registered already"):
        aggregator.register_run("r", ["op"])


def test_a_run_that_never_was_registered_is_created(aggregator):
    aggregator.remove_run("first")
    aggregator.abandon_run("second")
    update(aggregator, "first")
    aggregator.count_error("second")
    assert list(aggregator.snapshot.runs) == ["r", "first", "second"]


def test_an_abandoned_run_stays_as_it_is_until_it_is_replaced(aggregator):
    before = aggregator.snapshot.runs["r"]
    aggregator.abandon_run("r")
    update(aggregator)
    aggregator.count_error("r")
    aggregator.note_progress("r", 1001.0)
    assert aggregator.snapshot.runs["r"] is before
    aggregator.register_run("r", ["op"])
    assert aggregator.snapshot.runs["r"].updates == 0
    update(aggregator)
    assert aggregator.snapshot.runs["r"].updates == 1
    with pytest.raises(ValueError, match="registered already"):
        aggregator.register_run("r", ["op"])


def test_an_abandoned_run_can_be_removed(aggregator):
    aggregator.abandon_run("r")
    aggregator.remove_run("r")
    update(aggregator)
    assert not aggregator.snapshot.runs


def test_progress_moves_the_time_of_the_last_update_forward(aggregator):
    before = aggregator.snapshot.runs["r"]
    aggregator.note_progress("r", np.float32(1024.0))
    after = aggregator.snapshot.runs["r"]
    assert after.last_update_timestamp_seconds == 1024.0
    assert {name for name, value in vars(after).items() if value != vars(before)[name]} == {
        "last_update_timestamp_seconds"
    }
    aggregator.note_progress("r", 1023.0)
    assert aggregator.snapshot.runs["r"] is after


def test_progress_is_no_first_update():
    aggregator = RunAggregator()
    aggregator.register_run("r", ["op"])
    before = aggregator.snapshot
    for run in ("r", "unknown"):
        aggregator.note_progress(run, 1000.0)
    assert aggregator.snapshot is before


@pytest.mark.parametrize(("timestamp", "error"), [(math.inf, ValueError), (1.7e12, ValueError), (None, TypeError)])
def test_progress_at_no_time_is_an_error(aggregator, timestamp, error):
    with pytest.raises(error, match="timestamp_seconds"):
        aggregator.note_progress("r", timestamp)


def test_a_snapshot_of_numpy_scalars_can_be_dumped(aggregator):
    update(aggregator, environment_steps=np.int64(3), policy_loss=np.float32(0.5), rank_rollout_seconds=np.ones(2))
    (run,) = json.loads(json.dumps(aggregator.snapshot.plain()))["runs"]
    assert (run["environment_steps"], run["signals"], run["rank_rollout_seconds"]) == (3, {"policy_loss": 0.5}, [1, 1])
