"""The network: a shared trunk, one fused layer for all action heads, and a value head."""

from collections.abc import Mapping
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor, nn

from exporter.heads import row_heads


class FactoredCategorical:
    """Independent categorical distributions, one per action head, from one row of logits.

    The log-softmax is taken per head over logits padded to the widest head: each
    head has its own maximum, so none underflows because another one's logits are large.

    Args:
        logits: [batch, sum of head sizes], heads side by side.
        columns: [heads * widest head] from `padded_columns`.
        heads: number of heads.
    """

    def __init__(self, logits: Tensor, columns: Tensor, heads: int) -> None:
        padding = logits.new_full((len(logits), 1), _PADDING_LOGIT)
        padded = torch.cat([logits, padding], 1).index_select(1, columns).view(len(logits), heads, -1)
        self.log_probabilities = torch.log_softmax(padded, dim=-1)
        """[batch, heads, widest head]; padded choices have probability zero."""

    def sample(self, generator: torch.Generator) -> Tensor:
        """Actions [batch, heads], int64. Exponential races: argmax p/E with E ~ Exp(1) is categorical in p."""
        races = torch.empty_like(self.log_probabilities).exponential_(generator=generator)
        return (self.log_probabilities.exp() / races).argmax(-1)

    def mode(self) -> Tensor:
        """The most probable action of every head, [batch, heads], int64."""
        return self.log_probabilities.argmax(-1)

    def log_prob(self, actions: Tensor) -> Tensor:
        """Joint log-probability in nats, [batch]: the sum over heads. `actions`: [batch, heads], int64."""
        return self.log_probabilities.gather(-1, actions.unsqueeze(-1)).sum((1, 2))

    def entropy(self) -> Tensor:
        """Joint entropy in nats, [batch]: the sum over heads, which are independent."""
        return -(self.log_probabilities.exp() * self.log_probabilities).sum((1, 2))


# Finite, because 0 * -inf would make the entropy NaN; its probability is exactly zero all the same.
_PADDING_LOGIT = -1e9


def padded_columns(sizes: list[int]) -> Tensor:
    """Columns that lay logits of heads of `sizes` out as [heads, widest head], flattened.

    Missing choices point to the column behind the last logit, where the padding is.
    """
    starts = accumulate(sizes, initial=0)
    widest, padding = max(sizes), sum(sizes)
    return torch.tensor(
        [start + choice if choice < size else padding for start, size in zip(starts, sizes) for choice in range(widest)]
    )


class RunningMoments(nn.Module):
    """Mean and standard deviation of the returns seen lately, in which the value head thinks.

    A value head that had to reach returns of 50 from an output of 0 would first
    bend the trunk it shares with the policy. Averages decay by 0.99 per update,
    corrected for their start at zero as in Adam; before the first update the mean
    is 0 and the deviation 1.
    """

    DECAY = 0.99

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(0.0))
        self.register_buffer("deviation", torch.tensor(1.0))
        # Doubles, because the variance is a difference of two averages.
        for name in ("_first", "_second", "_weight"):
            self.register_buffer(name, torch.tensor(0.0, dtype=torch.float64))

    @torch.no_grad()
    def include(self, returns: np.ndarray) -> None:
        """Let `returns` [samples] move the moments, unless one of them is not finite."""
        if not np.isfinite(returns).all():
            return
        self._weight.lerp_(torch.ones_like(self._weight), 1 - self.DECAY)
        for average, value in (
            (self._first, returns.mean(dtype=float)),
            (self._second, np.square(returns, dtype=float).mean()),
        ):
            average.lerp_(torch.full_like(average, value), 1 - self.DECAY)
        self.mean.copy_(self._first / self._weight)
        variance = self._second / self._weight - (self._first / self._weight).square()
        self.deviation.copy_(variance.clamp(min=1e-8).sqrt())


class ActorCritic(nn.Module):
    """Shared tanh trunk with a policy layer and a value layer on top.

    Args:
        observation_size: length of a flat observation.
        heads: action head name -> number of choices, in the order of the action's columns.
        hidden_size: width of each of the trunk's two layers.

    The action heads are rows of one linear layer; `head_rows` says which. Weights
    are orthogonal with gain sqrt(2) in the trunk, 0.01 for every action head and 1
    for the value head; biases are zero.
    """

    def __init__(self, observation_size: int, heads: Mapping[str, int], hidden_size: int) -> None:
        super().__init__()
        self.heads = dict(heads)
        sizes = list(heads.values())
        self.trunk = nn.Sequential(
            _orthogonal(nn.Linear(observation_size, hidden_size), 2**0.5),
            nn.Tanh(),
            _orthogonal(nn.Linear(hidden_size, hidden_size), 2**0.5),
            nn.Tanh(),
        )
        self.policy_layer = nn.Linear(hidden_size, sum(sizes))
        nn.init.zeros_(self.policy_layer.bias)
        self.head_rows = row_heads(self.policy_layer, heads)
        for name in heads:
            weight = self.head_rows[name][0]
            nn.init.orthogonal_(weight.parameter.data[weight.start : weight.stop], 0.01)
        self.value_layer = _orthogonal(nn.Linear(hidden_size, 1), 1.0)
        self.register_buffer("_columns", padded_columns(sizes), persistent=False)
        self.return_moments = RunningMoments()

    def forward(self, observations: Tensor) -> tuple[FactoredCategorical, Tensor]:
        """Action distribution and values [batch] for observations [batch, observation_size]."""
        features = self.trunk(observations)
        distribution = FactoredCategorical(self.policy_layer(features), self._columns, len(self.heads))
        return distribution, self._values(features)

    @torch.inference_mode()
    def act(self, observations: np.ndarray, generator: torch.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Sampled actions [batch, heads], their joint log-probabilities [batch] and values [batch]."""
        distribution, values = self(self._to_device(observations))
        actions = distribution.sample(generator)
        return actions.cpu().numpy(), distribution.log_prob(actions).cpu().numpy(), values.cpu().numpy()

    @torch.inference_mode()
    def values(self, observations: np.ndarray) -> np.ndarray:
        """Values [batch] of observations [batch, observation_size]."""
        return self._values(self.trunk(self._to_device(observations))).cpu().numpy()

    def _values(self, features: Tensor) -> Tensor:
        return self.return_moments.mean + self.return_moments.deviation * self.value_layer(features).squeeze(-1)

    def _to_device(self, observations: np.ndarray) -> Tensor:
        return torch.from_numpy(observations).to(self._columns.device)


def _orthogonal(layer: nn.Linear, gain: float) -> nn.Linear:
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer
