"""Norms per head: right, attributed to the right head, and the same as torch's for clipping."""

import math

import pytest
import torch
from torch import nn

from exporter import HeadGradientMeter, Rows
from exporter.recording import after_backward
from exporter.telemetry import summarize_gradient_steps


def network(seed: int = 0) -> nn.ModuleDict:
    torch.manual_seed(seed)
    return nn.ModuleDict(
        {"trunk": nn.Linear(5, 8), "left": nn.Linear(8, 3), "right": nn.Linear(8, 4), "value": nn.Linear(8, 1)}
    )


def backward(net: nn.ModuleDict, skip: tuple[str, ...] = ()) -> None:
    net.zero_grad()
    features = net["trunk"](torch.randn(16, 5)).tanh()
    sum(net[name](features).square().mean() for name in ("left", "right", "value") if name not in skip).backward()


def meter_of(net: nn.ModuleDict) -> HeadGradientMeter:
    return HeadGradientMeter({name: net[name] for name in ("left", "right")}, net.parameters())


def reference_norm(parameters) -> float:
    return math.sqrt(sum(p.grad.double().square().sum().item() for p in parameters if p.grad is not None))


def test_norms_cover_all_parameters_of_a_head_and_the_global_norm_is_that_of_clipping():
    net = network()
    meter = meter_of(net)
    for _ in range(3):
        backward(net)
        global_norm = meter.measure()
        expected = {name: reference_norm(net[name].parameters()) for name in ("left", "right")}
        assert global_norm.item() == pytest.approx(nn.utils.clip_grad_norm_(net.parameters(), 1e9).item(), rel=1e-6)
        step = meter.collect()[-1]
        assert step.head_norms == pytest.approx(expected, rel=1e-6)
        assert step.global_norm == pytest.approx(reference_norm(net.parameters()), rel=1e-6)


def test_many_steps_are_kept_in_order_until_they_are_collected():
    net = network()
    meter = HeadGradientMeter({"left": net["left"], "right": net["right"]}, net.parameters())
    expected = []
    for _ in range(9):
        backward(net)
        meter.measure()
        expected.append(reference_norm(net["left"].parameters()))
    assert [step.head_norms["left"] for step in meter.collect()] == pytest.approx(expected, rel=1e-6)
    assert meter.collect() == []


def test_rows_of_a_fused_layer_agree_with_separate_layers():
    net = network()
    backward(net)
    fused = nn.Linear(8, 7)
    fused.weight.grad = torch.cat([net["left"].weight.grad, net["right"].weight.grad])
    fused.bias.grad = torch.cat([net["left"].bias.grad, net["right"].bias.grad])
    separate, rows = (
        meter_of(net),
        HeadGradientMeter(
            {
                "left": [Rows(fused.weight, 0, 3), Rows(fused.bias, 0, 3)],
                "right": [Rows(fused.weight, 3, 7), Rows(fused.bias, 3, 7)],
            },
            fused.parameters(),
        ),
    )
    separate.measure()
    rows.measure()
    assert rows.collect()[0].head_norms == pytest.approx(separate.collect()[0].head_norms, rel=1e-6)


def test_a_head_without_a_gradient_is_left_out_and_a_zero_gradient_counts():
    net = network()
    meter = meter_of(net)
    backward(net, skip=("left",))
    assert net["left"].weight.grad is None
    meter.measure()
    backward(net)
    for parameter in net["left"].parameters():
        parameter.grad.zero_()
    meter.measure()
    without, zero = meter.collect()
    assert set(without.head_norms) == {"right"} and without.cv == 0.0
    assert zero.head_norms["left"] == 0.0 and zero.cv == pytest.approx(math.sqrt(2))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("shared_layer", [False, True])
def test_a_nonfinite_gradient_is_pinned_on_its_own_head(bad, shared_layer):
    net = network()
    backward(net)
    if shared_layer:
        layer = nn.Linear(8, 7)
        layer.weight.grad, layer.bias.grad = torch.ones(7, 8), torch.ones(7)
        meter = HeadGradientMeter({"left": [Rows(layer.weight, 0, 3)], "right": [Rows(layer.weight, 3, 7)]})
        layer.weight.grad[5, 2] = bad
    else:
        meter = meter_of(net)
        net["right"].weight.grad[0, 0] = bad
    assert not math.isfinite(meter.measure().item())
    step = meter.collect()[0]
    assert math.isfinite(step.head_norms["left"]) and not math.isfinite(step.head_norms["right"])
    assert step.cv == math.inf


