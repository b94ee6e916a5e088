"""How a fault gets into a run: around one method of the trainer or of the environment."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trainer.policy import ActorCritic
from trainer.training import Training


def around(owner: Any, name: str, call: Callable[..., Any]) -> None:
    """Replace the method `owner.name` by `call`, which gets the original one and then the arguments."""
    original = getattr(owner, name)
    setattr(owner, name, lambda *arguments: call(original, *arguments))


def change_observations(training: Training, change: Callable[[np.ndarray], np.ndarray]) -> None:
    """Let the policy see `change(observations)`, of a copy [number, features]; at the end of an episode too."""

    def step(original, actions):
        observations, rewards, terminated, truncated, infos = original(actions)
        if truncated.any():
            infos = infos | {"final_obs": change(np.array(infos["final_obs"], np.float32))}
        return change(np.array(observations, np.float32)), rewards, terminated, truncated, infos

    around(training.environment.vector_env, "step", step)


def rows_of(policy: ActorCritic, head: str) -> slice:
    """Of the logits, and of the policy layer."""
    part = policy.head_rows[head][0]
    return slice(part.start, part.stop)


def elements_of(policy: ActorCritic, head: str) -> Tensor:
    """Numbers of the head's weights and biases in `policy.flat`."""
    places = torch.arange(len(policy.flat))
    parts = []
    for rows in policy.head_rows[head]:
        parameter = rows.parameter
        of_parameter = places.as_strided(parameter.shape, parameter.stride(), parameter.storage_offset())
        parts.append(of_parameter[rows.start : rows.stop].flatten())
    return torch.cat(parts)
