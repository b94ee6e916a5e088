"""Observations are a thousand times larger from the middle of the run on: other units, or a lost normalizer.

A resume without the statistics of the normalizer does it: https://github.com/DLR-RM/stable-baselines3/issues/1256,
https://github.com/leggedrobotics/rsl_rl/issues/17.
"""

from study.environments import Task
from study.wrapping import change_observations
from trainer.training import Training


def inject(training: Training, task: Task) -> None:
    change_observations(training, lambda observations: 1000 * observations)