def test_a_nan_outside_the_heads_makes_the_step_critical_without_blaming_a_head():
    net = network()
    backward(net)
    net["value"].bias.grad.fill_(math.nan)
    meter = meter_of(net)
    meter.measure()
    step = meter.collect()[0]
    assert all(map(math.isfinite, step.head_norms.values()))
    assert step.cv == math.inf


def test_heads_that_cannot_be_measured_are_refused():
    net = network()
    layer = nn.Linear(8, 7)
    for heads, message in [
        ({"left": []}, "'left' has no parameters"),
        ({"left": nn.Tanh()}, "'left' has no parameters"),
        ({"left": net["left"], "right": net["left"]}, "'left' and 'right' share"),
        ({"left": [Rows(layer.weight, 0, 4)], "right": [Rows(layer.weight, 3, 7)]}, "share row 3"),
        ({"left": [Rows(layer.weight, 0, 8)]}, "rows 0:8 of a layer that has 7"),
        ({"left": layer, "right": [Rows(layer.weight, 0, 3)]}, "takes all of a layer"),
    ]:
        with pytest.raises(ValueError, match=message):
            HeadGradientMeter(heads)
    with pytest.raises(TypeError, match="'left' must be"):
        HeadGradientMeter({"left": ["weight"]})


@pytest.mark.parametrize("width", [8, 512])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recording_agrees_with_measuring_whatever_the_size_and_whoever_is_absent(width, dtype):
    torch.manual_seed(0)
    heads = nn.ModuleDict({name: nn.Linear(width, 40) for name in ("a", "b", "c")}).to(dtype)
    recorded, measured = HeadGradientMeter(dict(heads.items())), HeadGradientMeter(dict(heads.items()))
    for step in range(6):
        heads.zero_grad()
        present = [name for name in heads if (name, step) not in {("b", 2), ("b", 3), ("a", 4)}]
        for name in present:
            heads[name](torch.randn(4, width, dtype=dtype)).square().mean().backward()
        recorded.record(scale=torch.tensor(2.0), discard=torch.tensor(float(step == 5)))
        measured.measure()
    steps, expected = recorded.collect(), measured.collect()[:5]
    assert len(steps) == 5 and "b" not in steps[2].head_norms and "a" not in steps[4].head_norms
    for step, reference in zip(steps, expected, strict=True):
        halved = {name: norm / 2 for name, norm in reference.head_norms.items()}
        assert step.head_norms == pytest.approx(halved, rel=1e-2 if dtype is torch.bfloat16 else 1e-6)


def test_hooks_leave_parameters_as_they_were_and_can_be_removed():
    net = network()
    net["left"].requires_grad_(False)
    net["right"].register_parameter("steps", nn.Parameter(torch.zeros(1, dtype=torch.int64), requires_grad=False))
    taken = [parameter.requires_grad for parameter in net.parameters()]
    meter = meter_of(net)
    passes = []
    handles = after_backward(meter.parameters, lambda: passes.append(1))
    assert [parameter.requires_grad for parameter in net.parameters()] == taken
    assert all(parameter.is_leaf and parameter.grad is None for parameter in net.parameters())
    assert not net["left"](torch.randn(2, 8)).requires_grad
    backward(net)
    assert len(passes) == 1
    for handle in handles:
        handle.remove()
    net["left"].requires_grad_(True)
    backward(net)
    expected = {name: 2 * reference_norm(net[name].parameters()) for name in ("left", "right")}
    for parameter in net.parameters():
        if parameter.grad is not None:
            parameter.grad.mul_(2)
    meter.record()
    assert meter.collect()[0].head_norms == pytest.approx(expected, rel=1e-6) and len(passes) == 1


