"""Every query of the dashboard returns something from a real Prometheus that scrapes a real run."""

import sys
from collections.abc import Callable

from conftest import wait_until
from test_promql import PANELS, VARIABLES

# Empty in health.
MAY_BE_EMPTY = [expression for expression in PANELS if "ALERTS" in expression]


def with_values(expression: str) -> str:
    for variable, value in {"$__rate_interval": "15s", "$job": "ppo", "$run": ".+", "$instance": ".+"}.items():
        expression = expression.replace(variable, value)
    return expression


def test_every_query_has_a_result_and_every_rule_is_healthy(start: Callable, start_observability: Callable):
    observability = start_observability()
    port = observability.ports.metrics
    options = ["--metrics-port", str(port), "--targets-dir", observability.targets, "--run", "demo"]
    start("trainer", [sys.executable, "-m", "trainer", *options], f"http://127.0.0.1:{port}/metrics")

    for expression in [*PANELS, *VARIABLES]:
        if expression not in MAY_BE_EMPTY:
            wait_until(lambda: observability.query(with_values(expression)), f"a result of {expression}")
    for expression in MAY_BE_EMPTY:
        observability.query(with_values(expression))  # fails where the expression is wrong

    rules = observability.rules()
    assert rules and {rule["health"] for rule in rules} == {"ok"}, [rule.get("lastError") for rule in rules]
