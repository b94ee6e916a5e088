"""The network: tanh trunks, one fused layer for all action heads, and a value head."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from exporter.heads import row_heads


class FactoredCategorical:
    """Independent categorical distributions, one per action head, from one row of logits.

    The log-softmax is taken per head over logits padded to the widest head: each
    head has its own maximum, so none underflows because another one's logits are large.
    Choices run along the first axis and the batch along the last, where torch's softmax,
    gather and sums work on whole vectors: 20 times faster than over a short last axis.

    Args:
        logits: [batch, sum of head sizes], heads side by side.
        layout: of the heads.
    """

    def __init__(self, logits: Tensor, layout: "HeadLayout") -> None:
        self._logits = logits
        self._layout = layout
        padded = logits.new_full((layout.widest * layout.heads, len(logits)), _PADDING_LOGIT)
        padded.index_copy_(0, layout.rows, logits.detach().t().contiguous())
        self.log_probabilities = torch.log_softmax(padded.view(layout.widest, layout.heads, -1), dim=0)
        """[widest head, heads, batch], without autograd's graph; padded choices are never taken."""
        # Below this a probability changes no sum; exp() takes 70 times longer where its result is no normal number.
        self.probabilities = self.log_probabilities.clamp(min=-60.0).exp()

    def sample(self, variates: Tensor) -> Tensor:
        """Actions [batch, heads], int64: where each head's cumulative probability reaches its variate.

        Args:
            variates: [heads, batch], uniform in [0, 1).
        """
        cumulative = self.probabilities.cumsum(0)
        # In (0, total], so that neither a choice without probability nor one behind the last is taken.
        return (cumulative < (1 - variates) * cumulative[-1]).sum(0).t()

    def mode(self) -> Tensor:
        """The most probable action of every head, [batch, heads], int64."""
        return self.log_probabilities.argmax(0).t()

    def evaluate(self, actions: Tensor) -> tuple[Tensor, Tensor]:
        """Joint log-probability of `actions` and joint entropy, in nats, each [batch]: sums over the heads.

        Args:
            actions: [batch, heads], int64.
        """
        return _Evaluation.apply(self._logits, self, actions)


class _Evaluation(torch.autograd.Function):
    """Log-probability and entropy with their gradients written out, which autograd would take 15 kernels for.

    With p = softmax(x), for one head: d log p[a] / dx = onehot(a) - p and
    d H / dx = -p (log p + H).
    """

    @staticmethod
    def forward(ctx, logits: Tensor, distribution: FactoredCategorical, actions: Tensor) -> tuple[Tensor, Tensor]:
        choices = actions.t().unsqueeze(0)
        entropies = -(distribution.probabilities * distribution.log_probabilities).sum(0)
        ctx.distribution, ctx.choices, ctx.entropies = distribution, choices, entropies
        return distribution.log_probabilities.gather(0, choices).sum((0, 1)), entropies.sum(0)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, log_prob_gradient: Tensor, entropy_gradient: Tensor) -> tuple[Tensor, None, None]:
        distribution = ctx.distribution
        gradient = (distribution.log_probabilities + ctx.entropies).mul_(entropy_gradient).add_(log_prob_gradient)
        gradient.mul_(distribution.probabilities).neg_()
        gradient.scatter_add_(0, ctx.choices, log_prob_gradient.expand(ctx.choices.shape))
        return gradient.flatten(0, 1).index_select(0, distribution._layout.rows).t(), None, None


# Finite, because 0 * -inf would make the entropy NaN.
_PADDING_LOGIT = -1e9


