"""`GradientMonitor` on optimizers that know nothing of it."""

import copy
import gc
import logging
import math
import sys
import threading
import tracemalloc
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from conftest import wait_until
from torch import nn

from exporter import GradientMonitor, Rows, RunAggregator, Thresholds, gradient_cv, heads_from, row_heads
from exporter.monitor import WINDOW_SECONDS
from exporter.pending import PendingGradientSteps

HEADS = ("left", "middle", "right", "up", "down")


class Policy(nn.Module):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.trunk = nn.Linear(6, 16)
        self.heads = nn.ModuleDict({name: nn.Linear(16, 2 + index) for index, name in enumerate(HEADS)})
        self.value = nn.Linear(16, 1)

    def loss(self, inputs: torch.Tensor) -> torch.Tensor:
        features = self.trunk(inputs).tanh()
        outputs = [*(head(features) for head in self.heads.values()), self.value(features)]
        return sum(((index + 1) * output - 1).square().mean() for index, output in enumerate(outputs))


def train(policy: Policy, optimizer: torch.optim.Optimizer, steps: int, clip: float | None = None) -> list[float]:
    """A plain loop; the CV of every step, taken from the gradients before they are clipped."""
    generator, cvs = torch.Generator().manual_seed(1), []
    for _ in range(steps):
        optimizer.zero_grad()
        policy.loss(torch.randn(8, 6, generator=generator)).backward()
        cvs.append(
            gradient_cv(
                torch.cat([p.grad.flatten() for p in head.parameters()]).norm().item() for head in policy.heads.values()
            )
        )
        if clip is not None:
            nn.utils.clip_grad_norm_(policy.parameters(), clip)
        optimizer.step()
    return cvs


@pytest.fixture
def aggregator() -> RunAggregator:
    return RunAggregator()


@pytest.fixture
def policy() -> Policy:
    return Policy()


def monitor_of(policy: Policy, aggregator: RunAggregator, run: str = "walker-17", **options) -> GradientMonitor:
    return GradientMonitor(heads_from(policy, r"heads\.(\w+)"), run, aggregator=aggregator, **options)


def adam(policy: nn.Module, **options) -> torch.optim.Optimizer:
    return torch.optim.Adam(policy.parameters(), lr=1e-3, **options)


def quality(aggregator: RunAggregator, run: str = "walker-17"):
    return aggregator.snapshot.runs[run].gradient_quality


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


def test_threads_lose_no_step(aggregator):
    heads = nn.ModuleDict({name: nn.Linear(4, 2) for name in "ab"})
    optimizer = torch.optim.SGD(heads.parameters(), lr=0.0)
    monitor = GradientMonitor(dict(heads.items()), "r", window_steps=1, aggregator=aggregator).attach(optimizer)
    for parameter in heads.parameters():
        parameter.grad = torch.ones_like(parameter)

    def work(_) -> None:
        for _ in range(400):
            optimizer.step()
            monitor.record(episodes=1)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as threads:
            list(threads.map(work, range(4)))
    finally:
        sys.setswitchinterval(interval)
    optimizer.step()
    run = aggregator.snapshot.runs["r"]
    assert (run.exporter_errors, run.episodes, sum(run.gradient_quality.steps_by_level.values())) == (0, 1600, 1601)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_training_step_is_the_same_with_a_monitor_and_none_goes_uncounted(aggregator, backend):
    def trained(is_monitored: bool) -> tuple[torch.Tensor, int]:
        """Weights, and how many graphs were compiled."""
        torch.compiler.reset()
        torch.manual_seed(0)
        heads, graphs = nn.ModuleDict({name: nn.Linear(4, 2) for name in "ab"}), []
        optimizer = torch.optim.SGD(heads.parameters(), lr=0.1)
        if is_monitored:
            GradientMonitor(
                dict(heads.items()), "r", window_steps=1, before_clipping=True, global_norm=True, aggregator=aggregator
            ).attach(optimizer)

        def compile_and_count(graph, inputs):
            graphs.append(graph)
            return torch._dynamo.lookup_backend(backend)(graph, inputs)

        @torch.compile(backend=compile_and_count)
        def step(inputs: torch.Tensor) -> None:
            optimizer.zero_grad()
            sum(head(inputs).square().mean() for head in heads.values()).backward()
            optimizer.step()

        for size in (8, 8, 5, 8):
            step(torch.randn(size, 4))
        return torch.cat([parameter.detach().flatten() for parameter in heads.parameters()]), len(graphs)

    (plain, graphs), (monitored, graphs_of_both) = trained(False), trained(True)
    run = aggregator.snapshot.runs["r"]
    assert torch.equal(plain, monitored) and (run.updates, run.exporter_errors) == (4, 0)
    # Those that trace into a hook cost recompilations, and may fail in it.
    assert graphs_of_both == graphs > 0


