"""`python -m trainer evaluate` plays episodes with a checkpoint; `python -m trainer inspect` shows its content."""

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
import torch
from gymnasium.vector import AutoresetMode
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from exporter.health import cv_text
from trainer.checkpoint_files import CheckpointError, checkpoints_in, resolve
from trainer.config import ConfigError, TrainerConfig
from trainer.environments import TrainingEnvironment, UnsupportedEnvironment, make_environment
from trainer.parsing import Parser, config_of_run
from trainer.policy import ActorCritic
from trainer.stop import StopRequest
from trainer.training import make_policy


@dataclass(frozen=True)
class Episodes:
    """Undiscounted returns and lengths (environment steps) of whole episodes, in no particular order."""

    returns: list[float]
    lengths: list[int]


def play(
    policy: ActorCritic,
    environment: TrainingEnvironment,
    episodes: int,
    *,
    seed: int,
    deterministic: bool,
    played: Callable[[int], bool] = lambda count: False,
) -> Episodes:
    """Play whole episodes.

    Each environment plays a fixed number of them. Taking the first to end would favor short episodes.

    Args:
        policy: on the CPU.
        environment: in any autoreset mode.
        episodes: how many, at least 1.
        seed: of the environments and of sampling.
        deterministic: take the most probable choice of every head, instead of sampling.
        played: called after each step with the number of finished episodes; playing ends if it returns True.
    """
    count = environment.vector_env.num_envs
    left = episodes // count + (np.arange(count) < episodes % count)
    generator = torch.Generator().manual_seed(seed)
    returns, lengths, only_resets = np.zeros(count), np.zeros(count, int), np.zeros(count, bool)
    done = Episodes([], [])
    observations, _ = environment.vector_env.reset(seed=seed)
    while left.any() and not played(len(done.returns)):
        observations = np.asarray(observations, np.float32)
        if deterministic:
            choices = policy.most_probable(observations)
        else:
            choices = policy.act(observations, torch.rand(len(environment.heads), count, generator=generator).numpy())
        observations, rewards, terminated, truncated, _ = environment.vector_env.step(
            environment.environment_actions(choices)
        )
        returns += rewards
        lengths += ~only_resets
        ended = terminated | truncated
        counted = ended & (left > 0)
        done.returns.extend(returns[counted].tolist())
        done.lengths.extend(lengths[counted].tolist())
        left[counted] -= 1
        returns[ended], lengths[ended] = 0.0, 0
        if environment.autoreset_mode is AutoresetMode.NEXT_STEP:
            only_resets = ended
        elif environment.autoreset_mode is AutoresetMode.DISABLED:
            observations = environment.reset_ended(observations, ended)
    return done


def evaluate(arguments: Sequence[str], stop: StopRequest) -> int:
    """`python -m trainer evaluate`; returns the exit code.

    Raises:
        ConfigError: an argument is wrong.
        CheckpointError: the checkpoint cannot be used.
    """
    parser = _parser("evaluate", "Play episodes with the policy of a checkpoint and report what they return.")
    parser.add_argument("--episodes", type=int, default=100, help="episodes to play (default: %(default)s)")
    parser.add_argument(
        "--seed",
        type=int,
        default=1_000_000,
        help="seed of environments and sampling; environment i gets seed + i (default: %(default)s, far from the seeds "
        "of training)",
    )
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--sample", action="store_true", help="draw actions as in training (the default)")
    how.add_argument("--deterministic", action="store_true", help="take every head's most probable choice")
    options = parser.parse_args(arguments)
    if options.episodes < 1:
        raise ConfigError(f"--episodes: must be at least 1, got {options.episodes}")
    if not 0 <= options.seed < 2**32:
        raise ConfigError(f"--seed: must be from 0 to {2**32 - 1}, got {options.seed}")

    path, content = resolve(options.checkpoint, _warn)
    config = config_of_run(path, content)
    torch.set_num_threads(config.threads)
    try:
        count = min(config.num_envs, options.episodes)
        environment = make_environment(config.env, count, config.vectorization, kwargs=config.env_kwargs)
        policy = make_policy(config, environment)
        policy.load_state_dict(content["agent"]["policy"])
    except UnsupportedEnvironment as error:
        raise CheckpointError(f"{path}: {error}") from error
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise CheckpointError(
            f"{path}: its weights do not fit {config.env} as this version trains it: {' '.join(str(error).split())}"
        ) from error

    choice = "deterministic" if options.deterministic else "sampled"
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("episodes", total=options.episodes)

        def played(count: int) -> bool:
            progress.update(task, completed=count)
            return stop()

        started = time.monotonic()
        done = play(
            policy,
            environment,
            options.episodes,
            seed=options.seed,
            deterministic=options.deterministic,
            played=played,
        )
    if stop():
        print(f"stopped after {len(done.returns)} of {options.episodes} episodes", file=sys.stderr)
        return stop.exit_code
    std = f"{stdev(done.returns):.3f}" if len(done.returns) > 1 else "unknown of one"
    print(
        f"{path}: {config.run_name} at update {content['updates']}, {config.env}, {choice} actions, seed {options.seed}"
    )
    print(
        f"return mean {fmean(done.returns):.3f}, standard deviation {std}, "
        f"from {min(done.returns):.3f} to {max(done.returns):.3f}, {len(done.returns)} episodes"
    )
    print(f"length mean {fmean(done.lengths):.1f} environment steps; {time.monotonic() - started:.1f} s")
    return 0