class HeadLayout(NamedTuple):
    """How heads of different sizes lie in a grid [widest head, heads], flattened.

    Attributes:
        heads: number of heads.
        widest: choices of the largest one.
        rows: [sum of head sizes], the grid's row of each logit.
    """

    heads: int
    widest: int
    rows: Tensor

    @classmethod
    def of(cls, sizes: Sequence[int]) -> "HeadLayout":
        rows = [choice * len(sizes) + head for head, size in enumerate(sizes) for choice in range(size)]
        return cls(len(sizes), max(sizes), torch.tensor(rows))


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
    """Tanh trunk with a policy layer and a value layer on top, which share it or have one each.

    Args:
        observation_size: length of a flat observation.
        heads: action head name -> number of choices, in the order of the action's columns.
        hidden_size: width of each of a trunk's two layers.
        separate_critic: give the value layer a trunk of its own.

    The action heads are rows of one linear layer; `head_rows` says which. Weights
    are orthogonal with gain sqrt(2) in the trunk, 0.01 for every action head and 1
    for the value head; biases are zero.
    """

    def __init__(
        self, observation_size: int, heads: Mapping[str, int], hidden_size: int, *, separate_critic: bool = False
    ) -> None:
        super().__init__()
        self.heads = dict(heads)
        self.trunk = _trunk(observation_size, hidden_size)
        self.value_trunk = _trunk(observation_size, hidden_size) if separate_critic else None
        self.policy_layer = nn.Linear(hidden_size, sum(heads.values()))
        nn.init.zeros_(self.policy_layer.bias)
        self.head_rows = row_heads(self.policy_layer, heads)
        for name in heads:
            weight = self.head_rows[name][0]
            nn.init.orthogonal_(weight.parameter.data[weight.start : weight.stop], 0.01)
        self.value_layer = _orthogonal(nn.Linear(hidden_size, 1), 1.0)
        layout = HeadLayout.of(list(heads.values()))
        self.register_buffer("_rows", layout.rows, persistent=False)
        self._layout = layout
        self.return_moments = RunningMoments()

    def forward(self, observations: Tensor) -> tuple[FactoredCategorical, Tensor]:
        """Action distribution and values [batch] for observations [batch, observation_size]."""
        features = self.trunk(observations)
        distribution = self._distribution(self.policy_layer(features))
        return distribution, self._values(features if self.value_trunk is None else self.value_trunk(observations))

    @torch.inference_mode()
    def act(self, observations: np.ndarray, variates: Tensor) -> np.ndarray:
        """Sampled actions [batch, heads], int64.

        Args:
            observations: [batch, observation_size].
            variates: [heads, batch], uniform in [0, 1): the chance in the sampling.
        """
        logits = self.policy_layer(self.trunk(self._to_device(observations)))
        return self._distribution(logits).sample(variates).cpu().numpy()

    @torch.inference_mode()
    def evaluate(self, observations: np.ndarray, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Joint log-probabilities of actions [batch, heads] and values, each [batch]."""
        distribution, values = self(self._to_device(observations))
        log_probs, _ = distribution.evaluate(self._to_device(actions))
        return log_probs.cpu().numpy(), values.cpu().numpy()

    @torch.inference_mode()
    def values(self, observations: np.ndarray) -> np.ndarray:
        """Values [batch] of observations [batch, observation_size]."""
        trunk = self.trunk if self.value_trunk is None else self.value_trunk
        return self._values(trunk(self._to_device(observations))).cpu().numpy()

    def _distribution(self, logits: Tensor) -> FactoredCategorical:
        return FactoredCategorical(logits, self._layout._replace(rows=self._rows))

    def _values(self, features: Tensor) -> Tensor:
        return self.return_moments.mean + self.return_moments.deviation * self.value_layer(features).squeeze(-1)

    def _to_device(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self._rows.device)


def flat_parameters(module: nn.Module) -> nn.Parameter:
    """One parameter that holds all of `module`'s, which become views of it, as their gradients do of its gradient.

    What runs over all parameters, the optimizer and the sum over ranks, is then one kernel.
    """
    parameters = list(module.parameters())
    flat = nn.Parameter(torch.cat([parameter.detach().flatten() for parameter in parameters]))
    flat.grad = torch.zeros_like(flat)
    sizes = [parameter.numel() for parameter in parameters]
    for parameter, values, gradient in zip(parameters, flat.detach().split(sizes), flat.grad.split(sizes)):
        parameter.data = values.view_as(parameter)
        parameter.grad = gradient.view_as(parameter)
    return flat


def _trunk(observation_size: int, hidden_size: int) -> nn.Sequential:
    return nn.Sequential(
        _orthogonal(nn.Linear(observation_size, hidden_size), 2**0.5),
        nn.Tanh(),
        _orthogonal(nn.Linear(hidden_size, hidden_size), 2**0.5),
        nn.Tanh(),
    )


def _orthogonal(layer: nn.Linear, gain: float) -> nn.Linear:
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer
