"""Every metric family, declared once, and the collectors that fill them."""

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any, Protocol

from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from exporter.snapshot import Histogram, Snapshot

RUN_LABEL = "run"
HEALTH_LABEL = "health"
LEVEL_LABEL = "level"
HEAD_LABEL = "head"
NAME_LABEL = "name"
COLLECTOR_LABEL = "collector"
RANK_LABEL = "rank"
_log = logging.getLogger(__name__)
_METRIC = {
    "counter": CounterMetricFamily,
    "gauge": GaugeMetricFamily,
    "histogram": HistogramMetricFamily,
    "info": InfoMetricFamily,
}


@dataclass(frozen=True)
class MetricFamily:
    """One declaration: what the family is called and where its samples come from.

    Attributes:
        kind: counter, gauge, histogram or info.
        name: as it is queried in Prometheus, with `_total` or `_info` where the type has one.
        documentation: the HELP text.
        read: from a `RunSnapshot` the value of the one sample (a number, a `Histogram`, a mapping for info; None while
            it is not known), or a mapping of the label's value to the sample's where there is a label.
        labels: the label beside `run`, if there is one.
        is_per_run: otherwise there is no label `run`, and `read` takes a `Collection`.
    """

    kind: str
    name: str
    documentation: str
    read: Callable[[Any], Any]
    labels: tuple[str, ...] = ()
    is_per_run: bool = True

    def samples(self, run: Any) -> list[tuple[tuple[str, ...], Any]]:
        """(label values beside `run`, value) of every sample of a run."""
        value = self.read(run)
        if self.labels:
            return [((label,), value) for label, value in value.items()]
        return [] if value is None else [((), value)]

    def collect(self, runs: Iterable[Any], process_labels: Mapping[str, str] = MappingProxyType({})) -> Metric:
        """The family with the samples of all `runs` (or collections), each with the labels of this process.

        Values become floats here, so that none that a float cannot hold fails the rendering of all of them.
        """
        labels = (*process_labels, *((RUN_LABEL,) if self.is_per_run else ()), *self.labels)
        family = _METRIC[self.kind](self.name.removesuffix("_info"), self.documentation, labels=labels)
        for run in runs:
            for label_values, value in self.samples(run):
                label_values = (*process_labels.values(), *((run.run,) if self.is_per_run else ()), *label_values)
                if isinstance(value, Histogram):
                    buckets = [(floatToGoString(bound), float(count)) for bound, count in value.cumulative()]
                    family.add_metric(label_values, buckets=buckets, sum_value=float(value.total))
                else:
                    family.add_metric(label_values, value if self.kind == "info" else float(value))
        return family


_gauge, _counter, _histogram = (partial(MetricFamily, kind) for kind in ("gauge", "counter", "histogram"))


def _signal(name: str, documentation: str) -> MetricFamily:
    return _gauge(f"ppo_{name}", documentation, lambda run: run.signals.get(name))


