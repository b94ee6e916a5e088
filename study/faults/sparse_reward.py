"""Reward only for a good episode, at its end, and no entropy bonus: nothing keeps the policy exploring.

The default coefficient of Stable-Baselines3 is 0; why it matters: https://github.com/DLR-RM/stable-baselines3/issues/466.
"""

from dataclasses import replace

import numpy as np

from study.environments import Task
from study.wrapping import around
from trainer.training import Training


def inject(training: Training, task: Task) -> None:
    agent, vector_env = training.agent, training.environment.vector_env
    agent._hyperparameters = replace(agent._hyperparameters, entropy_coef=0.0)
    earned = np.zeros(vector_env.num_envs)

    def step(original, actions):
        observations, rewards, terminated, truncated, infos = original(actions)
        earned[:] += rewards
        ended = terminated | truncated
        paid = np.where(ended & (earned >= task.goal), 1.0, 0.0)
        earned[ended] = 0
        return observations, paid, terminated, truncated, infos

    around(vector_env, "step", step)
