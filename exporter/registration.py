"""The monitors of this process: one a run, until another takes over, the script ends, or the process is forked."""

import gc
import os
import sys
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence

from torch.optim import Optimizer

from exporter.aggregator import RunAggregator
from exporter.endpoint import SharedEndpoint
from exporter.goodbye import at_goodbye
from exporter.health import Thresholds

# Monitors of one process share it unless they are given another: one endpoint for all of them.
_process_aggregator = RunAggregator()


class Registration:
    """A run's place in an aggregator, which one monitor of the process has at a time.

    Args:
        aggregator: by default one that all monitors of the process share.
        run: its name.
        detach: lets the monitor stop observing.
        leave: closes the monitor, with whether the script has crashed.
    """

    _all: dict[tuple[RunAggregator, str], "Registration"] = {}

    def __init__(
        self,
        aggregator: RunAggregator | None,
        run: str,
        detach: Callable[[], None],
        leave: Callable[[bool], None],
    ) -> None:
        self.aggregator = aggregator or _process_aggregator
        self._key = self.aggregator, run
        self._detach = detach
        self._leave = leave
        self._optimizers: list[weakref.ref[Optimizer]] = []
        self._is_registered = False

    @property
    def optimizers(self) -> list[Optimizer]:
        """Those that the monitor observes, as far as they are still there."""
        return [optimizer for each in self._optimizers if (optimizer := each()) is not None]

    def begin(
        self,
        optimizers: Sequence[Optimizer],
        heads: Iterable[str],
        info: Mapping[str, str] | None,
        thresholds: Thresholds,
    ) -> bool:
        """The monitor observes `optimizers` from now on.

        Returns:
            Whether the run is new, and not that of a monitor which had been detached.

        Raises:
            ValueError: another monitor measures a run of this name, and is needed; or as `register_run`.
        """
        for other in list(self._all.values()):
            if not other.optimizers:
                other._detach()  # it would keep the parameters of a model that has gone
        if is_new := not self._is_registered:
            self._replace_earlier(optimizers)
            self.aggregator.register_run(self._key[1], heads, info, thresholds)
            self._is_registered = True
        # Before others can see it: they let one without optimizers detach.
        self._optimizers = [weakref.ref(each) for each in optimizers]
        self._all[self._key] = self
        return is_new

    def pause(self) -> None:
        """The monitor observes nothing for now; the run's series stay."""
        self._optimizers = []

    def end(self, crashed: bool) -> None:
        """Take the run's series away, and free its name; of one that has crashed beside others they stay."""
        if not self._is_registered:
            return
        self._is_registered = False
        if self._all.get(self._key) is self:
            del self._all[self._key]
        if crashed and SharedEndpoint.has_abandoned(*self._key):
            self.aggregator.abandon_run(self._key[1])
        else:
            self.aggregator.remove_run(self._key[1])

    def _replace_earlier(self, optimizers: Iterable[Optimizer]) -> None:
        """Close an earlier monitor of this run that nobody needs any more, as when a notebook's cell runs again."""
        earlier = self._all.get(self._key)
        if earlier is None:
            return

        def is_of_others() -> bool:
            return bool({*earlier.optimizers} - {*optimizers})

        if is_of_others():
            gc.collect()
        if is_of_others() and not hasattr(sys, "ps1"):
            raise ValueError(
                f"run {self._key[1]!r} is measured by another monitor already: close() that one, or give this one "
                "another name; runs of one process need distinct names"
            )
        earlier._leave(False)


def _begin_anew() -> None:
    """In a forked child: what is served there is not what its parent serves."""
    global _process_aggregator
    _process_aggregator, Registration._all = RunAggregator(), {}


def _leave_all(crashed: bool) -> None:
    for each in list(Registration._all.values()):
        each._leave(crashed)


at_goodbye(_leave_all)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_anew)
