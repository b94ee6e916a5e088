"""The monitors of this process: one per run."""

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

# The default aggregator of all monitors of this process: one endpoint serves them all.
_process_aggregator = RunAggregator()


class Registration:
    """A run's registration in an aggregator; one monitor of the process has it at a time.

    Args:
        aggregator: by default one that all monitors of the process share.
        run: name of the run.
        detach: makes the monitor stop observing.
        leave: closes the monitor; its argument is whether the script has crashed.
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
        """The observed optimizers that still exist."""
        return [optimizer for each in self._optimizers if (optimizer := each()) is not None]

    def begin(
        self,
        optimizers: Sequence[Optimizer],
        heads: Iterable[str],
        info: Mapping[str, str] | None,
        thresholds: Thresholds,
    ) -> bool:
        """Register that the monitor observes `optimizers` from now on.

        Returns:
            Whether the run is new; False when a detached monitor is attached again.

        Raises:
            ValueError: another live monitor measures a run of this name; or as `register_run`.
        """
        for other in list(self._all.values()):
            if not other.optimizers:
                other._detach()  # otherwise it keeps the parameters of a deleted model
        if is_new := not self._is_registered:
            self._replace_earlier(optimizers)
            self.aggregator.register_run(self._key[1], heads, info, thresholds)
            self._is_registered = True
        # Before others can see it: they let one without optimizers detach.
        self._optimizers = [weakref.ref(each) for each in optimizers]
        self._all[self._key] = self
        return is_new

    def pause(self) -> None:
        """Register that the monitor observes nothing; the run's series stay."""
        self._optimizers = []

    def end(self, crashed: bool) -> None:
        """Remove the run's series and free its name. The series stay if the run crashed and others continue."""
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
        """Close an earlier, unused monitor of this run, for example when a notebook's cell runs again."""
        earlier = self._all.get(self._key)
        if earlier is None:
            return

        def is_of_others() -> bool:
            return bool({*earlier.optimizers} - {*optimizers})

        if is_of_others():
            gc.collect()
        if is_of_others() and not hasattr(sys, "ps1"):
            raise ValueError(
                f"another monitor already measures run {self._key[1]!r}: close() that one, or give this one another "
                "name; runs of one process need distinct names"
            )
        earlier._leave(False)


def _reset_in_child() -> None:
    """Forget the parent's monitors in a forked child."""
    global _process_aggregator
    _process_aggregator, Registration._all = RunAggregator(), {}


def _leave_all(crashed: bool) -> None:
    for each in list(Registration._all.values()):
        each._leave(crashed)


at_goodbye(_leave_all)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_reset_in_child)
