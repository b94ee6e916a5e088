"""What the README says of metrics, alerts and levels is what the code does."""

import re

from exporter import CRITICAL_THRESHOLD, WARNING_THRESHOLD, HealthLevel
from exporter.metrics import METRIC_FAMILIES
from mixin.alerts import alerts
from mixin.config import MixinConfig
from stack.configuration import Ports
from stack.servers import ROOT

README = (ROOT / "README.md").read_text()


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
    for alert in alerts(MixinConfig()):
        severities.setdefault(alert.name, []).append(alert.severity)
    listed = {}
    for link, severity, _ in rows("alerts"):
        name, path = re.fullmatch(r"\[(\w+)\]\((.+)\)", link).groups()
        assert (ROOT / path).read_text().startswith(f"# {name}\n")
        listed[name] = severity.split(", ")
    assert listed == severities


def test_the_alert_table_names_the_numbers_that_the_rules_use():
    config = MixinConfig()
    declared = {(alert.name, alert.severity): alert for alert in alerts(config)}
    said = {re.match(r"\[(\w+)\]", link).group(1): text for link, _, text in rows("alerts")}
    for severity, threshold in (("warning", WARNING_THRESHOLD), ("critical", CRITICAL_THRESHOLD)):
        minutes = declared["PPOGradientCVHigh", severity].hold // 60
        assert re.search(rf"at least {threshold} for {minutes} minute", said["PPOGradientCVHigh"])
    assert f"{config.critical_step_share} of the gradient steps of 10 minutes" in said["PPOCriticalGradientSteps"]
    assert "[10m]" in declared["PPOCriticalGradientSteps", "warning"].value
    assert f"{config.skipped_step_share} of the gradient steps" in said["PPONonFiniteGradients"]
    starved = declared["PPOHeadStarved", "warning"].hold // 60
    assert f"less than {config.starved_part} of an equal part for {starved} minutes" in said["PPOHeadStarved"]
    assert f"{config.stalled_seconds} seconds" in said["PPOTrainingStalled"]
    assert f"above {CRITICAL_THRESHOLD}" in said["PPOCriticalThresholdUnreachable"]


def test_the_generated_files_name_the_ports_of_the_stack():
    for name in ("prometheus", "alertmanager"):
        assert getattr(MixinConfig(), f"{name}_url") == Ports().url(name)


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
