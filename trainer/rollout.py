"""Experience: stepping the environments, and advantages by GAE(lambda)."""

import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from gymnasium.vector import AutoresetMode
from torch import Tensor

from trainer.distributed import Ranks
from trainer.environments import TrainingEnvironment, UnsupportedEnvironment
from trainer.policy import ActorCritic

EPISODE_WINDOW = 100
# The collector's state of every episode in progress.
_EPISODES = ("observations", "only_resets", "returns", "lengths")


@dataclass(frozen=True)
class Rollout:
    """Experience of one rollout; tensors are on the policy's device.

    Attributes:
        observations: float32 [steps, environments, observation_size].
        actions: int64 [steps, environments, heads], choices counted from zero.
        log_probs: float32 [steps, environments, heads], of each head's choice when it was taken; the action's
            joint log-probability is their sum.
        values: float32 [steps, environments], the value function's estimate when the action was taken.
        advantages: float32 [steps, environments], GAE(lambda), not normalized.
        returns: float32 [steps, environments], advantages + values, the value function's target.
        valid: bool [steps, environments], False for steps that only reset an environment; always on the CPU.
        environment_steps: environment steps taken, all ranks together, resets left out.
        episodes: episodes that ended, all ranks together.
        seconds_of_ranks: wall time of each rank's environments and policy, without waiting for other ranks.
    """

    observations: Tensor
    actions: Tensor
    log_probs: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor
    valid: Tensor
    environment_steps: int
    episodes: int
    seconds_of_ranks: tuple[float, ...] = (0.0,)

    @property
    def num_envs(self) -> int:
        return self.advantages.shape[1]


def generalized_advantages(
    rewards: Tensor,
    values: Tensor,
    next_values: Tensor,
    episode_ends: Tensor,
    gamma: float,
    gae_lambda: float,
) -> Tensor:
    """GAE(lambda) of Schulman et al. 2016, https://arxiv.org/abs/1506.02438, equation 16.

    Args:
        rewards, values: [steps, environments].
        next_values: [steps, environments], value of the state after each step: 0 if the episode terminated, the
            value of its final observation if it was truncated.
        episode_ends: bool [steps, environments], whether the episode ended with the step.

    Returns:
        Advantages [steps, environments]; none flows across the end of an episode.
    """
    errors = torch.add(rewards, next_values, alpha=gamma).sub_(values)
    advantages = torch.empty_like(errors)
    later = torch.zeros_like(errors[0])
    for error, is_end, advantage in reversed(list(zip(errors, episode_ends, advantages))):
        torch.add(error, later, alpha=gamma * gae_lambda, out=advantage)
        # Not a factor of 0: a value after the end may be NaN.
        later = torch.where(is_end, error, advantage, out=advantage)
    return advantages


