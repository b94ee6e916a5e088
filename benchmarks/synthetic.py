"""Seven heads to learn: an environment that takes almost no time, with a known optimum.

Importing this module registers it with Gymnasium as `SevenHeads-v0`. So an environment's id may be
`benchmarks.synthetic:SevenHeads-v0`; it exists only as a vector environment.
"""

from typing import Any

import gymnasium
import numpy as np
from gymnasium.vector.utils import batch_space

HEAD_SIZES = (4, 8, 3, 3, 4, 4, 6)
OBSERVATION_SIZE = 64
TELLING = 8  # numbers of the observation that matter
EPISODE_STEPS = 8

_CONTEXTS = 16_384


class SevenHeadsVectorEnv(gymnasium.vector.VectorEnv):
    """Observations without memory, and for each head one right choice that is linear in the observation.

    Action: `MultiDiscrete` of `HEAD_SIZES`. Observation: [num_envs, 64] float32, standard normal, drawn anew in every
    step from 16,384 fixed ones. A fixed random linear map of the first 8 numbers scores the choices; the best score of
    a head is its right choice, computed once. So a step costs two lookups.
    Reward: the fraction of the heads that chose right, 0 to 1. An episode *terminates* after 8 steps in all
    environments together; its return is 8 at best and 1.95 by chance. Autoreset mode is SAME_STEP.

    Args:
        num_envs: at least 1.
    """

    metadata = {"render_modes": [], "autoreset_mode": gymnasium.vector.AutoresetMode.SAME_STEP}

    def __init__(self, num_envs: int = 1) -> None:
        self.num_envs = num_envs
        self.single_action_space = gymnasium.spaces.MultiDiscrete(HEAD_SIZES)
        self.single_observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (OBSERVATION_SIZE,), np.float32)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        task = np.random.default_rng(0)  # the same for every seed; seeds differ in their observations
        self._contexts = task.standard_normal((_CONTEXTS, OBSERVATION_SIZE), np.float32)
        scores = self._contexts[:, :TELLING] @ task.standard_normal((TELLING, sum(HEAD_SIZES)), np.float32)
        by_head = np.split(scores, np.cumsum(HEAD_SIZES)[:-1], axis=1)
        self._right = np.stack([head.argmax(1) for head in by_head], axis=1)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self._step = 0
        return self._draw(), {}

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        rewards = (actions == self._right[self._current]).mean(1)
        observations, infos = self._draw(), {}
        self._step += 1
        ended = np.full(self.num_envs, self._step == EPISODE_STEPS)
        if self._step == EPISODE_STEPS:
            final = np.empty(self.num_envs, dtype=object)
            final[:] = list(observations)
            infos = {"final_obs": final, "_final_obs": ended.copy()}
            observations, self._step = self._draw(), 0
        return observations, rewards, ended, np.zeros(self.num_envs, dtype=bool), infos

    def _draw(self) -> np.ndarray:
        self._current = self.np_random.integers(_CONTEXTS, size=self.num_envs)
        return self._contexts[self._current]


if "SevenHeads-v0" not in gymnasium.registry:
    gymnasium.register("SevenHeads-v0", vector_entry_point=SevenHeadsVectorEnv)
