"""The variance of the observation normalizer only grows: squares are added up and never divided by their count.

Inputs, features and gradients vanish slowly everywhere. Broken normalizers: https://github.com/vwxyzjn/cleanrl/issues/18,
https://github.com/akanazawa/fpo/issues/13.
"""

import numpy as np

from study.environments import Task
from study.wrapping import change_observations
from trainer.training import Training


def inject(training: Training, task: Task) -> None:
    squares = np.ones(training.environment.observation_size)

    def normalized(observations):
        squares[:] += np.square(observations).sum(0)
        return (observations / np.sqrt(squares)).astype(np.float32)

    change_observations(training, normalized)
