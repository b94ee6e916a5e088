"""Norms or gradients of steps on the device, until their window is closed."""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from exporter.pending import NO_HEAD, Block, Layout

# Up to this size, copying gradients costs less than a kernel per parameter; 64 KiB a step in float32.
_SMALL_ELEMENTS = 16384
_BUFFERED_STEPS = 32


class Taken(NamedTuple):
    """Numbers of one step on the device: norms, or a row of the buffer with the gradients.

    Attributes:
        owners: for each norm, or row of a gradient, the index of its head.
        numbers: one-dimensional.
        buffer: the buffer, if `numbers` is a row of it.
    """

    owners: tuple[int, ...]
    numbers: Tensor
    buffer: "Buffer | None" = None

    @property
    def has_heads(self) -> bool:
        """Whether a head has a gradient."""
        return self.buffer is not None or any(owner != NO_HEAD for owner in self.owners)


class OpenBlock:
    """Consecutive steps with the same kind of numbers."""

    def __init__(self, first: Taken, has_total: bool, has_discard: bool) -> None:
        self._layout = Layout(first.owners, has_total, has_discard)
        self._buffer = first.buffer
        self._start = first.buffer.filled if first.buffer is not None else 0
        self._vectors: list[Tensor] = []
        self._totals: list[Tensor] = []
        self._discards: list[Tensor] = []
        self._given_up: list[bool] = []

    def takes(self, taken: Taken, total: Tensor | None, discard: Tensor | None) -> bool:
        """Whether a step has the same kind of numbers."""
        owners, has_total, has_discard = self._layout
        return (
            taken.buffer is self._buffer
            and (taken.owners is owners or taken.owners == owners)
            and (total is not None) == has_total
            and (discard is not None) == has_discard
        )

    def add(self, taken: Taken, total: Tensor | None, discard: Tensor | None, given_up: bool) -> None:
        if self._buffer is None:
            self._vectors.append(taken.numbers)
        if total is not None:
            self._totals.append(total)
        if discard is not None:
            self._discards.append(discard)
        self._given_up.append(given_up)

    def close(self) -> tuple[Block, Tensor]:
        """The steps, and their numbers [steps, width of the layout]."""
        if self._buffer is None:
            numbers = torch.stack(self._vectors)
        else:
            numbers = self._buffer.norms(self._start, len(self._given_up))
        extra = [torch.stack(column).unsqueeze(1) for column in (self._totals, self._discards) if column]
        return Block(self._layout, tuple(self._given_up)), torch.cat([numbers, *extra], 1) if extra else numbers


