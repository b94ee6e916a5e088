"""Half of the observation stands still from the middle of the run on: a sensor or a feature pipeline hangs.

Such a feed does not raise an error anywhere; robots lose sensors so, and simulators their clients.
"""

from study.environments import Task
from study.wrapping import change_observations
from trainer.training import Training


def inject(training: Training, task: Task) -> None:
    last = []

    def stuck(observations):
        half = observations.shape[1] // 2
        last[:] = last or [observations[0, :half].copy()]
        observations[:, :half] = last[0]
        return observations

    change_observations(training, stuck)
