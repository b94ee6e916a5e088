"""A robot's arm, and what a library's own gradients say, for tests of libraries that robots are trained with."""

import statistics
from collections.abc import Callable

import numpy as np
import pytest
import torch
from conftest import fetch, wait_until
from gymnasium import spaces
from prometheus_client.parser import text_string_to_metric_families
from torch.optim.optimizer import register_optimizer_step_pre_hook

JOINTS = ["hip", "knee", "foot"]


ENVS, STEPS, OBSERVATIONS, EPISODE = 4, 8, 5, 6


CONTINUOUS = spaces.Box(-1.0, 1.0, (3,), np.float32)


class Arm:
    """Pays a joint for standing where an observation says, the first joint most; all environments end at once."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(0)
        self.reset()

    def reset(self) -> torch.Tensor:
        self.steps = 0
        return self.observe()

    def observe(self) -> torch.Tensor:
        self.observation = torch.rand(ENVS, OBSERVATIONS, generator=self.generator) * 2 - 1
        return self.observation

    def step(self, actions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, bool]:
        weights = torch.tensor([10.0, 1.0, 1.0])
        errors = (actions.float().reshape(ENVS, -1) - self.observation[:, : actions.reshape(ENVS, -1).shape[1]]).abs()
        rewards = -(errors * weights[: errors.shape[1]]).sum(1)
        self.steps = (self.steps + 1) % EPISODE
        return self.observe(), rewards, self.steps == 0


class Witness:
    """The CV of every optimizer step by a way of its own: from the gradients as they are at the step."""

    def __init__(self, norms: Callable[[], list[float]]) -> None:
        self.norms = norms
        self.cvs: list[float] = []

    def __enter__(self) -> "Witness":
        self.handle = register_optimizer_step_pre_hook(self.take)
        return self

    def __exit__(self, *_: object) -> None:
        self.handle.remove()

    def take(self, *_: object) -> None:
        norms = self.norms()
        self.cvs.append(statistics.stdev(norms) / statistics.fmean(norms))


def row_norms(*parameters: torch.Tensor) -> list[float]:
    """Of parameters that have one row a joint."""
    squares = sum(parameter.grad.reshape(len(parameter), -1).square().sum(1) for parameter in parameters)
    return squares.sqrt().tolist()


def scrape(url: str, updates: int) -> dict[str, float]:
    def look() -> dict[str, float] | None:
        values = {}
        for family in text_string_to_metric_families(fetch(url)[1]):
            for sample in family.samples:
                head = sample.labels.get("head")
                values[f"{sample.name}/{head}" if head else sample.name] = sample.value
        return values if values.get("ppo_updates_total") == updates else None

    return wait_until(look, f"{updates} updates are served")


def assert_agrees(values: dict[str, float], cvs: list[float], updates: int, heads: list[str]) -> None:
    assert [name.split("/")[1] for name in values if name.startswith("ppo_head_gradient_norm/")] == heads
    assert values["ppo_gradient_cv_per_step_count"] == len(cvs) > updates
    assert values["ppo_gradient_cv_per_step_sum"] == pytest.approx(sum(cvs), rel=1e-5)
    assert values["ppo_environment_steps_total"] == updates * ENVS * STEPS
    assert values["ppo_update_duration_seconds_count"] == values["ppo_rollout_duration_seconds_count"] == updates
    assert values["ppo_exporter_errors_total"] == 0


def norms_of_last_averaging(owner, norms: Callable[[], list[float]]) -> list[list[float]]:
    """Norms after each `reduce_parameters()` of a trainer, which comes before clipping."""
    reduce, seen = owner.reduce_parameters, []
    owner.reduce_parameters = lambda: (reduce(), seen.append(norms()))
    return seen


def mean_norms(seen: list[list[float]]) -> list[float]:
    """Of the four steps of the last update."""
    return [statistics.fmean(norms) for norms in zip(*seen[-4:])]
