"""Environments by name: the default one, or any Gymnasium environment with suitable spaces."""

from collections.abc import Mapping
from dataclasses import dataclass

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv

DEFAULT_ENVIRONMENT = "host-growth"
DEVICE_ENVS = 1024
"""Host networks from which a GPU is worth the way to it."""
VECTORIZATIONS = ("sync", "vector_entry_point")
"""Of Gymnasium's vectorization modes those that stay in this process."""


class UnsupportedEnvironment(ValueError):
    """The environment does not exist or its spaces cannot be trained on; the message says why."""


@dataclass(frozen=True)
class TrainingEnvironment:
    """A vector environment as the rollout uses it.

    Attributes:
        vector_env: follows Gymnasium's vector API, any autoreset mode.
        heads: action head name -> number of choices, in the order of the action's columns.
        observation_size: length of a flat observation.
    """

    vector_env: VectorEnv
    heads: Mapping[str, int]
    observation_size: int

    @property
    def autoreset_mode(self) -> AutoresetMode:
        """What the environment does after an episode ends; Gymnasium's default is NEXT_STEP."""
        return AutoresetMode(self.vector_env.metadata.get("autoreset_mode", AutoresetMode.NEXT_STEP))

    def environment_actions(self, choices: np.ndarray) -> np.ndarray:
        """Choices [num_envs, heads], counted from zero, as actions of the environment's own space."""
        space = self.vector_env.single_action_space
        actions = choices + space.start
        return actions[:, 0] if isinstance(space, spaces.Discrete) else actions

    def reset_ended(self, observations: np.ndarray, ended: np.ndarray) -> np.ndarray:
        """`observations` [num_envs, observation_size] to go on from: new episodes where one `ended`, in DISABLED mode."""
        if not ended.any():
            return observations
        first, _ = self.vector_env.reset(options={"reset_mask": ended.copy()})
        return np.where(ended[:, None], np.asarray(first, observations.dtype), observations)


def make_environment(name: str, num_envs: int, vectorization: str = "sync", device: str = "cpu") -> TrainingEnvironment:
    """Build `num_envs` copies of the environment `name`.

    Args:
        name: `host-growth` or the id of a registered Gymnasium environment.
        num_envs: number of copies.
        vectorization: for Gymnasium's environments, one of `VECTORIZATIONS`.
        device: where the policy lives; with at least `DEVICE_ENVS` of them, so do the host networks.

    Raises:
        UnsupportedEnvironment: unknown id, missing dependency, or unsupported spaces.
    """
    if name == DEFAULT_ENVIRONMENT:
        from trainer.environments.host_growth import HostGrowthVectorEnv

        vector_env: VectorEnv = HostGrowthVectorEnv(num_envs, device=device if num_envs >= DEVICE_ENVS else "cpu")
    else:
        try:
            # SAME_STEP spends no environment step on the reset itself; a vector class has a mode of its own.
            kwargs = {"autoreset_mode": AutoresetMode.SAME_STEP} if vectorization == "sync" else None
            vector_env = gym.make_vec(name, num_envs, vectorization_mode=vectorization, vector_kwargs=kwargs)
        except (gym.error.Error, ImportError) as error:
            raise UnsupportedEnvironment(f"environment {name!r}: {error}") from error
    return training_environment(name, vector_env)


def training_environment(name: str, vector_env: VectorEnv) -> TrainingEnvironment:
    """Check that `vector_env` can be trained on and read its heads.

    Raises:
        UnsupportedEnvironment: its spaces are not supported; the message says which are.
    """
    actions = vector_env.single_action_space
    observations = vector_env.single_observation_space
    heads = getattr(vector_env, "action_heads", None)
    if heads is None:
        if isinstance(actions, spaces.Discrete):
            heads = {"action": int(actions.n)}
        elif isinstance(actions, spaces.MultiDiscrete) and actions.nvec.ndim == 1:
            heads = {f"action_{index}": int(size) for index, size in enumerate(actions.nvec)}
        else:
            raise UnsupportedEnvironment(
                f"environment {name!r}: action space {actions} is not supported; supported are Discrete and "
                "one-dimensional MultiDiscrete"
            )
    if not (isinstance(observations, spaces.Box) and len(observations.shape) == 1):
        raise UnsupportedEnvironment(
            f"environment {name!r}: observation space {observations} is not supported; supported is a Box with one "
            "dimension (gymnasium.wrappers.FlattenObservation makes one of others)"
        )
    return TrainingEnvironment(vector_env, heads, observations.shape[0])
