"""`GradientMonitor` on plain optimizers."""

import gc
import logging
import math
import threading
import tracemalloc
import weakref

import numpy as np
import pytest
import torch
from conftest import wait_until
from walker import HEADS, Policy, adam, monitor_of, quality, train

from exporter import GradientMonitor, RunAggregator, Thresholds, heads_from
from exporter.monitor import WINDOW_SECONDS
from exporter.pending import PendingGradientSteps


@pytest.fixture
def aggregator() -> RunAggregator:
    return RunAggregator()


@pytest.fixture
def policy() -> Policy:
    return Policy()


@pytest.mark.parametrize("clip", [None, 1e-3])
def test_a_window_of_steps_is_exported_whether_clipped_or_not(policy, aggregator, clip):
    optimizer = adam(policy)
    monitor_of(policy, aggregator, window_steps=4).attach(optimizer)
    cvs = train(policy, optimizer, 10, clip)
    run = aggregator.snapshot.runs["walker-17"]
    assert run.updates == 2 and sum(run.gradient_quality.steps_by_level.values()) == 8
    assert run.gradient_quality.gradient_cv == pytest.approx(sum(cvs[4:8]) / 4, rel=1e-5)
    assert set(run.gradient_quality.head_norms) == set(HEADS)
    assert run.gradient_quality.ceiling == pytest.approx(math.sqrt(5))
    assert run.gradient_quality.gradient_norm is None


def test_a_window_is_an_update_once_the_trainer_says_so(policy, aggregator):
    optimizer = adam(policy)
    monitor = monitor_of(policy, aggregator, window_steps=100, global_norm=True).attach(optimizer)
    for update in range(3):
        train(policy, optimizer, 150 if update else 7)
        monitor.record(environment_steps=100, episodes=2, policy_loss=update)
        monitor.record(environment_steps=28)
        monitor.update_completed(approx_kl=torch.tensor(0.25), update_duration_seconds=0.5)
    run = aggregator.snapshot.runs["walker-17"]
    assert (run.updates, run.environment_steps, run.episodes) == (3, 384, 6)
    assert run.signals == {"policy_loss": 2.0, "approx_kl": 0.25}
    assert run.update_duration_seconds.total == pytest.approx(1.5)
    assert sum(run.gradient_quality.steps_by_level.values()) == 307
    expected = math.sqrt(sum(p.grad.square().sum().item() for p in policy.parameters()))
    assert run.gradient_quality.gradient_norm == pytest.approx(expected, rel=1)


def test_a_window_without_gradient_steps_says_nothing(policy, aggregator):
    optimizer = adam(policy)
    monitor = monitor_of(policy, aggregator).attach(optimizer)
    monitor.update_completed(environment_steps=5)
    assert aggregator.snapshot.runs["walker-17"].updates == 0
    train(policy, optimizer, 1)
    monitor.update_completed(environment_steps=5)
    assert aggregator.snapshot.runs["walker-17"].environment_steps == 10


def test_a_window_of_slow_steps_ends_after_a_time(policy, aggregator, clock):
    optimizer = adam(policy)
    monitor_of(policy, aggregator).attach(optimizer)
    updates = []
    for _ in range(8):
        clock.now += 0.4 * WINDOW_SECONDS
        train(policy, optimizer, 1)
        updates.append(aggregator.snapshot.runs["walker-17"].updates)
    assert updates == [0, 0, 0, 1, 1, 1, 1, 2]
    assert sum(quality(aggregator).steps_by_level.values()) == 8


def test_steps_within_a_long_update_are_a_sign_of_life(policy, aggregator, clock):
    optimizer = adam(policy)
    monitor = monitor_of(policy, aggregator, window_steps=None).attach(optimizer)
    train(policy, optimizer, 1)
    monitor.update_completed()
    ended = aggregator.snapshot.runs["walker-17"].last_update_timestamp_seconds
    for _ in range(5):
        clock.now += 0.5 * WINDOW_SECONDS
        train(policy, optimizer, 1)
    run = aggregator.snapshot.runs["walker-17"]
    assert run.last_update_timestamp_seconds - ended == pytest.approx(2 * WINDOW_SECONDS) and run.updates == 1


