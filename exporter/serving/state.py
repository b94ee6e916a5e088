"""What the training process said last."""

import threading
from collections.abc import Iterator, Mapping
from typing import Any

from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from exporter.snapshot import Snapshot


class State:
    """Taken over from every `state` frame; readers take its attributes.

    Attributes:
        process_labels: added to every sample of a run.
        snapshot: every run of the training process, replaced whole.
        metrics: by the name of a collector there the families that it had, each [name, documentation, type, unit,
            samples], a sample being [name, labels, value, timestamp]; None where it failed.
        has_come: set by the first frame.
    """

    def __init__(self, process_labels: Mapping[str, str]) -> None:
        self.process_labels = process_labels
        self.snapshot = Snapshot()
        self.metrics: dict[str, list[Any] | None] = {}
        self.has_come = threading.Event()

    def take(self, snapshot: Mapping[str, Any], metrics: dict[str, list[Any] | None]) -> None:
        """Raises KeyError, TypeError or ValueError where `snapshot` is none; then nothing has changed."""
        self.snapshot = Snapshot.from_plain(snapshot)
        self.metrics = metrics
        self.has_come.set()


class Relay(Collector):
    """What the collector of this name in the training process had, without families of the names in `taken`."""

    def __init__(self, state: State, name: str, taken: frozenset[str] = frozenset()) -> None:
        self._state, self._name, self._taken = state, name, taken

    def collect(self) -> Iterator[Metric]:
        families = self._state.metrics[self._name]
        if families is None:
            raise RuntimeError("it failed in the training process, which has said why")
        for name, documentation, kind, unit, samples in families:
            if name not in self._taken:
                metric = Metric(name, documentation, kind, unit)
                for sample in samples:
                    metric.add_sample(*sample)
                yield metric
