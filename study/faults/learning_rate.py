"""The learning rate is 30 times too high: a value from another optimizer or batch size, or 3e-2 typed for 1e-3.

https://github.com/DLR-RM/rl-baselines3-zoo keeps tuned ones per task, for the range that works is narrow.
"""

from dataclasses import replace

from study.environments import Task
from trainer.training import Training


def inject(training: Training, task: Task) -> None:
    training.config = replace(training.config, learning_rate=30 * training.config.learning_rate)
