"""Every recipe's program as it stands in the documentation, run with the real library and scraped while it trains."""

import json
import math
import re
import statistics
import sys
from pathlib import Path

import pytest
import torch
from conftest import fetch, free_ports, wait_until
from programs import last_scrape
from prometheus_client.parser import text_string_to_metric_families
from torch.optim.optimizer import register_optimizer_step_pre_hook

from stack.servers import ROOT

RECIPES = ROOT / "docs" / "recipes"
LIBRARIES = {
    "accelerate": "accelerate",
    "cleanrl": "gymnasium",
    "lightning": "lightning",
    "pufferlib": "pufferlib",
    "rl_games": "rl_games",
    "rllib": "ray",
    "rsl_rl": "rsl_rl",
    "sample_factory": "sample_factory",
    "skrl": "skrl",
    "stable_baselines3": "stable_baselines3",
    "tianshou": "tianshou",
    "torchrl": "torchrl",
    "trl": "trl",
}
PROSE = {"README", "esper"}

# Plain loops whose heads are `heads` of `agent` or `policy`, with 16 gradient steps in an update.
LOOPS = {"cleanrl", "torchrl"}
UPDATES = 7  # they make fewer here than in the documentation

# Those with one layer of 2 + 3 rows: arguments, gradient steps in an update, environment steps in one.
FUSED = {"pufferlib": ([], 8, 1024), "sample_factory": (["--serial_mode=False"], 4, 256)}
# The CV of every step by a way of its own, in whichever process the optimizer is.
WITNESS = """
import json, pathlib, statistics, torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

def witness(optimizer, args, kwargs):
    layer = [p.grad.double() for group in optimizer.param_groups for p in group["params"] if len(p) == 5]
    assert len(layer) == 2
    norms = [torch.cat([grad[rows].flatten() for grad in layer]).norm().item() for rows in (slice(2), slice(2, 5))]
    with pathlib.Path("witness").open("a") as file:
        file.write(json.dumps(statistics.stdev(norms) / statistics.fmean(norms)) + "\\n")

register_optimizer_step_pre_hook(witness)
"""


def program_of(recipe: str, port: int) -> str:
    pytest.importorskip(LIBRARIES[recipe], minversion="1.1" if recipe == "cleanrl" else None)  # CleanRL's own have 0.29
    (program,) = re.findall(r"^```python\n(.*?)^```$", (RECIPES / f"{recipe}.md").read_text(), re.DOTALL | re.MULTILINE)
    assert program.count("9842") == 1
    program = program.replace("9842", str(port))
    return program.replace("range(UPDATES)", f"range({UPDATES})") if recipe in LOOPS else program


def totals_and_heads(text: str) -> tuple[dict[str, float], dict[str, float]]:
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    heads = {s.labels["head"]: s.value for s in samples if s.name == "ppo_head_gradient_norm"}
    return {s.name: s.value for s in samples}, heads


def test_every_recipe_is_run_here():
    assert {path.stem for path in RECIPES.glob("*.md")} - PROSE == set(LIBRARIES)


@pytest.mark.parametrize("recipe", sorted(LOOPS))
def test_a_loop_serves_the_cv_of_every_step_that_it_takes(recipe: str):
    port, steps_per_update = free_ports().prometheus, 16
    namespace = {"__name__": "__main__"}
    cvs: list[float] = []
    scrapes = 0

    def totals_after(updates: int):
        totals, heads = totals_and_heads(fetch(f"http://127.0.0.1:{port}/metrics")[1])
        return (totals, heads) if totals["ppo_updates_total"] == updates else None

    def before_step(optimizer, args, kwargs) -> None:
        nonlocal scrapes
        heads = namespace.get("agent", namespace.get("policy")).heads
        if cvs and len(cvs) % steps_per_update == 0:
            totals, norms = wait_until(lambda: totals_after(len(cvs) // steps_per_update), "the update is served")
            assert set(norms) == set(heads)
            assert totals["ppo_gradient_cv_per_step_count"] == len(cvs)
            assert totals["ppo_gradient_cv_per_step_sum"] == pytest.approx(sum(cvs), rel=1e-5)
            assert totals["ppo_gradient_cv"] == pytest.approx(statistics.fmean(cvs[-steps_per_update:]), rel=1e-5)
            assert totals["ppo_exporter_errors_total"] == 0
            scrapes += 1
        norms = [math.sqrt(sum(p.grad.double().square().sum().item() for p in h.parameters())) for h in heads.values()]
        cvs.append(statistics.stdev(norms) / statistics.fmean(norms))

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    handle = register_optimizer_step_pre_hook(before_step)
    try:
        exec(compile(program_of(recipe, port), f"{recipe}.md", "exec"), namespace)
    finally:
        handle.remove()
        torch.set_num_threads(threads)
    assert scrapes == len(cvs) // steps_per_update - 1 == UPDATES - 1


@pytest.mark.parametrize("recipe", sorted(set(LIBRARIES) - LOOPS))
def test_the_program_trains_to_its_end_and_serves_its_heads(recipe: str, tmp_path: Path):
    port = free_ports().prometheus
    program = program_of(recipe, port)
    path = tmp_path / "program.py"
    path.write_text(program)
    scraped = last_scrape([sys.executable, path], tmp_path, port)
    totals, by_head = totals_and_heads(scraped)
    assert len(by_head) >= 2 and all(norm > 0 for norm in by_head.values())
    assert totals["ppo_gradient_cv"] > 0
    assert totals["ppo_gradient_cv_per_step_count"] >= totals["ppo_updates_total"] >= 1
    assert totals["ppo_exporter_errors_total"] == 0


@pytest.mark.parametrize("recipe", FUSED)
def test_a_fused_layer_is_served_as_its_parts_and_says_goodbye(recipe: str, tmp_path: Path):
    """Sample Factory's learner is in a process of its own here, as by default."""
    port, (arguments, steps, environment_steps) = free_ports().prometheus, FUSED[recipe]
    program, path = program_of(recipe, port), tmp_path / "program.py"
    assert program.count("window_steps=None") == 1
    path.write_text(WITNESS + program.replace("window_steps=None", 'window_steps=None, targets_dir="targets"'))
    totals, by_head = totals_and_heads(last_scrape([sys.executable, path, *arguments], tmp_path, port))
    cvs = [json.loads(line) for line in (tmp_path / "witness").read_text().splitlines()]
    updates = int(totals["ppo_updates_total"])
    seen = cvs[: steps * updates]
    assert set(by_head) == {"push", "unused"}
    assert totals["ppo_gradient_cv_per_step_count"] == steps * updates
    assert totals["ppo_gradient_cv_per_step_sum"] == pytest.approx(sum(seen), rel=1e-5)
    assert totals["ppo_gradient_cv"] == pytest.approx(statistics.fmean(seen[-steps:]), rel=1e-5)
    assert totals["ppo_environment_steps_total"] == environment_steps * updates
    assert totals["ppo_exporter_errors_total"] == 0
    assert not list((tmp_path / "targets").iterdir())
