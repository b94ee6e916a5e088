"""Every expression of rules, dashboards and Grafana's alerting is PromQL over metrics that exist."""

import json
import re
from collections.abc import Iterator

import promql_parser
import pytest
import yaml

from exporter.aggregator import RunAggregator
from exporter.metrics import build_registry
from mixin.__main__ import REPOSITORY

# Written by Prometheus itself, not by the exporter.
PROMETHEUS_SERIES = {"up", "ALERTS"}
# What Grafana puts in before it sends a query.
GRAFANA_VARIABLES = {"$__rate_interval": "5m", "$job": "ppo", "$run": ".+", "$instance": ".+"}


def exported_names() -> tuple[set[str], set[str]]:
    """Sample names on `/metrics`, all and those of counters (histogram parts included)."""
    aggregator = RunAggregator()
    names, counters = set(), set()
    suffixes = {
        "counter": ("_total",),
        "histogram": ("_bucket", "_sum", "_count"),
        "info": ("_info",),
        "gauge": ("",),
    }
    for family in build_registry(aggregator).collect():
        own = {family.name + suffix for suffix in suffixes[family.type]}
        names |= own
        if family.type in ("counter", "histogram"):
            counters |= own
    return names, counters


def dashboard_files() -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted((REPOSITORY / "grafana/dashboards").glob("*.json"))]


def rule_expressions() -> list[str]:
    rules = yaml.safe_load((REPOSITORY / "alerts/ppo.rules.yml").read_text())
    return [rule["expr"] for group in rules["groups"] for rule in group["rules"]]


def grafana_rule_expressions() -> list[str]:
    alerting = yaml.safe_load((REPOSITORY / "grafana/provisioning/alerting/ppo.yml").read_text())
    queries = [query for group in alerting["groups"] for rule in group["rules"] for query in rule["data"]]
    return [query["model"]["expr"] for query in queries if query["datasourceUid"] != "__expr__"]


def panel_expressions() -> list[str]:
    panels = [panel for board in dashboard_files() for panel in board["panels"]]
    return [target["expr"] for panel in panels for target in panel.get("targets", [])]


def variable_selectors() -> list[str]:
    queries = [v["query"] for board in dashboard_files() for v in board["templating"]["list"] if v["type"] == "query"]
    return [re.fullmatch(r"label_values\((.+), \w+\)", query)[1] for query in queries]


def template_expressions() -> list[str]:
    """Expressions that annotations look up, with labels put in as Prometheus would."""
    rules = (REPOSITORY / "alerts/ppo.rules.yml").read_text()
    return [text.replace("%q", '"x"') for text in sorted(set(re.findall(r"printf `([^`]+)`", rules)))]


def parse(expression: str):
    for variable, value in GRAFANA_VARIABLES.items():
        expression = expression.replace(variable, value)
    assert "$" not in expression, f"unknown variable in {expression}"
    return promql_parser.parse(expression)


def walk(node, above: tuple = ()) -> Iterator[tuple]:
    """(selector, the expressions it stands in, outermost first)"""
    if isinstance(node, promql_parser.VectorSelector):
        yield node, above
        return
    if isinstance(node, promql_parser.MatrixSelector):
        yield node.vector_selector, (*above, node)
        return
    for part in ("expr", "lhs", "rhs", "param"):
        child = getattr(node, part, None)
        if child is not None:
            yield from walk(child, (*above, node))
    for argument in getattr(node, "args", None) or []:
        yield from walk(argument, (*above, node))


def matchers(selector) -> dict[str, str]:
    return {matcher.name: matcher.value for matcher in selector.matchers.matchers}


RULES, GRAFANA_RULES, PANELS = rule_expressions(), grafana_rule_expressions(), panel_expressions()
VARIABLES, TEMPLATES = variable_selectors(), template_expressions()


def test_every_source_of_expressions_is_found():
    assert all((RULES, GRAFANA_RULES, PANELS, VARIABLES, TEMPLATES))


@pytest.mark.parametrize("expression", [*RULES, *GRAFANA_RULES, *PANELS, *VARIABLES, *TEMPLATES])
def test_expression_parses_and_names_only_metrics_that_exist(expression):
    selectors = list(walk(parse(expression)))
    assert selectors
    names, _ = exported_names()
    for selector, _ in selectors:
        assert selector.name in names | PROMETHEUS_SERIES


@pytest.mark.parametrize("expression", [*RULES, *GRAFANA_RULES, *TEMPLATES])
def test_rules_look_at_the_trainers_job_only(expression):
    for selector, _ in walk(parse(expression)):
        assert "job" in matchers(selector)


@pytest.mark.parametrize("expression", PANELS)
def test_panels_filter_by_the_chosen_job_run_and_instance(expression):
    for selector, _ in walk(parse(expression)):
        assert {"job", "run", "instance"} <= set(matchers(selector))


@pytest.mark.parametrize("expression", [e for e in PANELS if "[" in e])
def test_panels_take_rates_over_the_interval_that_fits_the_zoom(expression):
    assert set(re.findall(r"\[([^]]+)\]", expression)) == {"$__rate_interval"}


@pytest.mark.parametrize("expression", [*RULES, *PANELS])
def test_counters_stand_only_inside_rates_or_beside_their_own_past(expression):
    _, counters = exported_names()
    selectors = list(walk(parse(expression)))
    for selector, above in selectors:
        inside_rate = any(getattr(getattr(node, "func", None), "name", "") in ("rate", "increase") for node in above)
        has_past = any(other.name == selector.name and other.offset for other, _ in selectors)
        assert selector.name not in counters or inside_rate or has_past
