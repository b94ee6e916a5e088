"""Every query has a result from a real Prometheus that scrapes a real run: in health all that must have one,
with a drill, a dead and a stalled run also those that are empty in health."""

import sys
import time
from collections.abc import Callable

from conftest import wait_until
from test_promql import GRAFANA_RULES, RECORDED, VARIABLES, dashboard_files, with_values

from exporter.aggregator import RunAggregator
from exporter.health import HealthLevel
from exporter.link import MetricsServer
from exporter.telemetry import PPOUpdatePayload
from mixin.config import MixinConfig
from mixin.dashboards import EMPTY_IN_HEALTH

SB3_RUN = """
import sys
import gymnasium as gym
from stable_baselines3 import PPO
from exporter.integrations.stable_baselines3 import PrometheusCallback

env = gym.make("CartPole-v1")
env = gym.wrappers.TransformAction(env, lambda action: action[0], gym.spaces.MultiDiscrete([2, 3]))
PPO("MlpPolicy", env, n_steps=128, seed=1).learn(
    10_000_000, callback=PrometheusCallback(run="demo", port=int(sys.argv[1]), targets_dir=sys.argv[2])
)
"""


def queries() -> dict[str, list[str]]:
    """Expressions by the title of their panel or annotation."""
    by_title: dict[str, list[str]] = {}
    for board in dashboard_files():
        for panel in board["panels"]:
            by_title.setdefault(panel["title"], []).extend(target["expr"] for target in panel.get("targets", []))
        for annotation in board["annotations"]["list"]:
            by_title.setdefault(annotation["name"], []).append(annotation["expr"])
    return by_title


def check(observability, titles: set[str]) -> None:
    """Each query of these panels has a result, and so have variables and recording rules; the others are valid."""
    for title, expressions in queries().items():
        for expression in map(with_values, expressions):
            if title in titles:
                wait_until(lambda: observability.query(expression), f"{title}: a result of {expression}")
            else:
                observability.query(expression)  # fails where the expression is wrong
    for expression in (*map(with_values, VARIABLES), *RECORDED):
        wait_until(lambda: observability.query(expression), f"a result of {expression}")
    for expression in GRAFANA_RULES:
        observability.query(expression)

    rules = observability.rules()
    assert rules and {rule["health"] for rule in rules} == {"ok"}, [rule.get("lastError") for rule in rules]


def start_trainer(start: Callable, observability, *options: str) -> None:
    port = observability.ports.metrics
    command = [sys.executable, "-m", "trainer", "--metrics-port", str(port), "--targets-dir", observability.targets]
    command += ["--checkpoint-dir", observability.targets.parent / "checkpoints"]
    start("trainer", [*command, "--run", "demo", *options], f"http://127.0.0.1:{port}/metrics")


def test_only_panels_and_annotations_that_exist_are_declared_empty_in_health():
    assert EMPTY_IN_HEALTH.keys() < queries().keys() and all(EMPTY_IN_HEALTH.values())


def test_a_healthy_run_gives_every_query_a_result(start: Callable, start_observability: Callable):
    observability = start_observability()
    start_trainer(start, observability)
    check(observability, queries().keys() - EMPTY_IN_HEALTH.keys())


def test_what_is_empty_in_health_shows_a_drill_a_dead_run_and_a_stalled_one(
    start: Callable, start_observability: Callable
):
    observability = start_observability()
    start_trainer(start, observability, "--drill", "nan:op:3-1000000")
    with MetricsServer(RunAggregator(), port=0) as dead:
        dead.deliver("dead", targets_dir=observability.targets)
        dead.close(crashed=True)
    last_update = time.time() - MixinConfig().stalled_seconds - 1
    aggregator = RunAggregator()
    aggregator.handle_ppo_update(PPOUpdatePayload(run="stalled", timestamp_seconds=last_update))
    with MetricsServer(aggregator, port=0) as server:
        server.deliver("stalled", targets_dir=observability.targets)
        check(observability, set(queries()))
        (silent,) = map(with_values, queries()["Down or stalled"])
        problems = {"dead": "down", "stalled": "stalled"}
        wait_until(
            lambda: (
                problems
                == {found["metric"]["run"]: found["metric"]["problem"] for found in observability.query(silent)}
            ),
            "both are in the table, each with its problem",
        )


