"""Grafana's provisioning files hold only keys that Grafana reads, and point at things that exist.

Grafana silently ignores a key that it does not know, so a wrong one would go unnoticed. Grafana itself does not
run here: the keys are those that its documentation of file provisioning lists.
"""

import json
import re

import yaml

from exporter.health import CRITICAL_THRESHOLD, WARNING_THRESHOLD
from mixin.__main__ import REPOSITORY

PROVISIONING = REPOSITORY / "grafana/provisioning"
KEYS = {
    "datasource": {
        *("name", "type", "uid", "access", "url", "isDefault", "jsonData", "orgId", "editable", "version"),
    },
    "provider": {
        *("name", "orgId", "folder", "folderUid", "type", "disableDeletion", "allowUiUpdates"),
        *("updateIntervalSeconds", "options"),
    },
    "group": {"orgId", "name", "folder", "interval", "rules"},
    "rule": {
        *("uid", "title", "condition", "data", "dashboardUid", "panelId", "noDataState", "execErrState", "for"),
        *("annotations", "labels", "isPaused"),
    },
    "query": {"refId", "queryType", "relativeTimeRange", "datasourceUid", "model"},
    "contact point": {"orgId", "name", "receivers"},
    "receiver": {"uid", "type", "settings", "disableResolveMessage"},
    "policy": {
        *("orgId", "receiver", "group_by", "matchers", "object_matchers", "group_wait", "group_interval"),
        *("repeat_interval", "routes", "mute_time_intervals"),
    },
}


def load(path: str) -> dict:
    document = yaml.safe_load((PROVISIONING / path).read_text())
    assert document["apiVersion"] == 1
    return document


ALERTING = load("alerting/ppo.yml")
RULES = [rule for group in ALERTING["groups"] for rule in group["rules"]]
PROMETHEUS_RULES = {
    (rule["alert"], rule["labels"]["severity"]): rule
    for group in yaml.safe_load((REPOSITORY / "alerts/ppo.rules.yml").read_text())["groups"]
    for rule in group["rules"]
    if "alert" in rule
}
UIDS = {datasource["uid"]: datasource for datasource in load("datasources/ppo.yml")["datasources"]}


def seconds(duration: str) -> int:
    return int(duration[:-1]) * {"s": 1, "m": 60}[duration[-1]]


def test_only_keys_that_grafana_reads():
    assert set(ALERTING) == {"apiVersion", "groups", "contactPoints", "policies"}
    things = [
        *(("datasource", datasource) for datasource in UIDS.values()),
        *(("provider", provider) for provider in load("dashboards/ppo.yml")["providers"]),
        *(("group", group) for group in ALERTING["groups"]),
        *(("rule", rule) for rule in RULES),
        *(("query", query) for rule in RULES for query in rule["data"]),
        *(("contact point", point) for point in ALERTING["contactPoints"]),
        *(("receiver", receiver) for point in ALERTING["contactPoints"] for receiver in point["receivers"]),
        *(("policy", policy) for policy in ALERTING["policies"]),
    ]
    for kind, thing in things:
        assert set(thing) <= KEYS[kind], f"{kind}: {set(thing) - KEYS[kind]}"


def test_the_two_thresholds_are_those_of_the_exporter():
    conditions = {
        rule["labels"]["severity"]: next(query for query in rule["data"] if query["refId"] == rule["condition"])
        for rule in RULES
        if rule["title"] == "PPOGradientCVHigh"
    }
    assert {severity: query["model"]["expression"] for severity, query in conditions.items()} == {
        "warning": f"$B >= {WARNING_THRESHOLD}",
        "critical": f"$B >= {CRITICAL_THRESHOLD}",
    }


def test_every_alert_of_prometheus_is_there_once_with_its_condition():
    assert {(rule["title"], rule["labels"]["severity"]) for rule in RULES} == set(PROMETHEUS_RULES)
    assert len(RULES) == len(PROMETHEUS_RULES)
    for rule in RULES:
        (condition,) = (query["model"] for query in rule["data"] if query["refId"] == rule["condition"])
        expression = PROMETHEUS_RULES[rule["title"], rule["labels"]["severity"]]["expr"]
        assert expression.endswith(condition["expression"].removeprefix("$B"))


def test_rules_need_nothing_that_prometheus_records():
    for rule in RULES:
        (expression,) = (query["model"]["expr"] for query in rule["data"] if "expr" in query["model"])
        assert ":" not in re.sub(r"\[\w+:\w+\]", "", expression) and "ALERTS" not in expression


