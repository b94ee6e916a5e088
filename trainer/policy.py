"""The network: tanh layers, one layer for all action heads, a value head, and its hand-written gradient."""

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from exporter.heads import Rows


class FactoredCategorical:
    """Independent categorical distributions, one per action head.

    Logits are padded to the widest head, and the softmax is per head: each head subtracts its own maximum, so large
    logits of another head cannot make it underflow. The first axis is choices, the last is samples, so that torch's
    kernels work on long vectors.

    Args:
        logits: [choices of all heads, batch], heads in order.
        layout: layout of the heads, on the same device.

    Attributes:
        log_probabilities: [widest head, heads, batch]; padded choices are never sampled.
        probabilities: exponential of `log_probabilities`.
        entropies: [heads, batch], in nats.
    """

    def __init__(self, logits: Tensor, layout: "HeadLayout") -> None:
        self._layout = layout
        padded = logits.new_full((layout.widest * layout.heads, logits.shape[1]), _PADDING_LOGIT)
        padded.index_copy_(0, layout.rows, logits)
        self.log_probabilities = torch.log_softmax(padded.view(layout.widest, layout.heads, -1), dim=0)
        # Smaller probabilities change no sum, and exp() is 70 times slower when its result is subnormal.
        self.probabilities = self.log_probabilities.clamp(min=-60.0).exp_()
        self.entropies = (self.probabilities * self.log_probabilities).sum(0).neg_()

    def sample(self, uniforms: Tensor) -> Tensor:
        """Actions [batch, heads], int64: where each head's cumulative probability reaches its uniform number.

        Args:
            uniforms: [heads, batch], in [0, 1).
        """
        cumulative = self.probabilities.cumsum(0)
        # In (0, total], so that a choice with probability 0 or an index past the last is never taken.
        return (cumulative < (1 - uniforms) * cumulative[-1]).sum(0).t()

    def mode(self) -> Tensor:
        """The most probable action of every head, [batch, heads], int64."""
        return self.log_probabilities.argmax(0).t()

    def log_probs(self, actions: Tensor) -> Tensor:
        """Log-probabilities [heads, batch] of `actions` [batch, heads], int64; the joint one is their sum."""
        return self.log_probabilities.gather(0, actions.t().unsqueeze(0))[0]

    def gradient(self, actions: Tensor, by_log_prob: Tensor, by_entropy: float) -> Tensor:
        """Gradient by the logits, [choices of all heads, batch], of a scalar of log-probabilities and entropies.

        With p = softmax(x), for one head: d log p[a] / dx = onehot(a) - p and d H / dx = -p (log p + H).

        Args:
            actions: [batch, heads], int64.
            by_log_prob: [batch], the scalar's gradient by the joint log-probability of `actions`.
            by_entropy: its gradient by the joint entropy of each sample.
        """
        gradient = (self.log_probabilities + self.entropies).mul_(by_entropy).add_(by_log_prob)
        gradient.mul_(self.probabilities).neg_()
        choices = actions.t().unsqueeze(0)
        gradient.scatter_add_(0, choices, by_log_prob.expand(choices.shape))
        return gradient.flatten(0, 1).index_select(0, self._layout.rows)


# Finite, because 0 * -inf would make the entropy NaN.
_PADDING_LOGIT = -1e9


class HeadLayout(NamedTuple):
    """Places of heads of different sizes in a flattened grid [widest head, heads].

    Attributes:
        heads: number of heads.
        widest: choices of the largest head.
        rows: [choices of all heads], the grid's row of each logit.
    """

    heads: int
    widest: int
    rows: Tensor

    @classmethod
    def of(cls, sizes: Sequence[int], device: str | torch.device = "cpu") -> "HeadLayout":
        rows = [choice * len(sizes) + head for head, size in enumerate(sizes) for choice in range(size)]
        return cls(len(sizes), max(sizes), torch.tensor(rows, device=device))


