"""Recorded gradient steps on their way from the device, and the summary of a window."""

import math
from functools import lru_cache
from itertools import compress, groupby
from typing import NamedTuple

import torch
from torch import Tensor

from exporter.gradient_cv import gradient_cv
from exporter.telemetry import GradientMetrics, GradientStep, summary_of_steps

NO_HEAD = -1


class Layout(NamedTuple):
    """The order of a recorded step's numbers: norms, then a global norm, then a flag.

    Attributes:
        owners: for each norm the index of its head, `NO_HEAD` if it belongs to none.
        has_total: whether there is a global norm; otherwise it is that of all norms together.
        has_discard: whether there is a flag; if it is not 0, the step is left out.
    """

    owners: tuple[int, ...]
    has_total: bool
    has_discard: bool

    @property
    def width(self) -> int:
        return len(self.owners) + self.has_total + self.has_discard


class Block(NamedTuple):
    """Consecutive steps with the same layout.

    Attributes:
        layout: layout of each step.
        given_up: for each step, whether the optimizer never took it; such a step counts only if it was not finite.
    """

    layout: Layout
    given_up: tuple[bool, ...]


class _Steps(NamedTuple):
    """Steps of one layout on the host: norms [steps][heads with a gradient] and global norms [steps]."""

    names: list[str]
    norms: list[list[float]]
    totals: list[float]
    given_up: int


class PendingGradientSteps:
    """Recorded steps on their way from the device to the host.

    On CUDA the copy goes to pinned memory in the stream of the training step, and
    `is_ready` queries an event. Only reading a result waits.

    Args:
        head_names: names of the heads, by index.
        blocks: layouts of the steps, in order.
        numbers: the recorded numbers of all steps in order, on the device.
        first_step: number of steps recorded before.
    """

    def __init__(self, head_names: tuple[str, ...], blocks: list[Block], numbers: Tensor, first_step: int = 0) -> None:
        self.first_step = first_step
        self._head_names = head_names
        self._blocks = blocks
        self._arrived: list[_Steps] | None = None
        self._event = None
        if numbers.is_cuda:
            self._numbers = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            self._numbers.copy_(numbers, non_blocking=True)
            self._event = torch.cuda.Event()
            # The norms' device may not be the current one.
            self._event.record(torch.cuda.current_stream(numbers.device))
        else:
            self._numbers = numbers.to("cpu")

    @property
    def is_ready(self) -> bool:
        """Whether results are available without waiting."""
        return self._event is None or self._event.query()

    def summary(self) -> GradientMetrics:
        """Means over all steps: `summarize_gradient_steps(self.result())`, without an object per step.

        Waits for the device if the steps are not ready, like all results.
        """
        cvs: list[float] = []
        totals: list[float] = []
        norms_of: dict[str, list[float]] = {}
        steps = self._steps()
        for block in steps:
            cvs += [gradient_cv(n) if math.isfinite(t) else math.inf for n, t in zip(block.norms, block.totals)]
            totals += block.totals
            for name, norms in zip(block.names, zip(*block.norms)):
                norms_of.setdefault(name, []).extend(norms)
        return summary_of_steps(cvs, totals, norms_of, max((len(block.names) for block in steps), default=0))

    @property
    def nonfinite_steps(self) -> int:
        """Number of steps with a non-finite global norm."""
        return sum(not math.isfinite(total) for block in self._steps() for total in block.totals)

    @property
    def given_up_steps(self) -> int:
        """Number of non-finite steps that the optimizer never took."""
        return sum(block.given_up for block in self._steps())

    @property
    def absent_heads(self) -> list[str]:
        """Heads without a gradient in all steps."""
        present = {name for block in self._steps() for name in block.names}
        return [name for name in self._head_names if name not in present]

    def result(self) -> list[GradientStep]:
        """The steps, in order."""
        return [
            GradientStep(dict(zip(block.names, norms)), total)
            for block in self._steps()
            for norms, total in zip(block.norms, block.totals)
        ]

    def _steps(self) -> list[_Steps]:
        """All steps that count, grouped by layout; usually all have the same."""
        if self._arrived is None:
            if self._event is not None:
                self._event.synchronize()
            numbers, start, arrived = self._numbers.double(), 0, []
            for layout, blocks in groupby(self._blocks, lambda block: block.layout):
                given_up = [flag for block in blocks for flag in block.given_up]
                stop = start + len(given_up) * layout.width
                arrived.append(self._steps_of(layout, given_up, numbers[start:stop].view(len(given_up), layout.width)))
                start = stop
            self._arrived = [block for block in arrived if block.totals]
        return self._arrived

    def _steps_of(self, layout: Layout, given_up: list[bool], numbers: Tensor) -> _Steps:
        heads = len(self._head_names)
        columns, contributing = _columns(layout.owners, heads)
        width = len(columns)
        squares = (numbers if width == layout.width else numbers[:, :width]).square()
        # index_add_ keeps a NaN in its head's column; a matrix product would spread it. Python does the rest, because
        # more kernels would cost more.
        rows = squares.new_zeros(len(squares), heads + 1).index_add_(1, columns, squares).tolist()
        totals = numbers[:, width].tolist() if layout.has_total else [math.sqrt(sum(row)) for row in rows]
        norms = [[math.sqrt(row[index]) for index in contributing] for row in rows]
        counts = [flag == 0.0 for flag in numbers[:, -1].tolist()] if layout.has_discard else [True] * len(rows)
        if any(given_up):
            counts = [does and not (flag and math.isfinite(t)) for does, flag, t in zip(counts, given_up, totals)]
        if not all(counts):
            norms, totals, given_up = (list(compress(column, counts)) for column in (norms, totals, given_up))
        return _Steps([self._head_names[index] for index in contributing], norms, totals, sum(given_up))


@lru_cache(maxsize=256)
def _columns(owners: tuple[int, ...], heads: int) -> tuple[Tensor, list[int]]:
    """The column of each norm (the last one for norms of no head), and the heads that have a norm."""
    columns = [owner if owner != NO_HEAD else heads for owner in owners]
    return torch.tensor(columns, dtype=torch.long), sorted(set(columns) - {heads})
