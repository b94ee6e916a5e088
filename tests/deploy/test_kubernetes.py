"""deploy/kubernetes compared with its source files; no cluster runs here."""

import re
import shutil
import subprocess
from pathlib import Path, PurePosixPath

import pytest
import yaml

from exporter.link import DEFAULT_PORT
from stack.servers import ROOT
from trainer.parsing import parse_config

KUBERNETES = ROOT / "deploy/kubernetes"
JOB, _ = yaml.safe_load_all((KUBERNETES / "trainer/job.yaml").read_text())
POD = JOB["spec"]["template"]
(CONTAINER,) = POD["spec"]["containers"]
MONITOR = yaml.safe_load((KUBERNETES / "monitoring/pod-monitor.yaml").read_text())["spec"]
(ENDPOINT,) = MONITOR["podMetricsEndpoints"]


def test_the_rules_are_those_of_alerts():
    head, _, groups = (KUBERNETES / "monitoring/prometheus-rule.yaml").read_text().partition("\nspec:\n")
    source = (ROOT / "alerts/ppo.rules.yml").read_text()
    commands = "\n".join(line.strip("# ") for line in head.splitlines() if line.startswith("#   "))
    is_current = groups == re.sub(r"^(?=.)", "  ", source, flags=re.MULTILINE)
    assert is_current, f"prometheus-rule.yaml is not alerts/ppo.rules.yml any more; run\n{commands}"
    assert yaml.safe_load(f"{head}\nspec:\n{groups}")["spec"] == yaml.safe_load(source)


def test_the_dashboards_fit_into_one_config_map():
    (made,) = yaml.safe_load((ROOT / "grafana/dashboards/kustomization.yaml").read_text())["configMapGenerator"]
    dashboards = sorted((ROOT / "grafana/dashboards").glob("*.json"))
    assert made["files"] == [path.name for path in dashboards]
    assert sum(path.stat().st_size for path in dashboards) < 1_000_000  # the API takes 1 MiB


def test_the_pod_monitor_is_the_scrape_job():
    (job,) = yaml.safe_load((ROOT / "ppo.scrape.yml").read_text())["scrape_configs"]
    assert (ENDPOINT["interval"], ENDPOINT["scrapeTimeout"]) == (job["scrape_interval"], job["scrape_timeout"])
    assert {"targetLabel": "job", "replacement": job["job_name"]} in ENDPOINT["relabelings"]
    snake = [
        {re.sub("[A-Z]", lambda letter: f"_{letter[0].lower()}", key): value for key, value in rule.items()}
        for rule in ENDPOINT["metricRelabelings"]
    ]
    assert snake == job["metric_relabel_configs"]


def test_the_pod_monitor_finds_the_pods_of_the_job():
    labels = POD["metadata"]["labels"]
    assert MONITOR["selector"]["matchLabels"].items() <= labels.items()
    assert set(MONITOR["podTargetLabels"]) <= labels.keys()
    assert {"name": ENDPOINT["port"], "containerPort": DEFAULT_PORT} in CONTAINER["ports"]
    assert CONTAINER["readinessProbe"]["httpGet"]["port"] == ENDPOINT["port"]


def command(tmp_path: Path, *options: str) -> list[str]:
    """What the container starts with these options, where `tmp_path` is its volume."""
    shell, flags, script, *name = CONTAINER["command"]
    script = script.replace("/checkpoints ", f"{tmp_path} ", 1)  # where it looks; not what it tells the trainer
    environment = {"PATH": "/usr/bin:/bin", "RUN": "walker-17", "LAUNCHER": "printf %s\\n"}
    done = subprocess.run(
        [shell, flags, script, *name, *options], env=environment, check=True, capture_output=True, text=True
    )
    return done.stdout.splitlines()


def test_the_container_starts_a_trainer_that_may_write_where_it_does(tmp_path):
    start = command(tmp_path, *CONTAINER["args"])
    assert start[:2] == ["-m", "trainer"]
    config, telemetry = parse_config(start[2:])
    assert config.run_name == "walker-17" and telemetry.metrics_port == DEFAULT_PORT
    mounted = {PurePosixPath(mount["mountPath"]) for mount in CONTAINER["volumeMounts"]}
    for folder in (config.checkpoint_dir, telemetry.targets_dir):
        assert {PurePosixPath(folder), *PurePosixPath(folder).parents} & mounted, f"{folder} is read-only"


def test_the_container_resumes_where_there_is_a_checkpoint(tmp_path):
    (tmp_path / "walker-17").mkdir()
    assert "--resume" not in command(tmp_path, "--seed", "3")
    (tmp_path / "walker-17/update-00000020.pt").touch()
    (tmp_path / "walker-17/update-00000040.pt").touch()
    assert command(tmp_path, "--seed", "3")[-3:] == ["--seed", "3", "--resume"]


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not on PATH")
def test_kustomize_builds_everything():
    def built(folder: str) -> dict[str, dict]:
        done = subprocess.run(["kubectl", "kustomize", KUBERNETES / folder], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return {each["kind"]: each for each in yaml.safe_load_all(done.stdout)}

    assert built("monitoring").keys() == {"ConfigMap", "PodMonitor", "PrometheusRule"}
    run, ranks = built("trainer"), built("torchrun")
    assert run.keys() == ranks.keys() == {"Job", "PersistentVolumeClaim"}
    for made in (run, ranks):
        name, pod = made["Job"]["metadata"]["name"], made["Job"]["spec"]["template"]
        assert pod["metadata"]["labels"]["run"] == made["PersistentVolumeClaim"]["metadata"]["name"] == name
        claims = [volume.get("persistentVolumeClaim", {}).get("claimName") for volume in pod["spec"]["volumes"]]
        assert name in claims
    environment = ranks["Job"]["spec"]["template"]["spec"]["containers"][0]["env"]
    assert {each["name"]: each.get("value") for each in environment}["LAUNCHER"].startswith("torchrun ")
