"""The advantage has the wrong sign, or the loss lacks its minus: the policy is pushed away from what pays.

https://github.com/natolambert/rlhf-book/issues/125
"""

from study.environments import Task
from study.wrapping import around
from trainer.training import Training


def inject(training: Training, task: Task) -> None:
    def minibatches(original, *arguments):
        return (minibatch._replace(advantages=-minibatch.advantages) for minibatch in original(*arguments))

    around(training.agent, "_minibatches", minibatches)