def flat_of(net: nn.ModuleDict) -> nn.Parameter:
    """One parameter of which all of the network's are views, and their gradients of its gradient."""
    flat = nn.Parameter(torch.cat([parameter.detach().flatten() for parameter in net.parameters()]))
    flat.grad = torch.zeros_like(flat)
    sizes = [parameter.numel() for parameter in net.parameters()]
    for parameter, values, gradient in zip(net.parameters(), flat.detach().split(sizes), flat.grad.split(sizes)):
        parameter.data, parameter.grad = values.view_as(parameter), gradient.view_as(parameter)
    return flat


@pytest.mark.parametrize("rows", [False, True])
def test_the_norm_of_a_flat_gradient_is_the_global_norm_and_heads_keep_their_own(rows):
    net = network()
    flat = flat_of(net)
    heads = {name: net[name] for name in ("left", "right")}
    if rows:
        heads |= {"right": [Rows(net["right"].weight, 0, 3)], "last": [Rows(net["right"].weight, 3, 4)]}
    meter = HeadGradientMeter(heads, net.parameters(), flat=flat)
    for _ in range(40):
        flat.grad.normal_()
        global_norm = meter.measure()
        assert global_norm.item() == pytest.approx(flat.grad.norm().item(), rel=1e-6)
    step = meter.collect()[-1]
    assert step.global_norm == pytest.approx(flat.grad.norm().item(), rel=1e-6)
    assert step.head_norms["left"] == pytest.approx(reference_norm(net["left"].parameters()), rel=1e-6)
    if rows:
        assert step.head_norms["last"] == pytest.approx(net["right"].weight.grad[3].norm().item(), rel=1e-6)
    with pytest.raises(ValueError, match="flat must be a parameter of which all heads' parameters are views"):
        HeadGradientMeter({"left": network()["left"]}, flat=flat)


def test_the_trunk_is_not_finite_and_the_flat_norm_tells():
    net = network()
    flat = flat_of(net)
    meter = HeadGradientMeter({name: net[name] for name in ("left", "right")}, flat=flat)
    for value in (1.0, math.nan, math.inf, 1.0):
        flat.grad.fill_(1.0)
        net["trunk"].bias.grad.fill_(value)
        meter.measure()
    pending = meter.start_collecting()
    metrics = pending.summary()
    assert pending.nonfinite_steps == 2
    assert [math.isfinite(cv) for cv in metrics["gradient_cv_per_step"]] == [True, False, False, True]
    assert metrics["nonfinite_gradient_steps"] == {"left": 0, "right": 0}
    assert metrics["head_gradient_norms"]["left"] == pytest.approx(reference_norm(net["left"].parameters()))


@pytest.mark.parametrize("width", [8, 512])
@pytest.mark.parametrize("shared_layer", [False, True])
def test_the_summary_of_a_window_is_that_of_its_steps(width, shared_layer):
    torch.manual_seed(0)
    layers = nn.ModuleDict({name: nn.Linear(width, 40) for name in "abc"})
    heads = dict(layers.items())
    if shared_layer:
        heads |= {"b": [Rows(layers["b"].weight, 0, 9)], "d": [Rows(layers["b"].weight, 9, 40)]}
    meter = HeadGradientMeter(heads)
    for step in range(70):
        for name, parameter in layers.named_parameters():
            absent = name.startswith("b") and step in (3, 4, 5) or step == 9
            parameter.grad = None if absent else torch.randn_like(parameter) * 10 ** ((step % 5) * len(name) / 4)
        if step in (20, 33):
            layers["a"].bias.grad[2] = math.nan
        if step == 40:
            layers["c"].weight.grad.fill_(math.inf)
        if step == 50:
            for parameter in layers.parameters():
                parameter.grad.zero_()
        meter.measure()
    pending = meter.start_collecting()
    metrics, expected = pending.summary(), summarize_gradient_steps(pending.result())
    assert pending.nonfinite_steps == 3 and len(expected["gradient_cv_per_step"]) == 70
    assert all(math.isnan(each.pop("gradient_norm")) for each in (metrics, expected))
    assert metrics == expected
    assert metrics["gradient_cv_per_step"] == pytest.approx([step.cv for step in pending.result()], rel=1e-12)
    assert metrics["nonfinite_gradient_steps"] == {name: {"a": 2, "c": 1}.get(name, 0) for name in heads}
    assert meter.start_collecting().summary() == summarize_gradient_steps([])