def test_rows_of_a_fused_layer_are_heads(aggregator):
    torch.manual_seed(0)
    layer = nn.Linear(6, 9)
    optimizer = adam(layer)
    GradientMonitor(row_heads(layer, {"a": 2, "b": 4, "c": 3}), "fused", window_steps=1, aggregator=aggregator).attach(
        optimizer
    )
    layer(torch.randn(8, 6)).square().mean().backward()
    expected = {
        name: torch.cat([layer.weight.grad[rows].flatten(), layer.bias.grad[rows]]).norm().item()
        for name, rows in (("a", slice(0, 2)), ("b", slice(2, 6)), ("c", slice(6, 9)))
    }
    optimizer.step()
    assert quality(aggregator, "fused").head_norms == pytest.approx(expected, rel=1e-6)
    with pytest.raises(ValueError, match="weight has 9 rows, but the heads add up to 8"):
        row_heads(layer, {"a": 8})


@pytest.mark.parametrize("before_clipping", [False, True])
def test_a_nan_is_in_every_head_after_clipping_and_attributed_before(policy, aggregator, before_clipping):
    optimizer = adam(policy)
    monitor_of(policy, aggregator, window_steps=1, before_clipping=before_clipping).attach(optimizer)
    features = policy.trunk(torch.randn(8, 6)).tanh().detach()
    outputs = {name: head(features) for name, head in policy.heads.items()}
    outputs["middle"] = outputs["middle"] * math.nan
    sum(output.square().mean() for output in outputs.values()).backward()
    nn.utils.clip_grad_norm_(policy.heads.parameters(), 0.5)
    optimizer.step()
    blamed = {"middle"} if before_clipping else set(HEADS)
    assert quality(aggregator).nonfinite_steps == {head: int(head in blamed) for head in HEADS}
    assert quality(aggregator).gradient_cv == math.inf


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("before_clipping", [False, True])
def test_loss_scaling_is_undone_and_overflowed_steps_are_none(policy, aggregator, fused, before_clipping):
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1000)
    optimizer = adam(policy, fused=fused)
    monitor = monitor_of(
        policy, aggregator, window_steps=None, before_clipping=before_clipping, grad_scaler=scaler
    ).attach(optimizer)
    generator = torch.Generator().manual_seed(1)
    norms = []
    for step in range(4):
        inputs = torch.randn(8, 6, generator=generator)
        reference = copy.deepcopy(policy)
        reference.zero_grad()
        reference.loss(inputs).backward()
        optimizer.zero_grad()
        scaler.scale(policy.loss(inputs)).backward()
        if step == 1:
            policy.trunk.weight.grad.fill_(math.inf)
        else:
            norms.append(torch.cat([p.grad.flatten() for p in reference.heads["up"].parameters()]).norm().item())
        scaler.step(optimizer)
        scaler.update()
    monitor.update_completed()
    run = aggregator.snapshot.runs["walker-17"]
    assert sum(run.gradient_quality.steps_by_level.values()) == 3
    assert run.gradient_quality.head_norms["up"] == pytest.approx(sum(norms) / 3, rel=1e-5)
    assert math.isfinite(run.gradient_quality.gradient_cv) and run.exporter_errors == 0


def test_frozen_parameters_are_no_obstacle(policy, aggregator):
    policy.heads["left"].bias.requires_grad_(False)
    with torch.inference_mode():
        never_trained = nn.Parameter(torch.zeros(2), requires_grad=False)
    policy.heads["right"].register_parameter("never_trained", never_trained)
    optimizer = adam(policy)
    monitor_of(policy, aggregator, window_steps=1, before_clipping=True, global_norm=True).attach(optimizer)
    cvs = []
    for _ in range(2):
        optimizer.zero_grad()
        policy.loss(torch.randn(8, 6)).backward()
        optimizer.step()
        cvs.append(quality(aggregator).gradient_cv)
    assert set(quality(aggregator).head_norms) == set(HEADS) and all(cv > 0 for cv in cvs)


def test_a_step_with_a_closure_is_measured_in_its_own_step(policy, aggregator):
    optimizer = adam(policy)
    monitor_of(policy, aggregator, window_steps=1).attach(optimizer)
    for factor in (1.0, math.nan):

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = policy.loss(torch.randn(8, 6)) * factor
            loss.backward()
            return loss

        optimizer.step(closure)
        assert math.isfinite(quality(aggregator).gradient_cv) == (factor == 1.0)
    assert aggregator.snapshot.runs["walker-17"].updates == 2


