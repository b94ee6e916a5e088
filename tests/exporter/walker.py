"""A policy with five heads, and a monitor that watches it."""

import torch
from torch import nn

from exporter import GradientMonitor, RunAggregator, gradient_cv, heads_from

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


def monitor_of(policy: Policy, aggregator: RunAggregator, run: str = "walker-17", **options) -> GradientMonitor:
    return GradientMonitor(heads_from(policy, r"heads\.(\w+)"), run, aggregator=aggregator, **options)


def adam(policy: nn.Module, **options) -> torch.optim.Optimizer:
    return torch.optim.Adam(policy.parameters(), lr=1e-3, **options)


def quality(aggregator: RunAggregator, run: str = "walker-17"):
    return aggregator.snapshot.runs[run].gradient_quality
