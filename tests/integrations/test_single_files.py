"""CleanRL's and LeanRL's own files with the lines of the recipe in them, run to their end and scraped meanwhile.

Nothing of theirs is in this repository: SINGLE_FILES names folders, with colons between them, that have cleanrl/ppo.py
and the others. docs/recipes/README.md says how to get them.
"""

import os
import re
import sys
from pathlib import Path

import pytest
from conftest import free_ports
from programs import last_scrape
from prometheus_client.parser import text_string_to_metric_families

from stack.servers import ROOT

RECIPE = (ROOT / "docs" / "recipes" / "cleanrl.md").read_text()
CHANGES = dict(re.findall(r"^```diff\n--- (\S+)\n(.*?)^```$", RECIPE, re.DOTALL | re.MULTILINE))
JOINTS = [f"action_{index}" for index in range(6)]
CONTINUOUS = ["--env-id", "HalfCheetah-v4", "--num-steps", "64", "--num-minibatches", "4", "--update-epochs", "2"]
ARGUMENTS = {
    "cleanrl/ppo.py": (["--num-steps", "32"], ["action"], 16),
    "cleanrl/ppo_continuous_action.py": (CONTINUOUS, JOINTS, 8),
    "leanrl/ppo_continuous_action_torchcompile.py": ([*CONTINUOUS, "--compile"], JOINTS, 8),
}


def changed(file: str, text: str, port: int) -> str:
    """The file with what the recipe adds after a line that it has once, served at `port`."""
    (context, *added) = CHANGES[file].splitlines()
    assert context.startswith(" ") and all(line.startswith("+") for line in added)
    assert text.count(context[1:] + "\n") == 1
    lines = "\n".join(line[1:] for line in added).replace("run_name, ", f"run_name, port={port}, ")
    return text.replace(context[1:] + "\n", f"{context[1:]}\n{lines}\n")


def test_every_file_of_the_recipe_is_run_here():
    assert set(CHANGES) == set(ARGUMENTS)


@pytest.mark.parametrize("file", ARGUMENTS)
def test_a_file_with_the_lines_of_the_recipe_serves_every_step_of_its_heads(file: str, tmp_path: Path):
    folders = os.environ.get("SINGLE_FILES", "").split(os.pathsep)
    source = next((path for path in (Path(folder) / file for folder in folders if folder) if path.exists()), None)
    if source is None:
        pytest.skip(f"SINGLE_FILES names no folder that has {file}: docs/recipes/README.md")
    for library in ("tyro", "tensorboard", *(["wandb", "tqdm", "tensordict"] if "leanrl" in file else [])):
        pytest.importorskip(library)
    arguments, heads, steps = ARGUMENTS[file]
    if heads is JOINTS:
        pytest.importorskip("mujoco")
    port = free_ports().prometheus
    program = tmp_path / Path(file).name
    program.write_text(changed(file, source.read_text(), port))
    updates = 12
    per_update = int(arguments[arguments.index("--num-steps") + 1]) * (4 if file == "cleanrl/ppo.py" else 1)
    command = [sys.executable, program, *arguments, "--total-timesteps", str(updates * per_update)]
    scraped = last_scrape(command, tmp_path, port, WANDB_MODE="disabled")
    samples = [sample for family in text_string_to_metric_families(scraped) for sample in family.samples]
    values = {sample.name: sample.value for sample in samples}
    norms = {s.labels["head"]: s.value for s in samples if s.name == "ppo_head_gradient_norm"}
    assert list(norms) == heads and all(norm > 0 for norm in norms.values())
    assert (values["ppo_gradient_cv"] > 0) == (len(heads) > 1)
    assert values["ppo_gradient_cv_per_step_count"] == steps * values["ppo_updates_total"] > 0
    assert values["ppo_exporter_errors_total"] == 0
