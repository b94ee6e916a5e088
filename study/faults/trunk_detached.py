"""A head stands on detached features, `head(features.detach())`: it learns, but the trunk learns nothing for it.

Some do it on purpose: https://github.com/wudongming97/TopoMLP/issues/21.
"""

from study.environments import Task
from study.wrapping import around, rows_of
from trainer.training import Training


def inject(training: Training, task: Task) -> None:
    policy = training.agent.policy
    rows = rows_of(policy, task.head)

    def backward(original, seen, by_logits, by_outputs):
        own = by_logits[rows].clone()
        by_logits[rows] = 0
        original(seen, by_logits, by_outputs)
        policy.parameters["policy_weight"].grad[rows] = own @ seen.second[0].t()
        policy.parameters["policy_bias"].grad[rows] = own.sum(1, keepdim=True)

    around(policy, "backward", backward)
