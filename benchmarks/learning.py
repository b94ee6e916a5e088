"""Does the trainer learn, and what does the gradient CV look like while it does?

Trains over several seeds and prints, per seed: environment steps until the mean return of 100 episodes
reached the goal, the mean return at the end, the range of the CV per update and the share of gradient
steps in each health level; for the default environment also what a random and a do-nothing policy earn.

    .venv/bin/python -m benchmarks.learning --help
"""

import argparse
import platform
import sys
import time
from statistics import fmean, quantiles, stdev

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from exporter import HealthLevel
from trainer.config import TrainerConfig, parse_config
from trainer.environments import DEFAULT_ENVIRONMENT, make_environment
from trainer.environments.host_growth import ACTION_HEADS, Op
from trainer.stop import StopRequest
from trainer.training import Training


def train(config: TrainerConfig, goal: float | None) -> dict[str, object]:
    """One run to its end."""
    training, stop = Training(config), StopRequest()
    reached, cvs, started = None, [], time.perf_counter()
    for _ in track(range(config.updates), f"seed {config.seed}", console=Console(stderr=True), transient=True):
        training.update(stop)
        run = training.aggregator.snapshot.runs[config.run_name]
        cvs.append(run.gradient_quality.gradient_cv)
        if goal is not None and reached is None and run.signals.get("episode_return_mean", -np.inf) >= goal:
            reached = run.environment_steps
    steps = run.gradient_quality.steps_by_level
    return {
        "reached": reached,
        "return": run.signals["episode_return_mean"],
        "steps_per_second": run.environment_steps / (time.perf_counter() - started),
        "cvs": cvs,
        "shares": {level: steps[level] / sum(steps.values()) for level in HealthLevel},
    }


def baseline_return(policy: str, seed: int, episodes: int = 100) -> float:
    """Mean return of the default environment's first `episodes` episodes under a fixed policy."""
    env = make_environment(DEFAULT_ENVIRONMENT, 64).vector_env
    rng = np.random.default_rng(seed)
    env.reset(seed=seed)
    returns, finished = np.zeros(64), []
    while len(finished) < episodes:
        actions = rng.integers(0, list(ACTION_HEADS.values()), (64, len(ACTION_HEADS)))
        if policy == "do nothing":
            actions[:, list(ACTION_HEADS).index("op")] = Op.WAIT
        _, rewards, terminated, truncated, _ = env.step(actions)
        returns += rewards
        ended = terminated | truncated
        finished.extend(returns[ended].tolist())
        returns[ended] = 0.0
    return fmean(finished[:episodes])


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.learning",
        description="Train over several seeds; print steps to the goal, returns, CV range and share of steps by level.",
        epilog="Everything after -- goes to the trainer.",
    )
    parser.add_argument("--seeds", type=int, default=5, help="seeds 1000, 2000, ... up to N of them (default: 5)")
    parser.add_argument("--goal", type=float, help="mean return of 100 episodes to be reached (default: none)")
    own = sys.argv[1:]
    split = own.index("--") if "--" in own else len(own)
    options, trainer_arguments = parser.parse_args(own[:split]), own[split + 1 :]

    table = Table(title=f"{' '.join(trainer_arguments) or 'defaults'} ({platform.processor() or platform.machine()})")
    for column in ("seed", "goal reached at step", "return", "random", "do nothing", "CV min / median / p95 / max"):
        table.add_column(column, justify="right")
    for column in (*(f"{level} steps" for level in HealthLevel), "steps/s"):
        table.add_column(column, justify="right")
    returns: dict[str, list[float]] = {"trained": [], "random": [], "do nothing": []}
    # Environment i of a vector is seeded with seed + i: seeds far apart share no episodes.
    for seed in range(1000, 1000 * (options.seeds + 1), 1000):
        config = parse_config([*trainer_arguments, "--seed", str(seed)])
        result = train(config, options.goal)
        returns["trained"].append(result["return"])
        if config.env == DEFAULT_ENVIRONMENT:
            for policy in ("random", "do nothing"):
                returns[policy].append(baseline_return(policy, seed))
        cvs = result["cvs"]
        table.add_row(
            str(seed),
            f"{result['reached']:,}" if result["reached"] else "-",
            f"{result['return']:.3f}",
            *(f"{returns[policy][-1]:.3f}" if returns[policy] else "-" for policy in ("random", "do nothing")),
            f"{min(cvs):.3f} / {quantiles(cvs, n=2)[0]:.3f} / {quantiles(cvs, n=20)[-1]:.3f} / {max(cvs):.3f}",
            *(f"{result['shares'][level]:.2%}" for level in HealthLevel),
            f"{result['steps_per_second']:,.0f}",
        )
    Console(width=180).print(table)
    for policy, values in returns.items():
        if len(values) > 1:
            print(f"{policy}: {fmean(values):.3f} +- {stdev(values):.3f} over {len(values)} seeds")


if __name__ == "__main__":
    main()
