"""What the training process said last."""

import threading
from collections.abc import Iterator, Mapping
from typing import Any

from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from exporter.snapshot import Snapshot


class State:
    """Replaced whole by every `state` frame; readers take its attributes.

    Attributes:
        snapshot: every run of the training process.
        gc_stats: `gc.get_stats()` there.
        has_come: set by the first frame.
        process_labels: added to every sample of a run.
        user_metrics: what the training process read from a registry of the user's; None where there is none.
    """

    def __init__(self, process_labels: Mapping[str, str]) -> None:
        self.process_labels = dict(process_labels)
        self.snapshot = Snapshot()
        self.gc_stats: list[dict[str, int]] = []
        self.user_metrics: UserMetrics | None = None
        self.has_come = threading.Event()

    def take(self, frame: Mapping[str, Any]) -> None:
        """Raises:
        KeyError, TypeError, ValueError: the frame holds something else; what was there stays.
        """
        snapshot = Snapshot.from_plain(frame["snapshot"])
        if "metrics" in frame:
            self.user_metrics = self.user_metrics or UserMetrics()
            self.user_metrics.families = frame["metrics"]
        self.gc_stats = frame["gc"]
        self.snapshot = snapshot
        self.has_come.set()


class UserMetrics(Collector):
    """The families of a registry that lies in the training process.

    Attributes:
        families: [name, documentation, type, unit, samples], a sample being [name, labels, value, timestamp]; None
            where the registry could not be read.
        taken: names of families that others serve.
    """

    def __init__(self) -> None:
        self.families: list[Any] | None = []
        self.taken: frozenset[str] = frozenset()

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        if self.families is None:
            raise RuntimeError("the registry could not be read, as the training process has said")
        for name, documentation, kind, unit, samples in self.families:
            if name not in self.taken:
                metric = Metric(name, documentation, kind, unit)
                for sample in samples:
                    metric.add_sample(*sample)
                yield metric