class RunningMoments:
    """Mean and standard deviation of recent returns, to normalize the value head's targets.

    Without normalization, a value head that has to reach returns of 50 from an output of 0 would first distort the
    trunk that it shares with the policy. Averages decay by 0.99 per update, with Adam's bias correction.

    Attributes:
        mean, std: 0-dimensional tensors; 0 and 1 before the first update.
    """

    DECAY = 0.99

    def __init__(self, device: str | torch.device = "cpu") -> None:
        self.mean, self.std = torch.zeros((), device=device), torch.ones((), device=device)
        # Averages of the returns, of their squares, and of one. Doubles: the variance is a difference of averages.
        self._averages = torch.zeros(3, dtype=torch.float64, device=device)

    def update(self, returns: Tensor) -> None:
        """Update the moments with `returns` [samples], unless one of them is not finite."""
        returns = returns.double()
        now = torch.stack([returns.mean(), returns.square().mean(), returns.new_ones(())])
        moved = self._averages.lerp(now, 1 - self.DECAY)
        is_finite = now.isfinite().all()
        torch.where(is_finite, moved, self._averages, out=self._averages)
        mean, square = self._averages[:2] / self._averages[2]
        self.mean.copy_(torch.where(is_finite, mean, self.mean))
        self.std.copy_(torch.where(is_finite, (square - mean * mean).clamp(min=1e-8).sqrt(), self.std))

    def state_dict(self) -> dict[str, Tensor]:
        """The moments and the averages behind them; tensors are not copied."""
        return {"mean": self.mean, "std": self.std, "averages": self._averages}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        load_tensors(self.state_dict(), state)


class Activations(NamedTuple):
    """Results of `ActorCritic.forward` that the backward pass needs; K is 2 with a separate critic, else 1.

    Attributes:
        observations: [batch, observation_size].
        first, second: [K, hidden_size, batch], the tanh layers.
        logits: [choices of all heads, batch].
        outputs: [batch], values normalized by the moments of the returns.
    """

    observations: Tensor
    first: Tensor
    second: Tensor
    logits: Tensor
    outputs: Tensor


