"""The tasks of the study: what is trained, with which settings, and which head a head's fault hits."""

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import gymnasium
import numpy as np
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space

from trainer.config import TrainerConfig
from trainer.environments.host_growth import ACTION_HEADS

UPDATES = 100
SEVEN = (4, 8, 3, 3, 4, 4, 6)
TWENTY = tuple(3 + number % 4 for number in range(20))


class ContextualVectorEnv(gymnasium.vector.VectorEnv):
    """Each head has one right choice, which the observation names.

    Observation: [num_envs, 6] float32, standard normal, drawn anew in every step. A fixed random linear map scores
    the choices of a head; the best one is right. Reward: the part of the heads that count and chose right, 0 to 1.
    An episode terminates after 8 steps in all environments together. Autoreset mode is SAME_STEP.

    Args:
        num_envs: at least 1.
        sizes: number of choices of each head.
        counting: of the first so many heads the reward is made; the others do not matter. None for all.
        fixed: the right choice of the last so many heads is 0, whatever the observation says.
    """

    metadata = {"render_modes": [], "autoreset_mode": AutoresetMode.SAME_STEP}
    SIZE, STEPS = 6, 8

    def __init__(
        self, num_envs: int = 1, *, sizes: tuple[int, ...] = SEVEN, counting: int | None = None, fixed: int = 0
    ) -> None:
        self.num_envs = num_envs
        self.single_action_space = gymnasium.spaces.MultiDiscrete(sizes)
        self.single_observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (self.SIZE,), np.float32)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        # The same task for every seed: seeds differ in what they see of it.
        self._map = np.random.default_rng(0).standard_normal((self.SIZE, sum(sizes)), np.float32)
        self._bounds = np.cumsum(sizes)[:-1]
        self._counting = counting or len(sizes)
        self._first_fixed = len(sizes) - fixed

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self._step = 0
        return self._draw(), {}

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict]:
        rewards = (actions == self._right)[:, : self._counting].mean(1)
        self._step = (self._step + 1) % self.STEPS
        ended = np.full(self.num_envs, self._step == 0)
        return self._draw(), rewards, ended, np.zeros(self.num_envs, bool), {}

    def _draw(self) -> np.ndarray:
        observations = self.np_random.standard_normal((self.num_envs, self.SIZE), np.float32)
        scores = np.split(observations @ self._map, self._bounds, axis=1)
        self._right = np.stack([of_head.argmax(1) for of_head in scores], axis=1)
        self._right[:, self._first_fixed :] = 0
        return observations


class DroneVectorEnv(gymnasium.vector.VectorEnv):
    """A drone in the wind holds its place with motors that get hot: five discrete actuators, and real dynamics.

    Action: `MultiDiscrete([5, 5, 5, 3, 2])`: thrust along three axes (full back to full ahead), cooling (off, half,
    full), air brake. Thrust heats, cooling costs reward; a hot motor gives no thrust. Observation: [num_envs, 11]
    float32: position, velocity, wind (constant in an episode), heat, and whether the motor is hot. Reward: 1 at the
    place, 1 / (1 + squared distance) elsewhere, less 0.1 for full cooling. Nothing ends an episode but the limit of 32
    steps, which *truncates* it, at different times in different environments. Autoreset mode is SAME_STEP.
    """

    metadata = {"render_modes": [], "autoreset_mode": AutoresetMode.SAME_STEP}
    action_heads = {"thrust_x": 5, "thrust_y": 5, "thrust_z": 5, "cooling": 3, "brake": 2}
    STEPS, SECONDS = 32, 0.25

    def __init__(self, num_envs: int = 1) -> None:
        self.num_envs = num_envs
        self.single_action_space = gymnasium.spaces.MultiDiscrete(list(self.action_heads.values()))
        self.single_observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (11,), np.float32)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.observation_space = batch_space(self.single_observation_space, num_envs)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self._place, self._speed, self._wind = np.zeros((3, self.num_envs, 3))
        self._heat = np.zeros(self.num_envs)
        self._begin(np.ones(self.num_envs, bool))
        self._steps = self.np_random.integers(self.STEPS, size=self.num_envs)
        return self._observations(), {}

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict]:
        thrust = (actions[:, :3] - 2) / 2 * (self._heat < 1)[:, None]
        drag = 0.3 + 1.5 * actions[:, 4:]
        self._speed += self.SECONDS * (2.5 * thrust + self._wind - drag * self._speed)
        self._place += self.SECONDS * self._speed
        heating = 0.12 * np.abs(thrust).sum(1) - 0.15 * actions[:, 3]
        self._heat = np.clip(self._heat + heating, 0, 1.5)
        rewards = 1 / (1 + np.square(self._place).sum(1)) - 0.05 * actions[:, 3]
        self._steps += 1
        cut = self._steps >= self.STEPS
        infos = {}
        if cut.any():
            infos = {"final_obs": self._observations(), "_final_obs": cut.copy()}
            self._begin(cut)
        return self._observations(), rewards, np.zeros(self.num_envs, bool), cut, infos

    def _begin(self, which: np.ndarray) -> None:
        count = int(which.sum())
        self._place[which] = self.np_random.uniform(-2, 2, (count, 3))
        self._speed[which] = 0
        self._wind[which] = self.np_random.uniform(-0.8, 0.8, (count, 3))
        self._heat[which] = 0
        if hasattr(self, "_steps"):
            self._steps[which] = 0

    def _observations(self) -> np.ndarray:
        heat = self._heat[:, None]
        return np.concatenate([self._place, self._speed, self._wind, heat, heat >= 1], axis=1, dtype=np.float32)


