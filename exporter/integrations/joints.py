"""Common parts of robot trainers: a Gaussian policy, one head per joint, and gradients that they average themselves."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from exporter.heads import Rows
from exporter.monitor import GradientMonitor


def joint_heads(
    count: int, mean: nn.Module, spread: nn.Module | Tensor | None = None, names: Sequence[str] | None = None
) -> dict[str, list[Rows]]:
    """One head for each dimension of a continuous action.

    Args:
        count: dimensions of the action.
        mean: the layer whose rows are the means; it may have the same number of rows for each further parameter of
            the distribution after them.
        spread: standard deviations or their logarithms: a parameter [count] or a layer with `count` rows. One that all
            dimensions share belongs to no head.
        names: names of the joints, in the action's order; by default `joint_0`, `joint_1`, ...

    Raises:
        ValueError: `names` has another length or a duplicate, or the layer's rows are not a multiple of `count`.
    """
    names = [f"joint_{i}" for i in range(count)] if names is None else list(names)
    if len(names) != count or len(set(names)) < count:
        raise ValueError(f"the action has {count} dimensions, so give {count} different names; got {names!r}")
    parts: list[Tensor] = list(mean.parameters())
    if any(len(part) % count for part in parts):
        raise ValueError(f"{count} dimensions of the action cannot share a layer of {len(parts[0])} rows")
    if isinstance(spread, nn.Module):
        parts += spread.parameters()
    elif spread is not None and spread.shape == (count,):
        parts.append(spread)
    return {
        name: [Rows(part, row, row + 1) for part in parts for row in range(index, len(part), count)]
        for index, name in enumerate(names)
    }


def last_linear(module: nn.Module, rows: Sequence[int]) -> nn.Linear:
    """A module's last linear layer with one of these numbers of rows.

    Raises:
        ValueError: there is none.
    """
    layers = [layer for layer in module.modules() if isinstance(layer, nn.Linear) and layer.out_features in rows]
    if not layers:
        wanted = " or ".join(map(str, rows))
        raise ValueError(f"{type(module).__name__} has no linear layer with {wanted} outputs, one for each action")
    return layers[-1]


def measure_after_averaging(monitor: GradientMonitor, *owners: Any) -> None:
    """Measure after `owner.reduce_parameters()` has averaged gradients over processes, between backward and clipping.

    With several owners, the last call counts.
    """

    def measured(reduce_parameters: Callable[[], None]) -> Callable[[], None]:
        def reduce_and_measure() -> None:
            reduce_parameters()
            monitor.gradients_ready()

        return reduce_and_measure

    for owner in owners:
        owner.reduce_parameters = measured(owner.reduce_parameters)