def test_a_window_is_published_when_it_has_come_from_the_device(policy, monkeypatch):
    """What stands for a CUDA device here lets norms arrive when the test says so."""
    under_way = []

    class FromDevice(PendingGradientSteps):
        def __init__(self, *given) -> None:
            super().__init__(*given)
            self.arrival = threading.Event()
            under_way.append(self.arrival)

        is_ready = property(lambda self: self.arrival.is_set())

        def summary(self):
            assert self.arrival.wait(30)
            return super().summary()

    class Listening(RunAggregator):
        def handle_ppo_update(self, payload) -> None:
            super().handle_ppo_update(payload)
            losses.append(payload.policy_loss)

    def let_arrive(count: int) -> None:
        wait_until(lambda: len(under_way) == count, f"window {count} is under way")
        under_way[-1].set()

    losses = []
    optimizer = adam(policy)
    monitor = monitor_of(policy, Listening()).attach(optimizer)
    monkeypatch.setattr("exporter.heads.PendingGradientSteps", FromDevice)
    for update in (1, 2):
        train(policy, optimizer, 3)
        monitor.update_completed(policy_loss=update)
    under_way[1].set()
    assert losses == []
    under_way[0].set()
    wait_until(lambda: losses == [1, 2], "both are published in their order, without another step")
    for update in (3, 4):
        train(policy, optimizer, 1)
        monitor.record(policy_loss=update)
        device = threading.Thread(target=let_arrive, args=(update,))
        device.start()
        monitor.detach()
        assert losses[-1] == update
        device.join()
        monitor.attach(optimizer)


def test_a_long_window_is_right_to_the_last_step(policy, aggregator):
    optimizer = adam(policy)
    monitor = monitor_of(policy, aggregator, window_steps=None).attach(optimizer)
    cvs = train(policy, optimizer, 300)
    monitor.update_completed()
    assert quality(aggregator).gradient_cv == pytest.approx(sum(cvs) / 300, rel=1e-5)


@pytest.mark.parametrize(
    ("heads", "run", "info", "error"),
    [
        ({0: 0, "b": 1}, "r", {}, TypeError),
        ({"a": 0, "b": 1}, 17, {}, TypeError),
        ({"a": 0, "b": 1}, "", {}, ValueError),
        ({"a": 0, "b": 1}, "\udcff", {}, ValueError),
        ({"a\udcff": 0, "b": 1}, "r", {}, ValueError),
        ({"a": 0, "b": 1}, "r", {"note": "\udcff"}, ValueError),
        ({"a": 0, "b": 1}, "r", {"run": "other"}, ValueError),
        ({"a": 0, "b": 1}, "r", {"not a label": 1}, ValueError),
    ],
)
def test_labels_that_would_break_the_endpoint_are_refused(policy, aggregator, heads, run, info, error):
    heads = {name: [policy.trunk, policy.value][index] for name, index in heads.items()}
    optimizer = adam(policy)
    with pytest.raises(error):
        GradientMonitor(heads, run, info=info, aggregator=aggregator).attach(optimizer)
    assert not aggregator.snapshot.runs


def test_what_cannot_be_attached_is_an_error_that_names_the_head(policy, aggregator):
    def attach(heads, optimizer=None):
        # The same name every time: what could not be attached leaves nothing behind.
        return GradientMonitor(heads, "r", aggregator=aggregator).attach(optimizer or adam(policy))

    with pytest.raises(ValueError, match="the optimizer does not own a parameter of head 'right'"):
        without_right = [p for n, p in policy.named_parameters() if "right" not in n]
        attach(heads_from(policy, r"heads\.(\w+)"), torch.optim.SGD(without_right, lr=0.1))
    with pytest.raises(ValueError, match="'a' and 'b' share a parameter"):
        attach({"a": policy.trunk, "b": policy.trunk})
    with pytest.raises(ValueError, match="head 'a' has no parameters"):
        attach({"a": [], "b": policy.trunk})
    with pytest.raises(ValueError, match="there are no heads"):
        attach({})
    with pytest.raises(TypeError, match=r"expected a torch.optim.Optimizer, got walker\.Policy"):
        attach({"a": policy.trunk, "b": policy.value}, policy)
    with pytest.raises(
        ValueError, match=r"no module of Policy matches head\\.\(\\w\+\); there are trunk, heads, heads.left"
    ):
        heads_from(policy, r"head\.(\w+)")
    monitor = attach({"a": policy.trunk, "b": policy.value})
    with pytest.raises(RuntimeError, match="already attached"):
        monitor.attach(adam(policy))


def test_detaching_publishes_what_was_measured_and_closing_frees_the_name(policy, aggregator):
    optimizer = adam(policy)
    monitor = monitor_of(policy, aggregator).attach(optimizer)
    train(policy, optimizer, 3)
    monitor.detach()
    train(policy, optimizer, 3)
    assert sum(quality(aggregator).steps_by_level.values()) == 3
    monitor.attach(optimizer)
    train(policy, optimizer, 2)
    monitor.close()
    assert not aggregator.snapshot.runs
    monitor_of(policy, aggregator).close()


def test_the_model_of_a_training_that_is_over_is_freed_when_the_next_begins(aggregator):
    def train_once(run: str) -> weakref.ref:
        policy = Policy()
        optimizer = adam(policy)
        monitor_of(policy, aggregator, run, global_norm=True).attach(optimizer)
        train(policy, optimizer, 3)
        return weakref.ref(policy.trunk.weight)

    first, _ = train_once("first"), train_once("second")
    gc.collect()
    assert first() is None
    assert sum(quality(aggregator, "first").steps_by_level.values()) == 3


