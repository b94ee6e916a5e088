"""A head is kept in float16 without a float32 copy: the squares of its gradients underflow in Adam's second moment.

https://discuss.pytorch.org/t/adam-half-precision-nans/1765, https://github.com/pytorch/pytorch/issues/8860. Division
by epsilon alone then makes the head's steps far too large.
"""

from study.environments import Task
from study.wrapping import around, elements_of
from trainer.training import Training


def inject(training: Training, task: Task) -> None:
    agent = training.agent
    own = elements_of(agent.policy, task.head)

    def step(original, learning_rate):
        norm = original(learning_rate)
        for values in (agent.policy.flat, *agent._moments):
            values[own] = values[own].half().float()
        return norm

    around(agent, "_step", step)
