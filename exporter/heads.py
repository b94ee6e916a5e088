"""What an action head is to the measurement, and its gradient norms on the device."""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import accumulate, groupby, pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from exporter.telemetry import GradientStep


@dataclass(frozen=True)
class Rows:
    """Rows `start:stop` of a layer that several heads share, in its weight or its bias."""

    parameter: Tensor
    start: int
    stop: int


Head = nn.Module | Iterable[Tensor | Rows]

_NO_HEAD = -1
# Up to here copying gradients costs less than starting one kernel per parameter; 64 KiB a step in float32.
_SMALL_ELEMENTS = 16384
_COPIED_STEPS = 128  # after so many, copies are reduced to norms, so that a long window stays small


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
        self._is_shared = set(rows)
        self.parameters = (*self._whole, *self._shared)
        self._owners = [[owner] for owner in whole.values()] + list(rows.values())
        self._all_owners = tuple(owner for owners in self._owners for owner in owners)
        # Half-precision norms lose digits, and those of float16 overflow at 65504.
        half = any(parameter.dtype in (torch.float16, torch.bfloat16) for parameter in self.parameters)
        self._dtype = torch.float32 if half else None
        _require_measurable(self.parameters)
        self._steps: list[_Step] = []
        self._is_small = not rows and sum(parameter.numel() for parameter in whole) <= _SMALL_ELEMENTS
        # Parameters of one head stand next to each other: (owner, elements) of each such block.
        self._blocks = [
            (owner, sum(parameter.numel() for parameter, _ in block))
            for owner, block in groupby(whole.items(), lambda item: item[1])
        ]
        # Norm, address and version of each gradient that a backward pass has made since the last step.
        self._early: dict[Tensor, tuple[Tensor, int, int]] = {}
        self._backward_pass = -1

    def record(self, scale: Tensor | None = None, discard: Tensor | None = None) -> None:
        """Take the norms of the gradients as they are now, or as `record_after_backward()` saw them.

        Args:
            scale: what the loss was multiplied with, a 0-dimensional tensor; norms are divided by it.
            discard: a 0-dimensional tensor; where it turns out not to be zero the step is left out.
        """
        gradients = self._small_gradients()
        norms, present = ([gradients], None) if gradients is not None else self._norms()
        if scale is not None and norms:
            norms = list(torch._foreach_div(norms, scale))
        if discard is not None:
            # A copy: its owner may change it before it is read.
            norms.append(discard.detach().clone())
        self._steps.append(_Step(norms, present, discard is not None, gradients is not None))
        if gradients is not None and len(self._steps) % _COPIED_STEPS == 0:
            self._steps = self._with_norms(self._steps)

    def require_owned(self, owned: Iterable[Tensor]) -> None:
        """Check that an optimizer's parameters include every head's.

        Raises:
            ValueError: they do not; the message names a head.
        """
        known = set(owned)
        for parameter, owners in zip(self.parameters, self._owners):
            if parameter not in known:
                name = next((self.head_names[owner] for owner in owners if owner != _NO_HEAD), None)
                raise ValueError(f"the optimizer does not own a parameter of head {name!r}")

    def record_after_backward(self, on_error: Callable[[Exception], None]) -> list[RemovableHandle]:
        """Take each parameter's norm as soon as its gradient is accumulated, before anything clips it.

        Those of a step that was given up are forgotten in the next backward pass that
        reaches a parameter. A step without one takes them for its own if gradients were
        zeroed in place, which looks like clipping. A change through `.data` goes unnoticed.

        Args:
            on_error: told of what goes wrong in a hook, which must not end the backward pass.

        Returns:
            Handles that end it.
        """

        def take(parameter: Tensor) -> None:
            try:
                self._take_early(parameter)
            except Exception as error:
                on_error(error)

        take = torch.compiler.disable(take)  # a compiled training step must not trace into it
        # What is frozen may be unfrozen later; integers never have a gradient, nor what inference mode has made.
        able = [p for p in self.parameters if (p.is_floating_point() or p.is_complex()) and not p.is_inference()]
        return [_hooked(parameter, take) for parameter in able]

    def measure(self) -> Tensor:
        """Take the norms of the gradients as they are now.

        Returns:
            Global L2 norm over all parameters, a 0-dimensional tensor on their device.
        """
        norms, present = self._norms()
        joined = _joined(norms, self.parameters[0].device)
        self._steps.append(_Step([joined], present))
        return torch.linalg.vector_norm(joined)

    def collect(self) -> list[GradientStep]:
        """One record per step since the last call, in order; one transfer for all of them."""
        return self.start_collecting().result()

    def start_collecting(self) -> "PendingGradientSteps":
        """Like `collect()`, without waiting for the device."""
        steps, self._steps = self._steps, []
        steps = self._with_norms(steps)
        on_device = _joined([norm for step in steps for norm in step.norms], self.parameters[0].device)
        layouts = [(self._owners_of(step), step.may_be_discarded) for step in steps]
        return PendingGradientSteps(self.head_names, layouts, on_device)

    def _owners_of(self, step: "_Step") -> tuple[int, ...]:
        """The head of each of the step's norms."""
        if step.owners is not None:
            return step.owners
        if step.present is None:
            return self._all_owners
        return tuple(owner for owners, has in zip(self._owners, step.present) if has for owner in owners)

    def _small_gradients(self) -> Tensor | None:
        """A copy of all gradients in one vector, where that is cheaper now than their norms."""
        if not self._is_small or self._early:
            return None
        gradients = [parameter.grad for parameter in self._whole]
        for gradient in gradients:
            if gradient is None or gradient.requires_grad:
                return None
        flat = torch._utils._flatten_dense_tensors(gradients)
        return flat.clone() if len(gradients) == 1 else flat  # of a single one it is a view

    def _with_norms(self, steps: list["_Step"]) -> list["_Step"]:
        """The same steps, with a norm per head in place of gradients that were copied; one kernel per head."""
        copied = [step.norms[0] for step in steps if step.holds_gradients]
        if not copied:
            return steps
        parts = torch.stack(copied).split([elements for _, elements in self._blocks], dim=1)
        owners = tuple(owner for owner, _ in self._blocks)
        rows = iter(torch.stack([torch.linalg.vector_norm(part, dim=1, dtype=self._dtype) for part in parts], 1))
        return [
            step._replace(norms=[next(rows), *step.norms[1:]], holds_gradients=False, owners=owners)
            if step.holds_gradients
            else step
            for step in steps
        ]

    def _take_early(self, parameter: Tensor) -> None:
        gradient = parameter.grad
        self._early[parameter] = (self._norm(parameter), gradient.data_ptr(), gradient._version)
        if self._backward_pass == (now := torch._C._current_graph_task_id()):
            return
        self._backward_pass = now
        # What is as the last pass left it is accumulated further; anything else is no longer what was measured.
        for other, (_, address, version) in list(self._early.items()):
            gradient = other.grad
            if gradient is None:
                del self._early[other]
            elif gradient.data_ptr() != address or gradient._version != version:
                self._take_early(other)

    def _norms(self) -> tuple[list[Tensor], tuple[bool, ...] | None]:
        """Norms of what has a gradient; for every parameter whether it has one, None if all have."""
        if self._early:
            early, self._early = self._early, {}
            present = tuple(parameter.grad is not None for parameter in self.parameters)
            # A gradient that no backward pass has touched since the last step, a zero one say, is taken as it is.
            norms = [early[p][0] if p in early else self._norm(p) for p, has in zip(self.parameters, present) if has]
            return norms, None if all(present) else present
        gradients = [parameter.grad for parameter in self._whole]
        shared = self._shared
        present = None
        for gradient in (*gradients, *[parameter.grad for parameter in shared]) if shared else gradients:
            if gradient is None:
                present = tuple(parameter.grad is not None for parameter in self.parameters)
                gradients = [gradient for gradient in gradients if gradient is not None]
                shared = [parameter for parameter in shared if parameter.grad is not None]
                break
        norms = list(torch._foreach_norm(gradients, dtype=self._dtype)) if gradients else []
        norms.extend(map(self._norm, shared))
        if any(norm.requires_grad for norm in norms):  # gradients of a double backward
            norms = [norm.detach() for norm in norms]
        return norms, present

    def _norm(self, parameter: Tensor) -> Tensor:
        """Norm of the gradient of a parameter, or of each row of a layer that heads share."""
        gradient = parameter.grad
        if gradient.requires_grad:  # of a double backward
            gradient = gradient.detach()
        if parameter not in self._is_shared:
            return torch.linalg.vector_norm(gradient, dtype=self._dtype)
        rows = gradient.flatten(1) if gradient.dim() > 1 else gradient.unsqueeze(1)
        return torch.linalg.vector_norm(rows, dim=1, dtype=self._dtype)


