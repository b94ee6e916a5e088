"""A site's own settings: checked, and carried into every file."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from mixin.__main__ import generate, main
from mixin.config import CV_CRITICAL, STALLED, MixinConfig, parse_duration

# As far from the defaults as it goes: other thresholds, no waiting or long waiting, a name that must be quoted.
SITE = """\
job: "rl \\\"training\\\"\\n\\\\d"
warning-threshold: 0.8
critical-threshold: 1.5
critical-step-share: 0.03
skipped-step-share: 0.002
starved-part: 0.35
stalled-after: 7m
grafana-url: https://grafana.example/ops/
pager-webhook-url: https://pager.example/hook
for:
  PPOGradientCVHigh/warning: 8m
  PPOGradientCVHigh/critical: 45s
  PPOCriticalGradientSteps: 1m
  PPONonFiniteGradients/warning: 2m
  PPOHeadStarved: 0
  PPOTrainerDown: 4m
  PPOTrainingStalled: 3m
  PPOCriticalThresholdUnreachable: 0
keep-firing-for:
  PPOGradientCVHigh/critical: 11m
  PPONonFiniteGradients: 70s
  PPOTrainerDown: 15m
"""


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """Folder with the files of a site."""
    settings = tmp_path / "site.yml"
    settings.write_text(SITE)
    command_line = ["--for", "PPOTrainerDown=7m", "--for", "PPONonFiniteGradients=1m"]
    assert main(["--config", str(settings), *command_line, "--output", str(tmp_path / "site")]) == 0
    return tmp_path / "site"


def load(path: Path) -> dict:
    return yaml.safe_load(path.read_text())


def test_the_files_of_a_site_pass_the_servers_own_checks(site: Path, servers):
    alerts = site / "alerts"
    for command in (
        [servers.promtool, "check", "rules", "--lint-fatal", "ppo.rules.yml"],
        [servers.promtool, "test", "rules", "ppo.rules.test.yml"],
        [servers.amtool, "check-config", "alertmanager.yml"],
    ):
        done = subprocess.run(command, cwd=alerts, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


def test_rule_tests_notice_a_rule_that_is_not_what_the_site_asked_for(site: Path, servers):
    text = (site / "alerts/ppo.rules.yml").read_text()
    running = {}
    for right, wrong in (("for: 8m", "for: 9m"), ("keep_firing_for: 11m", "keep_firing_for: 10m"), ("1.5", "1.75")):
        folder = shutil.copytree(site / "alerts", site / wrong.replace(" ", ""))
        (folder / "ppo.rules.yml").write_text(text.replace(right, wrong))
        assert text != text.replace(right, wrong)
        command = [servers.promtool, "test", "rules", "ppo.rules.test.yml"]
        running[wrong] = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    assert {wrong: process.wait() for wrong, process in running.items()} == dict.fromkeys(running, 1)


def test_one_setting_reaches_both_evaluators_the_dashboards_and_alertmanager(site: Path):
    groups = load(site / "alerts/ppo.rules.yml")["groups"]
    rules = [rule for group in groups for rule in group["rules"] if "alert" in rule]
    prometheus = {(rule["alert"], rule["labels"]["severity"]): rule for rule in rules}
    folders = load(site / "grafana/provisioning/alerting/ppo.yml")["groups"]
    grafana = {(rule["title"], rule["labels"]["severity"]): rule for group in folders for rule in group["rules"]}
    assert set(prometheus) == set(grafana)
    assert prometheus[CV_CRITICAL]["expr"].endswith(">= 1.5") and prometheus[CV_CRITICAL]["for"] == "45s"
    assert grafana[CV_CRITICAL]["data"][-1]["model"]["expression"] == "$B >= 1.5"
    # The command line wins over the file.
    assert prometheus["PPOTrainerDown", "critical"]["for"] == "7m"
    assert prometheus["PPONonFiniteGradients", "warning"]["for"] == "1m"
    assert grafana["PPOTrainerDown", "critical"]["for"] == "8m"
    assert "for" not in prometheus["PPOHeadStarved", "warning"]
    # Longer than the limit without being told so.
    assert prometheus[STALLED]["keep_firing_for"] == "8m"
    link = prometheus[CV_CRITICAL]["annotations"]["dashboard_url"]
    assert link.startswith("https://grafana.example/ops/d/ppo-gradient-health?viewPanel=10&var-job=")

    thresholds = [
        step["value"]
        for path in (site / "grafana/dashboards").glob("*.json")
        for panel in json.loads(path.read_text())["panels"]
        if "CV" in panel["title"]
        for step in panel.get("fieldConfig", {}).get("defaults", {}).get("thresholds", {}).get("steps", [])
    ]
    assert {0.8, 1.5} <= set(thresholds) and not {0.5, 2.0} & set(thresholds)
    receivers = {each["name"]: each for each in load(site / "alerts/alertmanager.yml")["receivers"]}
    assert receivers["pager"]["webhook_configs"][0]["url"] == "https://pager.example/hook"
    assert receivers["team"]["webhook_configs"][0]["url"] == "http://127.0.0.1:9843/"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--warning-threshold", "2"], "--warning-threshold must be below --critical-threshold"),
        (["--critical-threshold", "1.9"], "is no bound of a histogram bucket: 0.1, 0.2"),
        (["--critical-threshold", "nan"], "is no bound of a histogram bucket"),
        (["--warning-threshold", "low"], "argument --warning-threshold"),
        (["--starved-part", "0"], "--starved-part must be above 0"),
        (["--critical-step-share", "nan"], "--critical-step-share must be above 0 and at most 1"),
        (["--job", ""], "--job must not be empty"),
        (["--grafana-url", "grafana.example"], "--grafana-url grafana.example is no address such as http://"),
        (["--stalled-after", "5 minutes"], "is no duration such as 90s, 5m or 1h30m"),
        (["--stalled-after", "0"], "--stalled-after must be at least 30s"),
        (["--for", "PPOTrainerDown"], "is not of the form ALERT[/SEVERITY]=DURATION"),
        (["--for", "PPOTrainerUp=1m"], "no such alert; there are PPOGradientCVHigh/warning"),
        (["--for", "PPOTrainerDown/warning=1m"], "no such alert"),
        (["--for", "PPOTrainerDown=-1m"], "is no duration"),
        (["--for", "PPONonFiniteGradients/warning=6m"], "must be at most 5m"),
        (["--for", "PPOGradientCVHigh/critical=3m"], "one long rise would notify twice"),
        (["--keep-firing-for", "PPOTrainerDown=1m"], "must be above 1m: Grafana's equal alert"),
        (["--keep-firing-for", "PPOGradientCVHigh/warning=3m"], "must be below that of PPOGradientCVHigh/critical"),
        (["--keep-firing-for", "PPOTrainingStalled=5m"], "must be above --stalled-after (5m)"),
    ],
)
def test_contradicting_or_wrong_settings_are_refused(arguments, message, tmp_path: Path, capsys):
    with pytest.raises(SystemExit) as exit_:
        main([*arguments, "--output", str(tmp_path)])
    assert exit_.value.code == 2 and message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("jobs: ppo\n", "jobs; there are job, "),
        ("- job\n", "no mapping; there are job, "),
        ("job: [\n", "cannot read"),
        ("for: 5m\n", "for: "),
        ("for: {PPOTrainerDown: soon}\n", "'soon' is no duration"),
        ("warning-threshold: high\n", "warning-threshold: could not convert"),
        ("job:\n", "job: has no value"),
    ],
)
def test_a_wrong_settings_file_is_refused_by_name(text, message, tmp_path: Path, capsys):
    settings = tmp_path / "site.yml"
    settings.write_text(text)
    with pytest.raises(SystemExit) as exit_:
        main(["--config", str(settings), "--output", str(tmp_path / "out")])
    error = capsys.readouterr().err
    assert exit_.value.code == 2 and str(settings) in error and message in error
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written_is_an_error_in_one_line(tmp_path: Path, capsys):
    (tmp_path / "file").touch()
    assert main(["--output", str(tmp_path / "file")]) == 1
    assert capsys.readouterr().err.startswith(f"error: cannot write {tmp_path / 'file'}/")


def test_help_names_every_default(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for default in ("(default: 0.5)", "(default: 2.0)", "(default: 5m)", "(default: $PPO_DASHBOARDS_PATH)"):
        assert default in text
    assert "PPOGradientCVHigh/critical 1m 3m" in text


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("5m", 300), ("1h30m", 5400), ("2d", 172800), ("0", 0), (0, 0), ("0s", 0)]
)
def test_durations_are_read_as_prometheus_writes_them(text, seconds):
    assert parse_duration(text) == seconds


def test_steps_at_other_thresholds_are_told_apart_by_buckets():
    own, other = (
        generate(config)["alerts/ppo.rules.yml"]
        for config in (MixinConfig(), MixinConfig(warning_threshold=0.6, critical_threshold=1.5))
    )
    assert 'health="critical"' in own and "_bucket" not in own
    assert 'health="critical"' not in other and 'ppo_gradient_cv_per_step_bucket{job="ppo", le="1.5"}' in other
