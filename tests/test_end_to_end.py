"""The whole chain with real parts: a run goes critical, people are notified, and notified again when it is over."""

import math
import subprocess
import sys

import pytest
from conftest import GENTLY, wait_until

from exporter import CRITICAL_THRESHOLD
from stack.servers import ROOT
from trainer.environments.host_growth import ACTION_HEADS

RUN = "drill-17"


@pytest.fixture
def observability(start_observability, request):
    return start_observability(getattr(request, "param", 30))


@pytest.fixture
def train(observability):
    """Starts a trainer whose target file the running Prometheus finds."""
    processes = []

    def start(*flags: str) -> subprocess.Popen:
        process = subprocess.Popen(
            [
                *(*GENTLY, sys.executable, "-m", "trainer", "--run", RUN, "--targets-dir", str(observability.targets)),
                *("--checkpoint-dir", str(observability.targets.parent / "checkpoints")),
                *("--metrics-port", str(observability.ports.metrics), "--total-timesteps", "100000000", *flags),
            ],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def active(observability, **labels: str) -> list[dict]:
    return [
        alert
        for alert in observability.alerts()
        if labels.items() <= alert["labels"].items() and alert["labels"].get("run") == RUN
    ]


def test_a_drill_is_notified_as_critical_with_its_head_and_then_resolved(observability, train, tmp_path):
    fault = tmp_path / "fault"
    train("--num-envs", "16", "--rollout-steps", "16", "--minibatch-size", "64", "--drill", f"dominate:op:@{fault}")
    assert all(rule["health"] in ("ok", "unknown") for rule in observability.rules())

    (healthy,) = wait_until(
        lambda: observability.query(f'ppo_gradient_cv{{run="{RUN}"}} < {CRITICAL_THRESHOLD}'), "scrape"
    )
    assert healthy["metric"]["job"] == "ppo"
    heads = {
        sample["metric"]["head"]
        for sample in wait_until(lambda: observability.query("ppo_head_gradient_norm"), "heads")
    }
    assert heads == set(ACTION_HEADS)

    fault.touch()
    (critical,) = wait_until(
        lambda: observability.notified("firing", alertname="PPOGradientCVHigh", severity="critical", run=RUN),
        "critical notification",
    )
    cv = f"{math.sqrt(len(ACTION_HEADS)):.3f}"
    assert critical["annotations"]["summary"] == f"Gradient CV of run {RUN} is critical"
    assert f"run {RUN} is {cv}" in critical["annotations"]["description"]
    assert "Head op has 100" in critical["annotations"]["description"]
    assert critical["annotations"]["runbook_url"]

    (warning,) = wait_until(
        lambda: active(observability, alertname="PPOGradientCVHigh", severity="warning"), "warning in Alertmanager"
    )
    assert warning["status"]["state"] == "suppressed" and warning["status"]["inhibitedBy"]

    fault.unlink()
    (resolved,) = wait_until(
        lambda: observability.notified("resolved", alertname="PPOGradientCVHigh", severity="critical", run=RUN),
        "resolved notification",
        seconds=120,
    )
    assert resolved["fingerprint"] == critical["fingerprint"]
    told = [alert for notification in observability.notifications() for alert in notification["alerts"]]
    # Up to the end of the critical alert nothing was heard of the warning. (A single update may warn later.)
    until_resolved = told[: told.index(resolved) + 1]
    assert [a for a in until_resolved if a["labels"]["alertname"] == "PPOGradientCVHigh"] == [critical, resolved]
    assert all(rule["health"] == "ok" for rule in observability.rules())
    assert observability.query(f'ppo_gradient_steps_total{{run="{RUN}", health="critical"}} >= 16')


# Prometheus takes up to 5 s to notice that a target file is gone, and finds nobody there until then.
@pytest.mark.parametrize("observability", [10], indirect=True)
def test_a_trainer_that_is_stopped_is_not_notified_as_down(observability, train):
    trainer = train("--num-envs", "16", "--rollout-steps", "16", "--minibatch-size", "64")
    wait_until(lambda: observability.query(f'up{{job="ppo", run="{RUN}"}} == 1'), "trainer is up")
    trainer.terminate()
    assert trainer.wait(30) == 143
    wait_until(lambda: not observability.query(f'up{{run="{RUN}"}}'), "target is gone")
    assert not observability.query('ALERTS{alertname="PPOTrainerDown", alertstate="firing"}')
    assert not observability.notified("firing", alertname="PPOTrainerDown")


def test_a_nan_is_notified_with_the_head_that_had_it(observability, train, tmp_path):
    fault = tmp_path / "fault"
    train("--num-envs", "16", "--rollout-steps", "16", "--minibatch-size", "64", "--drill", f"nan:curve:@{fault}")
    wait_until(lambda: observability.query(f'ppo_gradient_cv{{run="{RUN}"}} < {CRITICAL_THRESHOLD}'), "scrape")
    fault.touch()
    wait_until(lambda: observability.query(f'ppo_gradient_cv{{run="{RUN}"}} == +Inf'), "scrape")
    fault.unlink()
    (alert, *_) = wait_until(
        lambda: observability.notified("firing", alertname="PPONonFiniteGradients", severity="warning", run=RUN), "NaN"
    )
    assert "1 head (curve) of run" in alert["annotations"]["description"]
    # A NaN that was skipped shows as +Inf, never as an old good value.
    assert observability.query(f'max_over_time(ppo_gradient_cv{{run="{RUN}", health="critical"}}[5m]) == +Inf')
