"""The newest state from the training process."""

import threading
from collections.abc import Iterator, Mapping
from typing import Any

from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from exporter.snapshot import Snapshot


class State:
    """The content of the newest `state` frame.

    Attributes:
        process_labels: labels for every sample of a run.
        snapshot: every run of the training process, replaced as a whole.
        metrics: name of a collector in the training process -> its families, each [name, documentation, type, unit,
            samples]; a sample is [name, labels, value, timestamp]. None if the collector failed.
        has_come: set by the first frame.
    """

    def __init__(self, process_labels: Mapping[str, str]) -> None:
        self.process_labels = process_labels
        self.snapshot = Snapshot()
        self.metrics: dict[str, list[Any] | None] = {}
        self.has_come = threading.Event()

    def take(self, snapshot: Mapping[str, Any], metrics: dict[str, list[Any] | None]) -> None:
        """Set the state. Raises KeyError, TypeError or ValueError, and changes nothing, if `snapshot` is not one."""
        self.snapshot = Snapshot.from_plain(snapshot)
        self.metrics = metrics
        self.has_come.set()


class Relay(Collector):
    """The families of a collector in the training process, without those named in `taken`."""

    def __init__(self, state: State, name: str, taken: frozenset[str] = frozenset()) -> None:
        self._state, self._name, self._taken = state, name, taken

    def collect(self) -> Iterator[Metric]:
        families = self._state.metrics[self._name]
        if families is None:
            raise RuntimeError("it failed in the training process; see that process' log")
        for name, documentation, kind, unit, samples in families:
            if name not in self._taken:
                metric = Metric(name, documentation, kind, unit)
                for sample in samples:
                    metric.add_sample(*sample)
                yield metric
