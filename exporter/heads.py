"""What an action head is to the measurement, and its gradient norms on the device."""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from exporter.pending import NO_HEAD, Block, Layout, PendingGradientSteps
from exporter.telemetry import GradientStep


@dataclass(frozen=True)
class Rows:
    """Rows `start:stop` of a layer that several heads share, in its weight or its bias."""

    parameter: Tensor
    start: int
    stop: int


Head = nn.Module | Iterable[Tensor | Rows]

# Up to here copying gradients costs less than starting one kernel per parameter; 64 KiB a step in float32.
_SMALL_ELEMENTS = 16384
_BUFFERED_STEPS = 32


def row_heads(layer: nn.Module, sizes: Mapping[str, int]) -> dict[str, list[Rows]]:
    """Heads that are rows of one fused layer, in order.

    Args:
        layer: its parameters (weight, bias) have the heads' rows along their first axis.
        sizes: head name -> number of rows.

    Raises:
        ValueError: the sizes do not add up to the layer's rows.
    """
    for name, parameter in layer.named_parameters():
        if len(parameter) != sum(sizes.values()):
            raise ValueError(f"{name} has {len(parameter)} rows, but the heads add up to {sum(sizes.values())}")
    bounds = zip(sizes, pairwise(accumulate(sizes.values(), initial=0)))
    return {name: [Rows(part, start, stop) for part in layer.parameters()] for name, (start, stop) in bounds}


def heads_from(model: nn.Module, pattern: str) -> dict[str, list[Tensor]]:
    r"""Heads by the names of their modules, such as `heads_from(model, r"heads\.(\w+)")`.

    Args:
        model: whose `named_modules()` are searched.
        pattern: regular expression that a module's whole name must match. Its first
            group that matches is the head's name, the module's own name where there is
            none; modules with the same name make one head.

    Raises:
        ValueError: no module matches; the message lists module names.
    """
    expression = re.compile(pattern)
    heads: dict[str, dict[Tensor, None]] = {}
    for name, module in model.named_modules():
        if match := expression.fullmatch(name):
            head = next((group for group in match.groups() if group), name)
            heads.setdefault(head, {}).update(dict.fromkeys(module.parameters()))
    if not heads:
        names = [name for name, _ in model.named_modules() if name]
        raise ValueError(
            f"no module of {type(model).__name__} matches {pattern}; there are {', '.join(names[:20])}"
            + (f" and {len(names) - 20} more" if len(names) > 20 else "")
        )
    return {name: list(parameters) for name, parameters in heads.items()}