def inspect(arguments: Sequence[str]) -> int:
    """`python -m trainer inspect`; returns the exit code.

    Raises:
        ConfigError: an argument is wrong.
        CheckpointError: the checkpoint cannot be used.
    """
    options = _parser("inspect", "Show the content of a checkpoint.").parse_args(arguments)
    path, content = resolve(options.checkpoint, _warn)
    try:
        lines = _description(path, content)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise CheckpointError(f"{path}: not a checkpoint as this version writes it: {error!r}") from error
    # A file from a stranger must not send control characters to the terminal.
    print("\n".join(line if line.isprintable() else ascii(line) for line in lines), flush=True)
    return 0


def _description(path: Path, content: Mapping[str, Any]) -> list[str]:
    config = config_of_run(path, content)
    run = content["run"]
    written = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(content["written_at_seconds"]))
    lines = [
        f"{path}: {path.stat().st_size:,} bytes, format version {content['format_version']}",
        f"run         {config.run_name} on {config.env}, update {content['updates']} of {config.total_updates}",
        f"written     {written}, torch {content['torch_version']}, exporter {content['exporter_version']}",
        f"counters    {run['environment_steps']} environment steps, {run['episodes']} episodes, {run['updates']} "
        f"updates, {run['resumes']} resumes, {run['gradient_quality']['skipped_steps']} gradient steps skipped",
        f"gradient    {cv_text(run['gradient_quality']['gradient_cv'], config.thresholds)}",
        *(f"            {name} {value:.6g}" for name, value in run["signals"].items()),
        "settings    (* other than the default)",
    ]
    for name, value in content["config"].items():
        lines.append(f"          {'*' if value != getattr(TrainerConfig, name) else ' '} {name}: {value}")
    lines.append("tensors")
    for name, tensor in _tensors(content):
        lines.append(f"            {name} {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}")
    if "environment" not in content["collector"]:
        lines.append(f"not inside  the episodes in progress: {config.env} cannot be saved, a resume begins new ones")
    others = [other.name for other in checkpoints_in(path.parent) if other.name != path.name]
    return [*lines, f"beside it   {', '.join(others)}"] if others else lines


def _parser(command: str, description: str) -> argparse.ArgumentParser:
    parser = Parser(prog=f"python -m trainer {command}", description=description, allow_abbrev=False)
    parser.add_argument(
        "checkpoint", type=Path, metavar="CHECKPOINT", help="checkpoint, or a run's folder: its newest readable one"
    )
    return parser


def _warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr, flush=True)


def _tensors(state: Any, name: str = "") -> list[tuple[str, Tensor]]:
    if isinstance(state, Tensor):
        return [(name, state)]
    if not isinstance(state, dict):
        return []
    return [found for key, value in state.items() for found in _tensors(value, f"{name}.{key}" if name else str(key))]
