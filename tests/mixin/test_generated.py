"""What is committed is what the declarations give, here and in a folder of the user's choice."""

import subprocess
import sys
from pathlib import Path

import yaml

from mixin.__main__ import REPOSITORY, main


def test_committed_files_are_those_that_the_declarations_give(capsys):
    status = main(["--check"])
    assert status == 0, f"run `python -m mixin`:\n{capsys.readouterr().out}"


def test_check_lists_what_differs_and_writes_nothing(tmp_path: Path, capsys):
    main(["--output", str(tmp_path)])
    changed = tmp_path / "alerts/ppo.rules.yml"
    changed.write_text("groups: []\n")
    capsys.readouterr()
    assert main(["--output", str(tmp_path), "--check"]) == 1
    assert capsys.readouterr().out.splitlines() == ["alerts/ppo.rules.yml: differs"]
    assert changed.read_text() == "groups: []\n"


def test_another_site_gets_a_complete_set_whose_own_rule_tests_pass(tmp_path: Path, servers):
    options = {
        "--job": "rl-training",
        "--prometheus-url": "http://prometheus.example:9090",
        "--alertmanager-url": "http://alertmanager.example:9093",
        "--runbook-base-url": "https://runbooks.example/ppo/",
        "--dashboards-path": "/srv/dashboards",
    }
    arguments = [text for option in options.items() for text in option]
    subprocess.run([sys.executable, "-m", "mixin", "--output", str(tmp_path), *arguments], check=True, cwd=REPOSITORY)
    alerts = tmp_path / "alerts"
    subprocess.run([servers.promtool, "test", "rules", "ppo.rules.test.yml"], check=True, cwd=alerts)
    rules = (alerts / "ppo.rules.yml").read_text()
    assert 'job="rl-training"' in rules and 'job="ppo"' not in rules
    assert "https://runbooks.example/ppo/PPOTrainerDown.md" in rules
    provisioning = tmp_path / "grafana/provisioning"
    datasources = yaml.safe_load((provisioning / "datasources/ppo.yml").read_text())["datasources"]
    assert [datasource["url"] for datasource in datasources] == [
        "http://prometheus.example:9090",
        "http://alertmanager.example:9093",
    ]
    provider = yaml.safe_load((provisioning / "dashboards/ppo.yml").read_text())["providers"][0]
    assert provider["options"]["path"] == "/srv/dashboards"