class _Step(NamedTuple):
    """Norms of one step on the device: one tensor per parameter that has a gradient, or all in one.

    `present`: for every parameter whether it has a gradient, None if all have. The
    last norm is no norm but the discard flag if the step `may_be_discarded`; the first
    one is the gradients themselves, in one vector, if it `holds_gradients`. `owners`:
    the head of each norm, where it is not that of the parameters.
    """

    norms: list[Tensor]
    present: tuple[bool, ...] | None
    may_be_discarded: bool = False
    holds_gradients: bool = False
    owners: tuple[int, ...] | None = None


class PendingGradientSteps:
    """Recorded steps on their way from the device to the host.

    On CUDA the copy goes to pinned memory in the stream of the training step, and
    `is_ready` asks an event; nothing waits before `result()`.
    """

    def __init__(
        self,
        head_names: tuple[str, ...],
        layouts: list[tuple[tuple[int, ...], bool]],
        norms: Tensor,
    ) -> None:
        self._head_names = head_names
        self._layouts = layouts
        self._event = None
        if norms.is_cuda:
            self._norms = torch.empty(norms.shape, dtype=norms.dtype, pin_memory=True)
            self._norms.copy_(norms, non_blocking=True)
            self._event = torch.cuda.Event()
            # The norms' device need not be the current one.
            self._event.record(torch.cuda.current_stream(norms.device))
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
        # Neighbours of one layout are put together at once: usually that is all of them.
        for (owners, may_be_discarded), group in groupby(self._layouts):
            count = len(list(group))
            columns = [owner if owner != _NO_HEAD else heads for owner in owners]
            width = len(columns) + may_be_discarded
            block = squares[start : start + count * width].view(count, width)
            start += block.numel()
            if may_be_discarded:
                block = block[block[:, -1] == 0.0, :-1]
            # index_add_ keeps a NaN in the column of its own head; a matrix product would spread it.
            per_head = block.new_zeros(len(block), heads + 1)
            per_head.index_add_(1, torch.tensor(columns, dtype=torch.long), block)
            contributing = sorted(set(columns) - {heads})
            names = [self._head_names[index] for index in contributing]
            steps.extend(
                GradientStep(dict(zip(names, norms)), global_norm)
                for norms, global_norm in zip(per_head[:, contributing].sqrt().tolist(), block.sum(1).sqrt().tolist())
            )
        return steps


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
    owners = rows.setdefault(part.parameter, [_NO_HEAD] * len(part.parameter))
    if not 0 <= part.start < part.stop <= len(owners):
        raise ValueError(f"head {names[head]!r} takes rows {part.start}:{part.stop} of a layer that has {len(owners)}")
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
