"""Finding torch optimizers inside a trainer's wrappers, and processes that train together."""

import gc
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from torch.optim import Optimizer

# Attributes in which wrappers keep the inner optimizer: Accelerate and others, tianshou, SAM, schedule-free.
_INNER = ("optimizer", "_optim", "base_optimizer", "base")


def unwrapped(optimizers: Optimizer | Iterable[Optimizer]) -> list[Optimizer]:
    """The inner torch optimizers of one optimizer or of several.

    Raises:
        TypeError: one is not an optimizer and has none inside; the message names its class.
    """
    several = optimizers if isinstance(optimizers, (list, tuple)) else [optimizers]
    if not several:
        raise TypeError("there is no optimizer")
    return [_require(_innermost(optimizer) or optimizer) for optimizer in several]


def _innermost(optimizer: object, depth: int = 4) -> Optimizer | None:
    """The optimizer inside all wrappers, or None."""
    inner = [getattr(optimizer, name, None) for name in _INNER] if depth else []
    found = (_innermost(each, depth - 1) for each in inner if each is not None)
    return next(filter(None, found), optimizer if isinstance(optimizer, Optimizer) else None)


def _require(optimizer: object) -> Optimizer:
    if not isinstance(optimizer, Optimizer):
        kind = type(optimizer)
        raise TypeError(
            f"expected a torch.optim.Optimizer, got {kind.__module__}.{kind.__qualname__}; "
            "pass the torch optimizer that it keeps"
        )
    return optimizer


def has_closure(args: tuple[object, ...], kwargs: Mapping[str, object]) -> bool:
    """Whether `optimizer.step` got a closure; `args` begins with the optimizer itself."""
    return kwargs.get("closure") is not None or len(args) > 1 and args[1] is not None


def is_one_of_several() -> bool:
    """Whether this process trains together with others."""
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def unaveraged_warning(parameters: Iterable[Tensor]) -> str | None:
    """A warning if DistributedDataParallel does not average the gradients of these parameters; None otherwise.

    Searches all objects of the process, because a parameter does not know its module.
    """
    parallel, ours = torch.nn.parallel.DistributedDataParallel, set(parameters)
    modules = [each for each in gc.get_objects() if issubclass(type(each), parallel)]
    if any(not ours.isdisjoint(module.parameters()) for module in modules):
        return None
    return (
        "several processes train together, and gradients are measured before they are averaged: no "
        "DistributedDataParallel has a parameter of the heads. If the trainer averages by hand, call gradients_ready() "
        "after that, or leave before_clipping out"
    )


def unknown_scaler_warning() -> str | None:
    """What is wrong with gradients at the end of the backward pass, where a `GradScaler` is in use that nobody named.

    Looks at every object of the process, for neither loss nor optimizer know their scaler.
    """
    scalers = [each for each in gc.get_objects() if issubclass(type(each), torch.amp.GradScaler)]
    if not any(scaler.is_enabled() for scaler in scalers):
        return None
    return (
        "there is a GradScaler, but the monitor was given none. If it scales this run's loss, norms are too large, and "
        "steps that it skips count as not finite: pass grad_scaler=, or before_clipping=False"
    )