class HeadGradientMeter:
    """L2 gradient norms of action heads, from one pass over the gradients.

    `record()` runs between backward and optimizer step; `measure()` does the same and
    returns the global norm that clipping needs. Both only queue work on the device.
    `collect()` transfers what was recorded, all steps at once. What is stored are norms
    of whole parameters and of rows; they are put together per head when they are collected.

    Args:
        heads: name -> module, parameters, or `Rows` of layers that heads share.
        other_parameters: what else the optimizer steps; counts in the global norm only.
        flat: a parameter of which all others are views, as their gradients are of its
            gradient. The global norm is then that of `flat.grad`.

    Attributes:
        head_names: in the order of `heads`.
        parameters: every parameter that is measured by itself.
        recorded: steps since they were collected last.

    Raises:
        ValueError: a head has no parameters, two heads share one, rows are out of range, or the
            parameters cannot be measured (sharded, on several devices, or no views of `flat`).
        TypeError: a head is made of something else.
    """

    def __init__(
        self, heads: Mapping[str, Head], other_parameters: Iterable[Tensor] = (), *, flat: Tensor | None = None
    ) -> None:
        if not heads:
            raise ValueError("there are no heads to measure")
        self.head_names = tuple(heads)
        self._flat = flat
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
        for parameter in other_parameters if flat is None else ():
            if parameter not in rows:
                whole.setdefault(parameter, NO_HEAD)

        self._whole = list(whole)
        self._shared = list(rows)
        self._is_shared = set(rows)
        self.parameters = (*self._whole, *self._shared)
        self._owners = [[owner] for owner in whole.values()] + list(rows.values())
        self._all_owners = tuple(owner for owners in self._owners for owner in owners)
        # Half-precision norms lose digits, and those of float16 overflow at 65504.
        half = any(parameter.dtype in (torch.float16, torch.bfloat16) for parameter in self.parameters)
        self._dtype = torch.float32 if half else None
        _require_measurable(self.parameters, flat)
        self._buffer = _Buffer.of(dict(zip(self.parameters, self._owners)), self._dtype)
        self._open: _OpenBlock | None = None
        self._closed: list[tuple[Block, Tensor]] = []
        self.recorded = 0
        self._early: _Taken | None = None
        # Tells whether gradients were accumulated further: a small one that is kept until it is stepped on.
        self._smallest_first = sorted(self.parameters, key=Tensor.numel)
        self._mark: tuple[Tensor, Tensor, int] | None = None

    def record(self, scale: Tensor | None = None, discard: Tensor | None = None) -> GradientStep | None:
        """Take the norms of the gradients as they are now, or as `take_early()` saw them.

        A step in which no head has a gradient is left out.

        Args:
            scale: what the loss was multiplied with, a 0-dimensional tensor; norms are divided by it.
            discard: a 0-dimensional tensor; where it turns out not to be zero the step is left out.

        Returns:
            The step if it is not finite; None if it is, or where the device would have to be waited for.
        """
        taken, self._early, self._mark = self._early or self._take(), None, None
        if not taken.has_heads:
            return None
        if scale is not None:
            taken.divide(scale)
        # A copy: its owner may change it before it is read.
        self._commit(taken, discard=None if discard is None else discard.detach().clone())
        return None if discard is not None or taken.is_finite() else self._step_of(taken)

    def measure(self) -> Tensor:
        """Take the norms of the gradients as they are now.

        Returns:
            Global L2 norm over all parameters, a 0-dimensional tensor on their device.
        """
        taken = self._take()
        total = None if self._flat is None else torch.linalg.vector_norm(self._flat.grad, dtype=self._dtype)
        self._commit(taken, total)
        return torch.linalg.vector_norm(taken.numbers, dtype=self._dtype) if total is None else total

    def take_early(self, *, may_give_up: bool = True) -> GradientStep | None:
        """Take the norms of the gradients as they are now for the next `record()`.

        Args:
            may_give_up: a step that was taken so earlier, and whose gradients were zeroed or made anew
                instead of a step, counts if it was not finite.

        Returns:
            As `record()`.
        """
        if self._mark is not None:
            parameter, gradient, version = self._mark
            # A backward pass that adds to it makes one version.
            if parameter.grad is not gradient or gradient._version - version > 1:
                self.give_up(may_give_up)
        self._early = self._take()
        for parameter in self._smallest_first:
            if (gradient := parameter.grad) is not None:
                self._mark = (parameter, gradient, gradient._version)
                break
        return None if self._early.is_finite() else self._step_of(self._early)

    def give_up(self, does_count: bool = True) -> None:
        """What was taken early gets no step; it counts, if at all, only if it was not finite."""
        early, self._early, self._mark = self._early, None, None
        if does_count and early is not None and early.has_heads:
            self._commit(early, given_up=True)

    def require_owned(self, owned: Iterable[Tensor]) -> None:
        """Check that an optimizer's parameters include every head's.

        Raises:
            ValueError: they do not; the message names a head.
        """
        known = set(owned)
        for parameter, owners in zip(self.parameters, self._owners):
            if parameter not in known:
                name = next((self.head_names[owner] for owner in owners if owner != NO_HEAD), None)
                raise ValueError(f"the optimizer does not own a parameter of head {name!r}")

    def collect(self) -> list[GradientStep]:
        """One record per step since the last call, in order; one transfer for all of them."""
        return self.start_collecting().result()

    def start_collecting(self) -> PendingGradientSteps:
        """Like `collect()`, without waiting for the device."""
        self._close_block()
        if self._buffer is not None and self._early is None:
            self._buffer.filled = 0
        closed, self._closed, self.recorded = self._closed, [], 0
        return self._pending(closed)

    def _pending(self, closed: list[tuple[Block, Tensor]]) -> PendingGradientSteps:
        numbers = [numbers.flatten() for _, numbers in closed] or [torch.zeros(0, device=self.parameters[0].device)]
        return PendingGradientSteps(
            self.head_names, [block for block, _ in closed], numbers[0] if len(numbers) == 1 else torch.cat(numbers)
        )

    def _step_of(self, taken: "_Taken") -> GradientStep | None:
        """The one step, if it is not finite."""
        block = _OpenBlock(taken, False, False)
        block.add(taken, None, None, False)
        step = self._pending([block.close()]).last()
        return None if math.isfinite(step.global_norm) else step

    def _take(self) -> "_Taken":
        if self._buffer is not None and (taken := self._buffer.take()) is not None:
            return taken
        with torch.no_grad():  # gradients of a double backward
            norms, owners = self._norms()
            return _Taken(owners, _joined(norms, self.parameters[0].device))

    def _commit(
        self, taken: "_Taken", total: Tensor | None = None, discard: Tensor | None = None, given_up: bool = False
    ) -> None:
        if self._open is None or not self._open.takes(taken, total, discard):
            self._close_block()
            self._open = _OpenBlock(taken, total is not None, discard is not None)
        self._open.add(taken, total, discard, given_up)
        self.recorded += 1
        if taken.buffer is not None and taken.buffer.advance():
            self._close_block()

    def _close_block(self) -> None:
        if self._open is not None:
            self._closed.append(self._open.close())
            self._open = None

    def _norms(self) -> tuple[list[Tensor], tuple[int, ...]]:
        """Norms of what has a gradient, and the heads that they belong to."""
        whole = [gradient for parameter in self._whole if (gradient := parameter.grad) is not None]
        shared = [gradient for parameter in self._shared if (gradient := parameter.grad) is not None]
        owners = self._all_owners
        if len(whole) + len(shared) < len(self.parameters):
            has = [parameter.grad is not None for parameter in self.parameters]
            owners = tuple(owner for owners, it_has in zip(self._owners, has) if it_has for owner in owners)
        whole = [gradient.coalesce().values() if gradient.is_sparse else gradient for gradient in whole]
        norms = list(torch._foreach_norm(whole, dtype=self._dtype)) if whole else []
        for gradient in shared:
            rows = gradient.to_dense() if gradient.is_sparse else gradient
            rows = rows.flatten(1) if rows.dim() > 1 else rows.unsqueeze(1)
            norms.append(torch.linalg.vector_norm(rows, dim=1, dtype=self._dtype))
        return norms, owners


