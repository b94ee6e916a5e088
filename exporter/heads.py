"""Action heads, and their gradient norms on the device."""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import accumulate, pairwise

import torch
from torch import Tensor, nn

from exporter.pending import NO_HEAD, Block, PendingGradientSteps
from exporter.recording import Buffer, OpenBlock, Taken
from exporter.telemetry import GradientStep


@dataclass(frozen=True)
class Rows:
    """Rows `start:stop` of a parameter (weight or bias) of a layer that several heads share.

    `axis` is the axis of the rows. If it is not the first axis, all others must have length 1.
    """

    parameter: Tensor = field(repr=False)
    start: int
    stop: int
    axis: int = 0


Head = nn.Module | Iterable[nn.Module | Tensor | Rows]
Heads = Mapping[str, Head] | nn.ModuleDict | Iterable[Head]

_WRAPPERS = re.compile(r"(?<![^.])(module|_orig_mod)\.")


def named_heads(heads: Heads) -> dict[str, Head]:
    """Heads by name; those of a list are `head_0`, `head_1`, ...

    Raises:
        TypeError: `heads` is neither a mapping nor a list.
    """
    if hasattr(heads, "items"):
        # Store iterators as lists: a detached monitor may be attached again.
        return {name: list(head) if isinstance(head, Iterator) else head for name, head in heads.items()}
    if not hasattr(heads, "__iter__") or isinstance(heads, (str, Tensor)):
        raise TypeError(
            f"heads must be a mapping of names to modules, parameters or rows, got {type(heads).__name__}; "
            "space_heads() and row_heads() split a layer that heads share"
        )
    return {f"head_{index}": head for index, head in enumerate(heads)}


def row_heads(layer: nn.Module, sizes: Mapping[str, int]) -> dict[str, list[Rows]]:
    """Heads that are rows of one fused layer, in order.

    Args:
        layer: a layer whose parameters (weight, bias) have the heads' rows along their first axis.
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
        model: the model whose `named_modules()` are searched. The pattern may leave out `module.` of
            DistributedDataParallel and `_orig_mod.` of `torch.compile`.
        pattern: regular expression that a module's full name must match. Its first
            group that matches is the head's name; without a group, the module's own name.
            Modules with the same head name make one head.

    Raises:
        ValueError: no module matches; the message lists module names.
    """
    expression = re.compile(pattern)
    heads: dict[str, dict[Tensor, None]] = {}
    for name, module in model.named_modules():
        if match := expression.fullmatch(name) or expression.fullmatch(_WRAPPERS.sub("", name)):
            head = next((group for group in match.groups() if group), name)
            heads.setdefault(head, {}).update(dict.fromkeys(module.parameters()))
    if not heads:
        names = [name for name, _ in model.named_modules() if name]
        raise ValueError(
            f"no module of {type(model).__name__} matches {pattern}; there are {', '.join(names[:20]) or 'none'}"
            + (f" and {len(names) - 20} more" if len(names) > 20 else "")
        )
    return {name: list(parameters) for name, parameters in heads.items()}