class ActorCritic:
    """Two tanh layers, then one layer for all action heads and one for the value; no autograd.

    Actor and critic share the tanh layers, or have their own, which are computed side by side. The first axis is units,
    the last is the batch. Weights are orthogonal with gain sqrt(2) in the tanh layers, 0.01 for every action head and 1
    for the value head, drawn from torch's global generator. Biases are zero.

    Args:
        observation_size: length of a flat observation.
        heads: action head name -> number of choices, in the order of the action's columns.
        hidden_size: width of the two tanh layers.
        separate_critic: give the critic its own tanh layers.
        device: device of the network.

    Attributes:
        parameters: name -> tensor. The first axis of tanh layers has the actor's units, then the critic's.
        flat: one vector with all parameters; they are views of it, and their gradients are views of `flat.grad`. So the
            optimizer and the sum over ranks take one kernel.
        head_rows: head name -> its rows of the policy layer.
        policy_layer: the part of `flat` of the action heads, a view.
        return_moments: turn outputs of the value head into values.
    """

    def __init__(
        self,
        observation_size: int,
        heads: Mapping[str, int],
        hidden_size: int,
        *,
        separate_critic: bool = False,
        device: str | torch.device = "cpu",
    ) -> None:
        self.heads = dict(heads)
        self.device = torch.device(device)
        networks, choices = 1 + separate_critic, sum(heads.values())
        shapes = {
            "input_weight": (networks * hidden_size, observation_size),
            "input_bias": (networks * hidden_size, 1),
            "hidden_weight": (networks, hidden_size, hidden_size),
            "hidden_bias": (networks, hidden_size, 1),
            "policy_weight": (choices, hidden_size),
            "policy_bias": (choices, 1),
            "value_weight": (1, hidden_size),
            "value_bias": (1, 1),
        }
        sizes = [math.prod(shape) for shape in shapes.values()]
        self.flat = torch.zeros(sum(sizes), device=self.device)
        self.flat.grad = torch.zeros_like(self.flat)
        self.parameters: dict[str, Tensor] = {}
        for (name, shape), values, gradient in zip(shapes.items(), self.flat.split(sizes), self.flat.grad.split(sizes)):
            self.parameters[name] = values.view(shape)
            self.parameters[name].grad = gradient.view(shape)
        first = sum(sizes[: list(shapes).index("policy_weight")])
        self.policy_layer = self.flat[first : first + choices * (hidden_size + 1)]
        self._weights = tuple(self.parameters.values())
        self._gradients = tuple(parameter.grad for parameter in self._weights)
        bounds = dict(zip(heads, pairwise(accumulate(heads.values(), initial=0))))
        parts = (self.parameters["policy_weight"], self.parameters["policy_bias"])
        self.head_rows = {name: [Rows(part, *rows) for part in parts] for name, rows in bounds.items()}
        for network in range(networks):
            units = slice(network * hidden_size, (network + 1) * hidden_size)
            _orthogonal_(self.parameters["input_weight"][units], 2**0.5)
            _orthogonal_(self.parameters["hidden_weight"][network], 2**0.5)
        for start, stop in bounds.values():
            _orthogonal_(self.parameters["policy_weight"][start:stop], 0.01)
        _orthogonal_(self.parameters["value_weight"], 1.0)
        self._layout = HeadLayout.of(list(heads.values()), self.device)
        self._head_of_choice = torch.repeat_interleave(torch.tensor(list(heads.values()))).to(self.device)
        self.return_moments = RunningMoments(self.device)
        self._actor: _HostActor | None = None

    def forward(self, observations: Tensor) -> Activations:
        """Run both networks on observations [batch, observation_size]."""
        w1, b1, w2, b2, policy_weight, policy_bias, value_weight, value_bias = self._weights
        first = _tanh_(torch.addmm(b1, w1, observations.t())).view(len(w2), w2.shape[1], -1)
        second = _tanh_(torch.baddbmm(b2, w2, first))
        logits = torch.addmm(policy_bias, policy_weight, second[0])
        outputs = torch.addmm(value_bias, value_weight, second[-1])
        return Activations(observations, first, second, logits, outputs[0])

    def backward(self, seen: Activations, by_logits: Tensor, by_outputs: Tensor) -> None:
        """Write the gradient of a scalar into every parameter's `grad`.

        Args:
            seen: result of `forward` for these samples.
            by_logits: [choices of all heads, batch], the scalar's gradient by the logits.
            by_outputs: [batch], its gradient by the outputs.
        """
        _, _, w2, _, policy_weight, _, value_weight, _ = self._weights
        to_w1, to_b1, to_w2, to_b2, to_policy_weight, to_policy_bias, to_value_weight, to_value_bias = self._gradients
        by_outputs = by_outputs.unsqueeze(0)
        torch.mm(by_logits, seen.second[0].t(), out=to_policy_weight)
        torch.sum(by_logits, 1, keepdim=True, out=to_policy_bias)
        torch.mm(by_outputs, seen.second[-1].t(), out=to_value_weight)
        torch.sum(by_outputs, 1, keepdim=True, out=to_value_bias)
        by_second = torch.empty_like(seen.second)
        torch.mm(policy_weight.t(), by_logits, out=by_second[0])
        if len(by_second) == 2:
            torch.mul(value_weight.t(), by_outputs, out=by_second[1])
        else:
            by_second[0].addcmul_(value_weight.t(), by_outputs)
        by_sum = _tanh_backward(by_second, seen.second)
        torch.bmm(by_sum, seen.first.mT, out=to_w2)
        torch.sum(by_sum, 2, keepdim=True, out=to_b2)
        by_sum = _tanh_backward(torch.bmm(w2.mT, by_sum), seen.first).flatten(0, 1)
        torch.mm(by_sum, seen.observations, out=to_w1)
        torch.sum(by_sum, 1, keepdim=True, out=to_b1)

    def distribution(self, logits: Tensor) -> FactoredCategorical:
        """The action distribution of logits [choices of all heads, batch]."""
        return FactoredCategorical(logits, self._layout)

    def act(self, observations: Any, uniforms: Any) -> Any:
        """Sampled actions [batch, heads], int64: a NumPy array for NumPy observations, a tensor for a tensor.

        Args:
            observations: [batch, observation_size], float32.
            uniforms: [heads, batch] in [0, 1), for the sampling: a NumPy array for NumPy observations and a policy on
                the CPU, else a tensor on the policy's device.
        """
        if isinstance(observations, Tensor):
            return self.distribution(self.forward(observations).logits).sample(uniforms)
        if self.device.type == "cpu":
            if self._actor is None or self._actor.batch != len(observations):
                self._actor = _HostActor(self._weights, self._layout, len(observations))
            return self._actor.act(observations, uniforms)
        on_device = torch.from_numpy(observations).to(self.device, non_blocking=True)
        return self.act(on_device, uniforms).cpu().numpy()

    def most_probable(self, observations: np.ndarray) -> np.ndarray:
        """The most probable actions [batch, heads], int64, for observations [batch, observation_size]."""
        logits = self.forward(torch.from_numpy(observations).to(self.device)).logits
        return self.distribution(logits).mode().cpu().numpy()

    def evaluate(self, observations: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities of actions [batch, heads], of the same shape, and values [batch]."""
        seen = self.forward(observations)
        return self.distribution(seen.logits).log_probs(actions).t(), self._values(seen)

    def head_norms(self, vectors: Tensor) -> Tensor:
        """L2 norms [K, heads] of each head's part of K vectors like `policy_layer`."""
        choices = len(self._head_of_choice)
        weights, biases = vectors.square().split([vectors.shape[1] - choices, choices], dim=1)
        of_choices = weights.unflatten(1, (choices, -1)).sum(2).add_(biases)
        sums = of_choices.new_zeros(len(vectors), len(self.heads))
        return sums.index_add_(1, self._head_of_choice, of_choices).sqrt_()

    def values(self, observations: Tensor) -> Tensor:
        """Values [batch] of observations [batch, observation_size]."""
        return self._values(self.forward(observations))

    def _values(self, seen: Activations) -> Tensor:
        return self.return_moments.mean + self.return_moments.std * seen.outputs

    def state_dict(self) -> dict[str, Any]:
        """Parameters by name and the moments of the returns; tensors are not copied."""
        return {**self.parameters, "return_moments": self.return_moments.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load `state_dict()` of a network of the same shape.

        Raises:
            KeyError, ValueError: the state is of another network.
        """
        load_tensors(self.parameters, state)
        self.return_moments.load_state_dict(state["return_moments"])


class _HostActor:
    """Samples actions on the CPU, for one batch size.

    With few environments a kernel's call costs more than its work, and NumPy's calls cost a third of torch's. Matrix
    products use torch, which respects the run's number of threads.
    """

    def __init__(self, weights: Sequence[Tensor], layout: HeadLayout, batch: int) -> None:
        w1, b1, w2, b2, self._policy_weight, self._policy_bias, *_ = weights
        hidden_size = w2.shape[1]
        # The actor's part of the tanh layers.
        self._layers = (w1[:hidden_size], b1[:hidden_size]), (w2[0], b2[0])
        self.batch = batch
        self._units = [torch.empty(hidden_size, batch) for _ in self._layers]
        self._arrays = [units.numpy() for units in self._units]
        self._logits = torch.empty(len(self._policy_weight), batch)
        self._logits_array = self._logits.numpy()
        self._rows = layout.rows.numpy()
        self._padded = np.full((layout.widest * layout.heads, batch), _PADDING_LOGIT, np.float32)
        self._grid = self._padded.reshape(layout.widest, layout.heads, batch)

    def act(self, observations: np.ndarray, uniforms: np.ndarray) -> np.ndarray:
        inputs = torch.from_numpy(observations).t()
        for (weight, bias), units, array in zip(self._layers, self._units, self._arrays):
            torch.addmm(bias, weight, inputs, out=units)
            np.tanh(array, out=array)
            inputs = units
        torch.addmm(self._policy_bias, self._policy_weight, inputs, out=self._logits)
        self._padded[self._rows] = self._logits_array
        weights = np.exp(self._grid - self._grid.max(0))
        cumulative = weights.cumsum(0)
        # As in FactoredCategorical.sample().
        return (cumulative < (1 - uniforms) * cumulative[-1]).sum(0).T


_tanh_backward = torch.ops.aten.tanh_backward


def _tanh_(x: Tensor) -> Tensor:
    """tanh in place. Uses NumPy on the CPU: torch takes one to seven times as long, depending on the processor."""
    if not x.is_cpu:
        return x.tanh_()
    array = x.numpy()
    np.tanh(array, out=array)
    return x


def _orthogonal_(weight: Tensor, gain: float) -> None:
    # Draw on the CPU, so that a seed gives the same weights on every device.
    weight.copy_(torch.nn.init.orthogonal_(torch.empty(weight.shape), gain))


def load_tensors(tensors: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """Copy `state` into `tensors` by name.

    Raises:
        KeyError, ValueError: a name is missing, or a shape differs.
    """
    for name, tensor in tensors.items():
        if state[name].shape != tensor.shape:
            raise ValueError(f"{name} must be {list(tensor.shape)}, got {list(state[name].shape)}")
        tensor.copy_(state[name])
