"""A head's weights are drawn with a standard deviation of 1, a hundred times the usual 0.01 of a policy's last layer.

`nn.init.normal_(weight)` does that; why the last layer is to be small: point 2 of
https://iclr-blog-track.github.io/2022/03/25/ppo-implementation-details/, and
https://github.com/ikostrikov/pytorch-a2c-ppo-acktr-gail/issues/230.
"""

from study.environments import Task
from study.wrapping import rows_of
from trainer.training import Training


def inject(training: Training, task: Task) -> None:
    policy = training.agent.policy
    policy.parameters["policy_weight"][rows_of(policy, task.head)].normal_()
