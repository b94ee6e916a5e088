"""A PPO loop with the structure of CleanRL's ppo.py, written for this comparison.

CleanRL's package needs a Gym that does not run with current NumPy, and is meant to be copied rather than imported. This
loop has everything that determines its cost: separate actor and critic, one `Categorical` per head, preallocated
tensors, GAE as a loop over tensors, shuffled indices, two statistics read from every minibatch, and torch's plain
`clip_grad_norm_` and Adam. It has no TensorBoard writer.
"""

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv
from torch import Tensor, nn
from torch.distributions import Categorical

from benchmarks.peers import Contestant, Setting


def make_envs(setting: Setting) -> VectorEnv:
    if setting.vectorization != "sync":
        return gym.make_vec(setting.env, setting.num_envs, vectorization_mode=setting.vectorization)
    thunks = [lambda: gym.wrappers.RecordEpisodeStatistics(gym.make(setting.env))] * setting.num_envs
    return SyncVectorEnv(thunks, autoreset_mode=AutoresetMode.SAME_STEP)


def linear(inputs: int, outputs: int, gain: float = 2**0.5) -> nn.Linear:
    layer = nn.Linear(inputs, outputs)
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


def network(inputs: int, hidden: int, outputs: int, gain: float) -> nn.Sequential:
    return nn.Sequential(
        linear(inputs, hidden), nn.Tanh(), linear(hidden, hidden), nn.Tanh(), linear(hidden, outputs, gain)
    )


class Agent(nn.Module):
    def __init__(self, observation_size: int, head_sizes: list[int], hidden_size: int) -> None:
        super().__init__()
        self.head_sizes = head_sizes
        self.critic = network(observation_size, hidden_size, 1, 1.0)
        self.actor = network(observation_size, hidden_size, sum(head_sizes), 0.01)

    def forward(self, observations: Tensor, actions: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Actions [batch, heads], their log-probabilities, entropies and values, each [batch]."""
        heads = [Categorical(logits=logits) for logits in self.actor(observations).split(self.head_sizes, dim=1)]
        if actions is None:
            actions = torch.stack([head.sample() for head in heads], dim=1)
        log_probs = torch.stack([head.log_prob(choice) for head, choice in zip(heads, actions.unbind(1))]).sum(0)
        entropies = torch.stack([head.entropy() for head in heads]).sum(0)
        return actions, log_probs, entropies, self.critic(observations).squeeze(1)


def start(setting: Setting) -> Contestant:
    torch.manual_seed(setting.seed)
    np.random.seed(setting.seed)
    envs = make_envs(setting)
    space = envs.single_action_space
    discrete = isinstance(space, gym.spaces.Discrete)
    agent = Agent(
        envs.single_observation_space.shape[0], [int(space.n)] if discrete else space.nvec.tolist(), setting.hidden_size
    )
    optimizer = torch.optim.Adam(agent.parameters(), lr=setting.learning_rate, eps=setting.adam_eps)

    shape = (setting.rollout_steps, setting.num_envs)
    observations = torch.zeros(*shape, envs.single_observation_space.shape[0])
    actions = torch.zeros(*shape, len(agent.head_sizes), dtype=torch.int64)
    log_probs, rewards, dones, values = (torch.zeros(shape) for _ in range(4))
    next_observation = torch.as_tensor(envs.reset(seed=setting.seed)[0])
    next_done = torch.zeros(setting.num_envs)

    def collect() -> None:
        nonlocal next_observation, next_done
        for step in range(setting.rollout_steps):
            observations[step], dones[step] = next_observation, next_done
            with torch.no_grad():
                actions[step], log_probs[step], _, values[step] = agent(next_observation)
            choice = actions[step].numpy()
            following, reward, terminated, truncated, _ = envs.step(choice[:, 0] if discrete else choice)
            rewards[step] = torch.as_tensor(reward)
            next_observation = torch.as_tensor(following)
            next_done = torch.as_tensor(np.logical_or(terminated, truncated), dtype=torch.float32)

    @torch.no_grad()
    def advantages_of_rollout() -> Tensor:
        next_value, alive = agent(next_observation)[3], 1 - next_done
        advantages, running = torch.zeros_like(rewards), 0.0
        for step in reversed(range(setting.rollout_steps)):
            delta = rewards[step] + setting.gamma * next_value * alive - values[step]
            advantages[step] = running = delta + setting.gamma * setting.gae_lambda * alive * running
            next_value, alive = values[step], 1 - dones[step]
        return advantages

    def learn(advantages: Tensor) -> None:
        batch = [x.flatten(0, 1) for x in (observations, actions, log_probs, values, advantages, advantages + values)]
        indices = np.arange(setting.steps_per_update)
        clip, clipped_parts = setting.clip_range, []
        for _ in range(setting.epochs):
            np.random.shuffle(indices)
            for first in range(0, len(indices), setting.minibatch_size):
                chosen = indices[first : first + setting.minibatch_size]
                observation, action, old_log_prob, old_value, advantage, target = (x[chosen] for x in batch)
                _, log_prob, entropy, value = agent(observation, action)
                log_ratio = log_prob - old_log_prob
                ratio = log_ratio.exp()
                with torch.no_grad():
                    ((ratio - 1) - log_ratio).mean().item()
                    clipped_parts.append(((ratio - 1).abs() > clip).float().mean().item())
                advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
                policy_loss = torch.max(-advantage * ratio, -advantage * ratio.clamp(1 - clip, 1 + clip)).mean()
                limit = setting.value_clip_range
                clipped_value = old_value + (value - old_value).clamp(-limit, limit)
                value_loss = 0.5 * torch.max((value - target) ** 2, (clipped_value - target) ** 2).mean()
                loss = policy_loss - setting.entropy_coef * entropy.mean() + setting.value_coef * value_loss
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(agent.parameters(), setting.max_grad_norm)
                optimizer.step()

    def update() -> None:
        collect()
        learn(advantages_of_rollout())

    return Contestant(update)
