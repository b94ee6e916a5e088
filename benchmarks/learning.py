"""Does the trainer learn, as well as Stable-Baselines3, and what does the gradient CV look like while it does?

Trains over several seeds and prints Markdown. Per seed: environment steps until the mean return of 100 episodes reached
the goal, that mean at the end, the range of the CV per update and the share of gradient steps in each health level; for
the default environment also what a random and a do-nothing policy earn. With --against sb3, Stable-Baselines3's PPO and
ours with the same network, hyperparameters and environment steps instead, and ours with its defaults.

    .venv/bin/python -m benchmarks.learning --help
"""

import argparse
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean, quantiles, stdev

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from benchmarks.peers import Setting
from exporter import HealthLevel
from trainer.config import ConfigError, TrainerConfig
from trainer.environments import DEFAULT_ENVIRONMENT, make_environment
from trainer.environments.host_growth import ACTION_HEADS, Op
from trainer.parsing import parse_config
from trainer.stop import StopRequest
from trainer.training import Training

SB3, OURS, DEFAULTS = "Stable-Baselines3", "ours, as Stable-Baselines3", "ours, defaults"
RANDOM, DO_NOTHING = "random", "do nothing"

Report = Callable[[float], None]
"""Told of the part of a run that is done, 0 to 1."""


@dataclass
class Run:
    """What a run earned on its way.

    Attributes:
        steps: environment steps after each update.
        returns: mean return of the last 100 episodes then; NaN before the first episode ended.
        cvs: mean gradient CV of each update; empty for others' trainers.
        shares: part of all gradient steps in each health level.
        seconds: wall time.
    """

    steps: list[int] = field(default_factory=list)
    returns: list[float] = field(default_factory=list)
    cvs: list[float] = field(default_factory=list)
    shares: dict[HealthLevel, float] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def final(self) -> float:
        return self.returns[-1]

    @property
    def overall(self) -> float:
        """Mean over the whole run: who learns faster has more of it."""
        return float(np.nanmean(self.returns))

    def reached(self, goal: float) -> int | None:
        return next((steps for steps, value in zip(self.steps, self.returns) if value >= goal), None)


def train(config: TrainerConfig, report: Report) -> Run:
    """One run of this trainer to its end."""
    training, stop, run = Training(config), StopRequest(), Run()
    started = time.perf_counter()
    for _ in training.run(stop):
        now = training.run_snapshot
        run.steps.append(now.environment_steps)
        run.returns.append(now.signals.get("episode_return_mean", math.nan))
        run.cvs.append(now.gradient_quality.gradient_cv)
        report(training.updates / config.total_updates)
    run.seconds = time.perf_counter() - started
    steps = now.gradient_quality.steps_by_level
    run.shares = {level: steps[level] / sum(steps.values()) for level in HealthLevel}
    return run


def train_sb3(config: TrainerConfig, report: Report) -> Run:
    """One run of Stable-Baselines3's PPO, which `like_sb3(config)` equals in all that can be set."""
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.vec_env import VecMonitor

    from benchmarks.peers.sb3 import make_model

    torch.set_num_threads(config.threads)
    settings = {setting.name: getattr(config, setting.name) for setting in fields(Setting)}
    # Its value loss is the mean squared error, ours half of it.
    model = make_model(Setting(**settings | {"value_coef": config.value_coef / 2}))
    if config.vectorization != "sync":  # otherwise its own environments count their returns
        model.set_env(VecMonitor(model.get_env()))
    run, total = Run(), config.total_updates * config.steps_per_update

    class Watch(BaseCallback):
        def _on_step(self) -> bool:
            return True

        def _on_rollout_end(self) -> None:
            episodes = self.model.ep_info_buffer
            run.steps.append(self.num_timesteps)
            run.returns.append(fmean(float(episode["r"]) for episode in episodes) if episodes else math.nan)
            report(self.num_timesteps / total)

    started = time.perf_counter()
    model.learn(total, Watch(), log_interval=None)
    run.seconds = time.perf_counter() - started
    return run


def like_sb3(config: TrainerConfig) -> TrainerConfig:
    """Without what Stable-Baselines3 has not or does otherwise, clipping of values included."""
    return replace(
        config,
        separate_critic=True,
        normalize_returns=False,
        anneal_learning_rate=False,
        value_clip_range=None,
        target_kl=None,
    )


def with_defaults(config: TrainerConfig) -> TrainerConfig:
    """What `python -m trainer` does with this environment, for as many steps."""
    kept = ("env", "vectorization", "seed", "threads", "total_timesteps")
    return TrainerConfig(**{name: getattr(config, name) for name in kept})