class Buffer:
    """Copies of the gradients of steps. For small gradients this costs less than single norms.

    One copy takes all gradients that have the same shape except for the first axis. Norms are taken for many steps at
    once.
    """

    def __init__(self, owners: Mapping[Tensor, list[int]], dtype: torch.dtype | None) -> None:
        # The head of each row; all rows of a whole parameter have the same head.
        owners = {p: each if len(each) > 1 else each * len(p) for p, each in owners.items()}
        groups: dict[object, list[Tensor]] = {}
        for parameter, rows in owners.items():
            # Rows along another axis than the first need a group of their own.
            groups.setdefault(parameter.shape[1:] if len(rows) == len(parameter) else id(parameter), []).append(
                parameter
            )
        self._groups = list(groups.values())
        self._dtype = dtype
        self._owners = tuple(owner for group in self._groups for parameter in group for owner in owners[parameter])
        sizes = [sum(parameter.numel() for parameter in group) for group in self._groups]
        first = self._groups[0][0]
        self.gradients = torch.empty(_BUFFERED_STEPS, sum(sizes), dtype=first.dtype, device=first.device)
        # [steps, rows, elements of a row] of each group, and the places for each step's gradients.
        self._rows = [
            part.unflatten(1, (sum(len(owners[parameter]) for parameter in group), -1))
            for part, group in zip(self.gradients.split(sizes, 1), self._groups)
        ]
        shapes = [(-1, *group[0].shape[1:]) for group in self._groups]
        self._places = [
            (step, [part.view(shape) for part, shape in zip(step.split(sizes), shapes)]) for step in self.gradients
        ]
        self.filled = 0

    @classmethod
    def of(cls, owners: Mapping[Tensor, list[int]], dtype: torch.dtype | None) -> "Buffer | None":
        """A buffer for gradients of these parameters; None if single norms are better."""
        small = sum(parameter.numel() for parameter in owners) <= _SMALL_ELEMENTS
        plain = all(parameter.dim() and parameter.numel() and parameter.is_floating_point() for parameter in owners)
        alike = len({parameter.dtype for parameter in owners}) == 1
        return cls(owners, dtype) if small and plain and alike else None

    def take(self) -> Taken | None:
        """Copy the current gradients into the next row; None if that is not possible."""
        step, places = self._places[self.filled]
        try:
            for group, place in zip(self._groups, places):
                torch.cat([parameter.grad for parameter in group], out=place)  # type: ignore[misc]  # None raises
        except (RuntimeError, TypeError):
            return None  # a gradient is missing, sparse, or part of a graph
        return Taken(self._owners, step, self)

    def advance(self) -> bool:
        """Keep the newest row. Returns whether the buffer is full."""
        self.filled = (self.filled + 1) % _BUFFERED_STEPS
        return self.filled == 0

    def norms(self, start: int, steps: int) -> Tensor:
        """Norms [steps, rows of all gradients]."""
        norms = [torch.linalg.vector_norm(rows[start : start + steps], dim=2, dtype=self._dtype) for rows in self._rows]
        return torch.cat(norms, 1)


def after_backward(parameters: Iterable[Tensor], call: Callable[[], None]) -> list[RemovableHandle]:
    """Call `call` at the end of each backward pass that has reached one of `parameters`.

    It runs after other callbacks for the end of the pass, so DistributedDataParallel has averaged
    the gradients by then.

    Returns:
        Handles that remove the hooks.
    """
    queue_callback = torch.autograd.Variable._execution_engine.queue_callback
    current_pass = torch._C._current_graph_task_id
    # Queue again at the end of the pass, to run after DistributedDataParallel's callback for the last bucket. A
    # compiled training step must not trace into these functions.
    at_end = partial(queue_callback, hidden_from_compiler(call))
    seen = -1

    def reached(parameter: Tensor) -> None:
        nonlocal seen
        if seen != (now := current_pass()):
            seen = now
            queue_callback(at_end)

    reached = hidden_from_compiler(reached)
    # A frozen parameter may be unfrozen later. Integers and tensors from inference mode never have a gradient.
    able = [p for p in parameters if (p.is_floating_point() or p.is_complex()) and not p.is_inference()]
    return [_hooked(parameter, reached) for parameter in able]


def hidden_from_compiler(hook: Callable[..., None]) -> Callable[..., None]:
    """`hook`, hidden from a compiled training step, which must not trace into it.

    `torch.compiler.disable` costs more than the rest of a hook, so it is used only while something is compiled.
    """
    hidden = torch.compiler.disable(hook)
    try:
        from torch._C._dynamo.eval_frame import get_eval_frame_callback as compiler
    except ImportError:
        return hidden

    def call(*args: object) -> None:
        if compiler() is None:
            hook(*args)
        else:
            hidden(*args)

    return torch.compiler.disable(call, recursive=False)


def _hooked(parameter: Tensor, hook: Callable[[Tensor], None]) -> RemovableHandle:
    """Register a hook, also on a frozen parameter, for which torch would refuse it; it works after unfreezing."""
    requires_grad = parameter.requires_grad
    handle = parameter.requires_grad_().register_post_accumulate_grad_hook(hook)
    parameter.requires_grad_(requires_grad)
    return handle