class RolloutCollector:
    """Steps the environments with the policy. Each rollout begins where the last one ended.

    Supports Gymnasium's three autoreset modes. A truncated episode bootstraps from the value of its own final
    observation. The step in which a NEXT_STEP environment only resets is not trained on. DISABLED environments are
    reset here. Environments on the policy's device (`as_tensors`) return tensors, and nothing waits for the device
    before the rollout is over; their episodes only terminate.

    Attributes:
        recent_returns, recent_lengths: undiscounted returns and lengths of the last 100 episodes.
    """

    def __init__(
        self,
        environment: TrainingEnvironment,
        policy: ActorCritic,
        *,
        steps: int,
        gamma: float,
        gae_lambda: float,
        seed: int,
        generator: torch.Generator,
        ranks: Ranks = Ranks(),
    ) -> None:
        self._ranks = ranks
        self._environment = environment
        self._policy = policy
        self._steps = steps
        self._gamma = gamma
        self._gae_lambda = gae_lambda
        self._generator = generator
        self._as_tensors = getattr(environment.vector_env, "as_tensors", False)
        count = environment.vector_env.num_envs
        observations, _ = environment.vector_env.reset(seed=seed + ranks.rank * count)
        self._observations = _copied(observations)
        self._only_resets = np.zeros(count, dtype=bool)
        self._returns = np.zeros(count)
        self._lengths = np.zeros(count, dtype=int)
        self.recent_returns: deque[float] = deque(maxlen=EPISODE_WINDOW)
        self.recent_lengths: deque[int] = deque(maxlen=EPISODE_WINDOW)

    @property
    def environment_can_be_saved(self) -> bool:
        """Whether episodes in progress continue after `load_state_dict`: the environment needs that method too."""
        return hasattr(self._environment.vector_env, "load_state_dict")

    def state_dict(self) -> dict[str, Any]:
        """Where the next rollout of all ranks starts; the environment is the first axis of each of its tensors.

        Call it only between two rollouts, and on all ranks. Tensors are not copied.
        """
        state = {
            "generator": self._generator.get_state(),
            "recent_returns": list(self.recent_returns),
            "recent_lengths": list(self.recent_lengths),
        }
        if self.environment_can_be_saved:
            episodes = {name: torch.as_tensor(getattr(self, f"_{name}")) for name in _EPISODES}
            state["environment"] = self._ranks.gather_rows(self._environment.vector_env.state_dict())
            state["episodes"] = self._ranks.gather_rows(episodes)
        return state

    def load_state_dict(self, state: Mapping[str, Any], *, seed: int) -> None:
        """Continue from `state_dict()`. The total number of environments must match; the number of ranks may differ.

        An environment that cannot be saved begins new episodes.

        Args:
            state: from `state_dict()`.
            seed: seed of these new episodes.

        Raises:
            KeyError, RuntimeError, TypeError, ValueError: the state does not fit the environment.
        """
        self._generator.set_state(state["generator"])
        self.recent_returns.extend(state["recent_returns"])
        self.recent_lengths.extend(state["recent_lengths"])
        if not self.environment_can_be_saved:
            seed += self._ranks.rank * len(self._observations)
            self._observations = _copied(self._environment.vector_env.reset(seed=seed)[0])
            return
        self._environment.vector_env.load_state_dict(self._ranks.own_rows(state["environment"]))
        episodes = self._ranks.own_rows(state["episodes"])
        for name in _EPISODES:
            own, saved = torch.as_tensor(getattr(self, f"_{name}")), episodes[name]
            if (own.shape, own.dtype) != (saved.shape, saved.dtype):
                raise ValueError(f"{name} must be {own.dtype} {list(own.shape)}, got {saved.dtype} {list(saved.shape)}")
            own.copy_(saved)

    def collect(self, should_stop: Callable[[], bool] = lambda: False) -> Rollout | None:
        """One rollout, or None if `should_stop()` held after one of its steps."""
        started = time.perf_counter()
        environment, policy, device = self._environment, self._policy, self._policy.device
        mode = environment.autoreset_mode
        observations = self._buffer(torch.float32, environment.observation_size)
        actions = self._buffer(torch.int64, len(environment.heads))
        rewards, ends = self._buffer(torch.float32), self._buffer(torch.bool)
        uniforms = self._uniforms()
        # NumPy writes into the same memory, faster.
        buffers = observations, actions, rewards, ends, uniforms
        observed, taken, paid, ended, uniforms = buffers if self._as_tensors else map(_as_array, buffers)
        truncated_only = np.zeros(ends.shape, bool)
        final_observations: list[np.ndarray] = []

        for step in range(self._steps):
            observed[step] = self._observations
            taken[step] = policy.act(observed[step], uniforms[step])
            next_observations, paid[step], terminated, truncated, infos = environment.vector_env.step(
                taken[step] if self._as_tensors else environment.environment_actions(taken[step])
            )
            ended[step] = terminated | truncated
            if not self._as_tensors:
                if truncated.any():
                    truncated_only[step] = cut = truncated & ~terminated
                    final = _final(infos) if mode is AutoresetMode.SAME_STEP else next_observations
                    final_observations += list(final[cut])
                if mode is AutoresetMode.DISABLED:
                    next_observations = environment.reset_ended(next_observations, ended[step])
            self._observations = next_observations
            if should_stop():
                return None
        self._observations = _copied(next_observations)
        on_host = _start_copying(rewards, ends)

        # The policy is still the same, and one large batch costs less than many small ones.
        observations, actions, rewards, ends = (
            tensor.to(device, non_blocking=True) for tensor in (observations, actions, rewards, ends)
        )
        log_probs, values = (
            tensor.unflatten(0, ends.shape)
            for tensor in policy.evaluate(observations.flatten(0, 1), actions.flatten(0, 1))
        )
        last_observations = torch.as_tensor(self._observations).to(device, non_blocking=True)
        next_values = torch.cat([values[1:], policy.values(last_observations).unsqueeze(0)]).masked_fill_(ends, 0.0)
        if final_observations:
            where = torch.from_numpy(np.flatnonzero(truncated_only)).to(device, non_blocking=True)
            final = torch.from_numpy(np.stack(final_observations).astype(np.float32))
            next_values.view(-1)[where] = policy.values(final.to(device, non_blocking=True))
        advantages = generalized_advantages(rewards, values, next_values, ends, self._gamma, self._gae_lambda)

        paid, ended = on_host()
        valid = np.ones(ended.shape, bool)
        if mode is AutoresetMode.NEXT_STEP:
            valid[0], valid[1:] = ~self._only_resets, ~ended[:-1]
            self._only_resets[:] = ended[-1]
        finished = self._finished_episodes(paid, valid, ended)
        of_ranks = self._ranks.gather_objects((int(valid.sum()), finished, time.perf_counter() - started))
        finished = [episode for _, of_rank, _ in of_ranks for episode in of_rank]
        self.recent_returns.extend(episode_return for episode_return, _ in finished)
        self.recent_lengths.extend(length for _, length in finished)
        return Rollout(
            observations,
            actions,
            log_probs,
            values,
            advantages,
            advantages + values,
            torch.from_numpy(valid),
            environment_steps=sum(steps for steps, _, _ in of_ranks),
            episodes=len(finished),
            seconds_of_ranks=tuple(seconds for _, _, seconds in of_ranks),
        )

    def _buffer(self, dtype: torch.dtype, *shape: int) -> Tensor:
        """An empty tensor [steps, environments, *shape] for the environments; pinned if it goes to a GPU later."""
        device = self._policy.device
        where = {"device": device} if self._as_tensors else {"pin_memory": device.type == "cuda"}
        return torch.empty(self._steps, self._environment.vector_env.num_envs, *shape, dtype=dtype, **where)

    def _uniforms(self) -> Tensor:
        """Uniforms for sampling actions, [steps, heads, environments]. All ranks draw the same; each uses its part."""
        generator, environments = self._generator, self._ranks.size * self._environment.vector_env.num_envs
        shape = (self._steps, len(self._environment.heads), environments)
        return self._ranks.own_columns(torch.rand(shape, generator=generator, device=generator.device))

    def _finished_episodes(self, rewards: np.ndarray, valid: np.ndarray, ended: np.ndarray) -> list[tuple[float, int]]:
        """Return and length of each episode that ended, in order."""
        finished: list[tuple[float, int]] = []
        start = 0
        for stop in np.flatnonzero(ended.any(1)) + 1:
            self._returns += rewards[start:stop].sum(0, dtype=float)
            self._lengths += valid[start:stop].sum(0)
            over, start = ended[stop - 1], stop
            finished += zip(self._returns[over].tolist(), self._lengths[over].tolist())
            self._returns[over], self._lengths[over] = 0.0, 0
        self._returns += rewards[start:].sum(0, dtype=float)
        self._lengths += valid[start:].sum(0)
        return finished


