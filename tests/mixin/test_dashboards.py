"""Dashboards hold to the rules that make them readable at night and importable anywhere."""

import json

import pytest

from exporter.health import CRITICAL_THRESHOLD, WARNING_THRESHOLD, HealthLevel
from mixin.__main__ import REPOSITORY
from mixin.dashboards import CV_PANEL_ID, DASHBOARD_UID

CORE_PANELS = {"stat", "timeseries", "table", "bargauge", "state-timeline", "row"}
BOARDS = {
    path.stem: json.loads(path.read_text()) for path in sorted((REPOSITORY / "grafana/dashboards").glob("*.json"))
}
BOARD = BOARDS[DASHBOARD_UID]
PANELS = [panel for board in BOARDS.values() for panel in board["panels"] if panel["type"] != "row"]


@pytest.fixture(params=BOARDS.values(), ids=BOARDS.keys())
def board(request) -> dict:
    return request.param


def panel_titled(title: str) -> dict:
    return next(panel for panel in BOARD["panels"] if panel["title"] == title)


def threshold_steps(panel: dict) -> list[tuple]:
    steps = panel["fieldConfig"]["defaults"]["thresholds"]["steps"]
    return [(step["value"], step["color"]) for step in steps]


def test_dashboard_can_be_provisioned_and_found_again(board):
    assert board["uid"] in BOARDS and board["id"] is None
    assert board["editable"] is False
    assert board["schemaVersion"] <= 38


def test_panel_ids_are_unique(board):
    ids = [panel["id"] for panel in board["panels"]]
    assert len(set(ids)) == len(ids) and all(ids)


def test_panels_neither_overlap_nor_leave_the_grid(board):
    taken = set()
    for panel in board["panels"]:
        position = panel["gridPos"]
        assert position["x"] + position["w"] <= 24
        cells = {
            (position["x"] + column, position["y"] + line)
            for column in range(position["w"])
            for line in range(position["h"])
        }
        assert not cells & taken, panel["title"]
        taken |= cells


def test_variables_choose_source_job_run_and_instance(board):
    variables = {variable["name"]: variable for variable in board["templating"]["list"]}
    assert list(variables) == ["datasource", "job", "run", "instance"]
    assert variables["datasource"]["query"] == "prometheus"
    for name in ("job", "run", "instance"):
        variable = variables[name]
        assert variable["multi"] and variable["includeAll"] and variable["allValue"] == ".+"
        assert variable["refresh"] == 2, "on change of the time range"
        assert variable["query"].startswith("label_values(")
        assert variable["datasource"]["uid"] == "${datasource}"


@pytest.mark.parametrize("panel", PANELS, ids=[panel["title"] for panel in PANELS])
def test_panel_says_what_it_shows(panel):
    defaults = panel["fieldConfig"]["defaults"]
    assert panel["type"] in CORE_PANELS
    assert panel["title"] and len(panel["description"]) > 40
    assert defaults["unit"] and "decimals" in defaults and defaults["noValue"]
    assert panel["datasource"]["uid"] == "${datasource}"
    references = [target["refId"] for target in panel["targets"]]
    assert references and all(references) and len(set(references)) == len(references)
    for target in panel["targets"]:
        assert target["datasource"]["uid"] == "${datasource}"
        assert panel["type"] == "table" or "{{" in target["legendFormat"], "a legend, not the whole label set"


def test_cv_panel_draws_both_thresholds_as_lines():
    panel = next(panel for panel in BOARD["panels"] if panel["id"] == CV_PANEL_ID)
    assert threshold_steps(panel) == [(None, "green"), (WARNING_THRESHOLD, "yellow"), (CRITICAL_THRESHOLD, "red")]
    assert panel["fieldConfig"]["defaults"]["custom"]["thresholdsStyle"]["mode"] == "line"
    assert panel["fieldConfig"]["defaults"]["decimals"] == 3


def test_level_is_shown_in_the_operators_words_and_colours():
    mappings = panel_titled("Level now")["fieldConfig"]["defaults"]["mappings"][0]["options"]
    assert [(mappings[str(index)]["text"], mappings[str(index)]["color"]) for index in range(3)] == [
        ("stable", "green"),
        ("warn", "yellow"),
        ("BAD", "red"),
    ]


def test_share_of_steps_is_coloured_by_level():
    overrides = panel_titled("Share of gradient steps by level")["fieldConfig"]["overrides"]
    colors = {entry["matcher"]["options"]: entry["properties"][0]["value"]["fixedColor"] for entry in overrides}
    assert colors == {str(level): level.color for level in HealthLevel}
