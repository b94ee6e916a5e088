"""The runs of the study: each trains with one fault, or none, and writes a row an update."""

import math
import multiprocessing
import os
import signal
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from exporter.health import HealthLevel, Thresholds
from study.environments import TASKS, UPDATES, Task
from study.faults import FAULTS
from study.table import Row, to_text
from study.wrapping import around
from trainer.stop import StopRequest
from trainer.training import Training

NO_FAULT = "none"
THREE = ("host-growth", "contextual", "drone")
BENIGN = ("solved-heads", "idle-heads")
BY_HEADS = ("heads-2", "heads-3", "heads-20")
# Of those that hit one head, and of those that hit all, some of each.
OF_BY_HEADS = ("learning_rate", "entropy_sign", "head_detached", "head_not_optimized")
FAULT_SEEDS = range(1, 6)


class Job(NamedTuple):
    """A run to do."""

    task: str
    fault: str
    seed: int
    updates: int = UPDATES

    @property
    def file(self) -> str:
        return f"{self.task}.{self.fault}.{self.seed}.{self.updates}.csv"


def all_jobs() -> list[Job]:
    """Every run of the study. Seeds come one after the other, so that an unfinished study has something of all."""
    jobs = []
    for tasks, healthy_seeds in ((THREE, 20), (BENIGN, 10), (BY_HEADS, 8)):
        jobs += [Job(task, NO_FAULT, seed) for task in tasks for seed in range(1, healthy_seeds + 1)]
    for seed in FAULT_SEEDS:
        for name, fault in FAULTS.items():
            jobs += [Job(task, name, seed) for task in fault.tasks or THREE]
        jobs += [Job(task, name, seed) for task in BY_HEADS for name in OF_BY_HEADS]
    return sorted(jobs, key=lambda job: job.seed)


def train(job: Job, attach: Callable[[Training], None] = lambda training: None) -> list[Row]:
    """Train as `job` says; a row an update. `attach` gets the run before anything happens in it."""
    task = TASKS[job.task]
    training = Training(task.config(job.seed, job.updates))
    attach(training)
    returns = _watch_returns(training)
    metrics: list[dict] = []

    def update(rollout, *, learning_rate, should_stop):
        metrics.append(original(rollout, learning_rate=learning_rate, should_stop=should_stop))
        return metrics[-1]

    original, training.agent.update = training.agent.update, update
    fault = FAULTS.get(job.fault)
    onset = 0 if fault is None else job.updates // 2 + 1 if fault.in_the_middle else 1
    rows: list[Row] = []
    for number in range(1, job.updates + 1):
        if number == onset:
            fault.inject(training, task)
        training.update(_NEVER)
        rows.append(_row(job, task, onset, number, returns, metrics.pop()))
        returns.clear()
    return rows


_NEVER = StopRequest()


def _watch_returns(training: Training) -> list[float]:
    """A list that gets the return of every episode, as the environment itself pays it."""
    vector_env = training.environment.vector_env
    earned, returns = np.zeros(vector_env.num_envs), []

    def step(original, actions):
        result = original(actions)
        _, rewards, terminated, truncated, _ = result
        earned[:] += rewards
        ended = terminated | truncated
        returns.extend(earned[ended].tolist())
        earned[ended] = 0
        return result

    around(vector_env, "step", step)
    return returns


def _row(job: Job, task: Task, onset: int, number: int, returns: Sequence[float], metrics: dict) -> Row:
    cvs = metrics["gradient_cv_per_step"]
    steps = Thresholds().steps_by_level(cvs)
    healthy, warning, critical = (steps[level] / len(cvs) for level in HealthLevel)
    norms = metrics["head_gradient_norms"]
    total = sum(norms.values())
    per_head = (
        tuple(float(metrics.get(name, {}).get(head, math.nan)) for head in task.heads)
        for name in (
            "head_gradient_norms",
            "head_entropy_ratios",
            "head_approx_kls",
            "head_clip_fractions",
            "head_update_ratios",
            "nonfinite_gradient_steps",
        )
    )
    return Row(
        *job[:3],
        onset,
        len(task.heads),
        number,
        statistics.fmean(returns) if returns else math.nan,
        metrics["gradient_cv"],
        healthy,
        warning,
        critical,
        min(norms.values()) / total if total > 0 and math.isfinite(total) else math.nan,
        metrics["gradient_norm"],
        *(metrics[name] for name in ("approx_kl", "clip_fraction", "entropy", "explained_variance")),
        *(metrics[name] for name in ("policy_loss", "value_loss")),
        len(cvs),
        metrics["skipped_gradient_steps"],
        *per_head,
    )


def _do(job: Job, folder: Path) -> None:
    """Train, and keep the rows in a file: whole or not at all."""
    path = folder / job.file
    unfinished = path.with_suffix(f".{os.getpid()}")
    unfinished.write_text(to_text(train(job)))
    unfinished.replace(path)


def _start_worker() -> None:
    # Ctrl-C is the parent's business: it ends the workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def do_all(jobs: Sequence[Job], folder: Path, workers: int) -> None:
    """Do those of `jobs` whose file is not in `folder` yet, with a progress line.

    Raises:
        KeyboardInterrupt: Ctrl-C; files of finished runs stay.
    """
    folder.mkdir(parents=True, exist_ok=True)
    missing = [job for job in jobs if not (folder / job.file).exists()]
    if not missing:
        return
    console = Console(stderr=True)
    columns = TextColumn("study"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    with (
        multiprocessing.get_context("spawn").Pool(workers, _start_worker) as pool,
        Progress(*columns, console=console, refresh_per_second=1, speed_estimate_period=300) as progress,
    ):
        bar = progress.add_task("runs", total=len(jobs), completed=len(jobs) - len(missing))
        waiting = [pool.apply_async(_do, (job, folder)) for job in missing]
        for result in waiting:
            while not result.ready():
                result.wait(0.5)  # a wait without end would not hear Ctrl-C
            result.get()
            progress.advance(bar)
            if not console.is_terminal and int(progress.tasks[bar].completed) % 20 == 0:
                left = progress.tasks[bar].time_remaining
                console.print(f"{int(progress.tasks[bar].completed)} of {len(jobs)} runs, {left or 0:.0f} s left")