class _Taken:
    """Numbers of one step on the device: norms, or a row of the buffer with the gradients themselves.

    Attributes:
        owners: for each norm, or row of a gradient, the index of its head.
        numbers: one-dimensional.
        buffer: the buffer of which `numbers` are the row that is to be filled, if so.
        has_heads: whether a head has a gradient.
    """

    __slots__ = ("owners", "numbers", "buffer", "has_heads", "_is_finite")

    def __init__(self, owners: tuple[int, ...], numbers: Tensor, buffer: "_Buffer | None" = None) -> None:
        self.owners = owners
        self.numbers = numbers
        self.buffer = buffer
        self.has_heads = buffer is not None or any(owner != NO_HEAD for owner in owners)
        self._is_finite: bool | None = None

    def divide(self, scale: Tensor) -> None:
        self.numbers = self.numbers.div_(scale)

    def is_finite(self) -> bool:
        """False where it may not be finite; True too where the device would have to be waited for."""
        if self._is_finite is None:
            numbers = self.numbers
            self._is_finite = not numbers.is_cpu or math.isfinite(numbers.dot(numbers).item())
        return self._is_finite


class _OpenBlock:
    """Neighbouring steps whose numbers are of one kind."""

    def __init__(self, first: _Taken, has_total: bool, has_discard: bool) -> None:
        self._layout = Layout(first.owners, has_total, has_discard)
        self._buffer = first.buffer
        self._start = first.buffer.filled if first.buffer is not None else 0
        self._vectors: list[Tensor] = []
        self._totals: list[Tensor] = []
        self._discards: list[Tensor] = []
        self._given_up: list[bool] = []

    def takes(self, taken: _Taken, total: Tensor | None, discard: Tensor | None) -> bool:
        """Whether a step is of the same kind."""
        owners, has_total, has_discard = self._layout
        return (
            taken.buffer is self._buffer
            and (taken.owners is owners or taken.owners == owners)
            and (total is not None) == has_total
            and (discard is not None) == has_discard
        )

    def add(self, taken: _Taken, total: Tensor | None, discard: Tensor | None, given_up: bool) -> None:
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


