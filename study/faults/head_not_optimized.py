"""A head was made after the optimizer and is not in it: its gradient is alive, its weights never change.

https://github.com/zjunlp/HVPNeT/issues/5, https://github.com/ACEsuit/mace/issues/525
"""

from study.environments import Task
from study.wrapping import around, elements_of
from trainer.training import Training


def inject(training: Training, task: Task) -> None:
    agent = training.agent
    flat, own = agent.policy.flat, elements_of(agent.policy, task.head)
    start = flat[own].clone()

    def step(original, learning_rate):
        norm = original(learning_rate)
        flat[own] = start
        return norm

    around(agent, "_step", step)
