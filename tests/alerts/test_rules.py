"""The rules and routes, checked and tested by the servers' own tools."""

import re
import subprocess
from pathlib import Path

import pytest
import yaml
from conftest import every_servers

from exporter.health import CRITICAL_THRESHOLD, STALLED_INTERVALS, STALLED_SECONDS, WARNING_THRESHOLD
from exporter.link import PUSH_JOB
from exporter.metrics import METRIC_FAMILIES
from stack.servers import ROOT

ALERTS = ROOT / "alerts"
RULES = [rule for group in yaml.safe_load((ALERTS / "ppo.rules.yml").read_text())["groups"] for rule in group["rules"]]
OF_ALERTS = [rule for rule in RULES if "alert" in rule]


def run(*command: object) -> str:
    done = subprocess.run([str(part) for part in command], cwd=ALERTS, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@every_servers
def test_rules_and_their_unit_tests_pass(servers):
    run(servers.promtool, "check", "rules", "--lint-fatal", "ppo.rules.yml")
    run(servers.promtool, "test", "rules", "ppo.rules.test.yml")


def test_every_alert_has_a_case_in_which_it_fires_with_its_texts():
    tests = yaml.safe_load((ALERTS / "ppo.rules.test.yml").read_text())["tests"]
    fires = {
        (case["alertname"], alert["exp_labels"]["severity"])
        for test in tests
        for case in test.get("alert_rule_test", [])
        for alert in case["exp_alerts"]
    }
    assert fires == {(rule["alert"], rule["labels"]["severity"]) for rule in OF_ALERTS}


def test_rules_name_metrics_that_exist_and_the_exporters_thresholds():
    served = {family.name for family in METRIC_FAMILIES}
    recorded = {rule["record"] for rule in RULES if "record" in rule}
    expressions = "\n".join(rule["expr"] for rule in RULES)
    assert set(re.findall(r"\b\w+:ppo_\w+:\w+", expressions)) <= recorded
    names = set(re.findall(r"(?<!:)\bppo_\w+(?!\w*:)", expressions))
    assert {re.sub("_count$", "", name) for name in names - {PUSH_JOB}} <= served and PUSH_JOB in names
    for level, threshold in (("warning", WARNING_THRESHOLD), ("critical", CRITICAL_THRESHOLD)):
        (rule,) = (rule for rule in RULES if rule.get("record") == f"run:ppo_gradient_cv_threshold:{level}")
        assert f"or {threshold} * count" in rule["expr"]


def test_the_limits_of_a_stall_are_multiples_of_the_update_interval_as_the_endpoint_has_it():
    (expression,) = (rule["expr"] for rule in OF_ALERTS if rule["alert"] == "PPOTrainingStalled")
    limits = [int(limit) for limit in re.findall(r"(\d+) \+ 0", expression)]
    bounds = [int(bound) for bound in re.findall(r"interval_seconds (?:<=|>) (\d+)", expression)]
    assert limits[0] == STALLED_SECONDS
    assert limits == [STALLED_INTERVALS * bound for bound in (*bounds, 4320)]
    windows = re.findall(r"ppo_updates_total offset (\d+)([mh])", expression)
    assert [int(number) * {"m": 60, "h": 3600}[unit] for number, unit in windows] == limits


@every_servers
def test_alertmanagers_configuration_passes_with_all_receivers_that_it_offers(servers, tmp_path: Path):
    text = (ALERTS / "alertmanager.yml").read_text()
    run(servers.amtool, "check-config", "alertmanager.yml")
    complete = tmp_path / "alertmanager.yml"
    complete.write_text(text.replace("\n  # - ", "\n  - ").replace("\n  #   ", "\n    "))
    names = [receiver["name"] for receiver in yaml.safe_load(complete.read_text())["receivers"]]
    assert names == ["pager", "team", "nobody", "slack", "pagerduty", "e-mail"]
    run(servers.amtool, "check-config", complete)


@pytest.mark.parametrize(
    ("labels", "receiver"),
    [
        *(
            (
                {"alertname": rule["alert"], **rule["labels"], "job": "ppo", "instance": "a:1", "run": "demo"},
                {"critical": "pager", "none": "nobody"}.get(rule["labels"]["severity"], "team"),
            )
            for rule in OF_ALERTS
        ),
        ({"alertname": "Disk", "severity": "critical"}, "pager"),
        ({"alertname": "Fan"}, "team"),
    ],
    ids=lambda value: value if isinstance(value, str) else f"{value['alertname']}-{value.get('severity')}",
)
def test_critical_alerts_reach_the_pager_and_all_others_the_team(servers, labels, receiver):
    pairs = [f"{name}={value}" for name, value in labels.items()]
    routed = run(servers.amtool, "config", "routes", "test", "--config.file=alertmanager.yml", *pairs)
    assert routed.strip() == receiver
