"""The host networks and their seeds: forward, backward, Adam.

All hosts are batched tensors. The backward pass is written by hand and uses buffers that are allocated once: it does
not depend on the caller's gradient mode, and a step takes few kernels. The last axis is points, the one before it is
units. Biases are columns of the weights, multiplied by a row of ones.
"""

import math
from enum import IntEnum
from types import SimpleNamespace

import torch
from torch import Tensor


class Blueprint(IntEnum):
    """Kind of a seed's module: hidden units between two linear maps of the host's features."""

    BOTTLENECK = 0  # linear, low rank
    MLP = 1  # ReLU
    SINE = 2
    GATED = 3  # gated linear unit: one half times the sigmoid of the other


class Alpha(IntEnum):
    """How a seed's output f is combined with the host's features h at the blending level a."""

    ADD = 0  # h + a f
    MULTIPLY = 1  # h (1 + a f)
    INTERPOLATE = 2  # (1 - a) h + a f


WIDTH = 12
"""Features of the host."""
UNITS = 12
"""Hidden units of the widest blueprint."""
HOST_SIZES = (WIDTH * 3, WIDTH + 1)
"""Parameters into the features and out of them, with the biases."""
SEED_SIZES = (UNITS * (WIDTH + 1), WIDTH * UNITS)
"""Parameters into a seed's units, with the biases, and back to the features."""

# Units into and out of each blueprint's hidden layer; the rest of UNITS stays exactly zero. Only an MLP uses the second
# half as units; a gated unit uses it as the gate of the first half.
_HALF = UNITS // 2
_UNITS_IN = {Blueprint.BOTTLENECK: 4, Blueprint.MLP: UNITS, Blueprint.SINE: _HALF, Blueprint.GATED: UNITS}
_UNITS_OUT = {**_UNITS_IN, Blueprint.GATED: _HALF}

LEARNING_RATE = 0.03
BETA1, BETA2, EPSILON = 0.9, 0.99, 1e-8
GRADIENT_LIMIT = 1.0
"""Gradients are clipped to it by value, so that the squares in Adam's state stay finite."""


def parameter_count(blueprint: Blueprint) -> int:
    """Number of parameters of a seed of this blueprint."""
    return (WIDTH + 1) * _UNITS_IN[blueprint] + _UNITS_OUT[blueprint] * WIDTH


def seed_scales(device: torch.device | str = "cpu") -> Tensor:
    """Factors that turn normal draws into initial weights: [blueprints + 1, seed parameters].

    Zero for missing units, for the biases, and in the last row. Weights out of the units are small, so that a new seed
    hardly changes the host.
    """
    scales = torch.zeros(len(Blueprint) + 1, sum(SEED_SIZES))
    for blueprint in Blueprint:
        seed_in, seed_out = _seed_weights(scales[blueprint])
        seed_in[: _UNITS_IN[blueprint], :WIDTH] = math.sqrt(2 / WIDTH)
        seed_out[:, : _UNITS_OUT[blueprint]] = 0.1
    return scales.to(device)


