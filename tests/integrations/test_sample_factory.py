"""The recipe's program with the learner in a process of its own, as Sample Factory has it by default."""

import json
import statistics
import sys
from pathlib import Path

import pytest
from conftest import free_ports
from programs import last_scrape
from prometheus_client.parser import text_string_to_metric_families
from test_recipes import program_of

# The CV of every step by a way of its own: the norms of the two parts of the layer that has 2 + 3 rows.
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


def test_a_learner_in_its_own_process_serves_every_step_and_says_goodbye(tmp_path: Path):
    port = free_ports().prometheus
    program = program_of("sample_factory", port)
    path = tmp_path / "program.py"
    assert program.count("window_steps=None") == 1
    path.write_text(WITNESS + program.replace("window_steps=None", 'window_steps=None, targets_dir="targets"'))
    scraped = last_scrape([sys.executable, path, "--serial_mode=False"], tmp_path, port)
    samples = [sample for family in text_string_to_metric_families(scraped) for sample in family.samples]
    values = {sample.name: sample.value for sample in samples}
    cvs = [json.loads(line) for line in (tmp_path / "witness").read_text().splitlines()]
    updates, steps = int(values["ppo_updates_total"]), 4
    assert {s.labels["head"] for s in samples if s.name == "ppo_head_gradient_norm"} == {"push", "unused"}
    assert values["ppo_gradient_cv_per_step_count"] == steps * updates
    assert values["ppo_gradient_cv_per_step_sum"] == pytest.approx(sum(cvs[: steps * updates]), rel=1e-5)
    window = cvs[steps * (updates - 1) : steps * updates]
    assert values["ppo_gradient_cv"] == pytest.approx(statistics.fmean(window), rel=1e-5)
    assert values["ppo_environment_steps_total"] == 256 * updates
    assert values["ppo_exporter_errors_total"] == 0
    assert (tmp_path / "targets").is_dir() and not list((tmp_path / "targets").iterdir())
