"""Every expression of rules, dashboards and Grafana's alerting is PromQL over metrics that exist."""

import json
import re
from collections.abc import Iterator
from functools import cache

import promql_parser
import pytest
import yaml
from conftest import fetch
from prometheus_client.parser import text_string_to_metric_families

from exporter.aggregator import RunAggregator
from exporter.link import MetricsServer
from mixin.__main__ import REPOSITORY

# Written by Prometheus itself, not by the exporter.
PROMETHEUS_SERIES = {"up", "ALERTS"}
# What Grafana puts in before it sends a query. No two durations are equal, so that they can be told apart.
GRAFANA_VARIABLES = {
    "$__rate_interval": "17s",
    "$__range": "10m",
    "$__interval": "5s",
    "$__interval_ms": "5000",
    "$job": "(ppo|another)",
    "$run": ".+",
    "$instance": ".+",
}


@cache
def exported_names() -> tuple[set[str], set[str]]:
    """Sample names on `/metrics`, all and those of counters (histogram parts included)."""
    with MetricsServer(RunAggregator(), port=0) as server:
        families = list(text_string_to_metric_families(fetch(server.url)[1]))
    names, counters = set(), set()
    suffixes = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count")}
    for family in families:
        own = {family.name + suffix for suffix in suffixes.get(family.type, ("",))}
        names |= own
        if family.type in suffixes:
            counters |= own
    return names, counters


def dashboard_files() -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted((REPOSITORY / "grafana/dashboards").glob("*.json"))]


def rules() -> list[dict]:
    content = yaml.safe_load((REPOSITORY / "alerts/ppo.rules.yml").read_text())
    return [rule for group in content["groups"] for rule in group["rules"]]


def grafana_rule_expressions() -> list[str]:
    alerting = yaml.safe_load((REPOSITORY / "grafana/provisioning/alerting/ppo.yml").read_text())
    queries = [query for group in alerting["groups"] for rule in group["rules"] for query in rule["data"]]
    return [query["model"]["expr"] for query in queries if query["datasourceUid"] != "__expr__"]


def panel_expressions() -> list[str]:
    panels = [panel for board in dashboard_files() for panel in board["panels"]]
    return [target["expr"] for panel in panels for target in panel.get("targets", [])]


def annotation_expressions() -> list[str]:
    return [annotation["expr"] for board in dashboard_files() for annotation in board["annotations"]["list"]]


def variable_selectors() -> list[str]:
    queries = [v["query"] for board in dashboard_files() for v in board["templating"]["list"] if v["type"] == "query"]
    return [re.fullmatch(r"label_values\((.+), \w+\)", query)[1] for query in queries]


def template_expressions() -> list[str]:
    """Expressions that annotations look up, with labels put in as Prometheus would."""
    text = (REPOSITORY / "alerts/ppo.rules.yml").read_text()
    return [found.replace("%q", '"x"') for found in sorted(set(re.findall(r"printf `([^`]+)`", text)))]


def with_values(expression: str) -> str:
    """`expression` as Grafana would send it; KeyError where it does not know the variable."""
    return re.sub(r"\$\w+", lambda variable: GRAFANA_VARIABLES[variable[0]], expression)


def parse(expression: str):
    return promql_parser.parse(with_values(expression))


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


def inside_rate(above: tuple) -> bool:
    functions = {getattr(getattr(node, "func", None), "name", None) for node in above}
    return not functions.isdisjoint({"rate", "irate", "increase"})


RULES, RECORDED = [rule["expr"] for rule in rules()], [rule["record"] for rule in rules() if "record" in rule]
GRAFANA_RULES, PANELS, ANNOTATIONS = grafana_rule_expressions(), panel_expressions(), annotation_expressions()
VARIABLES, TEMPLATES = variable_selectors(), template_expressions()


def test_every_source_of_expressions_is_found():
    assert all((RULES, RECORDED, GRAFANA_RULES, PANELS, ANNOTATIONS, VARIABLES, TEMPLATES))


@pytest.mark.parametrize("expression", [*RULES, *GRAFANA_RULES, *PANELS, *ANNOTATIONS, *VARIABLES, *TEMPLATES])
def test_expression_parses_and_names_only_metrics_that_exist(expression):
    selectors = list(walk(parse(expression)))
    assert selectors
    names, _ = exported_names()
    for selector, _ in selectors:
        assert selector.name in names | PROMETHEUS_SERIES | set(RECORDED)


@pytest.mark.parametrize("expression", [*RULES, *GRAFANA_RULES, *TEMPLATES])
def test_rules_look_at_the_trainers_job_only(expression):
    for selector, _ in walk(parse(expression)):
        assert "job" in matchers(selector)


@pytest.mark.parametrize("expression", GRAFANA_RULES)
def test_rules_of_grafana_work_without_those_of_prometheus(expression):
    assert not {selector.name for selector, _ in walk(parse(expression))} & set(RECORDED)


@pytest.mark.parametrize("expression", RULES)
def test_counters_stand_only_inside_rates_or_beside_their_own_past(expression):
    _, counters = exported_names()
    selectors = list(walk(parse(expression)))
    for selector, above in selectors:
        has_past = any(other.name == selector.name and other.offset for other, _ in selectors)
        # A count of resumes is no rate: it says of a run whether its other counters began elsewhere.
        assert selector.name not in counters - {"ppo_resumes_total"} or inside_rate(above) or has_past
