"""Every query of the dashboard returns something from a real Prometheus that scrapes a real run."""

import sys
from collections.abc import Callable

from conftest import wait_until
from test_promql import PANELS, VARIABLES

from exporter.metrics import GRADIENT_NORM

# Empty in health.
MAY_BE_EMPTY = [expression for expression in PANELS if "ALERTS" in expression]


def with_values(expression: str) -> str:
    for variable, value in {"$__rate_interval": "15s", "$job": "ppo", "$run": ".+", "$instance": ".+"}.items():
        expression = expression.replace(variable, value)
    return expression


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


def check(observability, may_be_empty: list[str]) -> None:
    for expression in [*PANELS, *VARIABLES]:
        if expression not in may_be_empty:
            wait_until(lambda: observability.query(with_values(expression)), f"a result of {expression}")
    for expression in may_be_empty:
        observability.query(with_values(expression))  # fails where the expression is wrong

    rules = observability.rules()
    assert rules and {rule["health"] for rule in rules} == {"ok"}, [rule.get("lastError") for rule in rules]


def test_every_query_has_a_result_and_every_rule_is_healthy(start: Callable, start_observability: Callable):
    observability = start_observability()
    port = observability.ports.metrics
    options = ["--metrics-port", str(port), "--targets-dir", observability.targets, "--run", "demo"]
    start("trainer", [sys.executable, "-m", "trainer", *options], f"http://127.0.0.1:{port}/metrics")
    check(observability, MAY_BE_EMPTY)


def test_the_same_queries_show_a_stable_baselines3_run(start: Callable, start_observability: Callable):
    observability = start_observability()
    port = observability.ports.metrics
    command = [sys.executable, "-c", SB3_RUN, str(port), str(observability.targets)]
    start("trainer", command, f"http://127.0.0.1:{port}/metrics")
    # A monitor measures the global norm on demand only.
    global_norm = [expression for expression in PANELS if f"{GRADIENT_NORM.name}{{" in expression]
    assert global_norm
    check(observability, [*MAY_BE_EMPTY, *global_norm])
