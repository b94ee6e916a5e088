"""The project as users install it: only the wheel, without the trainer's dependencies."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from stack.servers import ROOT

# What a user's own trainer does, and what serves it.
TRAINER = """
import importlib.util, time
from urllib.request import urlopen
import torch
import exporter
for name in ("gymnasium", "rich", "stack", "study", "tests"):
    assert importlib.util.find_spec(name) is None, f"{name} is there"
heads = {"op": torch.nn.Linear(3, 2), "slot": torch.nn.Linear(3, 4)}
optimizer = torch.optim.SGD(torch.nn.ModuleDict(heads).parameters(), lr=0.1)
with exporter.watch(optimizer, heads, run="r", port=0) as monitor:
    for _ in range(2):
        optimizer.zero_grad()
        sum(head(torch.ones(3)).square().sum() for head in heads.values()).backward()
        optimizer.step()
    monitor.update_completed(policy_loss=0.5)
    until = time.monotonic() + 10
    while 'ppo_updates_total{run="r"} 1.0' not in (page := urlopen(monitor.url).read().decode()):
        assert time.monotonic() < until, page
        time.sleep(0.1)
    print(urlopen(monitor.url.removesuffix("metrics")).read().decode())
"""


def run(*command: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True)


@pytest.mark.soak
def test_a_wheel_measures_and_serves_where_nothing_else_is_installed(tmp_path: Path):
    sources, built, environment = tmp_path / "sources", tmp_path / "dist", tmp_path / "environment"
    # A copy, for a build leaves folders beside what it builds.
    listed = run("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=ROOT).stdout.splitlines()
    for name in listed:
        if (ROOT / name).is_file():
            (sources / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, sources / name)
    # The wheel is made of the sdist, which must be whole then.
    made = run(sys.executable, "-m", "build", "--outdir", built, sources, cwd=tmp_path)
    assert made.returncode == 0, made.stdout + made.stderr
    (wheel,) = built.glob("*.whl")
    run(sys.executable, "-m", "venv", environment, cwd=tmp_path)
    constraints = ROOT / "constraints.txt"
    installed = run(environment / "bin/pip", "install", "-c", constraints, wheel, cwd=tmp_path)
    assert installed.returncode == 0, installed.stderr
    trained = run(environment / "bin/python", "-c", TRAINER, cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr
    assert "</html>" in trained.stdout
    assert "calibrate" in run(environment / "bin/ppo-exporter", "calibrate", "--help", cwd=tmp_path).stdout
    refused = run(environment / "bin/ppo-train", cwd=tmp_path)
    assert (refused.returncode, "pip install 'ppo-gradient-exporter[trainer]'" in refused.stderr) == (1, True)
