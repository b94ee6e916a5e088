"""Provisioning changes nothing else at a site, names existing files, and has only keys that Grafana documents.

Grafana ignores a key that it does not know, so a wrong one would go unnoticed.
"""

import re

import yaml
from boards import BOARDS, ROOT, panels
from promql_parser import parse

PROVISIONING = ROOT / "grafana/provisioning"
KEYS = {
    "datasources": {"name", "type", "uid", "access", "url", "isDefault", "jsonData", "orgId", "editable", "version"},
    "providers": {
        *("name", "orgId", "folder", "folderUid", "type", "disableDeletion", "allowUiUpdates"),
        *("updateIntervalSeconds", "options"),
    },
    "groups": {"orgId", "name", "folder", "interval", "rules"},
    "rules": {
        *("uid", "title", "condition", "data", "dashboardUid", "panelId", "noDataState", "execErrState", "for"),
        *("annotations", "labels", "isPaused"),
    },
    "data": {"refId", "queryType", "relativeTimeRange", "datasourceUid", "model"},
}


def load(path: str, key: str) -> list[dict]:
    """What the file provisions: things of one kind, with only known keys, and nothing else."""
    document = yaml.safe_load((PROVISIONING / path).read_text())
    assert document.pop("apiVersion") == 1 and list(document) == [key], "no contact points, policies or deletions"
    for kind in ("rules", "data"):
        document[kind] = [each for things in document.values() for thing in things for each in thing.get(kind, [])]
    for kind, things in document.items():
        assert not [unknown for thing in things for unknown in set(thing) - KEYS[kind]]
    return document[key]


def test_the_data_source_is_one_of_its_own_and_no_default():
    (datasource,) = load("datasources/ppo.yml", "datasources")
    assert (datasource["name"], datasource["uid"], datasource["type"]) == (
        "PPO Prometheus",
        "ppo-prometheus",
        "prometheus",
    )
    assert not datasource["isDefault"] and "timeInterval" not in datasource["jsonData"]


def test_the_provider_takes_no_dashboard_away():
    (provider,) = load("dashboards/ppo.yml", "providers")
    assert provider["type"] == "file" and provider["disableDeletion"]
    assert provider["options"] == {"path": "$PPO_DASHBOARDS_PATH"}


def test_the_only_rules_are_those_of_the_cvs_two_thresholds():
    (group,) = load("alerting/ppo.yml", "groups")
    assert [rule["labels"] for rule in group["rules"]] == [{"severity": "warning"}, {"severity": "critical"}]
    for rule, usual in zip(group["rules"], (0.5, 2.0), strict=True):
        assert (rule["noDataState"], rule["execErrState"]) == ("OK", "KeepLast")
        query, condition = rule["data"]
        assert query["datasourceUid"] == "ppo-prometheus" and query["model"]["instant"]
        assert parse(query["model"]["expr"])
        assert f'level="{rule["labels"]["severity"]}"' in query["model"]["expr"]
        assert f"or {usual} * count" in query["model"]["expr"]
        assert condition["refId"] == rule["condition"] and condition["model"]["expression"] == query["refId"]
        assert rule["panelId"] in {panel["id"] for panel in panels(BOARDS[rule["dashboardUid"]])}
        links = rule["annotations"]["__dashboardUid__"], rule["annotations"]["__panelId__"]
        assert links == (rule["dashboardUid"], str(rule["panelId"]))


def test_rules_do_not_pass_for_those_of_prometheus():
    """An Alertmanager that gets both must not take one for the other."""
    (group,) = load("alerting/ppo.yml", "groups")
    names = set(re.findall(r"- alert: (\w+)", (ROOT / "alerts/ppo.rules.yml").read_text()))
    titles = {rule["title"] for rule in group["rules"]}
    assert len(titles) == 2 and names and not titles & names


def test_texts_hold_no_dollar_that_grafana_would_take_for_an_environment_variable():
    (group,) = load("alerting/ppo.yml", "groups")
    assert "$" not in str(group)
