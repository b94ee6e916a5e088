"""A snapshot leaves the process as JSON and comes back the same."""

import json
import math
from dataclasses import replace

import pytest

from exporter import HealthLevel, RunAggregator, Thresholds, emit_ppo_update
from exporter.snapshot import Histogram, RunSnapshot, Snapshot
from exporter.telemetry import HEAD_SIGNALS, GradientStep, summarize_gradient_steps

SIGNALS = {"policy_loss": -0.01, "approx_kl": math.inf, "learning_rate": 3e-4, "episode_return_mean": 0.1 + 0.2}


def trained() -> RunAggregator:
    """Every field of the run `r` differs from its default; `fresh` has had no update."""
    aggregator = RunAggregator()
    info = {"environment": 'host "growth"\n', "seed": "1"}
    aggregator.register_run("r", ["op", "slot"], info, Thresholds(0.25, 1.5))
    for cv in (0.3, math.inf):
        emit_ppo_update(
            {
                **summarize_gradient_steps([GradientStep({"op": 1.0, "slot": 3.0}, 4.0), GradientStep({"op": cv}, cv)]),
                "gradient_cv": cv,
                "skipped_gradient_steps": 1,
                **SIGNALS,
            },
            run="r",
            handler=aggregator,
            environment_steps=4096,
            episodes=3,
            update_duration_seconds=0.3,
            rollout_duration_seconds=200.0,
            rank_rollout_seconds=(0.2, 0.1),
            signals={"kl_coef": 0.1},
            timestamp_seconds=1_700_000_000.5,
        )
    aggregator.resume_run("r", aggregator.snapshot.runs["r"].plain())
    emit_ppo_update(
        {"gradient_cv": math.inf, "contributing_heads": 2, "head_gradient_norms": {"op": math.inf}, **SIGNALS},
        run="r",
        handler=aggregator,
        gradient_norm=math.inf,
        **{name: {"op": 0.5} for name in HEAD_SIGNALS},
        rank_rollout_seconds=(0.2, 0.1),
        signals={"kl_coef": 0.1},
    )
    aggregator.count_error("r")
    aggregator.register_run("fresh", ["op"])
    return aggregator


def over_the_wire(snapshot: Snapshot) -> Snapshot:
    return Snapshot.from_plain(json.loads(json.dumps(snapshot.plain())))


def test_every_field_of_every_run_comes_back():
    snapshot = trained().snapshot
    run = snapshot.runs["r"]
    same = [
        name
        for here, there in ((run, RunSnapshot("")), (run.gradient_quality, RunSnapshot("").gradient_quality))
        for name, value in vars(here).items()
        if value == vars(there)[name]
    ]
    assert not same  # so what is compared below says something
    back = over_the_wire(snapshot)
    assert back == snapshot and list(back.runs) == ["r", "fresh"]
    assert list(back.runs["r"].gradient_quality.steps_by_level) == list(HealthLevel)
    assert back.runs["r"].gradient_quality.head_shares == {"op": 1.0}
    assert over_the_wire(Snapshot()) == Snapshot()
    with pytest.raises(TypeError):
        back.runs["r"].signals["policy_loss"] = 1.0


def test_nan_comes_back():
    aggregator = RunAggregator()
    emit_ppo_update(
        {"head_gradient_norms": {"op": math.nan}, "explained_variance": math.nan}, run="r", handler=aggregator
    )
    run = over_the_wire(aggregator.snapshot).runs["r"]
    assert math.isnan(run.gradient_quality.head_norms["op"]) and math.isnan(run.signals["explained_variance"])


def test_a_resumed_run_keeps_what_is_its_own():
    earlier = trained().snapshot.runs["r"]
    aggregator = RunAggregator()
    aggregator.register_run("r", ["op", "slot"], {"seed": "2"}, Thresholds(0.5, 1.75))
    state = json.loads(json.dumps(earlier.plain()))
    # What a checkpoint of an earlier version does not have: what is this process' own, and signals of the heads.
    del state["level_since_timestamp_seconds"], state["update_interval_seconds"]
    for name in ("thresholds", *HEAD_SIGNALS):
        del state["gradient_quality"][name]
    aggregator.resume_run("r", state)
    assert aggregator.snapshot.runs["r"] == replace(
        earlier,
        info={"seed": "2"},
        gradient_quality=replace(
            earlier.gradient_quality, thresholds=Thresholds(0.5, 1.75), **dict.fromkeys(HEAD_SIGNALS, {})
        ),
        last_update_timestamp_seconds=None,
        level_since_timestamp_seconds=None,
        update_interval_seconds=None,
        rank_rollout_seconds=(),
        resumes=2,
    )


def test_a_histogram_with_other_bounds_is_not_resumed():
    earlier = trained().snapshot.runs["r"]
    own = RunSnapshot("r", update_duration_seconds=Histogram.empty((1.0, 2.0)))
    run = own.resumed(earlier.plain())
    assert run.update_duration_seconds == own.update_duration_seconds
    assert run.rollout_duration_seconds == earlier.rollout_duration_seconds
    assert run.gradient_quality.cv_per_step == earlier.gradient_quality.cv_per_step


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        ("run", 3, TypeError),
        ("info", [], TypeError),
        ("gradient_quality", None, TypeError),
        ("recent_gradient_cvs", ["0.3"], TypeError),
        ("recent_gradient_cvs", 0.3, TypeError),
        ("signals", {"policy_loss": 10**400}, TypeError),
        ("updates", -1, TypeError),
        ("updates", 1.0, TypeError),
        ("update_duration_seconds", {"bounds": [1.0], "counts": [1], "total": 0.0}, ValueError),
        ("rollout_duration_seconds", {}, KeyError),
        ("last_update_timestamp_seconds", True, TypeError),
        ("update_interval_seconds", "1", TypeError),
    ],
)
def test_something_else_is_an_error(field, value, error):
    plain = trained().snapshot.plain()
    plain["runs"][0][field] = value
    with pytest.raises(error):
        Snapshot.from_plain(plain)
    del plain["runs"][0][field]
    with pytest.raises(KeyError):
        Snapshot.from_plain(plain)


def test_impossible_thresholds_are_an_error():
    plain = trained().snapshot.plain()
    plain["runs"][0]["gradient_quality"]["thresholds"]["warning"] = 3.0
    with pytest.raises(ValueError, match="0 < warning < critical"):
        Snapshot.from_plain(plain)


@pytest.mark.parametrize("state", [None, 3, "runs", [], {}, {"runs": None}, {"runs": "r"}, {"runs": {"r": 1}}])
def test_what_is_no_snapshot_is_an_error(state):
    with pytest.raises((KeyError, TypeError, ValueError)):
        Snapshot.from_plain(state)