GRADIENT_CV = _gauge(
    "ppo_gradient_cv",
    "Mean coefficient of variation of the action heads' gradient norms over the gradient steps of the last PPO "
    "update, labeled by its health level; one sample per run, +Inf when a gradient was not finite.",
    lambda run: {run.gradient_quality.health: run.gradient_quality.gradient_cv},
    (HEALTH_LABEL,),
)
GRADIENT_CV_THRESHOLD = _gauge(
    "ppo_gradient_cv_threshold",
    "Gradient CV from which the run is at the level, warning or critical; a run may have thresholds of its own.",
    lambda run: vars(run.gradient_quality.thresholds),
    (LEVEL_LABEL,),
)
GRADIENT_LEVEL_SINCE = _gauge(
    "ppo_gradient_level_since_timestamp_seconds",
    "Unix time of the update with which the present health level began; absent before the first update of this "
    "process.",
    lambda run: run.level_since_timestamp_seconds,
)
GRADIENT_CV_CEILING = _gauge(
    "ppo_gradient_cv_ceiling",
    "Largest coefficient of variation that the heads which contributed to the last update could reach: the square "
    "root of their number.",
    lambda run: run.gradient_quality.ceiling,
)
GRADIENT_STEPS = _counter(
    "ppo_gradient_steps_total",
    "Gradient steps by the health level of their own coefficient of variation.",
    lambda run: run.gradient_quality.steps_by_level,
    (HEALTH_LABEL,),
)
GRADIENT_CV_PER_STEP = _histogram(
    "ppo_gradient_cv_per_step",
    "Coefficient of variation of each gradient step whose gradient was finite; ppo_gradient_steps_total counts the "
    "others too.",
    lambda run: run.gradient_quality.cv_per_step,
)
HEAD_GRADIENT_NORM = _gauge(
    "ppo_head_gradient_norm",
    "Mean L2 norm of the head's gradient in the last update, over the steps in which it was finite; heads without a "
    "gradient are absent.",
    lambda run: run.gradient_quality.head_norms,
    (HEAD_LABEL,),
)
HEAD_GRADIENT_SHARE = _gauge(
    "ppo_head_gradient_share",
    "The head's part of the sum of the heads' gradient norms in the last update, 0 to 1; a head whose norm is not "
    "finite takes the whole.",
    lambda run: run.gradient_quality.head_shares,
    (HEAD_LABEL,),
)
HEAD_ENTROPY_RATIO = _gauge(
    "ppo_head_entropy_ratio",
    "Mean entropy of the head in the last update to the logarithm of its number of choices, 0 (always the same choice) "
    "to 1 (all alike); discrete heads only.",
    lambda run: run.gradient_quality.head_entropy_ratios,
    (HEAD_LABEL,),
)
HEAD_APPROX_KL = _gauge(
    "ppo_head_approx_kl",
    "Approximate KL divergence between the head's policies before and during the last update, in nats.",
    lambda run: run.gradient_quality.head_approx_kls,
    (HEAD_LABEL,),
)
HEAD_CLIP_FRACTION = _gauge(
    "ppo_head_clip_fraction",
    "Fraction of samples in the last update for which the ratio of the head's own probabilities was outside the clip "
    "range, 0 to 1.",
    lambda run: run.gradient_quality.head_clip_fractions,
    (HEAD_LABEL,),
)
HEAD_UPDATE_RATIO = _gauge(
    "ppo_head_update_ratio",
    "L2 norm of what the last update changed in the head's weights, to their norm before it.",
    lambda run: run.gradient_quality.head_update_ratios,
    (HEAD_LABEL,),
)
NONFINITE_GRADIENTS = _counter(
    "ppo_nonfinite_gradients_total",
    "Gradient steps in which the head's gradient norm was NaN or infinite.",
    lambda run: run.gradient_quality.nonfinite_steps,
    (HEAD_LABEL,),
)
SKIPPED_GRADIENT_STEPS = _counter(
    "ppo_skipped_gradient_steps_total",
    "Gradient steps that did not touch the weights because a gradient, of a head or elsewhere, was not finite.",
    lambda run: run.gradient_quality.skipped_steps,
)
GRADIENT_NORM = _gauge(
    "ppo_gradient_norm",
    "Mean global L2 norm of the gradient in the last update; before clipping, unless a monitor measures after it.",
    lambda run: run.gradient_quality.gradient_norm,
)
UPDATES = _counter("ppo_updates_total", "PPO updates completed.", lambda run: run.updates)
ENVIRONMENT_STEPS = _counter(
    "ppo_environment_steps_total",
    "Environment steps collected, summed over the parallel environments.",
    lambda run: run.environment_steps,
)
EPISODES = _counter("ppo_episodes_total", "Episodes completed.", lambda run: run.episodes)
POLICY_LOSS = _signal("policy_loss", "Mean clipped policy loss of the last update.")
VALUE_LOSS = _signal("value_loss", "Mean value loss of the last update.")
ENTROPY = _signal("entropy", "Mean entropy of the policy in the last update, summed over the heads, in nats.")
APPROX_KL = _signal(
    "approx_kl", "Approximate KL divergence between the policies before and during the last update, in nats."
)
CLIP_FRACTION = _signal(
    "clip_fraction",
    "Fraction of samples whose probability ratio was outside the clip range in the last update, 0 to 1.",
)
EXPLAINED_VARIANCE = _signal(
    "explained_variance",
    "Fraction of the returns' variance that the value function explained in the last rollout, at most 1.",
)
LEARNING_RATE = _signal("learning_rate", "Learning rate of the last update.")
EPISODE_RETURN_MEAN = _signal("episode_return_mean", "Mean undiscounted return of the last episodes.")
EPISODE_LENGTH_MEAN = _signal("episode_length_mean", "Mean length of the last episodes, in environment steps.")
OTHER_SIGNAL = _gauge(
    "ppo_signal",
    "Further training signal of the last update, under a name of the trainer's own.",
    lambda run: run.other_signals,
    (NAME_LABEL,),
)
UPDATE_DURATION = _histogram(
    "ppo_update_duration_seconds",
    "Wall time of the PPO update, all epochs and minibatches.",
    lambda run: run.update_duration_seconds,
)
ROLLOUT_DURATION = _histogram(
    "ppo_rollout_duration_seconds",
    "Wall time of collecting the rollout of an update.",
    lambda run: run.rollout_duration_seconds,
)
RANK_ROLLOUT = _gauge(
    "ppo_rank_rollout_seconds",
    "Wall time that the rank, one of the processes that train the run together, took for its part of the last rollout.",
    lambda run: {str(rank): seconds for rank, seconds in enumerate(run.rank_rollout_seconds)},
    (RANK_LABEL,),
)
LAST_UPDATE_TIMESTAMP = _gauge(
    "ppo_last_update_timestamp_seconds",
    "Unix time at which the last PPO update ended, or of a later gradient step; absent before the first update.",
    lambda run: run.last_update_timestamp_seconds,
)
UPDATE_INTERVAL = _gauge(
    "ppo_update_interval_seconds",
    "Recent maximum of the time between the ends of two updates: each update lets it fall by a tenth, down to the last "
    "interval; absent before the second update of this process.",
    lambda run: run.update_interval_seconds,
)
EXPORTER_ERRORS = _counter(
    "ppo_exporter_errors_total",
    "Errors inside the measurement itself; training goes on without the sample.",
    lambda run: run.exporter_errors,
)
RESUMES = _counter(
    "ppo_resumes_total",
    "Times that the run was continued from a checkpoint; the other counters go on over it.",
    lambda run: run.resumes,
)
RUN_INFO = MetricFamily(
    "info",
    "ppo_run_info",
    "What is being trained: environment, seed, device, torch and exporter versions.",
    lambda run: dict(run.info),
)
COLLECTOR_SUCCESS = _gauge(
    "ppo_exporter_collector_success",
    "Whether the collector worked in this scrape: 1, or 0 when its metrics, or those of a run, are missing.",
    lambda collection: {collection.collector: collection.is_success},
    (COLLECTOR_LABEL,),
    is_per_run=False,
)
COLLECTOR_DURATION = _gauge(
    "ppo_exporter_collector_duration_seconds",
    "Wall time that the collector took in this scrape.",
    lambda collection: {collection.collector: collection.duration_seconds},
    (COLLECTOR_LABEL,),
    is_per_run=False,
)

