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
        gc_stats: `gc.get_stats()` there.
        user_metrics: what it read from a registry of the user's; None where there is none.
        has_come: set by the first frame.
    """

    def __init__(self, process_labels: Mapping[str, str]) -> None:
        self.process_labels = process_labels
        self.snapshot = Snapshot()
        self.gc_stats: list[dict[str, int]] = []
        self.user_metrics: UserMetrics | None = None
        self.has_come = threading.Event()

    def take(self, frame: Mapping[str, Any]) -> None:
        """Raises KeyError, TypeError or ValueError where the frame is none; then nothing has changed."""
        snapshot = Snapshot.from_plain(frame["snapshot"])
        if "metrics" in frame:
            self.user_metrics = self.user_metrics or UserMetrics()
            self.user_metrics.families = frame["metrics"]
        self.snapshot, self.gc_stats = snapshot, frame["gc"]
        self.has_come.set()


class UserMetrics(Collector):
    """The metrics of a registry that lies in the training process.

    Attributes:
        families: [name, documentation, type, unit, samples], a sample being [name, labels, value, timestamp]; None
            where the registry could not be read.
        taken: names of families that others serve.
    """

    families: list[Any] | None = None
    taken: frozenset[str] = frozenset()

    def collect(self) -> Iterator[Metric]:
        if self.families is None:
            raise RuntimeError("the training process could not read the registry, and has said why")
        for name, documentation, kind, unit, samples in self.families:
            if name not in self.taken:
                metric = Metric(name, documentation, kind, unit)
                for sample in samples:
                    metric.add_sample(*sample)
                yield metric
