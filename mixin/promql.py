"""Pieces of PromQL that rules and dashboards share."""

import json
import math

from prometheus_client.utils import floatToGoString

from exporter.health import HealthLevel
from exporter.metrics import GRADIENT_CV, GRADIENT_CV_PER_STEP, GRADIENT_STEPS, HEALTH_LABEL, RUN_LABEL, MetricFamily
from mixin.config import MixinConfig

IDENTITY = f"job, instance, {RUN_LABEL}"
"""The labels that tell one run from another, as PromQL writes them in by, on and ignoring."""

# Recorded by Prometheus before the alerts of the same group are evaluated; see mixin/alerts.py.
CV_RECORD = "job_instance_run:ppo_gradient_cv:max"
LEVEL_RECORD = "job_instance_run:ppo_gradient_level:max"
"""0 healthy, 1 warning, 2 critical."""
DOMINATING_HEAD_RECORD = "job_instance_run_head:ppo_head_gradient_share:topk1"
"""Share of the head with the largest one, 0 to 1, with the label `head`; absent where no head has a gradient."""
CRITICAL_STEPS_RECORD = "job_instance_run:ppo_critical_gradient_steps:ratio_increase10m"
NONFINITE_RECORD = "job_instance_run_head:ppo_nonfinite_gradients:increase10m"
"""Absent where there were none, but for processes younger than ten minutes."""
ENVIRONMENT_STEPS_RECORD = "job_instance_run:ppo_environment_steps:rate5m"


def quoted(text: str) -> str:
    """`text` as a PromQL string."""
    return json.dumps(text, ensure_ascii=False)  # the same escapes


def select(family: MetricFamily, matchers: str, suffix: str = "") -> str:
    """The series of `family` that match; `suffix` is _bucket, _sum or _count of a histogram."""
    return f"{family.name}{suffix}{{{matchers}}}"


def gradient_cv(matchers: str) -> str:
    """The CV without its level: a level change must not look like another series."""
    return f"max without ({HEALTH_LABEL}) ({select(GRADIENT_CV, matchers)})"


def level_index(matchers: str, config: MixinConfig) -> str:
    """0 healthy, 1 warning, 2 critical."""
    return level_of(gradient_cv(matchers), config)


def level_of(cv: str, config: MixinConfig) -> str:
    """The level of the CV that the PromQL `cv` gives: 0 healthy, 1 warning, 2 critical."""
    return f"({cv} >= bool {config.warning_threshold}) + ({cv} >= bool {config.critical_threshold})"


def steps_of_level(level: HealthLevel, matchers: str, window: str, config: MixinConfig) -> str:
    """Increase of a run's gradient steps of one level over `window`, such as 10m or $__rate_interval.

    Exact where the thresholds are the exporter's own, by which it labels its counter. Other thresholds
    are told apart by histogram buckets, whose bounds are inclusive: a step exactly at a threshold then
    counts for the level below.
    """
    if config.uses_exporter_levels:
        steps = select(GRADIENT_STEPS, f"{matchers}, {HEALTH_LABEL}={quoted(level)}")
        return per_run("sum", f"increase({steps}[{window}])")

    def up_to(bound: float) -> str:
        bucket = select(GRADIENT_CV_PER_STEP, f"{matchers}, le={quoted(floatToGoString(bound))}", "_bucket")
        return per_run("sum", f"increase({bucket}[{window}])")

    bounds = [config.warning_threshold, config.critical_threshold, math.inf]
    position = list(HealthLevel).index(level)
    steps = up_to(bounds[position])
    return f"({steps} - {up_to(bounds[position - 1])})" if position else steps


def per_run(aggregation: str, expression: str) -> str:
    """`expression` aggregated over everything but the run's identity, for instance over its heads."""
    return f"{aggregation} by ({IDENTITY}) ({expression})"
