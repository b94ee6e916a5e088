"""Every metric family in a scrape, and the collectors behind `/metrics`."""

import math
import re
import subprocess
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from endpoint import ask
from prometheus_client import generate_latest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from exporter import HealthLevel, MetricsServer, RunAggregator, Thresholds, emit_ppo_update
from exporter import metrics as declared
from exporter.collectors import GuardedCollectors, RunCollector, build_collectors, build_registry
from exporter.metrics import METRIC_FAMILIES, MetricFamily
from exporter.snapshot import Snapshot
from exporter.telemetry import GradientStep, summarize_gradient_steps

GOLDEN = Path(__file__).with_name("golden_metrics.txt")


def one_update(aggregator: RunAggregator) -> None:
    emit_ppo_update(
        summarize_gradient_steps([GradientStep({"op": 1.0, "slot": 3.0}, 4.0)]),
        run='walker "17"\n',
        handler=aggregator,
        head_entropy_ratios={"op": 0.02, "slot": 0.9},
        head_approx_kls={"op": 0.001, "slot": 0.009},
        head_clip_fractions={"op": 0.0, "slot": 0.125},
        head_update_ratios={"op": 0.0001, "slot": 0.01},
        environment_steps=4096,
        episodes=3,
        policy_loss=-0.01,
        value_loss=0.5,
        entropy=8.9,
        approx_kl=0.01,
        clip_fraction=0.1,
        explained_variance=math.nan,
        learning_rate=0.001,
        episode_return_mean=2.5,
        episode_length_mean=64.0,
        update_duration_seconds=0.3,
        rollout_duration_seconds=0.2,
        rank_rollout_seconds=(0.2, 0.1),
        signals={"kl_coef": 0.1},
        timestamp_seconds=1_700_000_000.5,
    )


@pytest.fixture
def aggregator() -> RunAggregator:
    return RunAggregator()


def test_every_family_is_as_recorded(aggregator, servers):
    """The whole contract with dashboards and rules in one file; a change here is a change for users."""
    aggregator.register_run('walker "17"\n', ["op", "slot"], {"environment": "host-growth", "seed": "1"})
    one_update(aggregator)
    with MetricsServer(aggregator, port=0) as server:
        text, openmetrics = (ask(server.url, Accept=accept).text for accept in ("*/*", "application/openmetrics-text"))
    ours = [line for line in text.splitlines() if "ppo_" in line]
    ours = [re.sub(r"(duration_seconds{collector=.*}) .*", r"\1 0.001", line) for line in ours]
    assert ours == GOLDEN.read_text().splitlines()
    # And promtool has nothing to say.
    check = subprocess.run([servers.promtool, "check", "metrics"], input=text, capture_output=True, text=True)
    assert (check.returncode, check.stdout, check.stderr) == (0, "", "")
    for families in (parse_text(text), parse_openmetrics(openmetrics)):
        names = {family.name.removesuffix("_total") for family in families}
        assert {"ppo_gradient_cv", "ppo_gradient_cv_per_step", "process_cpu_seconds", "python_info"} <= names


def test_every_family_that_is_declared_is_served():
    assert [f.name for f in METRIC_FAMILIES] == [f.name for f in vars(declared).values() if isinstance(f, MetricFamily)]


def test_before_the_first_update_a_run_is_there_and_healthy(aggregator):
    aggregator.register_run("r", ["op", "slot", "target"])
    samples = samples_of(build_registry(aggregator))
    assert samples["ppo_gradient_cv", "healthy", "r"] == 0.0
    assert samples["ppo_gradient_cv_ceiling", "r"] == pytest.approx(math.sqrt(3))
    for level in HealthLevel:
        assert samples["ppo_gradient_steps_total", level, "r"] == 0.0
    assert samples["ppo_nonfinite_gradients_total", "op", "r"] == 0.0
    absent = {"ppo_policy_loss", "ppo_last_update_timestamp_seconds", "ppo_update_interval_seconds"}
    absent |= {"ppo_gradient_level_since_timestamp_seconds"}
    assert not absent & {name for name, *_ in samples}


def test_every_scrape_is_of_one_update():
    """The source is as quick as can be: whoever looks again sees another update, of another level."""

    class Quick:
        updates, aggregator = 0, RunAggregator()

        @property
        def snapshot(self) -> Snapshot:
            self.updates += 1
            cv = (0.25, 1.25, math.inf)[self.updates % 3]
            metrics = {"gradient_cv": cv, "gradient_cv_per_step": (cv,), "gradient_norm": float(self.updates)}
            emit_ppo_update(metrics, run="r", handler=self.aggregator, environment_steps=1)
            return self.aggregator.snapshot

    registry, levels = build_registry(Quick()), set()
    for update in (1, 2, 3):
        samples = samples_of(registry)
        (level,) = [level for level in HealthLevel if ("ppo_gradient_cv", level, "r") in samples]
        assert level is Thresholds().level(samples["ppo_gradient_cv", level, "r"])
        assert sum(samples["ppo_gradient_steps_total", level, "r"] for level in HealthLevel) == update
        assert samples["ppo_updates_total", "r"] == samples["ppo_gradient_norm", "r"] == update
        levels.add(level)
    assert levels == set(HealthLevel)


