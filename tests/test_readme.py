"""The README's metrics, alerts and levels agree with the code."""

import re

import yaml

from exporter import CRITICAL_THRESHOLD, WARNING_THRESHOLD, HealthLevel
from exporter.metrics import METRIC_FAMILIES
from stack.configuration import Ports
from stack.servers import ROOT

README = (ROOT / "README.md").read_text()
RULES = [
    rule for group in yaml.safe_load((ROOT / "alerts/ppo.rules.yml").read_text())["groups"] for rule in group["rules"]
]


def rows(table: str) -> list[list[str]]:
    block = README.split(f"<!-- {table}:")[1].split(f"<!-- end of {table}")[0]
    lines = [line for line in block.splitlines() if line.startswith("|")][2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_the_metric_table_lists_every_family_with_type_and_labels():
    listed = [
        (name.strip("`"), kind, tuple(re.findall(r"`(\w+)`", labels))) for name, kind, labels, _ in rows("metrics")
    ]
    assert listed == [(family.name, family.kind, family.labels) for family in METRIC_FAMILIES]


def test_the_alert_table_lists_every_alert_with_its_severities_and_runbook():
    severities: dict[str, list[str]] = {}
    for rule in RULES:
        if "alert" in rule:
            severities.setdefault(rule["alert"], []).append(rule["labels"]["severity"])
    listed = {}
    for link, severity, _ in rows("alerts"):
        name, path = re.fullmatch(r"\[(\w+)\]\((.+)\)", link).groups()
        assert (ROOT / path).read_text().startswith(f"# {name}\n")
        listed[name] = sorted(severity.split(", "))
    assert listed == {name: sorted(each) for name, each in severities.items()}


def test_the_alert_table_names_no_number_that_the_rules_do_not_have():
    recorded = {rule["record"]: rule["expr"] for rule in RULES if "record" in rule}
    for link, _, said in rows("alerts"):
        rules = [rule for rule in RULES if f"[{rule.get('alert')}]" in link]
        text = " ".join(f"{rule['expr']} {rule.get('for', '')}" for rule in rules)
        text = " ".join([text, *(expression for name, expression in recorded.items() if name in text)])
        # "5 minutes" is 5m.
        numbers = {number + unit[:1] for number, unit in re.findall(r"\b(\d[\d.]*)(?: (minute|hour|day))?", said)}
        assert numbers <= set(re.findall(r"\b\d[\d.]*[mhd]?\b", text)), link


def test_the_alert_table_says_for_how_long_a_cv_must_be_high():
    ((_, _, said),) = (row for row in rows("alerts") if "[PPOGradientCVHigh]" in row[0])
    rules = {rule["labels"]["severity"]: rule for rule in RULES if rule.get("alert") == "PPOGradientCVHigh"}
    assert f"at least {CRITICAL_THRESHOLD} for {rules['critical']['for'][:-1]} minute" in said
    (minutes,) = re.findall(r"min_over_time\(run:ppo_gradient_cv:max\[(\d+)m\]\)", rules["warning"]["expr"])
    assert f"at least {WARNING_THRESHOLD} for {minutes} minutes" in said


def test_links_of_alerts_name_the_port_of_the_stacks_grafana():
    links = [rule["annotations"].get("dashboard_url") for rule in RULES if "alert" in rule]
    assert {link.partition("/d/")[0] for link in links if link} == {Ports().url("grafana")}


def test_levels_and_ports_are_those_of_the_code():
    levels = [line for line in README.splitlines() if re.match(r"\| (healthy|warning|critical) \|", line)]
    bounds = [re.findall(r"\d\.\d(?!\d)", line.split("|")[2]) for line in levels]
    assert bounds == [
        [f"{WARNING_THRESHOLD}"],
        [f"{WARNING_THRESHOLD}", f"{CRITICAL_THRESHOLD}"],
        [f"{CRITICAL_THRESHOLD}"],
    ]
    for line, level in zip(levels, HealthLevel, strict=True):
        assert f"| {level} |" in line and f"{level.word}`, {level.color}" in line
    for port in vars(Ports()).values():
        assert f":{port}" in README
