"""Signals per head of a PPO policy of Stable-Baselines3 with discrete actions, from a sample of its rollout."""

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.distributions import CategoricalDistribution, MultiCategoricalDistribution
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.utils import obs_as_tensor
from torch import Tensor
from torch.distributions import Categorical

_MOST_ROWS = 256
_PART = 8  # sample an eighth of a rollout: two passes over it cost little beside the epochs of an update


class RolloutSample:
    """Some rows of a rollout, with the log-probability of each head's choice before the update.

    It draws rows with its own generator and only evaluates the policy, in the mode in which it acts. So training is bit
    for bit the same with and without it.

    Args:
        model: the model, at the end of a rollout.
        heads: names of the heads with more than one choice, in the order of the action space.
    """

    def __init__(self, model: PPO, heads: Iterable[str]) -> None:
        self._model = model
        self._heads = tuple(heads)
        buffer = model.rollout_buffer
        count = buffer.buffer_size * buffer.n_envs
        rows = np.random.default_rng(model.num_timesteps).choice(count, min(_MOST_ROWS, -(-count // _PART)), False)
        where = np.divmod(rows, buffer.n_envs)
        seen: Any = buffer.observations
        rows_seen = {name: part[where] for name, part in seen.items()} if isinstance(seen, dict) else seen[where]
        self._observations = obs_as_tensor(rows_seen, model.device)
        self._actions = torch.as_tensor(buffer.actions[where], device=model.device)
        self._old_log_probs = self._of_heads()[1]

    @classmethod
    def of(cls, model: BaseAlgorithm, heads: Iterable[str]) -> "RolloutSample | None":
        """A sample; None if the model is not PPO, has other actions, or its policy has memory or masks."""
        if (
            isinstance(model, PPO)
            and getattr(type(model.policy), "get_distribution", None) is ActorCriticPolicy.get_distribution
            and isinstance(model.policy.action_dist, (CategoricalDistribution, MultiCategoricalDistribution))
        ):
            return cls(model, heads)
        return None

    def signals(self) -> dict[str, dict[str, float]]:
        """`head_entropy_ratios`, `head_approx_kls` and `head_clip_fractions` after the update."""
        model = self._model
        entropies, log_probs = self._of_heads()
        log_ratios = log_probs - self._old_log_probs
        changes = torch.expm1(log_ratios)
        clip_range: Any = model.clip_range  # a schedule, once the model is set up
        clipped = changes.abs() > clip_range(model._current_progress_remaining)
        # Schulman's estimator, http://joschu.net/blog/kl-approx.html
        parts = torch.stack([entropies, changes - log_ratios, clipped.float()]).mean(2).tolist()
        names = ("head_entropy_ratios", "head_approx_kls", "head_clip_fractions")
        return {name: dict(zip(self._heads, of_heads)) for name, of_heads in zip(names, parts)}

    @torch.no_grad()
    def _of_heads(self) -> tuple[Tensor, Tensor]:
        """Entropies as a fraction of the largest possible, and log-probabilities of the actions, both [heads, rows]."""
        policy = self._model.policy
        was_training = policy.training
        policy.set_training_mode(False)
        try:
            found: Any = policy.get_distribution(self._observations).distribution
        finally:
            policy.set_training_mode(was_training)
        columns = zip([found] if isinstance(found, Categorical) else found, self._actions.unbind(1))
        heads = [(head, taken) for head, taken in columns if head.logits.shape[1] > 1]
        entropies = [(head.entropy() / math.log(head.logits.shape[1])).clamp(max=1.0) for head, _ in heads]
        return torch.stack(entropies), torch.stack([head.log_prob(taken) for head, taken in heads])
