"""Minibatches are cut from the rollout as it came, in every epoch alike: samples of one time go together.

https://github.com/thu-ml/tianshou/issues/741, https://github.com/leggedrobotics/rsl_rl/issues/148
"""

import torch

from study.environments import Task
from study.wrapping import around
from trainer.training import Training


def inject(training: Training, task: Task) -> None:
    agent = training.agent

    def minibatches(original, samples, num_envs):
        # Put the samples so that the agent's next shuffle restores their order.
        twin = torch.Generator().set_state(agent._generator.get_state())
        shuffle = torch.randperm(len(samples.valid), generator=twin)
        return original(samples._replace(valid=samples.valid[shuffle.argsort()]), num_envs)

    around(agent, "_minibatches", minibatches)
