"""The old policy is never refreshed: log-probabilities of the actions come from the weights at the start.

A missing `policy_old.load_state_dict(...)` after the update; what the ratio is then:
https://github.com/nikhilbarhate99/PPO-PyTorch/issues/12, https://github.com/huggingface/trl/issues/454.
"""

from study.environments import Task
from study.wrapping import around
from trainer.training import Training


def inject(training: Training, task: Task) -> None:
    policy = training.agent.policy
    start = policy.flat.clone()

    def evaluate(original, observations, actions):
        _, values = original(observations, actions)
        now = policy.flat.clone()
        policy.flat.copy_(start)
        log_probs, _ = original(observations, actions)
        policy.flat.copy_(now)
        return log_probs, values

    around(policy, "evaluate", evaluate)