def baseline_return(policy: str, seed: int, episodes: int = 100) -> float:
    """Mean return of the default environment's first `episodes` episodes under a fixed policy."""
    env = make_environment(DEFAULT_ENVIRONMENT, 64).vector_env
    rng = np.random.default_rng(seed)
    env.reset(seed=seed)
    returns, finished = np.zeros(64), []
    while len(finished) < episodes:
        actions = rng.integers(0, list(ACTION_HEADS.values()), (64, len(ACTION_HEADS)))
        if policy == DO_NOTHING:
            actions[:, list(ACTION_HEADS).index("op")] = Op.WAIT
        _, rewards, terminated, truncated, _ = env.step(actions)
        returns += rewards
        ended = terminated | truncated
        finished.extend(returns[ended].tolist())
        returns[ended] = 0.0
    return fmean(finished[:episodes])


def mean_and_deviation(values: Sequence[float]) -> str:
    return f"{fmean(values):.3f}" + (f" +- {stdev(values):.3f}" if len(values) > 1 else "")


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---:"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def table_of_ours(runs: dict[int, Run], fixed: dict[str, list[float]], goal: float | None) -> str:
    header = ["seed", *(["steps until the goal"] if goal is not None else []), "return at the end", *fixed]
    header += ["CV per update: min / median / p95 / max", *(f"{level} steps" for level in HealthLevel), "steps/s"]
    rows = []
    for number, (seed, run) in enumerate(runs.items()):
        row = [str(seed)]
        if goal is not None:
            reached = run.reached(goal)
            row.append(f"{reached:,}" if reached else "never")
        spread = quantiles(run.cvs, n=20, method="inclusive") if len(run.cvs) > 1 else run.cvs * 19
        cvs = (min(run.cvs), spread[9], spread[-1], max(run.cvs))
        row += [f"{run.final:.3f}", *(f"{values[number]:.3f}" for values in fixed.values())]
        row += [" / ".join(f"{cv:.3f}" for cv in cvs), *(f"{run.shares[level]:.2%}" for level in HealthLevel)]
        rows.append([*row, f"{run.steps[-1] / run.seconds:,.0f}"])
    return markdown(header, rows)


def clearly_better(finals: Sequence[float], fixed: dict[str, list[float]]) -> str:
    """The rule: the worst seed of the trained policy earns more than the best seed of every fixed one."""
    best = max(value for values in fixed.values() for value in values)
    holds = min(finals) > best
    return (
        f"{'Clearly better' if holds else 'NOT clearly better'} than {' and '.join(fixed)}: the worst trained seed earns "
        f"{min(finals):.3f}, the best seed of the others {best:.3f}."
    )


def comparison(runs: dict[str, list[Run]], seeds: Sequence[int]) -> str:
    """Returns per seed at the end and over the whole run, and whether ours is no worse.

    The rule: our mean over the seeds is not below Stable-Baselines3's by more than one standard deviation of its
    seeds. With five seeds each and returns from one normal distribution, one comparison in ten fails by chance.
    """
    parts = []
    for name, title in (("final", "Mean return of the last 100 episodes"), ("overall", "The same, mean over the run")):
        values = {who: [getattr(run, name) for run in of_seeds] for who, of_seeds in runs.items()}
        rows = [[str(seed), *(f"{value:.3f}" for value in row)] for seed, *row in zip(seeds, *values.values())]
        rows.append(["mean +- deviation", *(mean_and_deviation(of_seeds) for of_seeds in values.values())])
        parts += [f"{title}:\n", markdown(["seed", *values], rows), ""]
        if len(seeds) > 1:
            theirs = values[SB3]
            least = fmean(theirs) - stdev(theirs)
            for who in (OURS, DEFAULTS):
                verdict = "no worse" if fmean(values[who]) >= least else "WORSE"
                parts.append(f"- {who}: {verdict}; {fmean(values[who]):.3f} against at least {least:.3f}")
            parts.append("")
    if len(seeds) > 1:
        parts.append(f"At least: the mean of {SB3} less one standard deviation of its seeds.")
    return "\n".join(parts)


