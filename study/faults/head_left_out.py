"""A head is missing in the sum of the joint log-probability; only the entropy bonus still moves it.

Its log-probability is nowhere computed, so that its KL divergence is measured as zero.

Sums over the parts of an action go wrong often: https://github.com/thu-ml/tianshou/issues/40,
https://github.com/pytorch/rl/pull/2791.
"""

import torch

from study.environments import Task
from study.wrapping import around, rows_of
from trainer.policy import FactoredCategorical
from trainer.training import Training


def inject(training: Training, task: Task) -> None:
    policy = training.agent.policy
    number, rows = list(policy.heads).index(task.head), rows_of(policy, task.head)

    class WithoutHead(FactoredCategorical):
        def log_probs(self, actions):
            log_probs = super().log_probs(actions)
            log_probs[number] = 0
            return log_probs

        def gradient(self, actions, by_log_prob, by_entropy):
            gradient = super().gradient(actions, by_log_prob, by_entropy)
            gradient[rows] = super().gradient(actions, torch.zeros_like(by_log_prob), by_entropy)[rows]
            return gradient

    around(policy, "distribution", lambda original, logits: WithoutHead(logits, policy._layout))