@dataclass(frozen=True)
class Task:
    """What is trained in the study.

    Attributes:
        heads: names of the action heads, in order.
        head: the one that a head's fault hits.
        goal: return from which the fault `sparse_reward` pays; chance hardly reaches it.
        settings: of `TrainerConfig`.
    """

    heads: tuple[str, ...]
    head: str
    goal: float
    settings: dict[str, Any] = field(default_factory=dict)

    def config(self, seed: int, updates: int = UPDATES) -> TrainerConfig:
        """Settings of one run; environment i is seeded with 1000 * seed + i."""
        settings = {"num_envs": 32, "rollout_steps": 32, "minibatch_size": 256, "hidden_size": 64} | self.settings
        steps = settings["num_envs"] * settings["rollout_steps"] * updates
        # A constant learning rate: what changes in a signal is then not the schedule's doing.
        return TrainerConfig(
            **settings, total_timesteps=steps, seed=1000 * seed, run="study", anneal_learning_rate=False
        )


def _contextual(sizes: tuple[int, ...], goal: float, **kwargs: Any) -> Task:
    return Task(
        tuple(f"action_{number}" for number in range(len(sizes))),
        "action_0",
        goal,
        {
            "env": "study.environments:StudyContextual-v0",
            "vectorization": "vector_entry_point",
            "env_kwargs": {"sizes": sizes, **kwargs},
            "learning_rate": 2e-3,
        },
    )


TASKS = {
    "host-growth": Task(tuple(ACTION_HEADS), "op", 4.0, {"env_kwargs": {"max_episode_steps": 32}}),
    "contextual": _contextual(SEVEN, 4.0),
    "drone": Task(
        tuple(DroneVectorEnv.action_heads),
        "thrust_x",
        16.0,
        {"env": "study.environments:StudyDrone-v0", "vectorization": "vector_entry_point"},
    ),
    # Healthy, whatever the CV says: six of seven heads have nothing more to learn, or never mattered.
    "solved-heads": _contextual(SEVEN, 4.0, fixed=6),
    "idle-heads": _contextual(SEVEN, 4.0, counting=1),
    # The same task with other numbers of heads.
    "heads-2": _contextual(SEVEN[:2], 4.0),
    "heads-3": _contextual(SEVEN[:3], 4.0),
    "heads-20": _contextual(TWENTY, 4.0),
}

for _name, _class in {"StudyContextual-v0": ContextualVectorEnv, "StudyDrone-v0": DroneVectorEnv}.items():
    if _name not in gymnasium.registry:
        gymnasium.register(_name, vector_entry_point=partial(_class))
