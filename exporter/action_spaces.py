"""Heads of a fused output layer, by the action space."""

import logging
import math
from collections.abc import Iterator, Sequence
from itertools import count, islice
from typing import Any, NamedTuple

from torch import Tensor, nn

from exporter.heads import Rows

_log = logging.getLogger(__name__)


class _Part(NamedTuple):
    """A part of the action: `rows` of the layer, ascending; `choices`, None for a continuous part."""

    name: str
    rows: list[int]
    choices: int | None


def space_heads(
    layer: nn.Module,
    action_space: Any,
    names: Sequence[str] | None = None,
    *,
    log_std: Tensor | None = None,
    std_rows: bool = False,
) -> dict[str, list[Rows]]:
    """Heads of a layer whose outputs are the parts of an action, in the action space's order.

    `Discrete` is one head, `MultiDiscrete` one per entry of `nvec`, `MultiBinary` one per bit, `Box` one per
    dimension; `Dict` and `Tuple` have the heads of their parts. A part with a single choice is not a head: it is left
    out, and the log says so.

    Args:
        layer: one output per choice, bit or dimension; of a sequence of modules, the last one with parameters.
        action_space: of one environment, from Gymnasium or any library with spaces of these names.
        names: one for every part, including those with a single choice. By default `action` for a single
            part, else `action_0`, `action_1`, ...; keys of a `Dict` replace `action` and numbers.
        log_std: log standard deviations of the `Box` dimensions, of shape [n], [1, n] or [n, 1]: each entry belongs to
            its dimension's head. A single one that all dimensions share belongs to no head.
        std_rows: the layer has a second row for each dimension of a `Box`, for its standard deviation; these rows
            follow those of all means.

    Raises:
        TypeError: the kind of space is not supported.
        ValueError: the layer has another number of rows, `names` has the wrong length or a duplicate, `log_std`
            has another shape, or no part has two choices.
    """
    free = count()
    parts = list(_parts("action", action_space, free, std_rows))
    if names is not None:
        if isinstance(names, str) or len(names) != len(parts):
            raise ValueError(f"the action has {len(parts)} parts, but the names are {names!r}")
        parts = [part._replace(name=name) for part, name in zip(parts, names)]
    if len({part.name for part in parts}) < len(parts):
        raise ValueError(f"heads need distinct names, got {[part.name for part in parts]}")
    while isinstance(layer, nn.Sequential):
        layer = next(module for module in reversed(layer) if any(True for _ in module.parameters()))
    rows = next(free)
    for name, parameter in layer.named_parameters():
        if len(parameter) != rows:
            raise ValueError(
                f"{name} has {len(parameter)} rows, but the action space {action_space} makes {rows}"
                "; of vector environments take single_action_space"
            )
    heads = {
        part.name: [Rows(p, *bounds) for p in layer.parameters() for bounds in _bounds(part.rows)] for part in parts
    }
    dimensions = [part.name for part in parts if part.choices is None]
    if log_std is not None and (log_std.numel() > 1 or log_std.dim() and len(dimensions) == 1):
        size, shape = len(dimensions), list(log_std.shape)
        if shape not in ([size], [1, size], [size, 1]):
            raise ValueError(f"log_std has the shape {shape}, but the action has {size} dimensions")
        for index, name in enumerate(dimensions):
            heads[name].append(Rows(log_std, index, index + 1, axis=shape.index(size)))
    single = [part.name for part in parts if part.choices == 1]
    if len(single) == len(parts):
        raise ValueError(f"nothing to measure: no part of {action_space} has two choices")
    if single:
        _log.info("left out of the heads, because they have a single choice: %s", ", ".join(single))
    return {name: rows for name, rows in heads.items() if name not in single}


def _bounds(rows: list[int]) -> list[tuple[int, int]]:
    """(first row, row after the last) of each contiguous piece."""
    is_one = rows[-1] - rows[0] < len(rows)
    return [(rows[0], rows[-1] + 1)] if is_one else [(row, row + 1) for row in rows]


def _parts(name: str, space: Any, free: Iterator[int], std_rows: bool) -> Iterator[_Part]:
    """The parts of an action; each takes the next rows from `free`."""
    kinds = {kind.__name__ for kind in type(space).__mro__}
    if "Discrete" in kinds:
        yield _Part(name, list(islice(free, int(space.n))), int(space.n))
    elif "MultiDiscrete" in kinds:
        for index, size in enumerate(space.nvec.flatten().tolist()):
            yield _Part(f"{name}_{index}", list(islice(free, size)), size)
    elif "MultiBinary" in kinds:
        for index in range(math.prod(space.shape)):
            yield _Part(f"{name}_{index}", [next(free)], 2)
    elif "Box" in kinds:
        size = math.prod(space.shape)
        columns = [list(islice(free, size)) for _ in range(1 + std_rows)]
        for index, rows in enumerate(zip(*columns)):
            yield _Part(f"{name}_{index}", list(rows), None)
    elif "Dict" in kinds:
        for key, part in space.spaces.items():
            yield from _parts(str(key) if name == "action" else f"{name}_{key}", part, free, std_rows)
    elif "Tuple" in kinds:
        for index, part in enumerate(space.spaces):
            yield from _parts(f"{name}_{index}", part, free, std_rows)
    else:
        raise TypeError(
            f"the action space {type(space).__name__} has no heads; use Discrete, MultiDiscrete, MultiBinary, Box, or "
            "Dict and Tuple of them"
        )