class HeadGradientMeter:
    """L2 gradient norms of action heads, from one pass over the gradients.

    Call `record()` between backward and optimizer step; `measure()` does the same and
    returns the global norm for clipping. Both only queue work on the device.
    `collect()` transfers all recorded steps at once. The meter stores norms of whole
    parameters and of rows; `collect()` combines them per head.

    Args:
        heads: name -> modules, parameters, or `Rows` of layers that heads share.
        other_parameters: the optimizer's other parameters; they count only in the global norm.
        flat: a parameter of which all others are views; their gradients are views of its
            gradient. The global norm is then that of `flat.grad`.

    Attributes:
        head_names: in the order of `heads`.
        parameters: every measured parameter.
        recorded: number of steps since the last `collect()`.

    Raises:
        ValueError: a head has no parameters, two heads share one, rows are out of range, or the
            parameters cannot be measured (sharded, on several devices, or not views of `flat`).
        TypeError: a head contains something else.
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
            for part in head_parts(name, head):
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
        self._rows = rows
        self._shared = list(rows)
        self.parameters = (*self._whole, *self._shared)
        self._owners = [[owner] for owner in whole.values()] + list(rows.values())
        self._all_owners = tuple(owner for owners in self._owners for owner in owners)
        # Norms in half precision lose digits, and overflow at 65504 in float16.
        half = any(parameter.dtype in (torch.float16, torch.bfloat16) for parameter in self.parameters)
        self._dtype = torch.float32 if half else None
        _require_measurable(self.parameters, flat)
        self._buffer = Buffer.of(dict(zip(self.parameters, self._owners)), self._dtype)
        self._open: OpenBlock | None = None
        self._closed: list[tuple[Block, Tensor]] = []
        self._checked = 0  # of the closed blocks
        self.recorded = self._recorded_ever = 0
        self._early: Taken | None = None
        self._newest: Tensor | None = None
        self._is_finite: bool | None = None  # whether the newest is finite, if known
        # A small gradient, kept until the step: its version shows whether gradients were accumulated further.
        self._smallest_first = sorted(self.parameters, key=Tensor.numel)
        self._mark: tuple[Tensor, Tensor, int] | None = None

    def record(self, scale: Tensor | None = None, discard: Tensor | None = None) -> bool:
        """Record the norms of the current gradients, or those that `take_early()` took.

        A step in which no head has a gradient is left out.

        Args:
            scale: factor of the loss, a 0-dimensional tensor; norms are divided by it.
            discard: a 0-dimensional tensor; if it is not zero, the step is left out.

        Returns:
            Whether a head has a gradient.
        """
        taken, self._early, self._mark = self._early or self._take(), None, None
        if not taken.has_heads:
            return False
        if scale is not None:
            taken.numbers.div_(scale)
        # Copy it: its owner may change it before it is read.
        self._commit(taken, discard=None if discard is None else discard.detach().clone())
        return True

    def measure(self) -> Tensor:
        """Record the norms of the current gradients.

        Returns:
            Global L2 norm over all parameters, a 0-dimensional tensor on their device.
        """
        taken = self._take()
        total = None if self._flat is None else torch.linalg.vector_norm(self._flat.grad, dtype=self._dtype)
        self._commit(taken, total)
        return torch.linalg.vector_norm(taken.numbers, dtype=self._dtype) if total is None else total

    def take_early(self, *, may_give_up: bool = True) -> bool:
        """Take the norms of the current gradients for the next `record()`.

        Args:
            may_give_up: if the gradients taken before were zeroed or replaced without a step, record them now as a
                step that the optimizer did not take; it counts if it was not finite.

        Returns:
            Whether such a step was recorded.
        """
        recorded = self.recorded
        if self._mark is not None:
            parameter, gradient, version = self._mark
            # A backward pass that accumulates into it raises the version by one.
            if parameter.grad is not gradient or gradient._version - version > 1:
                self.give_up(may_give_up)
        self._early = self._take()
        for parameter in self._smallest_first:
            if (smallest := parameter.grad) is not None:
                self._mark = (parameter, smallest, smallest._version)
                break
        return self.recorded > recorded

    def give_up(self, does_count: bool = True) -> None:
        """Note that no step follows for the gradients taken early. With `does_count` they count if not finite."""
        early, self._early, self._mark = self._early, None, None
        if does_count and early is not None and early.has_heads:
            self._commit(early, given_up=True)

    def trainable_heads(self) -> list[str]:
        """Heads with a parameter that requires a gradient."""
        owners = {o for parameter, own in zip(self.parameters, self._owners) if parameter.requires_grad for o in own}
        return [name for index, name in enumerate(self.head_names) if index in owners]

    def require_owned(self, owned: Iterable[Tensor]) -> None:
        """Check that an optimizer's parameters include every head's.

        Raises:
            ValueError: a parameter is missing; the message names its head.
        """
        known = set(owned)
        for parameter, owners in zip(self.parameters, self._owners):
            if parameter not in known:
                name = next((self.head_names[owner] for owner in owners if owner != NO_HEAD), None)
                raise ValueError(f"the optimizer does not own a parameter of head {name!r}")

    def collect(self) -> list[GradientStep]:
        """One `GradientStep` per step since the last call, in order; one transfer for all."""
        return self.start_collecting().result()

    def start_collecting(self) -> PendingGradientSteps:
        """Like `collect()`, without waiting for the device."""
        self._close_block()
        if self._buffer is not None and self._early is None:
            self._buffer.filled = 0
        closed, self._closed, self._checked, self.recorded = self._closed, [], 0, 0
        return self._pending(closed)

    def unchecked(self) -> PendingGradientSteps:
        """Steps recorded since the last call of this method; `collect()` will return them too."""
        self._close_block()
        blocks, self._checked = self._closed[self._checked :], len(self._closed)
        return self._pending(blocks)

    @property
    def has_early(self) -> bool:
        """Whether `take_early()` has taken the next step."""
        return self._early is not None

    def early(self) -> PendingGradientSteps:
        """The step that `take_early()` has taken."""
        assert self._early is not None
        block = OpenBlock(self._early, False, False)
        block.add(self._early, None, None, False)
        return self._pending([block.close()], first_step=self._recorded_ever)

    def is_finite(self) -> bool | None:
        """Whether the newest norms are finite; None if finding out means waiting for a device.

        Also False if their squares overflow.
        """
        if self._is_finite is None and self._newest is not None and self._newest.is_cpu:
            self._is_finite = math.isfinite(torch.dot(self._newest, self._newest).item())
        return self._is_finite

    def _pending(self, blocks: list[tuple[Block, Tensor]], first_step: int | None = None) -> PendingGradientSteps:
        numbers = [numbers.flatten() for _, numbers in blocks] or [torch.zeros(0, device=self.parameters[0].device)]
        return PendingGradientSteps(
            self.head_names,
            [block for block, _ in blocks],
            numbers[0] if len(numbers) == 1 else torch.cat(numbers),
            self._recorded_ever - sum(len(block.given_up) for block, _ in blocks) if first_step is None else first_step,
        )

    def _take(self) -> Taken:
        taken = self._buffer.take() if self._buffer is not None else None
        if taken is None:
            with torch.no_grad():  # gradients of a double backward
                norms, owners = self._norms()
                taken = Taken(owners, _joined(norms, self.parameters[0].device))
        self._newest, self._is_finite = taken.numbers, None
        return taken

    def _commit(
        self, taken: Taken, total: Tensor | None = None, discard: Tensor | None = None, given_up: bool = False
    ) -> None:
        if self._open is None or not self._open.takes(taken, total, discard):
            self._close_block()
            self._open = OpenBlock(taken, total is not None, discard is not None)
        self._open.add(taken, total, discard, given_up)
        self.recorded += 1
        self._recorded_ever += 1
        if taken.buffer is not None and taken.buffer.advance():
            self._close_block()

    def _close_block(self) -> None:
        if self._open is not None:
            self._closed.append(self._open.close())
            self._open = None

    def _norms(self) -> tuple[list[Tensor], tuple[int, ...]]:
        """Norms of all existing gradients, and the heads that own them."""
        whole = [gradient for parameter in self._whole if (gradient := parameter.grad) is not None]
        shared = [
            (parameter.grad, len(self._rows[parameter])) for parameter in self._shared if parameter.grad is not None
        ]
        owners = self._all_owners
        if len(whole) + len(shared) < len(self.parameters):
            has = [parameter.grad is not None for parameter in self.parameters]
            owners = tuple(owner for owners, it_has in zip(self._owners, has) if it_has for owner in owners)
        whole = [gradient.coalesce().values() if gradient.is_sparse else gradient for gradient in whole]
        norms = list(torch._foreach_norm(whole, dtype=self._dtype)) if whole else []
        for gradient, count in shared:
            rows = (gradient.to_dense() if gradient.is_sparse else gradient).reshape(count, -1)
            norms.append(torch.linalg.vector_norm(rows, dim=1, dtype=self._dtype))
        return norms, owners


def _joined(norms: list[Tensor], device: torch.device) -> Tensor:
    """All norms in one vector. Norms of whole parameters are 0-dimensional, those of rows are vectors."""
    if not norms:
        return torch.zeros(0, device=device)
    if all(norm.dim() == 0 for norm in norms):
        return torch.stack(norms)
    return torch.cat([norm if norm.dim() else norm.unsqueeze(0) for norm in norms])


def head_parts(name: str, head: Head) -> list[Tensor | Rows]:
    """The parameters or rows of a head.

    Raises:
        TypeError, ValueError: it contains something else, or nothing.
    """
    if isinstance(head, (Tensor, Rows)):
        head = [head]
    parts: list[Tensor | Rows] = []
    for part in [head] if isinstance(head, nn.Module) or not hasattr(head, "__iter__") else head:
        if not isinstance(part, (nn.Module, Tensor, Rows)):
            raise TypeError(f"head {name!r} must be modules, parameters or Rows; it contains {part!r}")
        parts += part.parameters() if isinstance(part, nn.Module) else [part]
    if not parts:
        raise ValueError(f"head {name!r} has no parameters")
    return parts


def _claim_rows(rows: dict[Tensor, list[int]], part: Rows, head: int, names: tuple[str, ...]) -> None:
    parameter, count = part.parameter, part.parameter.shape[part.axis]
    if part.axis and count != parameter.numel():
        raise ValueError(f"head {names[head]!r} takes rows along axis {part.axis} of shape {list(parameter.shape)}")
    owners = rows.setdefault(parameter, [NO_HEAD] * count)
    if not 0 <= part.start < part.stop <= len(owners):
        raise ValueError(f"head {names[head]!r} takes rows {part.start}:{part.stop} of a layer that has {len(owners)}")
    for row in range(part.start, part.stop):
        if owners[row] != NO_HEAD:
            raise ValueError(f"heads {names[owners[row]]!r} and {names[head]!r} share row {row} of a layer")
        owners[row] = head


def _require_measurable(parameters: tuple[Tensor, ...], flat: Tensor | None) -> None:
    devices = sorted({str(parameter.device) for parameter in parameters})
    if len(devices) > 1:
        raise ValueError(f"parameters are on several devices ({', '.join(devices)}); a monitor measures one")
    for parameter in parameters:
        # A shard has only a part of the norm.
        if hasattr(parameter, "_local_tensor") or getattr(parameter, "_fsdp_flattened", False):
            raise ValueError(
                f"a parameter is a {type(parameter).__name__} that is sharded over processes (DTensor, FSDP); "
                "its gradient norm cannot be measured here"
            )
    if flat is not None:
        storage = flat.untyped_storage().data_ptr()
        if any(parameter.untyped_storage().data_ptr() != storage for parameter in parameters):
            raise ValueError("flat must be a parameter of which all heads' parameters are views")
