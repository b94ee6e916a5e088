"""Does the trainer learn as well as Stable-Baselines3, and how large is the gradient CV meanwhile?

Trains every task with several seeds, each run in its own process, and prints Markdown: mean returns over the seeds with
95 % bootstrap intervals; for tasks with Stable-Baselines3 the intervals of the differences; for the others the range of
the gradient CV. Without arguments it makes all figures and images of docs/learning.md.

    .venv/bin/python -m benchmarks.learning --help
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from benchmarks.learning_report import comparison, plot, table_of_seeds
from benchmarks.learning_run import Run
from benchmarks.machine import machine
from trainer.config import ConfigError
from trainer.parsing import parse_config

ROOT = Path(__file__).resolve().parent.parent
SB3 = "Stable-Baselines3"
COMPARED = (SB3, "ours, as Stable-Baselines3", "ours, defaults")


class Task(NamedTuple):
    """A task.

    Attributes:
        title: title of its section and its plot.
        flags: flags of `python -m trainer`.
        trainers: names in `learning_run.TRAINERS`; if Stable-Baselines3 is among them, the others are compared with it.
        goal: mean return of 100 episodes to reach.
        is_drawn: whether to draw its curves.
    """

    title: str
    flags: str
    trainers: tuple[str, ...] = COMPARED
    goal: float | None = None
    is_drawn: bool = True


SMALL = "--num-envs 8 --rollout-steps 128 --minibatch-size 256 --hidden-size 64 --learning-rate 2.5e-4"
TASKS = {
    "cartpole": Task("CartPole-v1", f"--env CartPole-v1 {SMALL} --total-timesteps 204800"),
    "acrobot": Task("Acrobot-v1", f"--env Acrobot-v1 {SMALL} --total-timesteps 204800"),
    "seven-heads": Task(
        "Seven heads",
        "--env benchmarks.synthetic:SevenHeads-v0 --vectorization vector_entry_point --learning-rate 2.5e-4 "
        "--total-timesteps 409600",
    ),
    "host-growth": Task("Default environment", "--total-timesteps 500000", ("trained", "random", "do nothing")),
    "cartpole-example": Task(
        "CartPole-v1 as in examples/cartpole.yml", "--config examples/cartpole.yml", ("trained",), 475.0, False
    ),
}


class RunFailed(Exception):
    """A run ended with an error; the message has its name and its output."""


def run_in_process(who: str, seed: int, flags: Sequence[str]) -> Run:
    command = [sys.executable, "-m", "benchmarks.learning_run", who, str(seed), *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RunFailed(f"{who}, seed {seed}: exit code {done.returncode}\n{done.stderr[-2000:]}")
    return Run(**json.loads(done.stdout.splitlines()[-1]))


def kept_or_run(folder: Path | None, who: str, seed: int, flags: Sequence[str]) -> Run:
    """The run that lies in `folder` if it had the same flags; otherwise a new one, which is put there."""
    if folder is None:
        return run_in_process(who, seed, flags)
    path = folder / f"{who.replace(', ', '-').replace(' ', '-')}-{seed}.json"
    if path.exists() and (content := json.loads(path.read_text()))["flags"] == list(flags):
        return Run(**content["run"])
    run = run_in_process(who, seed, flags)
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(json.dumps({"flags": list(flags), "run": asdict(run)}))
    unfinished.replace(path)
    return run


def run_task(
    task: Task, seeds: Sequence[int], flags: Sequence[str], jobs: int, folder: Path | None, console: Console
) -> dict[str, list[Run]]:
    """All runs of a task, by trainer and in the order of the seeds.

    Raises:
        RunFailed: a run failed; runs that had not started are cancelled.
    """
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    wanted = [(who, seed) for seed in seeds for who in task.trainers]
    results: dict[tuple[str, int], Run] = {}
    with (
        Progress(*columns, TimeRemainingColumn(), console=console, refresh_per_second=1, transient=True) as progress,
        ThreadPoolExecutor(jobs) as pool,
    ):
        bar = progress.add_task(task.title, total=len(wanted))
        futures = {pool.submit(kept_or_run, folder, who, seed, flags): (who, seed) for who, seed in wanted}
        try:
            for future in as_completed(futures):
                who, seed = futures[future]
                results[who, seed] = run = future.result()
                console.print(f"{task.title}: {who}, seed {seed}: return {run.final:.3f}, {run.seconds:.0f} s")
                progress.advance(bar)
        except BaseException:
            pool.shutdown(cancel_futures=True)  # Ctrl-C reaches running ones directly
            raise
    return {who: [results[who, seed] for seed in seeds] for who in task.trainers}


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.learning",
        description="Train with several seeds; print mean returns with 95 %% bootstrap intervals, and draw the curves.",
        epilog="Options after -- go to the trainer, for all tasks: -- --total-timesteps 20000.",
    )
    parser.add_argument(
        "tasks", nargs="*", metavar="TASK", help=f"what to train: {', '.join(TASKS)} (default: all of them)"
    )
    parser.add_argument("--seeds", type=int, default=10, help="seeds 1000, 2000, ... up to N of them (default: 10)")
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count(), metavar="N", help="runs at a time (default: the number of cores)"
    )
    parser.add_argument(
        "--keep", type=Path, metavar="DIR", help="keep complete runs in this folder, and do not repeat those in it"
    )
    parser.add_argument(
        "--images", type=Path, default=ROOT / "docs/images", metavar="DIR", help="folder for the curves (docs/images)"
    )
    own = sys.argv[1:]
    split = own.index("--") if "--" in own else len(own)
    options, more_flags = parser.parse_args(own[:split]), own[split + 1 :]
    unknown = [name for name in options.tasks if name not in TASKS]
    if unknown:
        parser.error(f"no task {unknown[0]!r}; there are {', '.join(TASKS)}")
    if options.seeds < 2 or options.jobs < 1:
        parser.error("--seeds must be at least 2, --jobs at least 1")
    for package in ("stable_baselines3", "matplotlib"):
        if find_spec(package) is None:
            parser.error(f"the package {package} is not installed; it comes with the extras `sb3` and `dev`")
    chosen = {name: TASKS[name] for name in options.tasks or TASKS}
    os.chdir(ROOT)
    try:
        steps = {
            name: parse_config([*task.flags.split(), *more_flags])[0].total_timesteps for name, task in chosen.items()
        }
    except ConfigError as error:
        parser.error(str(error))

    # Environment i of a vector is seeded with seed + i: seeds far apart share no episodes.
    seeds = range(1000, 1000 * (options.seeds + 1), 1000)
    console = Console(stderr=True)
    print(machine("torch", "numpy", "gymnasium", "stable-baselines3"))
    print(f"`python -m benchmarks.learning {' '.join(own)}`")
    for name, task in chosen.items():
        flags, started = [*task.flags.split(), *more_flags], time.perf_counter()
        folder = options.keep / name if options.keep else None
        try:
            runs = run_task(task, seeds, flags, options.jobs, folder, console)
        except RunFailed as error:
            print(f"python -m benchmarks.learning: error: {name}: {error}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            return 130
        minutes = (time.perf_counter() - started) / 60
        print(f"\n### {task.title}\n\n`python -m benchmarks.learning {name}`: `{' '.join(flags)}`, {len(seeds)} seeds,")
        print(f"{steps[name]:,} environment steps each, {minutes:.1f} min\n")
        if task.is_drawn:
            plot(options.images / f"learning-{name}.png", task.title, runs)
        print(comparison(runs, SB3) if SB3 in runs else table_of_seeds(runs, seeds, task.goal), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
