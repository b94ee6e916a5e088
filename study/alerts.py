"""What the shipped alerts say of a run: the rules themselves, evaluated by promtool on what the endpoint would serve.

One update is taken to last 30 seconds and to be scraped once; a run of 100 updates then lasts 50 minutes. The rules are
read from alerts/ppo.rules.yml, so that nothing is written twice.
"""

import json
import math
import re
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import yaml
from prometheus_client import generate_latest

from exporter.aggregator import RunAggregator
from exporter.collectors import build_registry
from exporter.telemetry import PPOUpdatePayload
from stack.servers import provide
from study.environments import TASKS
from study.table import Row, Run
from study.truth import smoothed

RULES = Path(__file__).resolve().parent.parent / "alerts" / "ppo.rules.yml"
SECONDS = 30
"""How long an update lasts."""
_STEPS_PER_UPDATE = 1024


class Firing(NamedTuple):
    """An alert that fires while the update `update` is the newest one.

    Attributes:
        update: from 1.
        alert: its name, with the severity behind it where there are several.
    """

    update: int
    alert: str
    severity: str


def payload(row: Row, name: str, episode_return: float, seconds: int = SECONDS) -> PPOUpdatePayload:
    """What the update said, as far as the table knows. Gradient steps of one level have one CV."""
    heads = TASKS[row.task].heads
    levels = {0.1: row.healthy, 1.0: row.warning, math.inf if row.skipped_steps else 3.0: row.critical}
    per_step = tuple(cv for cv, part in levels.items() for _ in range(round(part * row.gradient_steps)))

    def by_head(values: Sequence[float]) -> dict[str, float]:
        return {head: value for head, value in zip(heads, values) if not math.isnan(value)}

    fields = {
        "head_gradient_norms": dict(zip(heads, row.head_gradient_norms)),
        "nonfinite_gradient_steps": {head: int(n) for head, n in zip(heads, row.head_nonfinite_steps)},
    }
    for new in ("head_entropy_ratios", "head_approx_kls", "head_clip_fractions", "head_update_ratios"):
        fields[new] = by_head(getattr(row, new))
    return PPOUpdatePayload(
        run=name,
        gradient_cv=row.gradient_cv,
        gradient_cv_per_step=per_step,
        contributing_heads=row.heads,
        gradient_norm=row.gradient_norm,
        skipped_gradient_steps=row.skipped_steps,
        environment_steps=_STEPS_PER_UPDATE,
        **{signal: getattr(row, signal) for signal in ("policy_loss", "value_loss", "entropy", "approx_kl")},
        **{signal: getattr(row, signal) for signal in ("clip_fraction", "explained_variance")},
        episode_return_mean=None if math.isnan(episode_return) else episode_return,
        timestamp_seconds=1.0 + row.update * seconds,
        **fields,
    )


def series(run: Run, name: str, wanted: re.Pattern, seconds: int = SECONDS) -> dict[str, list[str]]:
    """Series of the run as `/metrics` has them, with a value for each update; `_` where it is not there."""
    aggregator = RunAggregator()
    aggregator.register_run(name, TASKS[run.task].heads, {})
    registry = build_registry(aggregator)
    values: dict[str, list[str]] = {}
    # As the trainer does, which averages over 100 episodes.
    returns = smoothed(run.column("episode_return"), 3).tolist()
    for number, (row, episode_return) in enumerate(zip(run.rows, returns)):
        aggregator.handle_ppo_update(payload(row, name, episode_return, seconds))
        for line in generate_latest(registry).decode().splitlines():
            if wanted.match(line):
                text, _, value = line.rpartition(" ")
                values.setdefault(text, ["_"] * number).append(value)
        for known in values.values():
            # A series that is gone, such as the level before, is stale.
            known += ["stale"] * (number + 1 - len(known))
    labels = f'job="ppo",instance="{name}:9842"'
    return {text.replace("{", f"{{{labels},", 1): known for text, known in values.items()}


def firings(runs: Sequence[Run], rules: Path = RULES, seconds: int = SECONDS) -> list[list[Firing]]:
    """For each run, the alerts that fire at each update, by severity.

    Raises:
        RuntimeError: promtool says something else than which alerts fire.
    """
    content = yaml.safe_load(rules.read_text())
    mentioned = set(re.findall(r"(?<![\w:])ppo_\w+(?![\w:])", rules.read_text()))
    wanted = re.compile(f"({'|'.join(sorted(mentioned))}){{")
    names = [f"run-{number}" for number in range(len(runs))]
    updates = max(len(run.rows) for run in runs)
    test = {
        "rule_files": [str(rules)],
        "evaluation_interval": "15s",
        "group_eval_order": [group["name"] for group in content["groups"]],
        "tests": [
            {
                "interval": f"{seconds}s",
                "input_series": [
                    {"series": text, "values": " ".join(values)}
                    for run, name in zip(runs, names)
                    for text, values in (
                        *series(run, name, wanted, seconds).items(),
                        (f'up{{job="ppo",instance="{name}:9842"}}', ["1"] * len(run.rows)),
                    )
                ],
                # promtool prints what it got where it expected nothing. The time stands in a label.
                "promql_expr_test": [
                    {
                        "expr": f'label_replace(ALERTS{{alertstate="firing",run!=""}}, "at", "{update}", "", "")',
                        # The last evaluation before the next update.
                        "eval_time": f"{(update - 1) * seconds + seconds // 15 * 15 - 15}s",
                    }
                    for update in range(1, updates + 1)
                ],
            }
        ],
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "test.yml"
        path.write_text(json.dumps(test))  # YAML too, and quicker
        done = subprocess.run([provide().promtool, "test", "rules", path], capture_output=True, text=True, check=False)
    found: dict[str, set[Firing]] = {name: set() for name in names}
    output = done.stdout + done.stderr
    for labels in re.findall(r"\{([^{}]*alertstate=\"firing\"[^{}]*)\}", output):
        label = dict(re.findall(r'(\w+)="([^"]*)"', labels))
        found[label["run"]].add(Firing(int(label["at"]), label["alertname"], label["severity"]))
    if done.returncode not in (0, 1) or "SUCCESS" not in output and "got:" not in output:
        raise RuntimeError(f"promtool: {output[-2000:]}")
    return [sorted(found[name]) for name in names]


def in_batches(runs: Iterable[Run], size: int = 10) -> list[list[Run]]:
    """Runs that one call of promtool takes."""
    runs = list(runs)
    return [runs[start : start + size] for start in range(0, len(runs), size)]
