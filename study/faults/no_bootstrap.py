"""An episode that a time limit cuts short counts as ended, `done = terminated or truncated`: its future is worth 0.

https://github.com/DLR-RM/stable-baselines3/issues/633, https://github.com/Toni-SM/skrl/issues/449
"""

import numpy as np

from study.environments import Task
from study.wrapping import around
from trainer.training import Training


def inject(training: Training, task: Task) -> None:
    def step(original, actions):
        observations, rewards, terminated, truncated, infos = original(actions)
        return observations, rewards, terminated | truncated, np.zeros_like(truncated), infos

    around(training.environment.vector_env, "step", step)
