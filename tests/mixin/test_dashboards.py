"""What an operator sees first, in which words and colours, and where a click leads."""

import json
import re
from urllib.parse import parse_qs, urlsplit

import pytest
from test_dashboard_lint import BOARDS, panels
from test_promql import RECORDED, matchers, parse, walk

from exporter.health import HealthLevel
from mixin.config import MixinConfig
from mixin.dashboards import CV_PANEL_ID, DASHBOARD_UID, FLEET_DASHBOARD_UID, dashboards
from trainer.environments.host_growth import ACTION_HEADS

CORE_PANELS = {"stat", "timeseries", "table", "bargauge", "state-timeline", "heatmap"}
SCREEN = 21  # grid units that a browser shows of 1080 lines: 38 pixels each, below Grafana's own bars
RUN, FLEET = BOARDS[DASHBOARD_UID], BOARDS[FLEET_DASHBOARD_UID]
PANELS = [panel for board in BOARDS.values() for panel in panels(board)]
LEVEL_COLORS = {level.color for level in HealthLevel}


def panel_titled(title: str) -> dict:
    return next(panel for panel in PANELS if panel["title"] == title)


def properties(panel: dict) -> dict[str, dict]:
    """What overrides set, by the field that they match."""
    return {
        override["matcher"]["options"]: {entry["id"]: entry["value"] for entry in override["properties"]}
        for override in panel["fieldConfig"]["overrides"]
    }


def threshold_steps(thresholds: dict) -> list[tuple]:
    return [(step["value"], step["color"]) for step in thresholds["steps"]]


def words(mappings: list[dict]) -> dict[str, tuple[str, str]]:
    return {value: (shown["text"], shown["color"]) for value, shown in mappings[0]["options"].items()}


@pytest.mark.parametrize("board", BOARDS.values(), ids=BOARDS.keys())
def test_the_oldest_supported_grafana_can_read_it(board):
    assert board["schemaVersion"] == 38


@pytest.mark.parametrize("panel", PANELS, ids=[panel["title"] for panel in PANELS])
def test_panel_says_what_it_shows(panel):
    defaults = panel["fieldConfig"]["defaults"]
    assert panel["type"] in CORE_PANELS
    assert "Good: " in panel["description"]
    assert "decimals" in defaults and defaults["noValue"]
    references = [target["refId"] for target in panel["targets"]]
    assert all(references) and len(set(references)) == len(references)
    for target in panel["targets"]:
        labels = re.findall(r"{{(\w+)}}", target["legendFormat"])
        assert panel["type"] == "table" or (target["legendFormat"] and set(labels) <= {"run", "head", "rank", "le"})


@pytest.mark.parametrize("panel", PANELS, ids=[panel["title"] for panel in PANELS])
def test_lines_without_a_level_do_not_take_the_colours_of_levels(panel):
    color = panel["fieldConfig"]["defaults"].get("color", {})
    if panel["type"] == "timeseries":
        assert color["mode"] == "thresholds" or color["fixedColor"] not in LEVEL_COLORS


def test_a_head_has_one_colour_everywhere_and_none_of_a_level():
    titles = ("Gradient norm per head", "Share of the gradient per head", "Non-finite and skipped gradient steps")
    colors = [
        {name: change["color"]["fixedColor"] for name, change in properties(panel_titled(title)).items()}
        for title in titles
    ]
    assert colors[0] == colors[1] == colors[2]
    assert colors[0].keys() == {f"/^{head} /" for head in ACTION_HEADS}
    assert len(set(colors[0].values())) == len(ACTION_HEADS)
    assert not LEVEL_COLORS & set(colors[0].values())


def test_patterns_are_written_as_grafana_reads_them():
    # Without slashes it wants the whole name to match.
    patterns = [
        override["matcher"]["options"]
        for panel in PANELS
        for override in panel["fieldConfig"]["overrides"]
        if override["matcher"]["id"] == "byRegexp"
    ]
    assert patterns and all(re.fullmatch(r"/.+/|\.\*", pattern) for pattern in patterns)


