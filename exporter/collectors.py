"""The collectors behind `/metrics`: all families of all runs, and how each collector went in a scrape."""

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol

from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from exporter.metrics import COLLECTOR_DURATION, COLLECTOR_SUCCESS, METRIC_FAMILIES
from exporter.snapshot import Snapshot

_log = logging.getLogger(__name__)
_RUN_FAMILIES = tuple(family for family in METRIC_FAMILIES if family.is_per_run)


class SnapshotSource(Protocol):
    """Any object that has the newest snapshot, such as a `RunAggregator`."""

    snapshot: Snapshot


class RunCollector(Collector):
    """All families of all runs, from the snapshot that was current when the scrape began.

    If a run's samples cannot be made, that run is left out and `error` has the reason; the other runs are served.
    """

    def __init__(self, source: SnapshotSource, process_labels: Mapping[str, str] = MappingProxyType({})) -> None:
        self.error: Exception | None = None
        self._source = source
        self._process_labels = process_labels

    def describe(self) -> list[Metric]:
        """The families without samples, for a registry that checks names."""
        return [family.collect((), self._process_labels) for family in _RUN_FAMILIES]

    def collect(self) -> list[Metric]:
        metrics, self.error = self.describe(), None
        for name, run in self._source.snapshot.runs.items():
            try:
                samples = [family.collect((run,), self._process_labels).samples for family in _RUN_FAMILIES]
            except Exception as error:
                self.error = RuntimeError(f"run {name}: its metrics cannot be made: {error!r}")
            else:
                for metric, more in zip(metrics, samples, strict=True):
                    metric.samples += more
        return metrics


@dataclass(frozen=True)
class Collection:
    """One collector in one scrape."""

    collector: str
    is_success: bool
    duration_seconds: float


class GuardedCollectors(Collector):
    """Runs all `collectors` (by name), then exports success and duration of each in this scrape.

    If one fails, only its own metrics are missing; it is logged once until it works again. All together are one
    collector for a registry, so that success and duration belong to the same scrape.
    """

    def __init__(
        self, collectors: Mapping[str, Collector], process_labels: Mapping[str, str] = MappingProxyType({})
    ) -> None:
        self._collectors = collectors
        self._process_labels = process_labels
        self._failing: set[str] = set()

    def describe(self) -> Iterator[Metric]:
        for collector in self._collectors.values():
            yield from getattr(collector, "describe", collector.collect)()
        yield from self._about(())

    def collect(self) -> Iterator[Metric]:
        collections = []
        for name, collector in self._collectors.items():
            started = time.perf_counter()
            try:
                families, error = list(collector.collect()), getattr(collector, "error", None)
            except Exception as failure:
                families, error = [], failure
            if error is None:
                self._failing.discard(name)
            elif name not in self._failing:
                self._failing.add(name)
                _log.error("collector %s failed; metrics are missing until it works again", name, exc_info=error)
            collections.append(Collection(name, error is None, time.perf_counter() - started))
            yield from families
        yield from self._about(collections)

    def _about(self, collections: Iterable[Collection]) -> Iterator[Metric]:
        for family in (COLLECTOR_SUCCESS, COLLECTOR_DURATION):
            yield family.collect(collections, self._process_labels)


def build_collectors(
    source: SnapshotSource,
    process_labels: Mapping[str, str] = MappingProxyType({}),
    pid: Callable[[], int | str] = lambda: "self",
) -> dict[str, Collector]:
    """Collectors by name: the runs of `source`, the process `pid()`, and platform and GC of this process.

    Every sample of a run gets `process_labels`, such as a rank.
    """
    return {
        "run": RunCollector(source, process_labels),
        "process": ProcessCollector(pid=pid, registry=None),
        "platform": PlatformCollector(registry=None),
        "gc": GCCollector(CollectorRegistry()),  # it needs a registry; give it one of its own
    }


def build_registry(
    source: SnapshotSource, process_labels: Mapping[str, str] = MappingProxyType({})
) -> CollectorRegistry:
    """`build_collectors`, guarded, in one registry, for serving them in another way."""
    registry = CollectorRegistry()
    registry.register(GuardedCollectors(build_collectors(source, process_labels), process_labels))
    return registry