def test_the_time_at_a_level_begins_when_the_level_does(start_observability: Callable):
    observability = start_observability()
    aggregator = RunAggregator()
    (expression,) = map(with_values, queries()["At this level for"])

    def seconds() -> dict[str, float]:
        return {sample["metric"]["run"]: float(sample["value"][1]) for sample in observability.query(expression)}

    with MetricsServer(aggregator, port=0) as server:
        for run in ("changing", "steady"):
            server.deliver(run, targets_dir=observability.targets)
            aggregator.handle_ppo_update(PPOUpdatePayload(run=run, gradient_cv=0.1))
        wait_until(lambda: seconds().get("steady", 0) > 12, "12 seconds at one level")
        aggregator.handle_ppo_update(PPOUpdatePayload(run="changing", gradient_cv=3.0))

        def is_counted_anew() -> bool:
            now = seconds()  # to the five seconds that are the resolution here
            return now["changing"] < now["steady"] - 5

        wait_until(is_counted_anew, "the new level counts from its beginning, the other from its own")


def test_the_first_screen_and_the_table_say_what_the_run_said(start_observability: Callable):
    observability = start_observability()
    aggregator = RunAggregator()
    norms = {"slot": 0.1, "curve": 0.3, "op": 1.6}
    update = PPOUpdatePayload(
        run="demo",
        gradient_cv=1.25,
        gradient_cv_per_step=(0.1, 0.2, 0.3, 2.5),
        contributing_heads=len(norms),
        head_gradient_norms=norms,
        episode_return_mean=-3.5,
        policy_loss=0.125,
        clip_fraction=0.25,
    )
    aggregator.handle_ppo_update(update)

    def result(expression: str) -> tuple[str, float] | None:
        """The head, where there is one, and the value."""
        samples = observability.query(with_values(expression))
        return next(((each["metric"].get("head", ""), round(float(each["value"][1]), 4)) for each in samples), None)

    with MetricsServer(aggregator, port=0) as server:
        server.deliver("demo", targets_dir=observability.targets)
        told = queries()
        level, cv, head, _, episode_return, _, up = told["All runs"]
        for expression, expected in {
            **{told[title][0]: ("", value) for title, value in {"Level now": 1, "Gradient CV now": 1.25}.items()},
            told["CV ceiling"][0]: ("", 1.7321),
            told["Dominating head"][0]: ("op", 0.8),
            told["Most starved head"][0]: ("slot", 0.05),
            told["Policy loss"][0]: ("", 0.125),
            told["Clip fraction"][0]: ("", 0.25),
            **{level: ("", 1), cv: ("", 1.25), head: ("op", 0.8), episode_return: ("", -3.5), up: ("", 1)},
            told["The ten worst runs now"][0]: ("", 1.25),
        }.items():
            wait_until(lambda: result(expression) == expected, f"{expression} is {expected}")

        _, warned = wait_until(lambda: result(told["Time in each level"][1]), "the time in warning")
        assert 0 < warned <= 600, "seconds within the range of ten minutes"

        def shares() -> dict[str, float]:
            aggregator.handle_ppo_update(update)
            titles = told["Share of gradient steps by level"]
            return {name: (result(each) or ("", 0))[1] for name, each in zip(HealthLevel, titles, strict=True)}

        expected = {HealthLevel.HEALTHY: 0.75, HealthLevel.WARNING: 0, HealthLevel.CRITICAL: 0.25}
        wait_until(lambda: shares() == expected, "three of four gradient steps are healthy, one is critical")


def test_runs_of_one_process_have_a_row_each(start_observability: Callable):
    observability = start_observability()
    aggregator = RunAggregator()

    def runs(expression: str) -> set[str]:
        return {sample["metric"]["run"] for sample in observability.query(with_values(expression))}

    with MetricsServer(aggregator, port=0) as server:
        for run in ("one", "other"):
            server.deliver(run, targets_dir=observability.targets)
        aggregator.handle_ppo_update(PPOUpdatePayload(run="one"))
        aggregator.register_run("other", [])  # before its first update
        for expression in queries()["All runs"]:
            if "timestamp" in expression or "up{" in expression:
                wait_until(lambda: runs(expression) == {"one", "other"}, f"a row each from {expression}")
        (up,) = queries()["Trainer up"]
        assert runs(up.replace("$run", "one")) == {"one"} and not runs(up.replace("$run", "on"))


def test_the_same_queries_show_a_stable_baselines3_run(start: Callable, start_observability: Callable):
    observability = start_observability()
    port = observability.ports.metrics
    command = [sys.executable, "-c", SB3_RUN, str(port), str(observability.targets)]
    start("trainer", command, f"http://127.0.0.1:{port}/metrics")
    # A monitor measures the global norm on demand only, and knows of no rank's rollout.
    check(observability, queries().keys() - EMPTY_IN_HEALTH.keys() - {"Global gradient norm", "Rollout of each rank"})