def test_the_cv_has_three_decimals_wherever_it_stands():
    for title in ("Gradient CV now", "CV ceiling", "Gradient CV", "The ten worst runs now"):
        assert panel_titled(title)["fieldConfig"]["defaults"]["decimals"] == 3
    assert properties(panel_titled("All runs"))["CV"]["decimals"] == 3


def test_first_screen_answers_without_scrolling():
    titles = {panel["title"] for panel in panels(RUN) if panel["gridPos"]["y"] + panel["gridPos"]["h"] <= SCREEN}
    assert titles == {
        *("Level now", "Gradient CV now", "CV ceiling", "At this level for", "Dominating head", "Most starved head"),
        *("Gradient CV", "Level over time", "Time in each level", "Firing alerts"),
        *("Share of gradient steps by level", "Gradient norm per head", "Share of the gradient per head"),
    }


def test_level_is_shown_in_the_operators_words_and_colours():
    expected = {"0": ("stable", "green"), "1": ("warn", "yellow"), "2": ("BAD", "red")}
    for title in ("Level now", "Level over time"):
        assert words(panel_titled(title)["fieldConfig"]["defaults"]["mappings"]) == expected
    assert words(properties(panel_titled("All runs"))["level"]["mappings"]) == expected


@pytest.mark.parametrize(
    "title", ["Share of gradient steps by level", "Time in each level", "Runs by level", "Runs by level now"]
)
def test_what_is_counted_by_level_has_the_levels_colours(title):
    colors = {name: change["color"]["fixedColor"] for name, change in properties(panel_titled(title)).items()}
    assert colors == {str(level): level.color for level in HealthLevel}


def test_the_heatmap_has_colours():
    color = panel_titled("CV per gradient step")["options"]["color"]
    assert color["mode"] == "opacity" and color["steps"] > 1 and color["fill"] not in LEVEL_COLORS


def test_alerts_are_marked_on_the_cv_panel_alone():
    annotations = RUN["annotations"]["list"]
    colors = {re.search(r'severity="(\w+)"', each["expr"])[1]: each["iconColor"] for each in annotations}
    assert colors == {"critical": "red", "warning": "yellow"}
    for annotation in annotations:
        assert annotation["filter"] == {"ids": [CV_PANEL_ID], "exclude": False}


def test_a_sites_thresholds_are_in_every_panel_that_shows_levels():
    run, fleet = dashboards(MixinConfig(warning_threshold=0.8, critical_threshold=1.5))
    steps = [(None, "green"), (0.8, "yellow"), (1.5, "red")]
    by_title = {panel["title"]: panel for board in (run, fleet) for panel in panels(board)}
    for title in ("Gradient CV now", "Gradient CV", "The ten worst runs now"):
        assert threshold_steps(by_title[title]["fieldConfig"]["defaults"]["thresholds"]) == steps
    assert threshold_steps(properties(by_title["All runs"])["CV"]["thresholds"]) == steps
    assert by_title["Gradient CV"]["fieldConfig"]["defaults"]["custom"]["thresholdsStyle"]["mode"] == "line"
    ceiling = threshold_steps(by_title["CV ceiling"]["fieldConfig"]["defaults"]["thresholds"])
    assert ceiling[1][0] == pytest.approx(1.5) and ceiling[1][0] > 1.5
    for title in ("Level now", "Level over time", "At this level for", "Time in each level"):
        for target in by_title[title]["targets"]:
            assert set(re.findall(r">= bool ([\d.]+)", target["expr"])) == {"0.8", "1.5"}
    # The exporter labels its counter by thresholds of its own; the histogram knows others.
    assert 'le="0.8"' in json.dumps(by_title["Share of gradient steps by level"]).replace("\\", "")
    texts = " ".join(panel["description"] for panel in by_title.values())
    assert not re.search(r"(below|from|at|above) (0\.5|2\.0)\b", texts)


