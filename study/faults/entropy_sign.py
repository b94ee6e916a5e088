"""The entropy bonus has the wrong sign and makes the policy deterministic.

https://github.com/pukkapies/dl-imperial-maths/pull/8, https://github.com/ray-project/ray/issues/4369
"""

from dataclasses import replace

from study.environments import Task
from trainer.training import Training


def inject(training: Training, task: Task) -> None:
    agent = training.agent
    # Ten times the usual size: the coefficient with which people look for an effect that does not come.
    agent._hyperparameters = replace(agent._hyperparameters, entropy_coef=-10 * agent._hyperparameters.entropy_coef)
