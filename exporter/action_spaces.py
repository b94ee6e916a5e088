"""Heads of a fused output layer, by the action space that it serves."""

import logging
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from exporter.heads import Rows, row_heads

_log = logging.getLogger(__name__)


class _Part(NamedTuple):
    """A part of the action: `rows` of the layer; `choices`, None for one of a continuum."""

    name: str
    rows: int
    choices: int | None


def space_heads(
    layer: nn.Module, action_space: Any, names: Sequence[str] | None = None, *, log_std: Tensor | None = None
) -> dict[str, list[Rows]]:
    """Heads of a layer whose outputs are the parts of an action, in the action space's order.

    `Discrete` is one head, `MultiDiscrete` one per entry of `nvec`, `MultiBinary` one per bit, `Box` one per
    dimension; `Dict` and `Tuple` are those of their parts. A part with a single choice is no head: it is left
    out, and the log says so.

    Args:
        layer: one output per choice, bit or dimension; of a sequence of modules its last one with parameters.
        action_space: of one environment, from Gymnasium or whatever has spaces of these names.
        names: one for every part, those with a single choice included. By default `action` for a single
            part, else `action_0`, `action_1`, ...; keys of a `Dict` take the place of `action` and of numbers.
        log_std: the log-standard-deviations of the `Box` dimensions, of shape [n] or [1, n]: each is its head's. A
            single one that all dimensions share belongs to no head.

    Raises:
        TypeError: there are no heads in such a space.
        ValueError: the layer has another number of rows, `names` has the wrong length or a name twice, `log_std`
            has another shape, or no part has two choices.
    """
    parts = list(_parts("action", action_space))
    if names is not None:
        if isinstance(names, str) or len(names) != len(parts):
            raise ValueError(f"the action has {len(parts)} parts, but the names are {names!r}")
        parts = [part._replace(name=name) for part, name in zip(parts, names)]
    if len({part.name for part in parts}) < len(parts):
        raise ValueError(f"heads need distinct names, got {[part.name for part in parts]}")
    while isinstance(layer, nn.Sequential):
        layer = next(module for module in reversed(layer) if any(True for _ in module.parameters()))
    heads = row_heads(layer, {part.name: part.rows for part in parts})
    if log_std is not None and log_std.numel() != 1:
        dimensions = [part for part in parts if part.choices is None]
        if log_std.shape not in ((len(dimensions),), (1, len(dimensions))):
            shape = list(log_std.shape)
            raise ValueError(f"log_std has the shape {shape}, but the action has {len(dimensions)} dimensions")
        for index, part in enumerate(dimensions):
            heads[part.name].append(Rows(log_std, index, index + 1, axis=log_std.dim() - 1))
    single = [part.name for part in parts if part.choices == 1]
    if len(single) == len(parts):
        raise ValueError(f"nothing to measure: no part of {action_space} has two choices")
    if single:
        _log.info("no heads, for they have a single choice: %s", ", ".join(single))
    return {name: rows for name, rows in heads.items() if name not in single}


def _parts(name: str, space: Any) -> Iterator[_Part]:
    kinds = {kind.__name__ for kind in type(space).__mro__}
    if "Discrete" in kinds:
        yield _Part(name, int(space.n), int(space.n))
    elif "MultiDiscrete" in kinds:
        for index, size in enumerate(space.nvec.flatten().tolist()):
            yield _Part(f"{name}_{index}", size, size)
    elif "MultiBinary" in kinds:
        for index in range(math.prod(space.shape)):
            yield _Part(f"{name}_{index}", 1, 2)
    elif "Box" in kinds:
        for index in range(math.prod(space.shape)):
            yield _Part(f"{name}_{index}", 1, None)
    elif "Dict" in kinds:
        for key, part in space.spaces.items():
            yield from _parts(str(key) if name == "action" else f"{name}_{key}", part)
    elif "Tuple" in kinds:
        for index, part in enumerate(space.spaces):
            yield from _parts(f"{name}_{index}", part)
    else:
        raise TypeError(
            f"no heads in an action space {type(space).__name__}; supported are Discrete, MultiDiscrete, "
            "MultiBinary, Box, and Dict and Tuple of them"
        )
