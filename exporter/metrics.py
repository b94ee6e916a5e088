"""Every metric family, declared once."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.utils import floatToGoString

from exporter.snapshot import Histogram

RUN_LABEL = "run"
HEALTH_LABEL = "health"
LEVEL_LABEL = "level"
HEAD_LABEL = "head"
NAME_LABEL = "name"
COLLECTOR_LABEL = "collector"
RANK_LABEL = "rank"
_METRIC = {
    "counter": CounterMetricFamily,
    "gauge": GaugeMetricFamily,
    "histogram": HistogramMetricFamily,
    "info": InfoMetricFamily,
}


@dataclass(frozen=True)
class MetricFamily:
    """The declaration of a family: its name, and where its samples come from.

    Attributes:
        kind: counter, gauge, histogram or info.
        name: its name in PromQL, with `_total` or `_info` if its type has such a suffix.
        documentation: the HELP text.
        read: takes a `RunSnapshot`. Without a label it returns the sample's value: a number, a `Histogram`, a mapping
            for info, or None while it is not known. With a label it returns a mapping of label value to sample value.
        labels: the label besides `run`, if there is one.
        is_per_run: whether there is a label `run`; otherwise `read` takes a `Collection`.
    """

    kind: str
    name: str
    documentation: str
    read: Callable[[Any], Any]
    labels: tuple[str, ...] = ()
    is_per_run: bool = True

    def samples(self, run: Any) -> list[tuple[tuple[str, ...], Any]]:
        """(label values besides `run`, value) of every sample of a run."""
        value = self.read(run)
        if self.labels:
            return [((label,), value) for label, value in value.items()]
        return [] if value is None else [((), value)]

    def collect(self, runs: Iterable[Any], process_labels: Mapping[str, str] = MappingProxyType({})) -> Metric:
        """The family with the samples of all `runs` (or collections), each with the process labels.

        Converts values to floats here, so that a value which no float can hold does not fail the whole rendering.
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
    "Unix time of the update with which the current health level began; absent before the first update of this "
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
    "Mean entropy of the head in the last update divided by the logarithm of its number of choices: 0 is always the "
    "same choice, 1 is uniform; discrete heads only.",
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
    "L2 norm of the last update's change of the head's weights, divided by their norm before it.",
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
    "Gradient steps that did not change the weights because a gradient, of a head or elsewhere, was not finite.",
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
    "Additional training signal of the last update, under the trainer's own name for it.",
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
    "Wall time of the rank, one of the processes that train the run together, for its part of the last rollout.",
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
    "Recent maximum of the time between the ends of two updates. Each update lowers it by a tenth, but not below the "
    "last interval; absent before the second update of this process.",
    lambda run: run.update_interval_seconds,
)
EXPORTER_ERRORS = _counter(
    "ppo_exporter_errors_total",
    "Errors inside the measurement itself; training continues without the sample.",
    lambda run: run.exporter_errors,
)
RESUMES = _counter(
    "ppo_resumes_total",
    "Number of times that the run was resumed from a checkpoint; the other counters continue.",
    lambda run: run.resumes,
)
RUN_INFO = MetricFamily(
    "info",
    "ppo_run_info",
    "Environment, seed, device, torch and exporter versions of the run.",
    lambda run: dict(run.info),
)
COLLECTOR_SUCCESS = _gauge(
    "ppo_exporter_collector_success",
    "Whether the collector worked in this scrape: 1, or 0 if its metrics, or those of a run, are missing.",
    lambda collection: {collection.collector: collection.is_success},
    (COLLECTOR_LABEL,),
    is_per_run=False,
)
COLLECTOR_DURATION = _gauge(
    "ppo_exporter_collector_duration_seconds",
    "Wall time of the collector in this scrape.",
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
"""Every family, in the order of `/metrics`."""