class HostNetworks:
    """N hosts with S slots each, and their Adam optimizers.

    Attributes:
        host: [N, host parameters].
        seeds: [S, N, seed parameters].
        host_adam, seeds_adam: their optimizers.
    """

    def __init__(
        self, hosts: int, slots: int, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> None:
        self.host = torch.zeros(hosts, sum(HOST_SIZES), device=device, dtype=dtype)
        self.seeds = torch.zeros(slots, hosts, sum(SEED_SIZES), device=device, dtype=dtype)
        self.host_adam, self.seeds_adam = Adam(self.host, HOST_SIZES), Adam(self.seeds, SEED_SIZES)
        self.constants = torch.zeros(slots, hosts, len(_CONSTANTS), device=device, dtype=dtype)
        self._constants_of = torch.tensor(
            [[constant(b, a) for constant in _CONSTANTS.values()] for b in Blueprint for a in Alpha],
            device=device,
            dtype=dtype,
        )

    def set_modules(self, blueprint: Tensor, combination: Tensor) -> None:
        """Set each slot's `Blueprint` and `Alpha`: both [S, N] int64."""
        kinds = torch.add(combination, blueprint, alpha=len(Alpha)).flatten()
        torch.index_select(self._constants_of, 0, kinds, out=self.constants.view(-1, len(_CONSTANTS)))


# Constants of the forward and the backward pass for each blueprint and combination.
_CONSTANTS = {
    "floor": lambda blueprint, alpha: 0.0 if blueprint is Blueprint.MLP else -math.inf,
    "sine": lambda blueprint, alpha: float(blueprint is Blueprint.SINE),
    # Below the gate's input; the sigmoid of 40 is 1 in float32 and float64.
    "gate_floor": lambda blueprint, alpha: -math.inf if blueprint is Blueprint.GATED else 40.0,
    "second_half": lambda blueprint, alpha: float(blueprint is Blueprint.MLP),
    "multiplies": lambda blueprint, alpha: float(alpha is Alpha.MULTIPLY),
    "interpolates": lambda blueprint, alpha: float(alpha is Alpha.INTERPOLATE),
}


class Pass:
    """Forward and backward pass of B points through all networks, in buffers of its own.

    Args:
        networks: the networks; each call reads their current weights.
        points: B.
        one_level: whether a seed has the same blending level for all points.
        has_gradient: whether `backward` will be called; otherwise the slots share their buffers.
    """

    def __init__(self, networks: HostNetworks, points: int, *, one_level: bool, has_gradient: bool) -> None:
        slots, n = networks.seeds.shape[:2]
        new = networks.host.new_empty
        held = slots if has_gradient else 1
        self._networks = networks
        self._inward, outward = _host_weights(networks.host)
        self._outward = outward
        self._outward_transposed = outward[..., :WIDTH].mT
        features = networks.host.new_ones(held + has_gradient, n, WIDTH + 1, points)
        self._features, self._first, self._last = features[:held], features[0, :, :WIDTH], features[-1]
        self._logits = new(n, 1, points)
        # The output of a slot is keep h + (by_one + by_h h) f.
        self._keep, self._by_one, self._by_h = (new(slots, n, 1, 1 if one_level else points) for _ in range(3))
        shape = (held, n, UNITS, points)
        self._u, f = new(shape), new(shape)
        # Without a backward pass, compute everything in place: it stays in the cache.
        self._z, self._factor, self._whole = (
            (new(shape), new(shape), new(shape[1:])) if has_gradient else (self._u, self._u, f[0])
        )
        gate, self._half, self._other_half = new(held, n, _HALF, points), *(new(n, _HALF, points) for _ in range(2))
        self._gradient, self._by_z = (new(shape[1:]) for _ in range(2))
        self._host_gradients = new(n, WIDTH, 3), new(n, 1, WIDTH + 1)
        self._seed_gradients = new(held * n, UNITS, WIDTH + 1), new(held * n, WIDTH, UNITS)
        self._slots = []
        for slot in range(slots):
            own, after = slot % held, (slot + 1) % len(features)
            seed_in, seed_out = _seed_weights(networks.seeds[slot])
            u, z = self._u[own], self._z[own]
            floor, sine, gate_floor, second_half, *_ = networks.constants[slot].view(n, -1, 1, 1).unbind(1)
            # Views, made once: the two halves of the units, and h, the features without the ones.
            self._slots.append(
                SimpleNamespace(
                    seed_in=seed_in,
                    seed_in_transposed=seed_in[..., :WIDTH].mT,
                    seed_out=seed_out,
                    seed_out_transposed=seed_out.mT,
                    floor=floor,
                    sine=sine,
                    gate_floor=gate_floor,
                    second_half=second_half,
                    keep=self._keep[slot],
                    by_one=self._by_one[slot],
                    by_h=self._by_h[slot],
                    features=features[own],
                    h=features[own, :, :WIDTH],
                    joined=features[after, :, :WIDTH],
                    u=u,
                    u_first=u[:, :_HALF],
                    u_second=u[:, _HALF:],
                    gate=gate[own],
                    z=z,
                    z_first=z[:, :_HALF],
                    z_second=z[:, _HALF:],
                    f=f[own],
                    factor=self._factor[own],
                )
            )
        self._multiplies, self._interpolates = networks.constants[..., -2:, None, None].unbind(2)

    def forward(self, x: Tensor, levels: Tensor) -> Tensor:
        """Logits [N, B]; the next call overwrites them.

        Args:
            x: points [N, 3, B]: two coordinates and a one.
            levels: blending levels [S, N, B], or [S, N, 1] with `one_level`.
        """
        torch.tanh(torch.bmm(self._inward, x, out=self._whole), out=self._first)
        levels = levels.unsqueeze(2)
        torch.mul(levels, self._multiplies, out=self._by_h)
        torch.sub(levels, self._by_h, out=self._by_one)
        torch.mul(levels, self._interpolates, out=self._keep).neg_().add_(1)
        for s in self._slots:
            torch.bmm(s.seed_in, s.features, out=s.u)
            torch.sin(s.u_first, out=self._half)
            torch.maximum(s.u_first, s.floor, out=s.z_first).lerp_(self._half, s.sine)
            s.z_first.mul_(torch.maximum(s.u_second, s.gate_floor, out=s.gate).sigmoid_())
            torch.clamp(s.u_second, min=0, out=s.z_second).mul_(s.second_half)
            torch.bmm(s.seed_out, s.z, out=s.f)
            torch.mul(s.h, s.by_h, out=s.factor).add_(s.by_one)
            torch.mul(s.factor, s.f, out=self._whole)
            torch.addcmul(self._whole, s.keep, s.h, out=s.joined)
        return torch.bmm(self._outward, self._last, out=self._logits).squeeze(1)

    def backward(self, x: Tensor, logit_gradient: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Gradients of a scalar, from its gradient [N, B] by the logits of the last `forward(x, ...)`.

        Returns:
            Gradients of `host` [N, ...] and of `seeds` [S, N, ...], each in two parts, split as in `HOST_SIZES` and
            `SEED_SIZES`; the next call overwrites them.
        """
        g, half, other = self._gradient, self._half, self._other_half
        by_z, by_z_first, by_z_second = self._by_z, self._by_z[:, :_HALF], self._by_z[:, _HALF:]
        inward_gradient, outward_gradient = self._host_gradients
        in_gradient, out_gradient = self._seed_gradients
        by_logits = logit_gradient.unsqueeze(1)
        torch.bmm(by_logits, self._last.mT, out=outward_gradient)
        torch.mul(self._outward_transposed, by_logits, out=g)
        for s in reversed(self._slots):
            # A tensor that is read for the last time is overwritten by its gradient.
            by_f = torch.mul(g, s.factor, out=s.factor)
            g.mul_(s.f.mul_(s.by_h).add_(s.keep))
            torch.bmm(s.seed_out_transposed, by_f, out=by_z)
            slope = torch.gt(s.u_first, s.floor, out=half).lerp_(torch.cos(s.u_first, out=other), s.sine)
            torch.mul(by_z_first, slope.mul_(s.gate), out=s.u_first)
            # z is already gated, and 1 - gate is 0 for all other blueprints.
            by_gate = by_z_first.mul_(s.z_first)
            by_gate.addcmul_(by_gate, s.gate, value=-1)
            torch.addcmul(by_gate, by_z_second, torch.gt(s.z_second, 0, out=half), out=s.u_second)
            g.baddbmm_(s.seed_in_transposed, s.u)
        torch.bmm(self._factor.flatten(0, 1), self._z.flatten(0, 1).mT, out=out_gradient)
        torch.bmm(self._u.flatten(0, 1), self._features.flatten(0, 1).mT, out=in_gradient)
        g.addcmul_(torch.mul(g, self._first, out=self._whole), self._first, value=-1)
        torch.bmm(g, x.mT, out=inward_gradient)
        seeds_shape = self._networks.seeds.shape[:2]
        return (
            (inward_gradient.flatten(1), outward_gradient.flatten(1)),
            (in_gradient.view(*seeds_shape, -1), out_gradient.view(*seeds_shape, -1)),
        )


class Adam:
    """Adam (Kingma and Ba 2015, https://arxiv.org/abs/1412.6980, algorithm 1) in place.

    Every row of the weights counts its own updates. The averages are stored with bias correction: m / (1 - beta**t) is
    a running average in which the t-th gradient has the share (1 - beta) / (1 - beta**t). The first gradient has the
    share 1, so a row can start anew without clearing.

    Args:
        weights: [..., P].
        parts: sizes of the parts of P in which the gradients come.

    Attributes:
        mean, square: running averages of the gradients and of their squares, as `weights`.
    """

    def __init__(self, weights: Tensor, parts: tuple[int, ...]) -> None:
        self._weights = weights
        self.mean, self.square, self._gradient = (torch.zeros_like(weights) for _ in range(3))
        self._gradients = self._gradient.split(parts, dim=-1)
        # Added under the root: the root of an exact zero, as unused units have, takes 20 times as long.
        self._epsilon_squared = weights.new_tensor(EPSILON**2)

    def step(self, gradients: tuple[Tensor, Tensor], shares: Tensor, rate: float | Tensor) -> None:
        """Take a step.

        Args:
            gradients: gradients of the columns of the weights, in parts.
            shares: [..., 2], share of the new gradient in `mean` and `square`, by `shares_of_newest`; per row or one.
            rate: learning rate, [..., 1] per row, or one number.
        """
        for part, clipped in zip(gradients, self._gradients):
            torch.clamp(part, -GRADIENT_LIMIT, GRADIENT_LIMIT, out=clipped)
        of_mean, of_square = shares.split(1, dim=-1)
        scratch = self._gradient
        self.mean.lerp_(scratch, of_mean)
        self.square.lerp_(torch.addcmul(self._epsilon_squared, scratch, scratch, out=scratch), of_square)
        direction = torch.div(self.mean, torch.sqrt(self.square, out=scratch), out=scratch)
        if isinstance(rate, Tensor):
            self._weights.addcmul_(direction, rate, value=-1)
        else:
            self._weights.add_(direction, alpha=-rate)


def shares_of_newest(updates: int, device: torch.device | str = "cpu") -> Tensor:
    """(1 - beta) / (1 - beta**t) [updates + 1, 2] for t from 0 (taken as 1) to `updates` and for both betas."""
    rows = [[(1 - beta) / (1 - beta ** max(t, 1)) for beta in (BETA1, BETA2)] for t in range(updates + 1)]
    return torch.tensor(rows, dtype=torch.float32, device=device)


def _host_weights(host: Tensor) -> tuple[Tensor, Tensor]:
    """Views [..., D, 3] and [..., 1, D + 1] into [..., host parameters]; the last column of each is the bias."""
    inward, outward = host.split(HOST_SIZES, dim=-1)
    return inward.unflatten(-1, (WIDTH, 3)), outward.unsqueeze(-2)


def _seed_weights(seed: Tensor) -> tuple[Tensor, Tensor]:
    """Views [..., M, D + 1], the last column the bias, and [..., D, M] into [..., seed parameters]."""
    seed_in, seed_out = seed.split(SEED_SIZES, dim=-1)
    return seed_in.unflatten(-1, (UNITS, WIDTH + 1)), seed_out.unflatten(-1, (WIDTH, UNITS))
