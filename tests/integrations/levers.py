"""An environment in which the first part of the action matters most."""

import gymnasium
import numpy as np
from gymnasium import spaces


class Levers(gymnasium.Env):
    """Each part of the action pays when it names the largest observation, the first ten times as much; 10 steps."""

    observation_space = spaces.Box(-1.0, 1.0, (4,), np.float32)

    def __init__(self, action_space: spaces.Space) -> None:
        self.action_space = action_space

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
