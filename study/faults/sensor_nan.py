"""One number of the observation is NaN in one of eight environments, from the middle of the run on.

https://github.com/Gurvan/ssbm_gym/issues/6, https://github.com/Grid2op/grid2op/issues/389
"""

import numpy as np

from study.environments import Task
from study.wrapping import change_observations
from trainer.training import Training


def inject(training: Training, task: Task) -> None:
    def broken(observations):
        observations[::8, 0] = np.nan
        return observations

    change_observations(training, broken)
