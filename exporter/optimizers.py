"""The torch optimizers behind what a trainer calls its optimizer, and the processes that share them."""

import gc
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from torch.optim import Optimizer

# Where wrappers keep the optimizer that steps: Accelerate and others, tianshou, SAM, schedule-free.
_INNER = ("optimizer", "_optim", "base_optimizer", "base")


def unwrapped(optimizers: Optimizer | Iterable[Optimizer]) -> list[Optimizer]:
    """The optimizers that step, behind wrappers of one optimizer or of several.

    Raises:
        TypeError: one is no optimizer, and has none inside; the message names its class.
    """
    several = optimizers if isinstance(optimizers, (list, tuple)) else [optimizers]
    if not several:
        raise TypeError("there is no optimizer")
    return [_require(_innermost(optimizer) or optimizer) for optimizer in several]


def _innermost(optimizer: object, depth: int = 4) -> Optimizer | None:
    """The optimizer inside all wrappers, or None where there is none."""
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
    """Whether `optimizer.step` was given a closure; `args` begins with the optimizer itself."""
    return kwargs.get("closure") is not None or len(args) > 1 and args[1] is not None


def is_one_of_several() -> bool:
    """Whether this process trains together with others."""
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def unaveraged_warning(parameters: Iterable[Tensor]) -> str | None:
    """What is wrong with gradients of these parameters at the end of the backward pass, where several processes train.

    Looks at every object of the process, for a parameter does not know its module.
    """
    parallel, ours = torch.nn.parallel.DistributedDataParallel, set(parameters)
    modules = [each for each in gc.get_objects() if issubclass(type(each), parallel)]
    if any(not ours.isdisjoint(module.parameters()) for module in modules):
        return None
    return (
        "several processes train together, and gradients are measured before anything but DistributedDataParallel can "
        "average them, which has none of the heads. Where the trainer averages by hand, call gradients_ready() after "
        "that, or leave before_clipping out"
    )
