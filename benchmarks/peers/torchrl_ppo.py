"""PPO from TorchRL's parts, as in its own PPO examples: collector, GAE, replay buffer, ClipPPOLoss."""

import logging

import gymnasium as gym
import torch
from gymnasium.vector import AutoresetMode
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torch.distributions import Categorical, Independent
from torchrl.collectors import Collector
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
from torchrl.data.replay_buffers.samplers import SamplerWithoutReplacement
from torchrl.envs import ExplorationType, GymWrapper
from torchrl.modules import ProbabilisticActor, ValueOperator
from torchrl.objectives import ClipPPOLoss
from torchrl.objectives.value import GAE

from benchmarks.peers import Contestant, Setting
from benchmarks.peers.cleanrl import network


class Joint(Independent):
    """Independent categoricals over heads of different sizes: logits padded to the widest head."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__(Categorical(logits=logits), 1)


class Actor(nn.Module):
    def __init__(self, observation_size: int, head_sizes: list[int], hidden_size: int) -> None:
        super().__init__()
        self.network = network(observation_size, hidden_size, sum(head_sizes), 0.01)
        self.register_buffer("present", torch.arange(max(head_sizes)) < torch.tensor(head_sizes).unsqueeze(1))

    def forward(self, observation: Tensor) -> Tensor:
        """Logits [..., heads, widest head]."""
        logits = self.network(observation)
        padded = logits.new_full((*logits.shape[:-1], *self.present.shape), torch.finfo(logits.dtype).min)
        padded[..., self.present] = logits
        return padded


def make_env(setting: Setting) -> GymWrapper:
    # The fastest way to step eight CartPoles in one process: four times as fast as a SerialEnv of GymEnvs.
    kwargs = {"autoreset_mode": AutoresetMode.DISABLED} if setting.vectorization == "sync" else {}
    envs = gym.make_vec(
        setting.env, setting.num_envs, vectorization_mode=setting.vectorization, vector_kwargs=kwargs or None
    )
    envs.autoreset_mode = envs.metadata["autoreset_mode"]  # the wrapper reads it here
    return GymWrapper(envs, categorical_action_encoding=True)


def start(setting: Setting) -> Contestant:
    logging.getLogger("torchrl").setLevel(logging.WARNING)
    torch.manual_seed(setting.seed)
    env = make_env(setting)
    env.set_seed(setting.seed)
    observation_size = env.observation_spec["observation"].shape[-1]
    space = env.single_action_space
    if isinstance(space, gym.spaces.Discrete):
        actor_network: nn.Module = network(observation_size, setting.hidden_size, int(space.n), 0.01)
        distribution = Categorical
    else:
        actor_network = Actor(observation_size, space.nvec.tolist(), setting.hidden_size)
        distribution = Joint
    actor = ProbabilisticActor(
        TensorDictModule(actor_network, in_keys=["observation"], out_keys=["logits"]),
        in_keys=["logits"],
        distribution_class=distribution,
        return_log_prob=True,
        default_interaction_type=ExplorationType.RANDOM,
    )
    critic = ValueOperator(network(observation_size, setting.hidden_size, 1, 1.0), in_keys=["observation"])
    collector = Collector(
        env, actor, frames_per_batch=setting.steps_per_update, total_frames=-1, auto_register_policy_transforms=False
    )
    buffer = TensorDictReplayBuffer(
        storage=LazyTensorStorage(setting.steps_per_update),
        sampler=SamplerWithoutReplacement(),
        batch_size=setting.minibatch_size,
    )
    advantage = GAE(gamma=setting.gamma, lmbda=setting.gae_lambda, value_network=critic, average_gae=False)
    loss_module = ClipPPOLoss(
        actor,
        critic,
        clip_epsilon=setting.clip_range,
        entropy_coeff=setting.entropy_coef,
        critic_coeff=0.5 * setting.value_coef,  # the others halve the squared error
        loss_critic_type="l2",
        clip_value=setting.value_clip_range,
        normalize_advantage=True,
    )
    optimizer = torch.optim.Adam(loss_module.parameters(), lr=setting.learning_rate, eps=setting.adam_eps)
    rollouts = iter(collector)

    def update() -> None:
        rollout = next(rollouts)
        with torch.no_grad():
            rollout = advantage(rollout)
        buffer.extend(rollout.reshape(-1))
        for _ in range(setting.epochs):
            for batch in buffer:
                losses = loss_module(batch)
                loss = losses["loss_objective"] + losses["loss_critic"] + losses["loss_entropy"]
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(loss_module.parameters(), setting.max_grad_norm)
                optimizer.step()

    return Contestant(update, close=collector.shutdown)
