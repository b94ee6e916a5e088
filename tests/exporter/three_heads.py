"""A policy of three heads, for tests that train it by hand and look at its run `r`."""

import math

import torch
from torch import nn

from exporter import RunAggregator

HEADS = ("left", "middle", "right")


def three_heads() -> nn.ModuleDict:
    torch.manual_seed(0)
    return nn.ModuleDict({name: nn.Linear(4, 2) for name in HEADS})


def sgd(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(module.parameters(), lr=0.1)


def backward(heads: nn.ModuleDict, bad: str | None = None) -> None:
    heads.zero_grad()
    for name, head in heads.items():
        (head(torch.randn(8, 4)).square().mean() * (math.nan if name == bad else 1.0)).backward()


def run_of(aggregator: RunAggregator):
    return aggregator.snapshot.runs["r"]
