"""A gradient step that `GradientMonitor` measures: every kind of optimizer, gradient and head."""

import copy
import math
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from walker import HEADS, Policy, adam, monitor_of, quality, train

from exporter import GradientMonitor, Rows, RunAggregator, row_heads


@pytest.fixture
def aggregator() -> RunAggregator:
    return RunAggregator()


@pytest.fixture
def policy() -> Policy:
    return Policy()


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
