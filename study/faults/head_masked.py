"""A mask leaves one choice of a head in every step, so that what the head says never matters.

A mask that is cut wrongly between the heads: https://github.com/Denys88/rl_games/pull/361.
"""

from study.environments import Task
from study.wrapping import around
from trainer.training import Training


def inject(training: Training, task: Task) -> None:
    number = list(training.environment.heads).index(task.head)

    def step(original, actions):
        actions = actions.copy()
        actions[:, number] = 0
        return original(actions)

    around(training.environment.vector_env, "step", step)
