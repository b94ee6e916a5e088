"""What a PPO policy of Stable-Baselines3 with discrete actions says of each head, on a sample of its rollout."""

import math
from collections.abc import Iterable

import numpy as np
import torch
from stable_baselines3.common.distributions import CategoricalDistribution, MultiCategoricalDistribution
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.utils import obs_as_tensor
from torch import Tensor
from torch.distributions import Categorical

_MOST_ROWS = 256
_PART = 8  # of a rollout: two passes over it are then nothing beside the epochs of an update


class RolloutSample:
    """Some rows of a rollout, with the log-probability of each head's choice before the update.

    Rows are drawn by a generator of its own, and the policy is only asked, in the mode in which it acts: training is
    bit for bit the same with and without.

    Args:
        model: at the end of a rollout.
        heads: names of those of more than one choice, in the order of the action space.
    """

    def __init__(self, model: OnPolicyAlgorithm, heads: Iterable[str]) -> None:
        self._model = model
        self._heads = tuple(heads)
        buffer = model.rollout_buffer
        count = buffer.buffer_size * buffer.n_envs
        rows = np.random.default_rng(model.num_timesteps).choice(count, min(_MOST_ROWS, -(-count // _PART)), False)
        where = np.divmod(rows, buffer.n_envs)
        seen = buffer.observations
        seen = {name: part[where] for name, part in seen.items()} if isinstance(seen, dict) else seen[where]
        self._observations = obs_as_tensor(seen, model.device)
        self._actions = torch.as_tensor(buffer.actions[where], device=model.device)
        self._old_log_probs = self._of_heads()[1]

    @classmethod
    def of(cls, model: OnPolicyAlgorithm, heads: Iterable[str]) -> "RolloutSample | None":
        """A sample, or None of what is not known: no PPO, other actions, or a policy with memory or masks."""
        policy = model.policy
        is_known = (
            hasattr(model, "clip_range")
            and getattr(type(policy), "get_distribution", None) is ActorCriticPolicy.get_distribution
            and isinstance(policy.action_dist, (CategoricalDistribution, MultiCategoricalDistribution))
        )
        return cls(model, heads) if is_known else None

    def signals(self) -> dict[str, dict[str, float]]:
        """`head_entropy_ratios`, `head_approx_kls` and `head_clip_fractions` after the update."""
        model = self._model
        entropies, log_probs = self._of_heads()
        log_ratios = log_probs - self._old_log_probs
        changes = torch.expm1(log_ratios)
        clipped = changes.abs() > model.clip_range(model._current_progress_remaining)
        # Schulman's estimator, http://joschu.net/blog/kl-approx.html
        parts = torch.stack([entropies, changes - log_ratios, clipped.float()]).mean(2).tolist()
        names = ("head_entropy_ratios", "head_approx_kls", "head_clip_fractions")
        return {name: dict(zip(self._heads, of_heads)) for name, of_heads in zip(names, parts)}

    @torch.no_grad()
    def _of_heads(self) -> tuple[Tensor, Tensor]:
        """Entropies, of their largest, and log-probabilities of the actions, both [heads, rows]."""
        policy = self._model.policy
        was_training = policy.training
        policy.set_training_mode(False)
        try:
            found = policy.get_distribution(self._observations).distribution
        finally:
            policy.set_training_mode(was_training)
        columns = zip([found] if isinstance(found, Categorical) else found, self._actions.unbind(1))
        heads = [(head, taken) for head, taken in columns if head.logits.shape[1] > 1]
        entropies = [(head.entropy() / math.log(head.logits.shape[1])).clamp(max=1.0) for head, _ in heads]
        return torch.stack(entropies), torch.stack([head.log_prob(taken) for head, taken in heads])
