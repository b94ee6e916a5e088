"""From an update's metrics to the snapshot that readers see."""

import dataclasses
import math
from fractions import Fraction

import numpy as np
import pytest

from exporter import HealthLevel, PPOUpdatePayload, RunAggregator, emit_ppo_update
from exporter.telemetry import TRAINING_SIGNALS, GradientStep, summarize_gradient_steps

STEPS = [
    GradientStep({"op": 1.0, "slot": 3.0}, 4.0),
    GradientStep({"op": 1.0, "slot": 1.0}, 2.0),
    GradientStep({"op": math.nan}, math.nan),
]


def test_a_summary_takes_each_head_over_the_steps_it_took_part_in():
    summary = summarize_gradient_steps(STEPS[:2])
    assert summary["gradient_cv_per_step"] == (pytest.approx(math.sqrt(2) / 2), 0.0)
    assert summary["gradient_cv"] == pytest.approx(math.sqrt(2) / 4)
    assert summary["head_gradient_norms"] == {"op": 1.0, "slot": 2.0}
    assert summary["gradient_norm"] == 3.0
    summary = summarize_gradient_steps(STEPS)
    assert summary["gradient_cv"] == math.inf
    assert summary["nonfinite_gradient_steps"] == {"op": 1, "slot": 0}
    assert summary["contributing_heads"] == 2
    assert summary["head_gradient_norms"] == {"op": 1.0, "slot": 2.0}
    assert math.isnan(summarize_gradient_steps(STEPS[2:])["head_gradient_norms"]["op"])
    assert summarize_gradient_steps([GradientStep({"op": 1.7e308}, 1.7e308)] * 2)["gradient_norm"] == 1.7e308


def test_every_optional_number_of_a_payload_is_exported():
    optional = {field.name for field in dataclasses.fields(PPOUpdatePayload) if field.type == float | None}
    others = {"gradient_norm", "update_duration_seconds", "rollout_duration_seconds"}
    assert sorted(TRAINING_SIGNALS) == sorted(optional - others)


def test_a_run_is_healthy_at_zero_before_its_first_update():
    aggregator = RunAggregator()
    aggregator.register_run("r", ["op", "slot"])
    quality = aggregator.snapshot.runs["r"].gradient_quality
    assert quality.gradient_cv == 0.0 and quality.health is HealthLevel.HEALTHY
    assert quality.nonfinite_steps == {"op": 0, "slot": 0}
    with pytest.raises(ValueError, match="'r' is registered already"):
        aggregator.register_run("r", ["op"])


def test_updates_add_up_and_earlier_snapshots_stay_as_they_were():
    aggregator = RunAggregator()
    aggregator.register_run("r", ["op", "slot"])
    before = aggregator.snapshot
    for _ in range(2):
        payload = emit_ppo_update(
            {**summarize_gradient_steps(STEPS), "skipped_gradient_steps": 1, "policy_loss": 0.5},
            run="r",
            handler=aggregator,
            environment_steps=10,
            episodes=2,
            update_duration_seconds=0.2,
        )
    assert payload.gradient_cv == math.inf
    run = aggregator.snapshot.runs["r"]
    assert (run.updates, run.environment_steps, run.episodes) == (2, 20, 4)
    assert run.gradient_quality.steps_by_level == {
        HealthLevel.HEALTHY: 2,
        HealthLevel.WARNING: 2,
        HealthLevel.CRITICAL: 2,
    }
    assert run.gradient_quality.nonfinite_steps == {"op": 2, "slot": 0}
    assert run.gradient_quality.skipped_steps == 2
    # The steps that were not finite are in neither of the two, so that their quotient is a mean.
    assert run.gradient_quality.cv_per_step.cumulative()[-1] == (math.inf, 4)
    assert run.gradient_quality.cv_per_step.total == pytest.approx(2 * math.sqrt(2) / 2)
    assert run.signals == {"policy_loss": 0.5}
    assert run.update_duration_seconds.total == pytest.approx(0.4)
    assert before.runs["r"].updates == 0
    with pytest.raises(dataclasses.FrozenInstanceError):
        run.gradient_quality.gradient_cv = 1.0
    with pytest.raises(TypeError):
        aggregator.snapshot.runs["s"] = run