def test_counts_may_be_numpys(policy, aggregator):
    optimizer = adam(policy)
    monitor = monitor_of(policy, aggregator).attach(optimizer)
    train(policy, optimizer, 1)
    for _ in range(2):
        monitor.record(environment_steps=np.int64(2048), episodes=np.uint8(200))
    monitor.update_completed(episodes=np.count_nonzero([True, False]))
    run = aggregator.snapshot.runs["walker-17"]
    assert (run.environment_steps, run.episodes) == (4096, 401)


def test_what_is_recorded_of_each_head_stays_until_it_is_recorded_anew(policy, aggregator):
    optimizer = adam(policy)
    monitor = monitor_of(policy, aggregator).attach(optimizer)
    for ratios in ({"up": np.float32(0.25), "down": torch.tensor(1.0)}, None):
        if ratios is not None:
            monitor.record(head_entropy_ratios=ratios, head_update_ratios={"up": 0.01})
        train(policy, optimizer, 1)
        monitor.update_completed()
        assert quality(aggregator).head_entropy_ratios == {"up": 0.25, "down": 1.0}
    train(policy, optimizer, 1)
    monitor.update_completed(head_entropy_ratios=None)
    assert quality(aggregator).head_entropy_ratios == {} and quality(aggregator).head_update_ratios == {"up": 0.01}


def test_an_unknown_signal_is_refused_with_the_nearest_one(policy, aggregator):
    monitor = monitor_of(policy, aggregator)
    with pytest.raises(TypeError, match="no signal 'aprox_kl'; did you mean approx_kl"):
        monitor.record(aprox_kl=0.1)
    with pytest.raises(TypeError, match="no signal 'gradient_cv'"):
        monitor.record(gradient_cv=0.1)
    with pytest.raises(TypeError, match="policy_loss must be a number"):
        monitor.record(policy_loss="low")
    with pytest.raises(TypeError, match="head_approx_kls must be a mapping, head -> number, got 0.1"):
        monitor.record(head_approx_kls=0.1)
    with pytest.raises(ValueError, match=r"head_entropy_ratios\['up'\] must be from 0 to 1, got 1.5"):
        monitor.record(head_entropy_ratios={"up": 1.5})
    with pytest.raises(ValueError, match="environment_steps must be >= 0"):
        monitor.record(episodes=3, environment_steps=-9)
    optimizer = adam(policy)
    monitor.attach(optimizer)
    train(policy, optimizer, 1)
    monitor.update_completed()
    assert aggregator.snapshot.runs["walker-17"].episodes == 0


def test_an_error_inside_never_stops_training(policy, caplog):
    class Full(RunAggregator):
        def handle_ppo_update(self, payload) -> None:
            raise OSError("no space left on device")

    aggregator, optimizer = Full(), adam(policy)
    monitor_of(policy, aggregator, window_steps=2).attach(optimizer)
    before = policy.trunk.weight.detach().clone()
    with caplog.at_level(logging.ERROR):
        train(policy, optimizer, 10)
    assert not torch.equal(before, policy.trunk.weight)
    assert aggregator.snapshot.runs["walker-17"].exporter_errors == 5
    assert caplog.text.count("training continues") == 1


def test_too_few_heads_are_pointed_out(policy, aggregator, caplog):
    with caplog.at_level(logging.WARNING):
        heads = {name: policy.heads[name] for name in HEADS[:3]}
        GradientMonitor(heads, "three", aggregator=aggregator).attach(adam(policy))
    assert "3 heads: CV cannot exceed 1.732; critical at 2.0 can never be reached" in caplog.text


def test_thresholds_of_the_run_are_those_that_its_monitor_was_given(policy, aggregator, caplog):
    heads = {name: policy.heads[name] for name in HEADS[:3]}
    with pytest.raises(ValueError, match="0 < warning < critical, got warning 1.5 and critical 0.5"):
        GradientMonitor(heads, "three", thresholds=(1.5, 0.5), aggregator=aggregator)
    with caplog.at_level(logging.WARNING):
        GradientMonitor(heads, "three", thresholds=(0.5, 1.5), aggregator=aggregator).attach(adam(policy))
    assert aggregator.snapshot.runs["three"].gradient_quality.thresholds == Thresholds(critical=1.5)
    assert caplog.text == ""


def test_memory_stays_flat(policy, aggregator):
    optimizer = adam(policy)
    monitor_of(policy, aggregator, window_steps=16, before_clipping=True).attach(optimizer)
    train(policy, optimizer, 32)
    tracemalloc.start()
    train(policy, optimizer, 16)
    base, _ = tracemalloc.get_traced_memory()
    train(policy, optimizer, 160)
    grown, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # Ten norms of 160 steps, if they were kept, would be some 125 kB of tensors.
    assert grown - base < 30_000
