"""Rules for a dashboard, and what an operator sees first, in which words and colors."""

import copy
import json
import re
from itertools import combinations
from urllib.parse import parse_qs, urlsplit

import promql_parser
import pytest
import yaml
from boards import BOARDS, FLEET, ROOT, RUN, panel, panels, properties, queries, selectors, variables, with_values

from exporter.health import HealthLevel
from exporter.metrics import METRIC_FAMILIES
from grafana.__main__ import main
from grafana.panels import HEAD_COLORS
from trainer.environments.host_growth import ACTION_HEADS

PANELS = [each for board in BOARDS.values() for each in panels(board)]
QUERIES = [query for board in BOARDS.values() for query in queries(board)]
SCREEN = 21  # grid units that a browser shows of 1080 lines: 38 pixels each, below Grafana's own bars
LEVEL_COLORS = {str(level): level.color for level in HealthLevel}
RECORDED = {
    rule["record"]
    for group in yaml.safe_load((ROOT / "alerts/ppo.rules.yml").read_text())["groups"]
    for rule in group["rules"]
    if "record" in rule
}
HISTOGRAMS = [family.name for family in METRIC_FAMILIES if family.kind == "histogram"]
COUNTERS = {family.name for family in METRIC_FAMILIES if family.kind == "counter"}
COUNTERS |= {f"{name}_{part}" for name in HISTOGRAMS for part in ("bucket", "sum", "count")}
NOT_OURS = {"up", "ALERTS", "process_resident_memory_bytes", "process_cpu_seconds_total"}


def test_what_is_committed_is_what_the_python_draws(capsys):
    assert main(["--check"]) == 0, capsys.readouterr().out


@pytest.mark.parametrize("board", BOARDS.values(), ids=BOARDS.keys())
def test_everything_reads_the_chosen_data_source_job_run_and_instance(board):
    readers = [*panels(board), *(target for _, target in queries(board)), *list(variables(board).values())[1:]]
    assert variables(board)["datasource"]["query"] == "prometheus"
    assert all(reader["datasource"] == {"type": "prometheus", "uid": "${datasource}"} for reader in readers)
    for title, target in queries(board):
        for selector, _ in selectors(with_values(target, run="(a)", job="(b)", instance="(c)")):
            matchers = {matcher.value for matcher in selector.matchers.matchers}
            assert matchers >= {"(a)", "(b)", "(c)"} or selector.name == "job_instance:ppo_run_info:last6h", title


def test_every_query_reads_metrics_that_exist_and_counters_by_their_rates():
    exist = {family.name for family in METRIC_FAMILIES} | COUNTERS | RECORDED | NOT_OURS
    for title, target in QUERIES:
        for selector, above in selectors(with_values(target)):
            functions = {getattr(getattr(node, "func", None), "name", None) for node in above}
            is_rate = not functions.isdisjoint({"rate", "increase"})
            assert selector.name in exist and is_rate == (selector.name in COUNTERS | {"process_cpu_seconds_total"}), (
                title
            )


def test_a_rate_has_room_for_two_scrapes_a_minute_apart_at_any_zoom():
    for title, target in QUERIES:
        if "rate(" in target["expr"] or "increase(" in target["expr"]:
            windows = set(re.findall(r"\[(.+?)\]", target["expr"]))
            assert windows == {"$__range"} or windows == {"$__rate_interval"} and target["interval"] == "30s", title


def test_the_run_dashboard_needs_no_recording_rules_and_the_fleet_reads_no_heads_and_steps():
    def read(board: dict) -> set[str]:
        return {s.name for each in panels(board) for t in each["targets"] for s, _ in selectors(with_values(t))}

    assert not read(RUN) & RECORDED
    assert not read(FLEET) & {"ppo_gradient_cv", "ppo_head_gradient_share", *COUNTERS}


@pytest.mark.parametrize("each", PANELS, ids=[each["title"] for each in PANELS])
def test_a_panel_says_what_it_shows(each):
    defaults = each["fieldConfig"]["defaults"]
    assert "Good: " in each["description"] and defaults["unit"] and "decimals" in defaults and defaults["noValue"]
    assert len({target["refId"] for target in each["targets"]}) == len(each["targets"]) > 0
    assert each["type"] == "table" or all(target["legendFormat"] for target in each["targets"])
    fixed = json.dumps(defaults.get("color", ""))
    assert not [color for color in LEVEL_COLORS.values() if f'"{color}"' in fixed], "the colour of a level"


@pytest.mark.parametrize("board", BOARDS.values(), ids=BOARDS.keys())
def test_panels_have_ids_of_their_own_and_do_not_overlap(board):
    ids = [each["id"] for each in board["panels"]] + [
        each["id"] for row in board["panels"] for each in row.get("panels", [])
    ]
    assert len(set(ids)) == len(ids)
    screens = [board["panels"], *(row["panels"] for row in board["panels"] if row["type"] == "row")]
    for screen in screens:
        for one, other in combinations([each["gridPos"] for each in screen], 2):
            assert (
                one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
                or one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
            )  # fmt: skip


