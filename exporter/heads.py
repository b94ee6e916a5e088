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
    """L2 gradient norms of action heads, from one pass over the gradients.

    `record()` runs between backward and optimizer step and only queues work on
    the device; `measure()` does the same and returns the global norm that
    clipping needs. `collect()` transfers what was recorded, all steps at once.
    What is stored are norms of whole parameters and of single rows of shared
    layers; they are put together per head when they are collected.

    Args:
        heads: name -> module, parameters, or `Rows` of layers that heads share.
        other_parameters: what else the optimizer steps; counts in the global norm only.

    Attributes:
        head_names: in the order of `heads`.
        parameters: every parameter that is measured.

    Raises:
        ValueError: a head has no parameters, two heads share one, rows are out of
            range, or the parameters cannot be measured (sharded, or on several devices).
        TypeError: a head is made of something else.
    """

    def __init__(self, heads: Mapping[str, Head], other_parameters: Iterable[Tensor] = ()) -> None:
        if not heads:
            raise ValueError("there are no heads to measure")
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
        self.parameters = (*self._whole, *self._shared)
        self._owners = [[owner] for owner in whole.values()] + list(rows.values())
        # Half-precision norms lose digits, and those of float16 overflow at 65504.
        half = any(parameter.dtype in (torch.float16, torch.bfloat16) for parameter in self.parameters)
        self._dtype = torch.float32 if half else None
        _require_measurable(self.parameters)
        # One entry per step: norms, one tensor per parameter that has a gradient, and which those are.
        self._steps: list[tuple[list[Tensor], tuple[bool, ...] | None]] = []

    @torch.no_grad()
    def record(self) -> None:
        """Take the norms of the gradients as they are now."""
        self._steps.append(self._norms())

    @torch.no_grad()
    def measure(self) -> Tensor:
        """Take the norms of the gradients as they are now.

        Returns:
            Global L2 norm over all parameters, a 0-dimensional tensor on their device.
        """
        norms, present = self._norms()
        joined = _joined(norms, self.parameters[0].device)
        self._steps.append(([joined], present))
        return torch.linalg.vector_norm(joined)

    def collect(self) -> list[GradientStep]:
        """One record per step since the last call, in order; one transfer for all of them."""
        return self.start_collecting().result()

    def start_collecting(self) -> "PendingGradientSteps":
        """Like `collect()`, without waiting for the device."""
        steps, self._steps = self._steps, []
        device = self.parameters[0].device
        rows = [_joined(norms, device) for norms, _ in steps]
        presences = [present for _, present in steps]
        on_device = torch.cat(rows) if rows else torch.zeros(0)
        return PendingGradientSteps(self.head_names, self._owners, presences, on_device)

    def _norms(self) -> tuple[list[Tensor], tuple[bool, ...] | None]:
        """Norms of what has a gradient; for every parameter whether it has one, None if all have."""
        gradients = [parameter.grad for parameter in self._whole]
        shared = [parameter.grad for parameter in self._shared]
        present = None
        if None in gradients or None in shared:
            present = tuple(gradient is not None for gradient in (*gradients, *shared))
            gradients = [gradient for gradient in gradients if gradient is not None]
            shared = [gradient for gradient in shared if gradient is not None]
        norms = list(torch._foreach_norm(gradients, dtype=self._dtype)) if gradients else []
        for gradient in shared:
            flat = gradient.flatten(1) if gradient.dim() > 1 else gradient.unsqueeze(1)
            norms.append(torch.linalg.vector_norm(flat, dim=1, dtype=self._dtype))
        return norms, present


class PendingGradientSteps:
    """Recorded steps on their way from the device to the host.

    On CUDA the copy goes to pinned memory in the stream of the training step, and
    `is_ready` asks an event; nothing waits before `result()`.
    """

    def __init__(
        self,
        head_names: tuple[str, ...],
        owners: list[list[int]],
        presences: list[tuple[bool, ...] | None],
        norms: Tensor,
    ) -> None:
        self._head_names = head_names
        self._owners = owners
        self._presences = presences
        self._event = None
        if norms.is_cuda:
            self._norms = torch.empty(norms.shape, dtype=norms.dtype, pin_memory=True)
            self._norms.copy_(norms, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            self._norms = norms.to("cpu")

    @property
    def is_ready(self) -> bool:
        """Whether `result()` would return at once."""
        return self._event is None or self._event.query()

    def result(self) -> list[GradientStep]:
        """The steps, in order; waits for the device if they are not ready."""
        if self._event is not None:
            self._event.synchronize()
        heads = len(self._head_names)
        steps: list[GradientStep] = []
        squares = self._norms.double().square()
        start = 0
        # Steps with the same parameters present stand next to each other: usually that is all of them.
        for present, count in _grouped(self._presences):
            owners = self._owners if present is None else [o for o, has in zip(self._owners, present) if has]
            columns = [owner if owner != _NO_HEAD else heads for part in owners for owner in part]
            block = squares[start : start + count * len(columns)].view(count, len(columns))
            start += block.numel()
            # index_add_ keeps a NaN in the column of its own head; a matrix product would spread it.
            per_head = block.new_zeros(count, heads + 1).index_add_(1, torch.tensor(columns, dtype=torch.long), block)
            contributing = sorted(set(columns) - {heads})
            names = [self._head_names[index] for index in contributing]
            norms_of_heads = per_head[:, contributing].sqrt().tolist()
            steps.extend(
                GradientStep(dict(zip(names, norms)), global_norm)
                for norms, global_norm in zip(norms_of_heads, block.sum(1).sqrt().tolist())
            )
        return steps


def _joined(norms: list[Tensor], device: torch.device) -> Tensor:
    if len(norms) == 1:
        return norms[0].reshape(-1)
    return torch.cat([norm.reshape(1) if norm.dim() == 0 else norm for norm in norms]) if norms else torch.zeros(0, device=device)


def _grouped(presences: list[tuple[bool, ...] | None]) -> list[tuple[tuple[bool, ...] | None, int]]:
    groups: list[tuple[tuple[bool, ...] | None, int]] = []
    for present in presences:
        if groups and groups[-1][0] == present:
            groups[-1] = (present, groups[-1][1] + 1)
        else:
            groups.append((present, 1))
    return groups


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


def _require_measurable(parameters: tuple[Tensor, ...]) -> None:
    devices = sorted({str(parameter.device) for parameter in parameters})
    if len(devices) > 1:
        raise ValueError(f"parameters lie on several devices ({', '.join(devices)}); a monitor measures one")
    for parameter in parameters:
        # A shard knows only its own part of the norm.
        if hasattr(parameter, "_local_tensor") or getattr(parameter, "_fsdp_flattened", False):
            raise ValueError(
                f"a parameter is a {type(parameter).__name__} that is sharded over processes (DTensor, FSDP); "
                "its gradient norm cannot be measured here"
            )