class _Buffer:
    """Gradients of steps that are copied, for where they are small that costs less than their norms one by one.

    Gradients of one shape but for their first axis are one copy. Norms are taken of many steps at once.
    """

    def __init__(self, owners: Mapping[Tensor, Sequence[int]], dtype: torch.dtype | None) -> None:
        of_shape: dict[torch.Size, list[Tensor]] = {}
        for parameter in owners:
            of_shape.setdefault(parameter.shape[1:], []).append(parameter)
        self._groups = list(of_shape.values())
        self._dtype = dtype
        self._owners = tuple(
            owner
            for group in self._groups
            for parameter in group
            for owner in (owners[parameter] if len(owners[parameter]) > 1 else owners[parameter] * len(parameter))
        )
        sizes = [sum(parameter.numel() for parameter in group) for group in self._groups]
        first = self._groups[0][0]
        self._gradients = torch.empty(_BUFFERED_STEPS, sum(sizes), dtype=first.dtype, device=first.device)
        # [steps, rows, elements of a row] of each group, and where a step's gradients are copied to.
        self._rows = [
            part.unflatten(1, (sum(map(len, group)), -1))
            for part, group in zip(self._gradients.split(sizes, 1), self._groups)
        ]
        shapes = [torch.Size((-1, *shape)) for shape in of_shape]
        self._places = [
            (step, [part.view(shape) for part, shape in zip(step.split(sizes), shapes)]) for step in self._gradients
        ]
        self.filled = 0

    @classmethod
    def of(cls, owners: Mapping[Tensor, Sequence[int]], dtype: torch.dtype | None) -> "_Buffer | None":
        """A buffer for gradients of these parameters, or None where norms are better."""
        small = sum(parameter.numel() for parameter in owners) <= _SMALL_ELEMENTS
        plain = all(parameter.dim() and parameter.numel() and parameter.is_floating_point() for parameter in owners)
        alike = len({parameter.dtype for parameter in owners}) == 1
        return cls(owners, dtype) if small and plain and alike else None

    def take(self) -> _Taken | None:
        """Copy the gradients as they are now into the next row; None where that cannot be done."""
        step, places = self._places[self.filled]
        try:
            for group, place in zip(self._groups, places):
                torch.cat([parameter.grad for parameter in group], out=place)
        except (RuntimeError, TypeError):
            return None  # one is missing, sparse, or part of a graph
        return _Taken(self._owners, step, self)

    def advance(self) -> bool:
        """Keep the row that was filled last. Returns whether it was the last one."""
        self.filled = (self.filled + 1) % _BUFFERED_STEPS
        return self.filled == 0

    def norms(self, start: int, steps: int) -> Tensor:
        """Norms [steps, rows of all gradients]."""
        norms = [torch.linalg.vector_norm(rows[start : start + steps], dim=2, dtype=self._dtype) for rows in self._rows]
        return torch.cat(norms, 1)


def after_backward(parameters: Iterable[Tensor], call: Callable[[], None]) -> list[RemovableHandle]:
    """Call something at the end of each backward pass that has reached one of `parameters`.

    Whatever else waits for the end of the pass comes first: DistributedDataParallel has averaged
    the gradients by then.

    Returns:
        Handles that end it.
    """
    queue_callback = torch.autograd.Variable._execution_engine.queue_callback
    current_pass = torch._C._current_graph_task_id
    # Behind what is queued until the end of the pass, as DistributedDataParallel does with the last bucket. A compiled
    # training step must not trace into these functions.
    at_end = partial(queue_callback, torch.compiler.disable(call))
    seen = -1

    def reached(parameter: Tensor) -> None:
        nonlocal seen
        if seen != (now := current_pass()):
            seen = now
            queue_callback(at_end)

    reached = torch.compiler.disable(reached)
    # What is frozen may be unfrozen later; integers never have a gradient, nor what inference mode has made.
    able = [p for p in parameters if (p.is_floating_point() or p.is_complex()) and not p.is_inference()]
    return [_hooked(parameter, reached) for parameter in able]


def _joined(norms: list[Tensor], device: torch.device) -> Tensor:
    """All norms in one vector; those of whole parameters are 0-dimensional, those of rows are not."""
    if not norms:
        return torch.zeros(0, device=device)
    if all(norm.dim() == 0 for norm in norms):
        return torch.stack(norms)
    return torch.cat([norm if norm.dim() else norm.unsqueeze(0) for norm in norms])


def _hooked(parameter: Tensor, hook: Callable[[Tensor], None]) -> RemovableHandle:
    """Register a hook that a frozen parameter, for which torch would refuse it, keeps until it is unfrozen."""
    requires_grad = parameter.requires_grad
    handle = parameter.requires_grad_().register_post_accumulate_grad_hook(hook)
    parameter.requires_grad_(requires_grad)
    return handle


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
    owners = rows.setdefault(part.parameter, [NO_HEAD] * len(part.parameter))
    if not 0 <= part.start < part.stop <= len(owners):
        raise ValueError(f"head {names[head]!r} takes rows {part.start}:{part.stop} of a layer that has {len(owners)}")
    for row in range(part.start, part.stop):
        if owners[row] != NO_HEAD:
            raise ValueError(f"heads {names[owners[row]]!r} and {names[head]!r} share row {row} of a layer")
        owners[row] = head


def _require_measurable(parameters: tuple[Tensor, ...], flat: Tensor | None) -> None:
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
    if flat is not None:
        storage = flat.untyped_storage().data_ptr()
        if any(parameter.untyped_storage().data_ptr() != storage for parameter in parameters):
            raise ValueError("flat must be a parameter of which all heads' parameters are views")
