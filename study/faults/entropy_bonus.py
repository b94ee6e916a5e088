"""The entropy bonus is 100 times the usual one, from a task with rewards that are as much larger: no choice pays.

Entropy that only grows: https://github.com/openai/baselines/issues/470.
"""

from dataclasses import replace

from study.environments import Task
from trainer.training import Training


def inject(training: Training, task: Task) -> None:
    agent = training.agent
    agent._hyperparameters = replace(agent._hyperparameters, entropy_coef=100 * agent._hyperparameters.entropy_coef)