@pytest.mark.parametrize(
    ("norms", "shares"),
    [
        ({"a": 3.0, "b": 1.0}, {"a": 0.75, "b": 0.25}),
        ({"a": 0.0, "b": 0.0}, {"a": 0.0, "b": 0.0}),
        ({"a": math.nan, "b": 1.0, "c": math.inf}, {"a": 0.5, "b": 0.0, "c": 0.5}),
        ({"a": 1.7e308, "b": 1.7e308}, {"a": 0.5, "b": 0.5}),
        ({"a": 5e-324, "b": 0.0}, {"a": 1.0, "b": 0.0}),
    ],
)
def test_shares_are_never_nan(norms, shares):
    aggregator = RunAggregator()
    emit_ppo_update({"head_gradient_norms": norms}, run="r", handler=aggregator)
    assert aggregator.snapshot.runs["r"].gradient_quality.head_shares == shares


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"run": ""}, ValueError, "run must not be empty"),
        ({"run": 3}, TypeError, "run must be a string"),
        ({"gradient_cv": math.nan}, ValueError, "gradient_cv must be >= 0"),
        ({"gradient_cv": -0.1}, ValueError, "gradient_cv must be >= 0"),
        ({"gradient_cv": "0.3"}, TypeError, "gradient_cv must be a number"),
        ({"gradient_cv_per_step": (0.1, math.nan)}, ValueError, "gradient_cv_per_step"),
        ({"head_gradient_norms": {"op": -1.0}}, ValueError, "head_gradient_norms\\['op'\\]"),
        ({"head_entropy_ratios": {"op": 1.1}}, ValueError, "head_entropy_ratios\\['op'\\] must be from 0 to 1"),
        ({"head_clip_fractions": {"op": -0.1}}, ValueError, "head_clip_fractions\\['op'\\] must be from 0 to 1"),
        ({"head_approx_kls": {"op": None}}, TypeError, "head_approx_kls\\['op'\\] must be a number"),
        ({"head_update_ratios": {"op": -1.0}}, ValueError, "head_update_ratios\\['op'\\] must be >= 0"),
        ({"nonfinite_gradient_steps": {"op": 0.5}}, TypeError, "nonfinite_gradient_steps\\['op'\\]"),
        ({"environment_steps": -1}, ValueError, "environment_steps"),
        ({"episodes": True}, TypeError, "episodes"),
        ({"skipped_gradient_steps": 1}, ValueError, "had 0 gradient steps"),
        ({"policy_loss": "low"}, TypeError, "policy_loss"),
        ({"update_duration_seconds": math.inf}, ValueError, "update_duration_seconds"),
        ({"timestamp_seconds": None}, TypeError, "timestamp_seconds"),
        ({"timestamp_seconds": 1.7e12}, ValueError, "timestamp_seconds must be Unix time in seconds"),
        ({"policy_loss": 10**400}, ValueError, "policy_loss is too large for a float"),
        ({"policy_loss": -(10**5000)}, ValueError, "policy_loss is too large for a float"),
        ({"environment_steps": 10**400}, ValueError, "environment_steps is too large for a float"),
        ({"head_gradient_norms": {"op": 10**400}}, ValueError, "head_gradient_norms\\['op'\\] is too large"),
        ({"head_gradient_norms": {3: 1.0}}, TypeError, "a head of head_gradient_norms must be a string"),
        ({"nonfinite_gradient_steps": {"\ud800": 1}}, ValueError, "must be encodable as UTF-8"),
        ({"episodes": np.float64(1.0)}, TypeError, "episodes must be a whole number"),
        ({"episodes": np.True_}, TypeError, "episodes must be a whole number"),
    ],
)
def test_a_payload_names_the_field_that_is_wrong(fields, error, message):
    with pytest.raises(error, match=message):
        PPOUpdatePayload(**{"run": "r", **fields})


def test_a_payload_cannot_change_after_it_was_validated():
    norms = {"op": 1.0}
    payload = PPOUpdatePayload(run="r", head_gradient_norms=norms)
    norms["op"] = -1.0
    assert payload.head_gradient_norms["op"] == 1.0
    with pytest.raises(dataclasses.FrozenInstanceError):
        payload.gradient_cv = 1.0


def test_numbers_of_other_types_are_stored_as_plain_ones():
    payload = PPOUpdatePayload(
        run="r",
        gradient_cv=np.float32(0.5),
        gradient_cv_per_step=np.array([0.5, 0.25], dtype=np.float32),
        contributing_heads=np.int64(2),
        head_gradient_norms={"op": np.float16(1.5)},
        nonfinite_gradient_steps={"op": np.uint8(1)},
        gradient_norm=Fraction(1, 4),
        environment_steps=np.int32(7),
        policy_loss=2,
        update_duration_seconds=np.float64(0.25),
        rank_rollout_seconds=iter([np.float32(0.125)]),
        timestamp_seconds=np.float64(1.5),
    )
    plain = {name: value for name, value in vars(payload).items() if value is not None}
    types = {name: type(value) for name, value in plain.items()}
    assert types.pop("run") is str
    assert {type(value) for value in payload.gradient_cv_per_step + payload.rank_rollout_seconds} == {float}
    assert type(payload.head_gradient_norms["op"]) is float and type(payload.nonfinite_gradient_steps["op"]) is int
    assert {name for name, kind in types.items() if kind is int} == {
        "contributing_heads",
        "skipped_gradient_steps",
        "environment_steps",
        "episodes",
    }
    assert {name for name, kind in types.items() if kind is float} == {
        "gradient_cv",
        "gradient_norm",
        "policy_loss",
        "update_duration_seconds",
        "timestamp_seconds",
    }
    assert (payload.gradient_cv, payload.gradient_cv_per_step, payload.environment_steps) == (0.5, (0.5, 0.25), 7)
    assert (payload.gradient_norm, payload.rank_rollout_seconds) == (0.25, (0.125,))
