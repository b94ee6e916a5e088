"""`before_clipping`: a step has the norms of its own backward passes only."""

import math

import pytest
import torch
from torch import nn

from exporter import GradientMonitor, RunAggregator

HEADS = ("left", "middle", "right")


@pytest.fixture
def heads() -> nn.ModuleDict:
    torch.manual_seed(0)
    return nn.ModuleDict({name: nn.Linear(6, 3) for name in HEADS})


@pytest.fixture
def aggregator() -> RunAggregator:
    return RunAggregator()


def observed(heads: nn.ModuleDict, aggregator: RunAggregator, **options) -> torch.optim.Optimizer:
    optimizer = torch.optim.Adam(heads.parameters())
    GradientMonitor(
        dict(heads.items()), "run", window_steps=1, before_clipping=True, aggregator=aggregator, **options
    ).attach(optimizer)
    return optimizer


def loss_of(heads: nn.ModuleDict, *names: str) -> torch.Tensor:
    return sum(heads[name](torch.randn(8, 6)).square().mean() for name in names)


def norms_of(heads: nn.ModuleDict) -> dict[str, float]:
    return {n: torch.cat([p.grad.flatten() for p in head.parameters()]).norm().item() for n, head in heads.items()}


def exported(aggregator: RunAggregator) -> dict[str, float]:
    run = aggregator.snapshot.runs["run"]
    assert run.exporter_errors == 0
    return run.gradient_quality.head_norms


def zero_anew(optimizer: torch.optim.Optimizer) -> None:
    for parameter in optimizer.param_groups[0]["params"]:
        parameter.grad = torch.zeros_like(parameter)


@pytest.mark.parametrize(
    ("give_up", "others"),
    [
        (lambda optimizer: optimizer.zero_grad(set_to_none=True), {}),
        (lambda optimizer: optimizer.zero_grad(set_to_none=False), {"middle": 0.0, "right": 0.0}),
        (zero_anew, {"middle": 0.0, "right": 0.0}),
    ],
    ids=["none", "zeroed", "replaced"],
)
def test_norms_of_a_step_that_was_given_up_are_not_those_of_the_next(heads, aggregator, give_up, others):
    optimizer = observed(heads, aggregator)
    (loss_of(heads, *HEADS) * math.nan).backward()
    give_up(optimizer)
    loss_of(heads, "left").backward()
    left = heads["left"].weight.grad.norm().hypot(heads["left"].bias.grad.norm()).item()
    nn.utils.clip_grad_norm_(heads.parameters(), 1e-3)
    optimizer.step()
    assert exported(aggregator) == pytest.approx({"left": left, **others}, rel=1e-5)


def test_norms_of_a_step_that_overflowed_are_not_those_of_the_next(heads, aggregator):
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = observed(heads, aggregator, grad_scaler=scaler)
    for names, factor in ((HEADS, math.inf), (("left",), 1.0)):
        optimizer.zero_grad(set_to_none=False)
        scaler.scale(loss_of(heads, *names) * factor).backward()
        scaler.unscale_(optimizer)
        norms = {name: norm if name in names else 0.0 for name, norm in norms_of(heads).items()}
        nn.utils.clip_grad_norm_(heads.parameters(), 1e-3)
        scaler.step(optimizer)
        scaler.update()
    assert exported(aggregator) == pytest.approx(norms, rel=1e-5)


@pytest.mark.parametrize("set_to_none", [False, True])
def test_micro_batches_add_up_whichever_heads_they_touch(heads, aggregator, set_to_none):
    optimizer = observed(heads, aggregator)
    for _ in range(2):
        optimizer.zero_grad(set_to_none=set_to_none)
        for names in (("left",), ("middle", "right"), ("right",)):
            loss_of(heads, *names).backward()
        norms = norms_of(heads)
        nn.utils.clip_grad_norm_(heads.parameters(), 1e-3)
        optimizer.step()
        assert exported(aggregator) == pytest.approx(norms, rel=1e-5)


def test_what_is_clipped_between_micro_batches_counts_as_it_is_accumulated(heads, aggregator):
    optimizer = observed(heads, aggregator)
    for names in (("left", "right"), ("middle",), ("right",)):
        nn.utils.clip_grad_norm_(heads.parameters(), 0.1)
        loss_of(heads, *names).backward()
    norms = norms_of(heads)
    nn.utils.clip_grad_norm_(heads.parameters(), 1e-3)
    optimizer.step()
    assert exported(aggregator) == pytest.approx(norms, rel=1e-5)


def test_a_parameter_that_is_unfrozen_later_is_measured_before_clipping_too(heads, aggregator):
    heads["right"].requires_grad_(False)
    optimizer = observed(heads, aggregator)
    loss_of(heads, "left", "middle").backward()
    optimizer.step()
    assert set(exported(aggregator)) == {"left", "middle"}
    heads["right"].requires_grad_(True)
    optimizer.zero_grad()
    loss_of(heads, *HEADS).backward()
    norms = norms_of(heads)
    nn.utils.clip_grad_norm_(heads.parameters(), 1e-3)
    optimizer.step()
    assert exported(aggregator) == pytest.approx(norms, rel=1e-5)