def samples_of(collector) -> dict[tuple, float]:
    """What would be scraped, rendered and read again."""
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in parse_text(generate_latest(collector).decode())
        for sample in family.samples
    }


def spoil(aggregator: RunAggregator, run: str, updates: int) -> None:
    """Give the run a count that no payload could have."""
    aggregator.snapshot = aggregator.snapshot.with_run(replace(aggregator.snapshot.runs[run], updates=updates))


def test_large_norms_of_one_run_hide_no_other(aggregator):
    emit_ppo_update({"head_gradient_norms": {"op": 1.7e308, "slot": 1.7e308}}, run="large", handler=aggregator)
    emit_ppo_update({}, run="other", handler=aggregator)
    samples = samples_of(build_registry(aggregator))
    assert samples["ppo_head_gradient_share", "op", "large"] == 0.5
    assert samples["ppo_updates_total", "large"] == samples["ppo_updates_total", "other"] == 1.0


def test_a_run_whose_samples_cannot_be_made_is_left_out_and_told_once(aggregator, caplog):
    for run in ("before", "bad", "after"):
        aggregator.register_run(run, ["op", "slot"])
    registry = build_registry(aggregator)
    for _ in range(2):
        spoil(aggregator, "bad", 10**400)
        for _ in range(3):
            samples = samples_of(registry)
            assert samples["ppo_updates_total", "before"] == samples["ppo_updates_total", "after"] == 0.0
            assert not [key for key in samples if "bad" in key]
            assert samples["ppo_exporter_collector_success", "run"] == 0.0
            assert samples["ppo_exporter_collector_success", "gc"] == 1.0
        spoil(aggregator, "bad", 7)
        samples = samples_of(registry)
        assert samples["ppo_updates_total", "bad"] == 7.0
        assert samples["ppo_exporter_collector_success", "run"] == 1.0
    assert [record.getMessage() for record in caplog.records] == [
        "collector run failed; metrics are missing until it works again"
    ] * 2
    assert caplog.text.count("run bad: its metrics cannot be made") == 2


def test_a_collector_that_fails_takes_only_its_own_metrics_with_it(aggregator, caplog):
    aggregator.register_run("r", ["op", "slot"])

    def break_off(*_):
        yield from RunCollector(aggregator).describe()
        raise RuntimeError("for the test")

    broken = SimpleNamespace(collect=break_off)
    collectors = {"broken": broken, **build_collectors(aggregator, {"rank": "3"})}
    guarded = GuardedCollectors(collectors, {"rank": "3"})
    for _ in range(2):
        samples = samples_of(guarded)
        assert samples["ppo_exporter_collector_success", "broken", "3"] == 0.0
        assert samples["ppo_exporter_collector_success", "run", "3"] == 1.0
        assert samples["ppo_exporter_collector_duration_seconds", "broken", "3"] > 0.0
        assert samples["ppo_updates_total", "3", "r"] == 0.0
    assert [record.getMessage() for record in caplog.records] == [
        "collector broken failed; metrics are missing until it works again"
    ]
    broken.collect = lambda: []
    assert samples_of(guarded)["ppo_exporter_collector_success", "broken", "3"] == 1.0


@pytest.mark.parametrize(
    "name", ["ppo_updates_total", "ppo_gradient_cv_per_step_count", "ppo_run_info", "python_gc_collections_total"]
)
def test_a_registry_can_be_restricted_to_some_names(aggregator, name):
    aggregator.register_run("r", ["op", "slot"])
    assert {key[0] for key in samples_of(build_registry(aggregator).restricted_registry([name]))} == {name}


def test_a_restricted_registry_tells_of_this_scrape(aggregator):
    aggregator.register_run("r", ["op", "slot"])
    restricted = build_registry(aggregator).restricted_registry(["ppo_exporter_collector_success"])
    assert samples_of(restricted)["ppo_exporter_collector_success", "run"] == 1.0
    spoil(aggregator, "r", 10**400)
    assert samples_of(restricted)["ppo_exporter_collector_success", "run"] == 0.0


def test_runs_cannot_be_registered_twice(aggregator):
    registry = build_registry(aggregator)
    with pytest.raises(ValueError, match="Duplicated timeseries"):
        registry.register(RunCollector(aggregator))
