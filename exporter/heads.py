"""What an action head is to the measurement, and its gradient norms on the device."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from exporter.telemetry import GradientStep


@dataclass(frozen=True)
class Rows:
    """Rows `start:stop` of a layer that several heads share, in its weight or its bias."""

    parameter: Tensor
    start: int
    stop: int


Head = nn.Module | Iterable[Tensor | Rows]

_NO_HEAD = -1


class HeadGradientMeter:
    """L2 gradient norms of action heads, and the global norm that clipping needs, from one pass.

    `measure()` runs after every backward pass and before clipping; it only
    queues work on the device. `collect()` transfers what was measured, once per
    update. The norms that are stored are those of whole parameters and of single
    rows of shared layers; they are put together per head when they are collected.

    Args:
        heads: name -> module, parameters, or `Rows` of layers that heads share.
        other_parameters: what else the optimizer steps; counts in the global norm only.

    Raises:
        ValueError: a head has no parameters, two heads share one, or rows are out of range.
        TypeError: a head is made of something else.
    """

    def __init__(
        self, heads: Mapping[str, Head], other_parameters: Iterable[Tensor] = (), expected_steps: int = 64
    ) -> None:
        self.head_names = tuple(heads)
        whole: dict[Tensor, int] = {}
        rows: dict[Tensor, list[int]] = {}
        for index, (name, head) in enumerate(heads.items()):
            for part in _parts(name, head):
                if isinstance(part, Rows):
                    _claim_rows(rows, part, index, self.head_names)
                elif part in whole:
                    raise ValueError(f"heads {self.head_names[whole[part]]!r} and {name!r} share a parameter")
                else:
                    whole[part] = index
        for parameter in rows:
            if parameter in whole:
                raise ValueError(
                    f"head {self.head_names[whole[parameter]]!r} takes all of a layer of which other heads take rows"
                )
        for parameter in other_parameters:
            if parameter not in rows:
                whole.setdefault(parameter, _NO_HEAD)

        self._whole = list(whole)
        self._shared = list(rows)
        self._owners = [*whole.values(), *(owner for owners in rows.values() for owner in owners)]
        self._parts_of_head = [
            [p for p, owner in whole.items() if owner == index] + [p for p, owners in rows.items() if index in owners]
            for index in range(len(self.head_names))
        ]
        device = next(iter([*self._whole, *self._shared])).device
        self._norms = torch.zeros(expected_steps, len(self._owners), device=device)
        self._present: list[tuple[bool, ...]] = []

    @torch.no_grad()
    def measure(self) -> Tensor:
        """Take the norms of the gradients as they are now.

        Returns:
            Global L2 norm over all parameters, a 0-dimensional tensor on their device.
        """
        step = len(self._present)
        if step == len(self._norms):
            self._norms = torch.cat([self._norms, torch.zeros_like(self._norms)])
        norms = self._norms[step]
        gradients = [parameter.grad for parameter in self._whole]
        position = len(gradients)
        if None in gradients:
            norms.zero_()
            have = [index for index, gradient in enumerate(gradients) if gradient is not None]
            if have:
                found = torch._foreach_norm([gradients[index] for index in have])
                norms[torch.tensor(have, device=norms.device)] = torch.stack(found)
        elif gradients:
            norms[:position] = torch.stack(torch._foreach_norm(gradients))
        for parameter in self._shared:
            gradient = parameter.grad
            stop = position + len(parameter)
            if gradient is None:
                norms[position:stop] = 0.0
            elif gradient.dim() == 1:
                torch.abs(gradient, out=norms[position:stop])
            else:
                torch.linalg.vector_norm(gradient.flatten(1), dim=1, out=norms[position:stop])
            position = stop
        self._present.append(
            tuple(any(part.grad is not None for part in parts) for parts in self._parts_of_head)
        )
        return torch.linalg.vector_norm(norms)

    def collect(self) -> list[GradientStep]:
        """One record per `measure()` since the last call, in order; one transfer for all of them."""
        squares = self._norms[: len(self._present)].to("cpu", torch.float64).square()
        columns = torch.tensor([len(self.head_names) if owner == _NO_HEAD else owner for owner in self._owners])
        # index_add_ keeps a NaN in the column of its own head; a matrix product would spread it.
        per_head = squares.new_zeros(len(squares), len(self.head_names) + 1).index_add_(1, columns, squares)
        steps = [
            GradientStep(
                {name: norm for name, norm, has in zip(self.head_names, norms, present, strict=False) if has}, total
            )
            for norms, total, present in zip(
                per_head.sqrt().tolist(), squares.sum(1).sqrt().tolist(), self._present, strict=True
            )
        ]
        self._present = []
        return steps


def _parts(name: str, head: Head) -> list[Tensor | Rows]:
    if isinstance(head, (Tensor, Rows)):
        head = [head]
    parts = list(head.parameters() if isinstance(head, nn.Module) else head)
    if not parts:
        raise ValueError(f"head {name!r} has no parameters")
    for part in parts:
        if not isinstance(part, (Tensor, Rows)):
            raise TypeError(f"head {name!r} must be a module, parameters or Rows; it contains {part!r}")
    return parts


def _claim_rows(rows: dict[Tensor, list[int]], part: Rows, head: int, names: tuple[str, ...]) -> None:
    owners = rows.setdefault(part.parameter, [_NO_HEAD] * len(part.parameter))
    if not 0 <= part.start < part.stop <= len(owners):
        raise ValueError(
            f"head {names[head]!r} takes rows {part.start}:{part.stop} of a layer that has {len(owners)}"
        )
    for row in range(part.start, part.stop):
        if owners[row] != _NO_HEAD:
            raise ValueError(f"heads {names[owners[row]]!r} and {names[head]!r} share row {row} of a layer")
        owners[row] = head