def test_links_of_alerts_lead_to_panels_that_exist():
    links = re.findall(r"/d/([\w-]+)\?(?:viewPanel=(\d+))?", (ROOT / "alerts/ppo.rules.yml").read_text())
    ids = {uid: {each["id"] for each in panels(board)} for uid, board in BOARDS.items()}
    assert links and all(not panel_id or int(panel_id) in ids[uid] for uid, panel_id in links)


def test_a_run_dashboard_shows_one_run_and_a_fleet_dashboard_all_of_any_job():
    assert not variables(RUN)["run"]["multi"] and not variables(RUN)["run"]["includeAll"]
    assert all('run="$run"' in target["expr"] for _, target in queries(RUN)), "a name is no pattern"
    for board, names in ((RUN, ("job", "instance")), (FLEET, ("job", "run", "instance"))):
        for name in names:
            assert variables(board)[name]["current"]["value"] == "$__all" and variables(board)[name]["multi"]
    assert RUN["refresh"] == FLEET["refresh"] == "30s"


def test_the_first_screen_answers_without_scrolling_and_all_else_is_folded():
    first = {each["title"] for each in RUN["panels"] if each["gridPos"]["y"] + each["gridPos"]["h"] <= SCREEN}
    assert first == {
        *("Is it healthy, since when, and which head is it?", "Level now", "Gradient CV now", "CV ceiling"),
        *("At this level for", "Dominating head", "Most starved head", "Gradient CV", "Level over time"),
        *("Gradient steps by level", "Firing alerts", "Share of gradient steps by level", "Gradient norm per head"),
        *("Entropy per head", "Share of the gradient per head"),
    }
    below = [each for each in RUN["panels"] if each["title"] not in first]
    assert below and all(each["type"] == "row" and each["collapsed"] and each["panels"] for each in below)
    for title in ("Share of gradient steps by level", *(f"{of} per head" for of in ("Gradient norm", "Entropy"))):
        assert panel(RUN, title)["options"]["legend"]["displayMode"] == "list", "a table shows two of seven heads"


def test_levels_are_in_the_operators_words_and_colours():
    expected = {
        "-1": ("no update yet", "transparent"),
        "0": ("stable", "green"),
        "1": ("warn", "yellow"),
        "2": ("BAD", "red"),
    }

    def shown(mappings: list[dict]) -> dict:
        values = [item for each in mappings if each["type"] == "value" for item in each["options"].items()]
        return {value: (result["text"], result["color"]) for value, result in values}

    for title in ("Level now", "Level over time"):
        assert shown(panel(RUN, title)["fieldConfig"]["defaults"]["mappings"]) == expected
    assert shown(properties(panel(FLEET, "All runs"))["level"]["mappings"]) == expected
    assert shown(properties(panel(FLEET, "All runs"))["state"]["mappings"])["0"] == ("DOWN", "red")
    counted = [(RUN, "Gradient CV now"), (RUN, "Gradient steps by level"), (RUN, "Share of gradient steps by level")]
    for board, title in (*counted, (FLEET, "Runs by level"), (FLEET, "Runs by level now")):
        colors = {name: change["color"]["fixedColor"] for name, change in properties(panel(board, title)).items()}
        assert colors == LEVEL_COLORS


def test_the_cvs_colour_is_by_the_runs_own_thresholds():
    """No panel has 0.5 or 2.0 as a threshold; queries have them for runs that do not tell theirs."""
    steps = [step for each in PANELS for step in each["fieldConfig"]["defaults"].get("thresholds", {}).get("steps", [])]
    assert {step["value"] for step in steps} == {None, 1}
    assert not [change for each in PANELS for change in properties(each).values() if "thresholds" in change]
    lines = {target["legendFormat"]: target["expr"] for target in panel(RUN, "Gradient CV")["targets"]}
    for level, usual in (("warning", "0.5"), ("critical", "2.0")):
        assert (
            f'ppo_gradient_cv_threshold{{job=~"$job", run="$run", instance=~"$instance", level="{level}"}}'
            in lines[level]
        )
        assert f"or {usual} * count" in lines[level]
        assert properties(panel(RUN, "Gradient CV"))[level]["color"]["fixedColor"] == LEVEL_COLORS[level]


def test_nothing_and_nobody_are_no_green_yellow_or_red():
    nothing = panel(FLEET, "Runs by level now")["fieldConfig"]["defaults"]["mappings"]
    assert nothing[0]["options"]["0"]["color"] == nothing[1]["options"]["result"]["color"] == "transparent"
    for column in ("state", "level"):
        absent = properties(panel(FLEET, "All runs"))[column]["mappings"][-1]
        assert absent["options"]["match"] == "null" and absent["options"]["result"]["color"] == "transparent"
    base = panel(FLEET, "All runs")["fieldConfig"]["defaults"]["thresholds"]["steps"]
    assert base == [{"value": None, "color": "transparent"}]