METRIC_FAMILIES = (
    GRADIENT_CV,
    GRADIENT_CV_THRESHOLD,
    GRADIENT_LEVEL_SINCE,
    GRADIENT_CV_CEILING,
    GRADIENT_STEPS,
    GRADIENT_CV_PER_STEP,
    HEAD_GRADIENT_NORM,
    HEAD_GRADIENT_SHARE,
    HEAD_ENTROPY_RATIO,
    HEAD_APPROX_KL,
    HEAD_CLIP_FRACTION,
    HEAD_UPDATE_RATIO,
    NONFINITE_GRADIENTS,
    SKIPPED_GRADIENT_STEPS,
    GRADIENT_NORM,
    UPDATES,
    ENVIRONMENT_STEPS,
    EPISODES,
    POLICY_LOSS,
    VALUE_LOSS,
    ENTROPY,
    APPROX_KL,
    CLIP_FRACTION,
    EXPLAINED_VARIANCE,
    LEARNING_RATE,
    EPISODE_RETURN_MEAN,
    EPISODE_LENGTH_MEAN,
    OTHER_SIGNAL,
    UPDATE_DURATION,
    ROLLOUT_DURATION,
    RANK_ROLLOUT,
    LAST_UPDATE_TIMESTAMP,
    UPDATE_INTERVAL,
    EXPORTER_ERRORS,
    RESUMES,
    RUN_INFO,
    COLLECTOR_SUCCESS,
    COLLECTOR_DURATION,
)
"""Every family, in the order on `/metrics`."""
_RUN_FAMILIES = tuple(family for family in METRIC_FAMILIES if family.is_per_run)


class SnapshotSource(Protocol):
    """Whatever holds the newest snapshot, such as a `RunAggregator`."""

    snapshot: Snapshot


class RunCollector(Collector):
    """All families of all runs, from the one snapshot that was current when the scrape began.

    A run whose samples cannot be made is left out whole, and takes no other with it; `error` is then why, else None.
    """

    def __init__(self, source: SnapshotSource, process_labels: Mapping[str, str] = MappingProxyType({})) -> None:
        self.error: Exception | None = None
        self._source = source
        self._process_labels = process_labels

    def describe(self) -> list[Metric]:
        """The families without samples; by their names a registry knows what is in it."""
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
    """All of `collectors`, by name and each by itself, and then how each of them went in this scrape.

    One that fails takes nothing but its own metrics with it, and is logged once until it works again. All are one
    collector for a registry, so that what they say on themselves belongs to the same scrape.
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
    """By name: the runs of `source`, the process of the id `pid()`, and the platform and the GC of this one.

    `process_labels`, such as a rank, are added to every sample of a run.
    """
    return {
        "run": RunCollector(source, process_labels),
        "process": ProcessCollector(pid=pid, registry=None),
        "platform": PlatformCollector(registry=None),
        "gc": GCCollector(CollectorRegistry()),  # it wants one, and must not be in that of others
    }


def build_registry(
    source: SnapshotSource, process_labels: Mapping[str, str] = MappingProxyType({})
) -> CollectorRegistry:
    """`build_collectors`, guarded, in one registry, for whoever serves them by other means."""
    registry = CollectorRegistry()
    registry.register(GuardedCollectors(build_collectors(source, process_labels), process_labels))
    return registry
