"""Experience: stepping the environments, and advantages by GAE(lambda)."""

import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from gymnasium.vector import AutoresetMode

from trainer.distributed import Ranks
from trainer.environments import TrainingEnvironment
from trainer.policy import ActorCritic

EPISODE_WINDOW = 100
# What the collector knows of every episode in progress.
_EPISODES = ("observations", "only_resets", "returns", "lengths")


@dataclass(frozen=True)
class Rollout:
    """Experience of one rollout.

    Attributes:
        observations: float32 [steps, environments, observation_size].
        actions: int64 [steps, environments, heads], choices counted from zero.
        log_probs: float32 [steps, environments], joint log-probability of the action when it was taken.
        values: float32 [steps, environments], the value function's estimate when the action was taken.
        advantages: float32 [steps, environments], GAE(lambda), not normalized.
        returns: float32 [steps, environments], advantages + values, the value function's target.
        trained_on: bool [steps, environments], False for steps that only reset an environment.
        environment_steps: environment steps taken, all ranks together, resets left out.
        episodes: episodes that ended, all ranks together.
        seconds_of_ranks: wall time of each rank's environments and policy, before any waited for another.
    """

    observations: np.ndarray
    actions: np.ndarray
    log_probs: np.ndarray
    values: np.ndarray
    advantages: np.ndarray
    returns: np.ndarray
    trained_on: np.ndarray
    environment_steps: int
    episodes: int
    seconds_of_ranks: tuple[float, ...] = (0.0,)

    @property
    def num_envs(self) -> int:
        return self.advantages.shape[1]


def generalized_advantages(
    rewards: np.ndarray,
    values: np.ndarray,
    next_values: np.ndarray,
    episode_ends: np.ndarray,
    gamma: float,
    gae_lambda: float,
) -> np.ndarray:
    """GAE(lambda) of Schulman et al. 2016, https://arxiv.org/abs/1506.02438, equation 16.

    Args:
        rewards, values: [steps, environments].
        next_values: [steps, environments], value of the state each step led to: 0 where the
            episode terminated, the value of its final observation where it was truncated.
        episode_ends: bool [steps, environments], whether the episode ended with the step.

    Returns:
        Advantages [steps, environments]; none flows across the end of an episode.
    """
    deltas = rewards + gamma * next_values - values
    decay = gamma * gae_lambda * ~episode_ends
    advantages = np.zeros_like(deltas)
    running = np.zeros_like(deltas[0])
    for step in reversed(range(len(deltas))):
        running = deltas[step] + decay[step] * running
        advantages[step] = running
    return advantages


