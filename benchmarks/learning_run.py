"""One run of `benchmarks.learning` in its own process; the last line of its output is the `Run` as JSON.

.venv/bin/python -m benchmarks.learning_run WHO SEED [FLAGS OF THE TRAINER]
"""

import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from statistics import fmean

import numpy as np
import torch

from benchmarks.peers import Setting
from exporter import HealthLevel
from trainer.config import ConfigError, TrainerConfig
from trainer.environments import DEFAULT_ENVIRONMENT, make_environment
from trainer.environments.host_growth import ACTION_HEADS, Op
from trainer.parsing import parse_config
from trainer.stop import StopRequest
from trainer.training import Training


@dataclass
class Run:
    """Returns and gradient CV of a run.

    Attributes:
        steps: environment steps after each update.
        returns: mean return of the last 100 episodes, after each update; NaN before the first episode has ended.
        cvs: mean gradient CV of each update; empty for other trainers.
        shares: share of the gradient steps at each health level, 0 to 1.
        seconds: wall time.
    """

    steps: list[int] = field(default_factory=list)
    returns: list[float] = field(default_factory=list)
    cvs: list[float] = field(default_factory=list)
    shares: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def final(self) -> float:
        return self.returns[-1]

    @property
    def overall(self) -> float:
        """Mean return over the whole run: higher for faster learning."""
        return float(np.nanmean(self.returns))

    def reached(self, goal: float) -> int | None:
        return next((steps for steps, value in zip(self.steps, self.returns) if value >= goal), None)


def train(config: TrainerConfig) -> Run:
    """This trainer."""
    training, stop, run = Training(config), StopRequest(), Run()
    for _ in training.run(stop):
        now = training.run_snapshot
        run.steps.append(now.environment_steps)
        run.returns.append(now.signals.get("episode_return_mean", math.nan))
        run.cvs.append(now.gradient_quality.gradient_cv)
    steps = now.gradient_quality.steps_by_level
    run.shares = {level.value: steps[level] / sum(steps.values()) for level in HealthLevel}
    return run


def train_like_sb3(config: TrainerConfig) -> Run:
    """This trainer without the features that Stable-Baselines3 lacks or does differently, such as value clipping."""
    without = {"normalize_returns": False, "anneal_learning_rate": False, "value_clip_range": None, "target_kl": None}
    return train(replace(config, separate_critic=True, **without))


def train_with_defaults(config: TrainerConfig) -> Run:
    """This trainer with its defaults, on the same environment for the same number of steps."""
    kept = ("env", "vectorization", "seed", "threads", "total_timesteps")
    return train(TrainerConfig(**{name: getattr(config, name) for name in kept}))


def train_sb3(config: TrainerConfig) -> Run:
    """Stable-Baselines3's PPO, with the same settings as `train_like_sb3`."""
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.logger import Logger
    from stable_baselines3.common.vec_env import VecMonitor

    from benchmarks.peers.sb3 import make_model

    settings = {setting.name: getattr(config, setting.name) for setting in fields(Setting)}
    # SB3's value loss is the mean squared error, ours half of it.
    changed = {"value_clip_range": None, "value_coef": config.value_coef / 2}
    model = make_model(Setting(**settings | changed))
    model.set_logger(Logger(folder=None, output_formats=[]))  # the default logger makes a folder in /tmp
    if config.vectorization != "sync":  # otherwise its own environments count their returns
        model.set_env(VecMonitor(model.get_env()))
    run = Run()

    class Watch(BaseCallback):
        def _on_step(self) -> bool:
            return True

        def _on_rollout_end(self) -> None:
            episodes = self.model.ep_info_buffer
            run.steps.append(self.num_timesteps)
            run.returns.append(fmean(float(episode["r"]) for episode in episodes) if episodes else math.nan)

    whole_rollouts = max(1, config.total_timesteps // config.steps_per_update) * config.steps_per_update
    model.learn(whole_rollouts, Watch(), log_interval=None)
    return run


def play(config: TrainerConfig, *, does_nothing: bool, episodes: int = 100) -> Run:
    """A fixed policy in the default environment: the mean return of its first episodes."""
    env = make_environment(DEFAULT_ENVIRONMENT, 64).vector_env
    rng = np.random.default_rng(config.seed)
    env.reset(seed=config.seed)
    returns, finished = np.zeros(64), []
    while len(finished) < episodes:
        actions = rng.integers(0, list(ACTION_HEADS.values()), (64, len(ACTION_HEADS)))
        if does_nothing:
            actions[:, list(ACTION_HEADS).index("op")] = Op.WAIT
        _, rewards, terminated, truncated, _ = env.step(actions)
        returns += rewards
        ended = terminated | truncated
        finished.extend(returns[ended].tolist())
        returns[ended] = 0.0
    return Run(steps=[config.total_timesteps], returns=[fmean(finished[:episodes])])


TRAINERS: dict[str, Callable[[TrainerConfig], Run]] = {
    "trained": train,
    "Stable-Baselines3": train_sb3,
    "ours, as Stable-Baselines3": train_like_sb3,
    "ours, defaults": train_with_defaults,
    "random": lambda config: play(config, does_nothing=False),
    "do nothing": lambda config: play(config, does_nothing=True),
}


def main() -> int:
    who, seed, *flags = sys.argv[1:]
    try:
        config, _ = parse_config([*flags, "--seed", seed])
        torch.set_num_threads(config.threads)
        started = time.perf_counter()
        run = TRAINERS[who](config)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    run.seconds = time.perf_counter() - started
    print(json.dumps(asdict(run)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
