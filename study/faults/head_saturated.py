"""A head starts saturated: one choice has a bias of 1000, a mask's large number that stayed in. Its gradient is zero.

Probabilities that become exactly one: https://github.com/tensorflow/probability/issues/1317.
"""

from study.environments import Task
from study.wrapping import rows_of
from trainer.training import Training


def inject(training: Training, task: Task) -> None:
    policy = training.agent.policy
    policy.parameters["policy_bias"][rows_of(policy, task.head).start] = 1000.0