def test_a_click_on_a_run_opens_its_dashboard_with_its_variables_and_the_time_range():
    links = [
        (title, link)
        for title in ("All runs", "Down or stalled", "The ten worst runs now")
        for change in properties(panel_titled(title)).values()
        for link in change.get("links", [])
    ]
    assert [title for title, _ in links] == ["All runs", "Down or stalled", "The ten worst runs now"]
    known = {variable["name"] for variable in RUN["templating"]["list"]}
    for title, link in links:
        address = urlsplit(link["url"])
        parameters = parse_qs(address.query)
        assert address.path == f"/d/{RUN['uid']}" and link["url"].endswith("&${__url_time_range}")
        assert {f"var-{name}" for name in known} == parameters.keys()
        assert all(value.endswith(":percentencode}") for (value,) in parameters.values())
        # Labels that the link refers to are columns of the table.
        fields = re.findall(r"__data\.fields\.(\w+)", link["url"])
        organize = panel_titled(title).get("transformations", [{}])[-1].get("options", {})
        assert not set(fields) & (organize.get("excludeByName", {}).keys() | organize.get("renameByName", {}).keys())
        assert set(fields) <= organize.get("indexByName", {}).keys()


def test_rows_of_the_table_are_told_apart_by_the_same_labels_in_every_query():
    for target in panel_titled("All runs")["targets"]:
        assert re.search(r"by \(job, instance, run(, head)?\) \(", target["expr"])


def test_the_worst_runs_come_first():
    order = panel_titled("All runs")["options"]["sortBy"]
    assert [(by["displayName"], by["desc"]) for by in order] == [("level", True), ("CV", True)]
    (worst,) = panel_titled("The ten worst runs now")["targets"]
    assert worst["expr"].startswith("topk(10, ")


def test_columns_of_the_table_are_named_after_their_query():
    table = panel_titled("All runs")
    names = table["transformations"][-1]["options"]["renameByName"]
    expressions = {names[f"Value #{target['refId']}"]: target["expr"] for target in table["targets"]}
    reads = {"level": "gradient_level", "CV": "gradient_cv", "share": "head_gradient_share", "up": "up{"}
    reads |= {"last update": "last_update_timestamp", "return": "episode_return", "steps per second": "steps:rate"}
    assert expressions.keys() == reads.keys()
    assert all(part in expressions[name] for name, part in reads.items())


@pytest.mark.parametrize("panel", PANELS, ids=[panel["title"] for panel in PANELS])
def test_a_unit_is_that_of_the_metric(panel):
    units = {"ppo_head_gradient_share": "percentunit", "ppo_clip_fraction": "percentunit"}
    units |= {"ppo_rank_rollout_seconds": "s", "process_resident_memory_bytes": "bytes"}
    for target in panel["targets"] if panel["type"] != "table" else ():
        for selector, _ in walk(parse(target["expr"])):
            if selector.name in units:
                assert panel["fieldConfig"]["defaults"]["unit"] == units[selector.name]


def test_fleet_reads_what_is_recorded_instead_of_every_series():
    per_head_or_level = {"ppo_gradient_cv", "ppo_head_gradient_share", "ppo_environment_steps_total"}
    names = {s.name for panel in panels(FLEET) for target in panel["targets"] for s, _ in walk(parse(target["expr"]))}
    assert not names & per_head_or_level
    assert names & set(RECORDED)


def test_the_run_dashboard_works_without_recording_rules():
    for panel in panels(RUN):
        for target in panel["targets"]:
            assert not {selector.name for selector, _ in walk(parse(target["expr"]))} & set(RECORDED)


def test_everything_can_be_narrowed_to_one_instance():
    for panel in PANELS:
        for target in panel["targets"]:
            for selector, _ in walk(parse(target["expr"])):
                assert "instance" in matchers(selector)