def test_a_single_parameter_is_copied_not_looked_at_later(aggregator):
    layer = nn.Linear(4, 3, bias=False)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
    GradientMonitor({"a": layer}, "one", window_steps=2, aggregator=aggregator).attach(optimizer)
    layer.weight.grad = torch.ones_like(layer.weight)
    for value in (1.0, 3.0):
        layer.weight.grad.fill_(value)
        optimizer.step()
    assert quality(aggregator, "one").head_norms["a"] == pytest.approx(2 * math.sqrt(12))


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
    assert not aggregator.snapshot.runs and not optimizer._optimizer_step_pre_hooks


def test_training_is_bit_identical_with_and_without(policy, aggregator):
    observed, plain = policy, copy.deepcopy(policy)
    optimizer = adam(observed)
    monitor_of(observed, aggregator, before_clipping=True, global_norm=True).attach(optimizer)
    torch.manual_seed(5)
    train(observed, optimizer, 200, clip=0.5)
    after = torch.rand(1)
    torch.manual_seed(5)
    train(plain, adam(plain), 200, clip=0.5)
    assert torch.equal(after, torch.rand(1))
    for a, b in zip(observed.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a, b)


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
    with pytest.raises(TypeError, match=r"expected a torch.optim.Optimizer, got test_monitor\.Policy"):
        attach({"a": policy.trunk, "b": policy.value}, policy)
    with pytest.raises(
        ValueError, match=r"no module of Policy matches head\\.\(\\w\+\); there are trunk, heads, heads.left"
    ):
        heads_from(policy, r"head\.(\w+)")
    monitor = attach({"a": policy.trunk, "b": policy.value})
    with pytest.raises(RuntimeError, match="attached already"):
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
    assert not aggregator.snapshot.runs and not optimizer._optimizer_step_pre_hooks
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
    assert caplog.text.count("training goes on") == 1


@pytest.mark.parametrize("before_clipping", [False, True])
def test_sparse_gradients_are_measured(aggregator, before_clipping):
    torch.manual_seed(0)
    embedding, fused, layer = nn.Embedding(10, 4, sparse=True), nn.Embedding(6, 4, sparse=True), nn.Linear(4, 2)
    heads = {
        "sparse": embedding,
        "dense": layer,
        "above": [Rows(fused.weight, 0, 2)],
        "below": [Rows(fused.weight, 2, 6)],
    }
    optimizer = torch.optim.SGD([*embedding.parameters(), *fused.parameters(), *layer.parameters()], lr=0.1)
    GradientMonitor(heads, "r", window_steps=1, before_clipping=before_clipping, aggregator=aggregator).attach(
        optimizer
    )
    # Twice the same index: its two gradients have to be added up before they are squared.
    layer(embedding(torch.tensor([1, 2, 2])) + fused(torch.tensor([0, 3, 3]))).square().mean().backward()
    rows = fused.weight.grad.to_dense()
    expected = {
        "sparse": embedding.weight.grad.to_dense().norm().item(),
        "dense": layer.weight.grad.norm().hypot(layer.bias.grad.norm()).item(),
        "above": rows[:2].norm().item(),
        "below": rows[2:].norm().item(),
    }
    optimizer.step()
    assert quality(aggregator, "r").head_norms == pytest.approx(expected, rel=1e-6)


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


def test_half_precision_gradients_are_measured_in_single_precision(aggregator):
    torch.manual_seed(0)
    heads = {name: nn.Linear(64, 64).to(torch.bfloat16) for name in ("a", "b")}
    optimizer = torch.optim.SGD([p for head in heads.values() for p in head.parameters()], lr=0.1)
    GradientMonitor(heads, "half", window_steps=1, aggregator=aggregator).attach(optimizer)
    for head in heads.values():
        for parameter in head.parameters():
            parameter.grad = torch.randn_like(parameter)
    expected = {n: math.sqrt(sum(p.grad.double().square().sum() for p in h.parameters())) for n, h in heads.items()}
    optimizer.step()
    assert quality(aggregator, "half").head_norms == pytest.approx(expected, rel=1e-5)


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


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_an_attached_step_does_not_synchronize_on_cuda(policy, aggregator):
    policy = policy.cuda()
    optimizer = adam(policy, fused=True)
    monitor = monitor_of(policy, aggregator, window_steps=4, global_norm=True).attach(optimizer)
    inputs = torch.randn(8, 6, device="cuda")
    policy.loss(inputs).backward()
    optimizer.step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(40):
            optimizer.zero_grad()
            policy.loss(inputs).backward()
            optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    monitor.detach()
    run = aggregator.snapshot.runs["walker-17"]
    assert run.exporter_errors == 0 and sum(run.gradient_quality.steps_by_level.values()) == 41
