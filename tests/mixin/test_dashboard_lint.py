"""The rules that every dashboard keeps, and proof that each rule can be broken."""

import copy
import re
from collections.abc import Callable, Iterator
from datetime import timedelta
from itertools import combinations

import promql_parser
import pytest
from test_promql import GRAFANA_VARIABLES, dashboard_files, exported_names, inside_rate, matchers, parse, walk

BOARDS = {board["uid"]: board for board in dashboard_files()}
# Bookmarks, alerts and notifications that were sent long ago carry them.
UIDS = {"ppo-gradient-health", "ppo-fleet"}
ON_TIME_RANGE_CHANGE = 2
RATE_INTERVAL = timedelta(seconds=int(GRAFANA_VARIABLES["$__rate_interval"].removesuffix("s")))


def lint(board: dict) -> set[str]:
    """Names of the rules that `board` breaks."""
    return {rule for rule, kept in RULES.items() if not kept(board)}


def panels(board: dict) -> list[dict]:
    return [panel for panel in board["panels"] if panel["type"] != "row"]


def expressions(board: dict) -> list[str]:
    targets = [target["expr"] for panel in panels(board) for target in panel.get("targets", [])]
    return targets + [annotation["expr"] for annotation in board["annotations"]["list"]]


def selectors(board: dict) -> Iterator[tuple]:
    for expression in expressions(board):
        try:
            yield from walk(parse(expression))
        except (KeyError, ValueError):
            continue  # breaks `targets_are_promql`


def variables(board: dict) -> dict[str, dict]:
    return {variable["name"]: variable for variable in board["templating"]["list"]}


def data_source_is_a_variable(board: dict) -> bool:
    variable = variables(board).get("datasource", {})
    return variable.get("type") == "datasource" and variable.get("query") == "prometheus"


def everything_reads_that_data_source(board: dict) -> bool:
    targets = [target for panel in panels(board) for target in panel.get("targets", [])]
    queries = [variable for variable in variables(board).values() if variable["type"] == "query"]
    readers = [*panels(board), *targets, *queries, *board["annotations"]["list"]]
    return all(reader["datasource"]["uid"] == "${datasource}" for reader in readers)


def job_run_and_instance_are_variables(board: dict) -> bool:
    return all(
        (variable := variables(board).get(name))
        and re.fullmatch(rf"label_values\(.+, {name}\)", variable["query"])
        and variable["multi"]
        and variable["includeAll"]
        and variable["allValue"] == ".+"
        and variable["refresh"] == ON_TIME_RANGE_CHANGE
        for name in ("job", "run", "instance")
    )


def targets_filter_by_job_and_run(board: dict) -> bool:
    def filters(selector) -> bool:
        by = matchers(selector)
        return all(GRAFANA_VARIABLES[f"${name}"] in by.get(name, "") for name in ("job", "run"))

    return all(filters(selector) for selector, _ in selectors(board))


def panels_have_title_and_description(board: dict) -> bool:
    return all(panel.get("title") and panel.get("description") for panel in panels(board))


def panels_have_a_unit(board: dict) -> bool:
    return all(panel["fieldConfig"]["defaults"].get("unit") for panel in panels(board))


def panels_have_targets(board: dict) -> bool:
    return all(panel.get("targets") for panel in panels(board))


def targets_are_promql(board: dict) -> bool:
    try:
        return all(map(parse, expressions(board)))
    except (KeyError, ValueError):
        return False


def rates_fit_the_zoom(board: dict) -> bool:
    return all(
        above[-1].range == RATE_INTERVAL
        for _, above in selectors(board)
        if inside_rate(above) and isinstance(above[-1], promql_parser.MatrixSelector)
    )


def counters_are_inside_rates(board: dict) -> bool:
    _, counters = exported_names()
    return all(selector.name not in counters or inside_rate(above) for selector, above in selectors(board))


def panel_ids_are_unique(board: dict) -> bool:
    ids = [panel.get("id") for panel in board["panels"]]
    return all(ids) and len(set(ids)) == len(ids)


def panels_do_not_overlap(board: dict) -> bool:
    def apart(one: dict, other: dict) -> bool:
        return any(
            a[start] + a[size] <= b[start]
            for a, b in ((one, other), (other, one))
            for start, size in (("x", "w"), ("y", "h"))
        )

    places = [panel["gridPos"] for panel in board["panels"]]
    return all(place["x"] + place["w"] <= 24 for place in places) and all(
        apart(one, other) for one, other in combinations(places, 2)
    )


def cannot_be_edited_where_it_is_provisioned(board: dict) -> bool:
    return board["editable"] is False


def uid_is_stable(board: dict) -> bool:
    return board["uid"] in UIDS and board["id"] is None