class RolloutCollector:
    """Steps the environments with the policy, from where the last rollout ended.

    Respects Gymnasium's three autoreset modes: a truncated episode is continued
    with the value of its own final observation, the step in which NEXT_STEP
    environments only reset is not trained on, and DISABLED ones are reset here.

    Attributes:
        recent_returns, recent_lengths: of the last 100 episodes, as the environment paid them.
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
        count = environment.vector_env.num_envs
        observations, _ = environment.vector_env.reset(seed=seed + ranks.rank * count)
        self._observations = _float32(observations)
        self._only_resets = np.zeros(count, dtype=bool)
        self._returns = np.zeros(count)
        self._lengths = np.zeros(count, dtype=int)
        self.recent_returns: deque[float] = deque(maxlen=EPISODE_WINDOW)
        self.recent_lengths: deque[int] = deque(maxlen=EPISODE_WINDOW)

    @property
    def environment_can_be_saved(self) -> bool:
        """Whether episodes in progress can go on after `load_state_dict`: the environment has that method too."""
        return hasattr(self._environment.vector_env, "load_state_dict")

    def state_dict(self) -> dict[str, Any]:
        """Where the next rollout of all ranks starts; the environment is the first axis of each of its tensors.

        Only valid between two rollouts, and all ranks have to call it. Tensors are not copied.
        """
        state = {
            "generator": self._generator.get_state(),
            "recent_returns": list(self.recent_returns),
            "recent_lengths": list(self.recent_lengths),
        }
        if self.environment_can_be_saved:
            episodes = {name: torch.from_numpy(getattr(self, f"_{name}")) for name in _EPISODES}
            state["environment"] = self._ranks.gather_rows(self._environment.vector_env.state_dict())
            state["episodes"] = self._ranks.gather_rows(episodes)
        return state

    def load_state_dict(self, state: Mapping[str, Any], *, seed: int) -> None:
        """Go on from `state_dict()` of collectors with as many environments in all, whatever the number of ranks.

        An environment that cannot be saved begins new episodes.

        Args:
            state: of the collector.
            seed: of these new episodes.

        Raises:
            KeyError, RuntimeError, TypeError, ValueError: the state does not fit the environment.
        """
        self._generator.set_state(state["generator"])
        self.recent_returns.extend(state["recent_returns"])
        self.recent_lengths.extend(state["recent_lengths"])
        if not self.environment_can_be_saved:
            seed += self._ranks.rank * len(self._observations)
            self._observations = _float32(self._environment.vector_env.reset(seed=seed)[0])
            return
        self._environment.vector_env.load_state_dict(self._ranks.own_rows(state["environment"]))
        episodes = self._ranks.own_rows(state["episodes"])
        for name in _EPISODES:
            own, saved = getattr(self, f"_{name}"), episodes[name].numpy()
            if (own.shape, own.dtype) != (saved.shape, saved.dtype):
                raise ValueError(f"{name} must be {own.dtype} {list(own.shape)}, got {saved.dtype} {list(saved.shape)}")
            own[...] = saved

    def collect(self, should_stop: Callable[[], bool] = lambda: False) -> Rollout | None:
        """One rollout, or None if `should_stop()` held after one of its steps."""
        started = time.perf_counter()
        count = len(self._observations)
        shape = (self._steps, count)
        observations = np.empty((*shape, self._environment.observation_size), np.float32)
        actions = np.empty((*shape, len(self._environment.heads)), np.int64)
        rewards = np.empty(shape, np.float32)
        ends, trained_on = np.zeros(shape, bool), np.ones(shape, bool)
        finished: list[tuple[float, int]] = []
        cut_short: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        variates = self._ranks.own_columns(
            torch.rand(
                (self._steps, len(self._environment.heads), self._ranks.size * count),
                generator=self._generator,
                device=self._generator.device,
            )
        )

        for step in range(self._steps):
            observations[step] = self._observations
            trained_on[step] = ~self._only_resets
            actions[step] = self._policy.act(self._observations, variates[step])
            following, reward, terminated, truncated, infos = self._environment.vector_env.step(
                self._environment.environment_actions(actions[step])
            )
            rewards[step] = reward
            ends[step] = terminated | truncated
            finished += self._finished_episodes(reward, ends[step])
            following, final = self._after_episode_ends(_float32(following), ends[step], infos)
            environments = np.flatnonzero(truncated & ~terminated)
            if len(environments):
                cut_short.append((np.full_like(environments, step), environments, final[environments]))
            self._observations = following
            if should_stop():
                return None

        # The policy has not changed on the way, and one large batch costs less than many small ones.
        samples = self._steps * count
        log_probs, values = (
            array.reshape(shape)
            for array in self._policy.evaluate(observations.reshape(samples, -1), actions.reshape(samples, -1))
        )
        next_values = np.concatenate([values[1:], self._policy.values(self._observations)[np.newaxis]])
        next_values[ends] = 0.0
        if cut_short:
            steps, environments, final = map(np.concatenate, zip(*cut_short))
            next_values[steps, environments] = self._policy.values(final)
        advantages = generalized_advantages(rewards, values, next_values, ends, self._gamma, self._gae_lambda)
        of_ranks = self._ranks.gather_objects((int(trained_on.sum()), finished, time.perf_counter() - started))
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
            trained_on,
            environment_steps=sum(steps for steps, _, _ in of_ranks),
            episodes=len(finished),
            seconds_of_ranks=tuple(seconds for _, _, seconds in of_ranks),
        )

    def _after_episode_ends(
        self, following: np.ndarray, ended: np.ndarray, infos: dict
    ) -> tuple[np.ndarray, np.ndarray]:
        """Observations to act on next, and the final observations of episodes that ended."""
        final = following
        mode = self._environment.autoreset_mode
        if mode is AutoresetMode.NEXT_STEP:
            self._only_resets = ended
        elif ended.any() and mode is AutoresetMode.SAME_STEP:
            final = following.copy()
            final[ended] = np.stack(list(infos["final_obs"][ended])).astype(np.float32)
        elif mode is AutoresetMode.DISABLED:
            following = self._environment.reset_ended(following, ended)
        return following, final

    def _finished_episodes(self, reward: np.ndarray, ended: np.ndarray) -> list[tuple[float, int]]:
        """Return and length of the episodes that ended with this step."""
        self._returns += reward
        self._lengths += ~self._only_resets
        finished = list(zip(self._returns[ended].tolist(), self._lengths[ended].tolist()))
        self._returns[ended] = 0.0
        self._lengths[ended] = 0
        return finished


def _float32(observations: np.ndarray) -> np.ndarray:
    # A copy: vector environments may reuse the array that they return.
    return np.array(observations, dtype=np.float32)
