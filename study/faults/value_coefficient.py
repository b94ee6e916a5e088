"""The value loss drowns the policy in the trunk they share: its coefficient is 100 times the usual one.

A factor of 20 in public code: https://github.com/Acmece/rl-collision-avoidance/issues/21; a value loss orders of
magnitude too large: https://github.com/openai/baselines/issues/766.
"""

from dataclasses import replace

from study.environments import Task
from trainer.training import Training


def inject(training: Training, task: Task) -> None:
    agent = training.agent
    agent._hyperparameters = replace(agent._hyperparameters, value_coef=100 * agent._hyperparameters.value_coef)