RULES: dict[str, Callable[[dict], bool]] = {
    rule.__name__: rule
    for rule in (
        data_source_is_a_variable,
        everything_reads_that_data_source,
        job_run_and_instance_are_variables,
        targets_filter_by_job_and_run,
        panels_have_title_and_description,
        panels_have_a_unit,
        panels_have_targets,
        targets_are_promql,
        rates_fit_the_zoom,
        counters_are_inside_rates,
        panel_ids_are_unique,
        panels_do_not_overlap,
        cannot_be_edited_where_it_is_provisioned,
        uid_is_stable,
    )
}


@pytest.mark.parametrize("board", BOARDS.values(), ids=BOARDS.keys())
def test_every_dashboard_keeps_every_rule(board):
    assert lint(board) == set()


def set_last_target(board: dict, **changes: object) -> None:
    panels(board)[-1]["targets"][-1].update(changes)


def set_variable(board: dict, name: str, **changes: object) -> None:
    variables(board)[name].update(changes)


BREAKS: list[tuple[Callable[[dict], bool], Callable[[dict], object]]] = [
    (data_source_is_a_variable, lambda board: set_variable(board, "datasource", type="constant")),
    (everything_reads_that_data_source, lambda board: panels(board)[3]["datasource"].update(uid="prometheus")),
    (everything_reads_that_data_source, lambda board: set_last_target(board, datasource={"uid": "prometheus"})),
    (everything_reads_that_data_source, lambda board: set_variable(board, "run", datasource={"uid": "prometheus"})),
    (
        job_run_and_instance_are_variables,
        lambda board: board["templating"]["list"].remove(variables(board)["instance"]),
    ),
    (job_run_and_instance_are_variables, lambda board: set_variable(board, "run", query="query_result(up)")),
    (job_run_and_instance_are_variables, lambda board: set_variable(board, "run", multi=False)),
    (job_run_and_instance_are_variables, lambda board: set_variable(board, "run", includeAll=False)),
    (job_run_and_instance_are_variables, lambda board: set_variable(board, "job", allValue=".*")),
    (job_run_and_instance_are_variables, lambda board: set_variable(board, "job", refresh=1)),
    (targets_filter_by_job_and_run, lambda board: set_last_target(board, expr='up{job=~"$job"}')),
    (targets_filter_by_job_and_run, lambda board: set_last_target(board, expr='up{job="ppo", run=~"$run"}')),
    (panels_have_title_and_description, lambda board: panels(board)[3].update(title="")),
    (panels_have_title_and_description, lambda board: panels(board)[3].pop("description")),
    (panels_have_a_unit, lambda board: panels(board)[3]["fieldConfig"]["defaults"].pop("unit")),
    (panels_have_targets, lambda board: panels(board)[3].update(targets=[])),
    (targets_filter_by_job_and_run, lambda board: set_last_target(board, expr='up{job=~"$job", run="a"}')),
    (targets_are_promql, lambda board: set_last_target(board, expr="sum(up")),
    (targets_are_promql, lambda board: set_last_target(board, expr='up{job=~"$job", run=~"$unknown"}')),
    (
        rates_fit_the_zoom,
        lambda board: set_last_target(board, expr='rate(ppo_updates_total{job=~"$job", run=~"$run"}[5m])'),
    ),
    (
        counters_are_inside_rates,
        lambda board: set_last_target(board, expr='ppo_updates_total{job=~"$job", run=~"$run"}'),
    ),
    (panel_ids_are_unique, lambda board: panels(board)[3].update(id=panels(board)[0]["id"])),
    (panel_ids_are_unique, lambda board: panels(board)[3].update(id=None)),
    (panels_do_not_overlap, lambda board: panels(board)[0]["gridPos"].update(h=30)),
    (panels_do_not_overlap, lambda board: panels(board)[-1]["gridPos"].update(w=30)),
    (cannot_be_edited_where_it_is_provisioned, lambda board: board.update(editable=True)),
    (uid_is_stable, lambda board: board.update(uid="another")),
    (uid_is_stable, lambda board: board.update(id=7)),
]


@pytest.mark.parametrize("uid", BOARDS)
@pytest.mark.parametrize(
    ("rule", "break_it"), BREAKS, ids=[f"{i}-{rule.__name__}" for i, (rule, _) in enumerate(BREAKS)]
)
def test_each_rule_finds_what_breaks_it_and_nothing_else(uid, rule, break_it):
    board = copy.deepcopy(BOARDS[uid])
    break_it(board)
    assert lint(board) == {rule.__name__}


def test_each_rule_is_broken_once():
    assert {rule.__name__ for rule, _ in BREAKS} == set(RULES)
