"""Every recipe's program as it stands in the documentation, run with the real library and scraped while it trains."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import fetch, free_ports
from prometheus_client.parser import text_string_to_metric_families

from stack.servers import ROOT

RECIPES = ROOT / "docs" / "recipes"
LIBRARIES = {
    "accelerate": "accelerate",
    "cleanrl": "gymnasium",
    "lightning": "lightning",
    "stable_baselines3": "stable_baselines3",
    "torchrl": "torchrl",
    "trl": "trl",
}


def test_every_recipe_is_run_here():
    assert {path.stem for path in RECIPES.glob("*.md")} == set(LIBRARIES)


@pytest.mark.parametrize("recipe", LIBRARIES)
def test_the_program_trains_to_its_end_and_serves_its_heads(recipe: str, tmp_path: Path):
    pytest.importorskip(LIBRARIES[recipe])
    (program,) = re.findall(r"^```python\n(.*?)^```$", (RECIPES / f"{recipe}.md").read_text(), re.DOTALL | re.MULTILINE)
    assert program.count("9842") == 1
    port = free_ports().prometheus
    path = tmp_path / "program.py"
    path.write_text(program.replace("9842", str(port)))
    log = tmp_path / "log"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    scraped = ""
    with log.open("w") as output, subprocess.Popen(
        [sys.executable, path], cwd=tmp_path, env=environment, stdout=output, stderr=subprocess.STDOUT
    ) as process:
        while process.poll() is None:
            try:
                scraped = fetch(f"http://127.0.0.1:{port}/metrics")[1]
            except OSError:
                pass
            time.sleep(0.02)
    assert process.returncode == 0, log.read_text()
    samples = [sample for family in text_string_to_metric_families(scraped) for sample in family.samples]
    by_head = {s.labels["head"]: s.value for s in samples if s.name == "ppo_head_gradient_norm"}
    totals = {s.name: s.value for s in samples}
    assert len(by_head) >= 2 and all(norm > 0 for norm in by_head.values())
    assert totals["ppo_gradient_cv"] > 0
    assert totals["ppo_gradient_cv_per_step_count"] >= totals["ppo_updates_total"] >= 1
    assert totals["ppo_exporter_errors_total"] == 0
