"""Rewards of a thousand and more, and nothing that normalizes rewards or returns: the value loss is all there is.

https://github.com/vwxyzjn/cleanrl/issues/441, https://github.com/openai/sonic-on-ray/issues/4
"""

from dataclasses import replace

from study.environments import Task
from study.wrapping import around
from trainer.training import Training


def inject(training: Training, task: Task) -> None:
    agent = training.agent
    agent._hyperparameters = replace(agent._hyperparameters, normalize_returns=False)

    def step(original, actions):
        observations, rewards, *rest = original(actions)
        return observations, 1000 * rewards, *rest

    around(training.environment.vector_env, "step", step)
