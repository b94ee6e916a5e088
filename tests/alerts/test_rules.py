"""The alert rules, checked and tested by promtool, and what they refer to."""

import re
import subprocess

import yaml

from exporter.health import CRITICAL_THRESHOLD, WARNING_THRESHOLD
from mixin.__main__ import REPOSITORY

ALERTS = REPOSITORY / "alerts"
GROUPS = yaml.safe_load((ALERTS / "ppo.rules.yml").read_text())["groups"]
RULES = [rule for group in GROUPS for rule in group["rules"] if "alert" in rule]
RECORDS = [rule for group in GROUPS for rule in group["rules"] if "record" in rule]


def run(*command: object) -> None:
    done = subprocess.run([str(part) for part in command], cwd=ALERTS, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_rules_pass_promtool(servers):
    run(servers.promtool, "check", "rules", "--lint-fatal", "ppo.rules.yml")


def test_unit_tests_of_the_rules_pass(servers):
    run(servers.promtool, "test", "rules", "ppo.rules.test.yml")


def test_every_alert_has_cases_in_which_it_fires_and_in_which_it_stays_silent():
    tests = yaml.safe_load((ALERTS / "ppo.rules.test.yml").read_text())["tests"]
    fires, silent, recorded = set(), set(), set()
    for test in tests:
        for case in test.get("alert_rule_test", []):
            fires |= {(case["alertname"], alert["exp_labels"]["severity"]) for alert in case["exp_alerts"]}
        for case in test.get("promql_expr_test", []):
            if case["expr"].startswith("ALERTS{"):
                name = case["expr"].split('"')[1]
                states = "".join(sample["labels"] for sample in case["exp_samples"])
                severities = {rule["labels"]["severity"] for rule in RULES if rule["alert"] == name}
                silent |= {(name, severity) for severity in severities if f'severity="{severity}"' not in states}
            elif case["exp_samples"]:
                recorded |= {rule["record"] for rule in RECORDS if rule["record"] in case["expr"]}
    alerts = {(rule["alert"], rule["labels"]["severity"]) for rule in RULES}
    assert fires == silent == alerts
    assert recorded == {rule["record"] for rule in RECORDS}


def test_recorded_series_come_first_and_are_named_level_metric_operation():
    for group in GROUPS:
        kinds = ["record" in rule for rule in group["rules"]]
        assert kinds == sorted(kinds, reverse=True)
    for rule in RECORDS:
        level, metric, operation = rule["record"].split(":")
        assert level.startswith("job_instance_run") and metric.startswith("ppo_") and operation
        windows = set(re.findall(r"\[(\w+)\]", rule["expr"]))
        assert windows == set(re.findall(r"\d+[smh]$", operation)), "the window is part of the name"


def test_cv_thresholds_are_those_of_the_exporter():
    conditions = {
        rule["labels"]["severity"]: rule["expr"].split("} ")[-1]
        for rule in RULES
        if rule["alert"] == "PPOGradientCVHigh"
    }
    assert conditions == {"warning": f">= {WARNING_THRESHOLD}", "critical": f">= {CRITICAL_THRESHOLD}"}


def test_every_alert_says_who_what_and_what_to_do():
    for rule in RULES:
        annotations = rule["annotations"]
        assert "$labels.run" in annotations["summary"] and "$labels.run" in annotations["description"]
        assert rule["labels"]["severity"] in ("info", "warning", "critical")
        assert (REPOSITORY / annotations["runbook_url"]).is_file()
        assert "/d/ppo-gradient-health?" in annotations["dashboard_url"]


def test_alerts_about_the_gradient_name_level_and_dominating_head():
    about_the_run = {"PPOTrainerDown", "PPOTrainingStalled", "PPOCriticalThresholdUnreachable"}
    for rule in RULES:
        description = rule["annotations"]["description"]
        if rule["alert"] not in about_the_run:
            assert "ppo_gradient_cv:max{" in description or "Gradient CV" in rule["annotations"]["summary"]
            # Non-finite gradients name the head that had them.
            assert "dominates with a share" in description or "$labels.head" in description


def test_alertmanager_configuration_passes_amtool(servers):
    run(servers.amtool, "check-config", "alertmanager.yml")


def test_commented_receivers_are_valid_once_uncommented(servers, tmp_path):
    text = (ALERTS / "alertmanager.yml").read_text()
    complete = tmp_path / "alertmanager.yml"
    complete.write_text(text.replace("\n  # - ", "\n  - ").replace("\n  #   ", "\n    "))
    names = [receiver["name"] for receiver in yaml.safe_load(complete.read_text())["receivers"]]
    assert names == ["pager", "team", "slack", "e-mail"]
    run(servers.amtool, "check-config", complete)
