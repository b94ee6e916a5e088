"""Environments that take no time, so that the libraries around them are what a test runs."""

import gymnasium
import numpy as np
from gymnasium import spaces


class Levers(gymnasium.Env):
    """Every action has a component that pays if it is the largest observation's index; 10 steps an episode.

    The first component pays ten times as much as the others, so that heads differ.
    """

    observation_space = spaces.Box(-1.0, 1.0, (4,), np.float32)

    def __init__(self, action_space: spaces.Space | None = None) -> None:
        self.action_space = spaces.MultiDiscrete([3, 4, 2]) if action_space is None else action_space

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        super().reset(seed=seed)
        self._steps = 0
        return self._observe(), {}

    def step(self, action):
        hits = np.atleast_1d(action) == self._observation.argmax()
        self._steps += 1
        return self._observe(), float(10 * hits[0] + hits[1:].sum()), self._steps == 10, False, {}

    def _observe(self) -> np.ndarray:
        self._observation = self.np_random.uniform(-1, 1, 4).astype(np.float32)
        return self._observation