def test_rule_titles_are_unique_in_their_folder():
    places = [(group["folder"], rule["title"]) for group in ALERTING["groups"] for rule in group["rules"]]
    assert len(set(places)) == len(places)
    assert len({(group["folder"], group["name"]) for group in ALERTING["groups"]}) == len(ALERTING["groups"])
    assert len({rule["uid"] for rule in RULES}) == len(RULES)
    assert all(re.fullmatch(r"[a-z0-9-]{1,40}", rule["uid"]) for rule in RULES)


def test_states_and_references_are_those_that_grafana_knows():
    for rule in RULES:
        assert rule["noDataState"] == "OK", "a run that has ended cleanly has no data"
        assert rule["execErrState"] in ("Alerting", "Error", "OK", "KeepLast")
        references = [query["refId"] for query in rule["data"]]
        assert len(set(references)) == len(references) and rule["condition"] in references
        for query in rule["data"]:
            assert query["model"]["refId"] == query["refId"]
            if query["model"].get("type") == "reduce":
                assert query["model"]["expression"] in references


def test_rules_point_at_a_data_source_a_panel_and_a_runbook_that_exist():
    for rule in RULES:
        assert {query["datasourceUid"] for query in rule["data"]} <= {*UIDS, "__expr__"}
        board = json.loads((REPOSITORY / f"grafana/dashboards/{rule['dashboardUid']}.json").read_text())
        assert rule["panelId"] in [panel["id"] for panel in board["panels"]]
        assert rule["annotations"]["__dashboardUid__"] == rule["dashboardUid"]
        assert rule["annotations"]["__panelId__"] == str(rule["panelId"])
        assert (REPOSITORY / rule["annotations"]["runbook_url"]).is_file()
        assert f"/d/{rule['dashboardUid']}?" in rule["annotations"]["dashboard_url"]


def test_annotations_hold_no_dollar_that_grafana_would_expand_as_environment():
    for rule in RULES:
        assert not [text for text in (*rule["annotations"].values(), *rule["labels"].values()) if "$" in text]


def test_templates_use_only_what_grafana_offers():
    """`query`, which Prometheus' templates have, is not there; values go by the reference of a query."""
    words = {"if", "else", "end", "printf", "humanizeDuration", "urlquery"}
    for rule in RULES:
        references = {query["refId"] for query in rule["data"]}
        for text in rule["annotations"].values():
            for action in re.findall(r"{{(.+?)}}", text):
                fields = re.findall(r"\.[A-Z][\w.]*", action)
                assert all(re.fullmatch(r"\.Labels\.\w+|\.Values\.[A-Z]\.Value", field) for field in fields)
                assert {field.split(".")[2] for field in fields if "Values" in field} <= references
                rest = re.sub(r'"[^"]*"|\.[A-Z][\w.]*', "", action)
                assert set(re.findall(r"\w+", rest)) <= words


def test_policy_sends_to_the_alertmanager_and_again_before_it_forgets():
    (policy,), (point,) = ALERTING["policies"], ALERTING["contactPoints"]
    assert policy["receiver"] == point["name"]
    assert point["receivers"][0]["type"] == "prometheus-alertmanager"
    assert point["receivers"][0]["settings"]["url"] == UIDS["alertmanager"]["url"]
    alertmanager = yaml.safe_load((REPOSITORY / "alerts/alertmanager.yml").read_text())
    assert seconds(policy["repeat_interval"]) < seconds(alertmanager["global"]["resolve_timeout"])


def test_grafana_managed_alerts_begin_after_and_end_before_those_of_prometheus():
    """Otherwise the inhibition rule of Alertmanager would leave a gap, and a second notification."""
    interval = max(seconds(group["interval"]) for group in ALERTING["groups"])
    (policy,) = ALERTING["policies"]
    for rule in RULES:
        twin = PROMETHEUS_RULES[rule["title"], rule["labels"]["severity"]]
        assert seconds(rule["for"]) >= seconds(twin.get("for", "0s")) + interval
        assert seconds(twin["keep_firing_for"]) > interval + seconds(policy["group_interval"])
        assert not {key for key in rule if "keep" in key.lower()}, "it would outlast Prometheus' alert"


def test_grafana_knows_the_scrape_interval_from_which_it_derives_the_rate_interval():
    prometheus = yaml.safe_load((REPOSITORY / "prometheus.yml").read_text())
    assert UIDS["prometheus"]["jsonData"]["timeInterval"] == prometheus["global"]["scrape_interval"]