def test_down_comes_first_then_stalled_then_the_worst():
    table = panel(FLEET, "All runs")
    order = [(by["displayName"], by["desc"]) for by in table["options"]["sortBy"]]
    assert order == [("state", False), ("level", True), ("CV", True)]
    columns = table["transformations"][-1]["options"]["renameByName"]
    read = {columns[f"Value #{target['refId']}"]: target["expr"] for target in table["targets"]}
    assert 'alertname="PPOTrainingStalled"' in read["state"] and "up{" in read["state"]
    assert columns["Value"] == "state" and "and run:ppo_gradient_level:max" in read["steps per second"]
    assert all(expr.startswith(("max without () (", "time() - ")) for expr in read.values()), (
        "no names, all other labels"
    )
    assert {"custom.width"} <= set(properties(table)["run"]) & set(properties(table)["last update"])


def test_a_single_worst_run_has_its_name():
    worst = panel(FLEET, "The ten worst runs now")
    assert worst["fieldConfig"]["defaults"]["displayName"] == "${__field.labels.run}"
    colors = {ref: change["color"]["fixedColor"] for ref, change in properties(worst).items()}
    assert colors == {"A": "red", "B": "yellow", "C": "green"}
    assert [target["expr"][-4:] for target in worst["targets"]] == ["== 2", "== 1", "== 0"]


def test_small_panels_do_not_cut_what_they_say():
    timeline, steps = panel(RUN, "Level over time")["options"], panel(RUN, "Gradient steps by level")
    assert timeline["perPage"] == 0 and not timeline["legend"]["showLegend"]
    assert steps["options"]["namePlacement"] == "top"
    assert all("increase(ppo_gradient_steps_total{" in target["expr"] for target in steps["targets"])
    (since,) = panel(RUN, "At this level for")["targets"]
    assert since["expr"].startswith("time() - ppo_gradient_level_since_timestamp_seconds{")
    assert panel(RUN, "CV per gradient step")["gridPos"]["h"] >= 14, "labels of 17 buckets"
    assert properties(panel(RUN, "Firing alerts"))["alert"]["custom.minWidth"] >= 240


def test_heads_have_a_colour_by_name_and_those_of_the_default_environment_seven_different_ones():
    assert HEAD_COLORS.keys() == set(ACTION_HEADS) and len(set(HEAD_COLORS.values())) == len(ACTION_HEADS)
    for title in ("Gradient norm per head", "Share of the gradient per head", "Non-finite and skipped gradient steps"):
        assert panel(RUN, title)["fieldConfig"]["defaults"]["color"]["mode"] == "palette-classic-by-name"
        assert properties(panel(RUN, title)).keys() == HEAD_COLORS.keys()


def test_a_click_on_a_run_opens_its_dashboard_with_its_variables_and_the_time_range():
    worst, table = panel(FLEET, "The ten worst runs now"), panel(FLEET, "All runs")
    for (link,) in (worst["fieldConfig"]["defaults"]["links"], properties(table)["run"]["links"]):
        parameters = parse_qs(urlsplit(link["url"]).query)
        assert urlsplit(link["url"]).path == f"/d/{RUN['uid']}" and link["url"].endswith("&${__url_time_range}")
        assert parameters.keys() == {f"var-{name}" for name in variables(RUN)}
        assert all(value.endswith(":percentencode}") for (value,) in parameters.values())
    organize = table["transformations"][-1]["options"]
    assert not {"job", "run", "instance"} & (organize["excludeByName"].keys() | organize["renameByName"].keys())


def test_alerts_are_marked_on_the_cv_panel_alone():
    marks = {mark["iconColor"]: mark for mark in RUN["annotations"]["list"]}
    assert marks.keys() == {"red", "yellow"}
    for mark in marks.values():
        assert mark["filter"] == {"ids": [panel(RUN, "Gradient CV")["id"]], "exclude": False}


def test_variables_ask_for_labels_of_series():
    for board in BOARDS.values():
        for name, variable in list(variables(board).items())[1:]:
            series = re.fullmatch(rf"label_values\((.+), {name}\)", variable["query"])[1]
            assert promql_parser.parse(re.sub(r"\$\w+", ".+", series)).name == "ppo_gradient_cv"


@pytest.mark.filterwarnings("ignore:Prefer using dashboardv2:DeprecationWarning")
@pytest.mark.parametrize("board", BOARDS.values(), ids=BOARDS.keys())
def test_grafanas_schema_knows_every_key(board):
    """Grafana ignores a key that it does not know; so does its SDK, which then does not write it again."""
    from grafana_foundation_sdk.cog import plugins
    from grafana_foundation_sdk.cog.encoder import JSONEncoder
    from grafana_foundation_sdk.models.dashboard import Dashboard  # warns that there is a newer format

    plugins.register_default_plugins()
    known = json.loads(JSONEncoder(sort_keys=False).encode(Dashboard.from_json(copy.deepcopy(board))))

    def lost(ours: object, theirs: object, at: str) -> list[str]:
        if isinstance(ours, dict) and isinstance(theirs, dict):
            return [where for key, value in ours.items() for where in lost(value, theirs.get(key), f"{at}.{key}")]
        if isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
            return [where for pair in zip(ours, theirs) for where in lost(*pair, at)]
        return [] if ours == theirs else [at]

    assert lost(board, known, "") == []