def _as_array(tensor: Tensor) -> np.ndarray | Tensor:
    """A tensor on the CPU as a NumPy array that shares its memory; any other tensor unchanged."""
    return tensor.numpy() if tensor.is_cpu else tensor


def _final(infos: Mapping[str, Any]) -> np.ndarray:
    """Final observations of the environments whose episode ended.

    Raises:
        UnsupportedEnvironment: the environment does not return them.
    """
    if "final_obs" not in infos:
        raise UnsupportedEnvironment(
            "the environment declares SAME_STEP autoreset and has truncated an episode, but infos lacks `final_obs`, "
            "the final observations, which give the value of a truncated episode"
        )
    return infos["final_obs"]


def _copied(observations: np.ndarray | Tensor) -> np.ndarray | Tensor:
    """A copy in float32: vector environments may reuse the memory that they return."""
    if isinstance(observations, Tensor):
        return observations.to(torch.float32, copy=True)
    return np.array(observations, dtype=np.float32)


def _start_copying(*tensors: Tensor) -> Callable[[], list[np.ndarray]]:
    """Start copying tensors to the host. The returned function waits for these copies only and returns them."""
    if tensors[0].is_cpu:
        return lambda: [tensor.numpy() for tensor in tensors]
    copies = [torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True) for tensor in tensors]
    for copy, tensor in zip(copies, tensors):
        copy.copy_(tensor, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record(torch.cuda.current_stream(tensors[0].device))

    def wait() -> list[np.ndarray]:
        arrived.synchronize()
        return [copy.numpy() for copy in copies]

    return wait
