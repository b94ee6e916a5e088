"""Prometheus and Alertmanager accept the configurations that docs/alerting.md tells people to copy and write."""

import re
import subprocess
import textwrap
from pathlib import Path

import pytest
import yaml

from stack.servers import ROOT

PAGE = (ROOT / "docs/alerting.md").read_text()
ROUTES = (ROOT / "alerts/alertmanager.yml").read_text()


def recipes(first_line: str) -> list[str]:
    """Blocks of code that begin with this line."""
    found = re.findall(r"^( *```\w*\n.*?)^ *```$", PAGE, re.MULTILINE | re.DOTALL)
    bodies = [textwrap.dedent(block).partition("\n")[2] for block in found]
    return [body for body in bodies if body.startswith(first_line)]


def passes(*command: str | Path) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


def routed_to(servers, configuration: Path, *labels: str) -> str:
    passes(servers.amtool, "check-config", configuration)
    return passes(servers.amtool, "config", "routes", "test", f"--config.file={configuration}", *labels)


# Prometheus 2.42 does not know `scrape_config_files`.
@pytest.mark.parametrize("servers", ["newest"], indirect=True)
def test_the_copied_files_are_a_configuration(servers, tmp_path: Path):
    (commands,) = recipes("mkdir")
    subprocess.run(["sh", "-euc", commands.replace("/etc/", f"{tmp_path}/")], cwd=ROOT, check=True)
    configuration = tmp_path / "prometheus/prometheus.yml"
    configuration.write_text(recipes("# prometheus.yml\nrule_files")[0])
    assert "rules found" in passes(servers.promtool, "check", "config", configuration)
    assert routed_to(servers, tmp_path / "alertmanager/alertmanager.yml", "alertname=PPOHeadDead") == "team"


def test_recipes_for_prometheus_pass_promtool(servers, tmp_path: Path):
    for first_line, check in (
        ("# prometheus.yml\nglobal", ["config"]),
        ("# prometheus.yml of the agent", ["config", "--agent"]),
        ("# rules", ["rules"]),
    ):
        (recipe,) = recipes(first_line)
        (tmp_path / "recipe.yml").write_text(recipe)
        passes(servers.promtool, "check", *check, tmp_path / "recipe.yml")


def test_the_agent_lets_no_trainer_forge_labels_either():
    agent = yaml.safe_load(recipes("# prometheus.yml of the agent")[0])["scrape_configs"][0]
    (job,) = yaml.safe_load((ROOT / "ppo.scrape.yml").read_text())["scrape_configs"]
    assert agent["metric_relabel_configs"] == job["metric_relabel_configs"]


def test_slack_and_pagerduty_take_the_places_of_team_and_pager(servers, tmp_path: Path):
    text = ROUTES.replace("\n  # - ", "\n  - ").replace("\n  #   ", "\n    ")
    text = text.replace("receiver: team\n", "receiver: slack\n").replace("receiver: pager\n", "receiver: pagerduty\n")
    (configuration := tmp_path / "alertmanager.yml").write_text(text)
    assert routed_to(servers, configuration, "alertname=PPOHeadDead", "severity=warning") == "slack"
    assert routed_to(servers, configuration, "alertname=PPOTrainerDown", "severity=critical") == "pagerduty"
    assert routed_to(servers, configuration, "alertname=PPONonFiniteGradients", "severity=critical") == "pagerduty"


def test_the_watchdog_goes_to_the_dead_mans_switch(servers, tmp_path: Path):
    routes, recipe = yaml.safe_load(ROUTES), yaml.safe_load(recipes("# alertmanager.yml")[0])
    (watchdog,) = recipe["route"]["routes"]
    places = [route["matchers"] for route in routes["route"]["routes"]]
    routes["route"]["routes"][places.index(watchdog["matchers"])] = watchdog
    routes["receivers"] += recipe["receivers"]
    (configuration := tmp_path / "alertmanager.yml").write_text(yaml.safe_dump(routes))
    assert routed_to(servers, configuration, "alertname=PPOWatchdog", "severity=none") == "dead-mans-switch"