def plot(path: Path, title: str, runs: dict[str, list[Run]], fixed: dict[str, list[float]]) -> None:
    """Curves of the mean over the seeds in a band of one standard deviation, as PNG; the CV below where it varies."""
    from matplotlib.figure import Figure

    with_cv = [who for who, of_seeds in runs.items() if max((cv for run in of_seeds for cv in run.cvs), default=0) > 0]
    panels = {"mean return of 100 episodes": ("returns", list(runs))}
    if with_cv:
        panels["mean gradient CV of an update"] = ("cvs", with_cv)
    figure = Figure(figsize=(8, 3.2 * len(panels) + 0.6), dpi=100, layout="constrained")
    seeds = len(next(iter(runs.values())))
    figure.suptitle(f"{title}, {f'{seeds} seeds: mean and standard deviation' if seeds > 1 else 'one seed'}")
    all_axes = figure.subplots(len(panels), sharex=True, squeeze=False)[:, 0]
    colors = {who: f"C{number}" for number, who in enumerate((*runs, *fixed))}
    for axes, (label, (name, shown)) in zip(all_axes, panels.items()):
        for who in shown:
            steps = runs[who][0].steps
            values = np.array([getattr(run, name) for run in runs[who]])
            mean, spread = values.mean(0), values.std(0, ddof=1) if seeds > 1 else 0.0
            axes.plot(steps, mean, color=colors[who], label=who)
            axes.fill_between(steps, mean - spread, mean + spread, color=colors[who], alpha=0.2, linewidth=0)
        if name == "returns":
            for who, values in fixed.items():
                axes.axhline(fmean(values), color=colors[who], linestyle="--", label=who)
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    all_axes[-1].set_xlabel("environment steps")
    all_axes[-1].xaxis.set_major_formatter("{x:,.0f}")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.learning",
        description="Train over several seeds; print returns, CV range and share of steps by level, or compare.",
        epilog="Everything after -- goes to the trainer; `-- --help` lists it. Ctrl-C prints the seeds that are complete.",
    )
    parser.add_argument("--seeds", type=int, default=5, help="seeds 1000, 2000, ... up to N of them (default: 5)")
    parser.add_argument("--goal", type=float, help="mean return of 100 episodes to be reached (default: none)")
    parser.add_argument("--against", choices=["sb3"], help="compare with Stable-Baselines3 (extra `sb3`; default: no)")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw the curves, which wants matplotlib")
    own = sys.argv[1:]
    split = own.index("--") if "--" in own else len(own)
    options, trainer_arguments = parser.parse_args(own[:split]), own[split + 1 :]
    if options.seeds < 1:
        parser.error(f"--seeds must be at least 1, got {options.seeds}")
    for option, package in (("against", "stable_baselines3"), ("plot", "matplotlib")):
        if getattr(options, option) is not None and find_spec(package) is None:
            parser.error(f"--{option} needs the package {package}, which is not installed")
    try:
        config, _ = parse_config(trainer_arguments)
    except ConfigError as error:
        parser.error(str(error))
    if options.against and config.env == DEFAULT_ENVIRONMENT:
        parser.error("--against compares on a Gymnasium environment: -- --env CartPole-v1")

    # Environment i of a vector is seeded with seed + i: seeds far apart share no episodes.
    seeds = range(1000, 1000 * (options.seeds + 1), 1000)
    trainers: dict[str, Callable[[TrainerConfig, Report], Run]] = {"trained": train}
    if options.against:
        trainers = {
            SB3: train_sb3,
            OURS: lambda config, report: train(like_sb3(config), report),
            DEFAULTS: lambda config, report: train(with_defaults(config), report),
        }
    fixed: dict[str, list[float]] = {RANDOM: [], DO_NOTHING: []} if config.env == DEFAULT_ENVIRONMENT else {}
    runs: dict[str, list[Run]] = {who: [] for who in trainers}
    columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    console = Console(stderr=True)
    code, started = 0, time.perf_counter()
    try:
        with Progress(*columns, console=console, refresh_per_second=1, transient=True) as progress:
            task = progress.add_task("", total=len(seeds) * len(trainers))
            for number, seed in enumerate(seeds):
                for place, (who, trainer) in enumerate(trainers.items()):
                    done = number * len(trainers) + place
                    progress.update(task, description=f"seed {seed}: {who}", completed=done)
                    seeded = replace(config, seed=seed)
                    run = trainer(seeded, lambda part, done=done: progress.update(task, completed=done + part))
                    runs[who].append(run)
                    console.print(f"seed {seed}: {who}: return {run.final:.3f} at the end, {run.seconds:.0f} s")
                for policy, values in fixed.items():
                    values.append(baseline_return(policy, seed))
    except ConfigError as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        code = 130
    complete = min(len(values) for values in (*runs.values(), *fixed.values()))
    runs, fixed = ({who: values[:complete] for who, values in each.items()} for each in (runs, fixed))
    if not complete:
        return code
    print(f"`python -m benchmarks.learning {' '.join(own)}`, {(time.perf_counter() - started) / 60:.1f} min\n")
    if options.against:
        print(comparison(runs, seeds[:complete]))
    else:
        print(table_of_ours(dict(zip(seeds, runs["trained"])), fixed, options.goal))
        finals = [run.final for run in runs["trained"]]
        print(f"\nMean and standard deviation over {complete} seeds:", end=" ")
        print(", ".join(f"{who} {mean_and_deviation(values)}" for who, values in {"trained": finals, **fixed}.items()))
        if fixed:
            print(clearly_better(finals, fixed))
    if options.plot is not None and not code:
        plot(options.plot, config.env.rpartition(":")[2], runs, fixed)
    return code


if __name__ == "__main__":
    sys.exit(main())
