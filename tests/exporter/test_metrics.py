"""`/metrics` as Prometheus scrapes it: over TCP, while updates come in. And the collectors behind it."""

import gc
import math
import re
import subprocess
import threading
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from prometheus_client import CollectorRegistry, GCCollector, generate_latest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from exporter import HealthLevel, MetricsServer, RunAggregator, emit_ppo_update
from exporter.metrics import GuardedCollectors, RunCollector, build_collectors, build_registry
from exporter.telemetry import GradientStep, summarize_gradient_steps

GOLDEN = Path(__file__).with_name("golden_metrics.txt")


def scrape(url: str, accept: str = "text/plain") -> str:
    with urllib.request.urlopen(urllib.request.Request(url, headers={"Accept": accept}), timeout=10) as response:
        return response.read().decode()


def one_update(aggregator: RunAggregator) -> None:
    emit_ppo_update(
        summarize_gradient_steps([GradientStep({"op": 1.0, "slot": 3.0}, 4.0)]),
        run='walker "17"\n',
        handler=aggregator,
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
        timestamp_seconds=1_700_000_000.5,
    )


@pytest.fixture
def aggregator() -> RunAggregator:
    return RunAggregator()


@pytest.fixture
def url(aggregator) -> Iterator[str]:
    with MetricsServer(aggregator, port=0) as server:
        yield server.url


def test_every_family_is_as_recorded(aggregator, url):
    """The whole contract with dashboards and rules in one file; a change here is a change for users."""
    aggregator.register_run('walker "17"\n', ["op", "slot"], {"environment": "host-growth", "seed": "1"})
    one_update(aggregator)
    ours = [line for line in scrape(url).splitlines() if "ppo_" in line]
    ours = [re.sub(r"(duration_seconds{collector=.*}) .*", r"\1 0.001", line) for line in ours]
    assert ours == GOLDEN.read_text().splitlines()


def test_promtool_has_nothing_to_say(servers, aggregator, url):
    aggregator.register_run("r", ["op", "slot"], {"seed": "1"})
    one_update(aggregator)
    check = subprocess.run([servers.promtool, "check", "metrics"], input=scrape(url), capture_output=True, text=True)
    assert (check.returncode, check.stdout, check.stderr) == (0, "", "")


def test_before_the_first_update_a_run_is_there_and_healthy(aggregator, url):
    aggregator.register_run("r", ["op", "slot", "target"])
    samples = {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in parse_text(scrape(url))
        for sample in family.samples
        if sample.name.startswith("ppo_")
    }
    assert samples["ppo_gradient_cv", ("health", "healthy"), ("run", "r")] == 0.0
    assert samples["ppo_gradient_cv_ceiling", ("run", "r")] == pytest.approx(math.sqrt(3))
    for level in HealthLevel:
        assert samples["ppo_gradient_steps_total", ("health", level), ("run", "r")] == 0.0
    assert samples["ppo_nonfinite_gradients_total", ("head", "op"), ("run", "r")] == 0.0
    assert not [name for name, *_ in samples if name in ("ppo_policy_loss", "ppo_last_update_timestamp_seconds")]


def test_both_formats_are_negotiated_and_carry_process_metrics(aggregator, url):
    one_update(aggregator)
    accept = "application/openmetrics-text;version=1.0.0"
    for families in (parse_text(scrape(url)), parse_openmetrics(scrape(url, accept))):
        names = {family.name for family in families}
        assert {"ppo_gradient_cv", "ppo_gradient_cv_per_step", "process_cpu_seconds", "python_info"} <= {
            name.removesuffix("_total") for name in names
        }


def test_every_scrape_holds_one_level_from_one_update(aggregator, url):
    """Updates flip the level and carry their own number in several families; no scrape may mix two of them."""
    aggregator.register_run("r", ["op", "slot"])
    cvs = {HealthLevel.HEALTHY: 0.25, HealthLevel.WARNING: 1.25, HealthLevel.CRITICAL: math.inf}
    finished = threading.Event()

    def flip() -> None:
        number = 0
        while not finished.is_set():
            number += 1
            cv = list(cvs.values())[number % 3]
            emit_ppo_update(
                {"gradient_cv": cv, "gradient_cv_per_step": (cv,), "gradient_norm": float(number)},
                run="r",
                handler=aggregator,
                environment_steps=1,
            )

    def check_scrapes() -> set[str]:
        seen = set()
        for _ in range(60):
            families = {family.name: family.samples for family in parse_text(scrape(url))}
            (sample,) = families["ppo_gradient_cv"]
            level = HealthLevel(sample.labels["health"])
            assert sample.value == (cvs[level] if families["ppo_updates"][0].value else 0.0)
            updates = families["ppo_updates"][0].value
            assert families["ppo_environment_steps"][0].value == updates
            assert sum(s.value for s in families["ppo_gradient_steps"]) == updates
            if updates:
                assert families["ppo_gradient_norm"][0].value == updates
            seen.add(level)
        return seen

    trainer = threading.Thread(target=flip)
    trainer.start()
    try:
        with ThreadPoolExecutor(4) as scrapers:
            seen = set().union(*(future.result() for future in [scrapers.submit(check_scrapes) for _ in range(4)]))
    finally:
        finished.set()
        trainer.join()
    assert seen == set(HealthLevel)


def test_a_taken_port_is_a_clear_error(aggregator):
    with MetricsServer(aggregator, port=0) as server:
        with pytest.raises(
            OSError, match=rf"cannot serve /metrics on 127\.0\.0\.1:{server.port}: Address already in use"
        ):
            MetricsServer(aggregator, port=server.port)
        port = server.port
    MetricsServer(aggregator, port=port).close()


def test_the_default_address_is_this_machine_only(aggregator):
    with MetricsServer(aggregator, port=0) as server:
        assert server.url == f"http://127.0.0.1:{server.port}/metrics"


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
