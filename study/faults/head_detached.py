"""A head's output is detached, so that its loss has no way back: `logits = head(features).detach()`.

What people ask about it: https://github.com/zju-vipa/spot-adaptive-pytorch/issues/1. Here its gradient is exactly zero
and the trunk gets nothing from it.
"""

from study.environments import Task
from study.wrapping import around, rows_of
from trainer.training import Training


def inject(training: Training, task: Task) -> None:
    policy = training.agent.policy
    rows = rows_of(policy, task.head)

    def backward(original, seen, by_logits, by_outputs):
        by_logits[rows] = 0
        original(seen, by_logits, by_outputs)

    around(policy, "backward", backward)
