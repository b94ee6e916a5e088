"""`watch()`: attach and serve, in one call."""

import inspect
from collections.abc import Sequence
from typing import Any

from torch.optim import Optimizer

from exporter.heads import Heads
from exporter.monitor import GradientMonitor
from exporter.optimizers import is_one_of_several

_SERVING = inspect.signature(GradientMonitor.serve).parameters.keys() - {"self"}


def watch(optimizer: Optimizer | Sequence[Optimizer], heads: Heads, run: str, **options: Any) -> GradientMonitor:
    """An attached and served monitor, in one call; also a context manager.

        with exporter.watch(optimizer, exporter.space_heads(model.actor, env.action_space), run="walker-17"): ...

    Args:
        optimizer: one optimizer, or all that own heads, as for `GradientMonitor.attach`.
        heads: as for `GradientMonitor`.
        run: name of the run, its label on `/metrics`.
        options: options of `GradientMonitor` and of `GradientMonitor.serve`. Gradients are measured before clipping,
            unless `before_clipping` is false or several processes train together.

    Raises:
        OSError, RuntimeError, TypeError, ValueError: as `GradientMonitor`, its `attach` and its `serve`.
    """
    serving = {name: options.pop(name) for name in _SERVING & options.keys()}
    options.setdefault("before_clipping", not is_one_of_several())
    monitor = GradientMonitor(heads, run, **options).attach(optimizer)
    try:
        monitor.serve(**serving)
    except BaseException:
        monitor.close()
        raise
    return monitor
