"""The random part of an episode, drawn for all environments at once."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from trainer.environments.host_growth.networks import HOST_SIZES, SEED_SIZES, WIDTH

TRAINING_POINTS, VALIDATION_POINTS = 256, 64
SEED_DRAWS = 8
"""Initial weights drawn for each episode; the k-th germination uses draw k modulo this."""

_TURNS = (1.0, 1.4)  # of a spiral arm; drawn for each episode
_INNER_RADIUS = 0.1
_NOISE = 0.03
_POINT_SCALE = 1.5


class Episodes(NamedTuple):
    """Tasks, initial hosts and future seeds of N environments.

    Attributes:
        points: [N, 3, training and then validation points]: two coordinates and a one.
        signs: [N, points]: -1 for label 1, 1 for label 0; sign times logit is the logit of the wrong label.
        host: initial weights [N, host parameters].
        seeds: normal draws [N, SEED_DRAWS, seed parameters].
    """

    points: Tensor
    signs: Tensor
    host: Tensor
    seeds: Tensor


def draw_episodes(seeds: Tensor, episode: int) -> Episodes:
    """Episode number `episode` of each of `seeds` [N] int64. Each depends on its own seed only."""
    count = TRAINING_POINTS + VALIDATION_POINTS
    host_size, seeds_size = sum(HOST_SIZES), SEED_DRAWS * sum(SEED_SIZES)
    normals = 2 * count + host_size + seeds_size
    pairs = (normals + 1) // 2
    keys = _mix(_mix(seeds) + episode)
    shape, side, radius, pairs = _uniforms(keys, 3 + 2 * count + 2 * pairs).split((3, count, count, 2 * pairs), dim=1)
    normal = _normals(pairs)

    turns, phase, handed = shape.unsqueeze(-1).unbind(1)
    turns = _TURNS[0] + (_TURNS[1] - _TURNS[0]) * turns
    radius = torch.sqrt(_INNER_RADIUS**2 + (1 - _INNER_RADIUS**2) * radius)
    one = (side < 0.5).float()
    angle = 2 * math.pi * (phase + (2 * (handed < 0.5) - 1) * turns * radius + one / 2)
    points = torch.ones(len(seeds), 3, count, device=seeds.device)
    clean = radius.unsqueeze(1) * torch.stack((torch.cos(angle), torch.sin(angle)), dim=1)
    points[:, :2] = _POINT_SCALE * (clean + _NOISE * normal[:, : 2 * count].unflatten(1, (2, count)))

    host = normal[:, 2 * count : 2 * count + host_size].clone()
    host[:, 2 : 3 * WIDTH : 3] *= 0.5
    host[:, 3 * WIDTH : -1] /= math.sqrt(WIDTH)
    host[:, -1].zero_()
    drawn = normal[:, 2 * count + host_size :][:, :seeds_size].unflatten(1, (SEED_DRAWS, -1))
    return Episodes(points, 1 - 2 * one, host, drawn.contiguous())


def _uniforms(keys: Tensor, count: int) -> Tensor:
    """Uniforms, float32 [N, count], strictly between 0 and 1, from streams that start at `keys` [N] int64.

    SplitMix64 of Steele, Lea and Flood 2014, https://doi.org/10.1145/2660193.2660195: each output depends only on key
    and place. float32 represents the upper 23 bits of each half of an output exactly.
    """
    places = torch.arange(1, (count + 1) // 2 + 1, device=keys.device) * _signed(0x9E3779B97F4A7C15)
    halves = _mix(keys.unsqueeze(1) + places).view(torch.int32)[:, :count]
    return ((halves >> 9) + (2**22 + 0.5)) * 2.0**-23


def _normals(uniforms: Tensor) -> Tensor:
    """The same number of normal draws [N, 2 n], by Box and Muller 1958."""
    first, second = uniforms.chunk(2, dim=1)
    radius, angle = torch.sqrt(-2 * torch.log(first)), 2 * math.pi * second
    return torch.cat((radius * torch.cos(angle), radius * torch.sin(angle)), dim=1)


def _mix(values: Tensor) -> Tensor:
    """SplitMix64's mixing function, on int64."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        values = (values ^ _shifted(values, shift)) * _signed(factor)
    return values ^ _shifted(values, 31)


def _shifted(values: Tensor, bits: int) -> Tensor:
    """Logical shift to the right."""
    return (values >> bits) & ((1 << (64 - bits)) - 1)


def _signed(number: int) -> int:
    return number - (1 << 64) if number >= 1 << 63 else number
