"""Environments by name: the default one, or any Gymnasium environment with suitable spaces."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv

DEFAULT_ENVIRONMENT = "host-growth"
DEVICE_ENVS = 1024
"""Number of host networks from which a GPU is faster."""
VECTORIZATIONS = ("sync", "vector_entry_point")
"""Gymnasium's vectorization modes that stay in this process."""


class UnsupportedEnvironment(ValueError):
    """The environment does not exist, or its spaces are not supported; the message says why."""


@dataclass(frozen=True)
class TrainingEnvironment:
    """A vector environment as the rollout uses it; `training_environment` makes one.

    Attributes:
        vector_env: follows Gymnasium's vector API, any autoreset mode.
        choices: name of each part of an action -> number of choices, in the order of the action space.
        observation_size: length of a flat observation.
        notes: warnings for people who train on it.
        heads: the `choices` with at least two options; the others have nothing to learn.
    """

    vector_env: VectorEnv
    choices: Mapping[str, int]
    observation_size: int
    notes: tuple[str, ...] = ()
    heads: Mapping[str, int] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "heads", {name: count for name, count in self.choices.items() if count > 1})

    @property
    def autoreset_mode(self) -> AutoresetMode:
        """What the environment does after an episode ends; Gymnasium's default is NEXT_STEP."""
        return AutoresetMode(self.vector_env.metadata.get("autoreset_mode", AutoresetMode.NEXT_STEP))

    def environment_actions(self, choices: np.ndarray) -> Any:
        """Choices as actions of the environment's own space, in new arrays.

        Args:
            choices: int64 [num_envs, heads], counted from zero.

        Returns:
            int64 [num_envs] for a Discrete space and [num_envs, parts] for a MultiDiscrete one; for Dict and Tuple a
            dict or tuple of these.
        """
        if len(self.heads) < len(self.choices):
            learned, choices = choices, np.zeros((len(choices), len(self.choices)), np.int64)
            choices[:, [count > 1 for count in self.choices.values()]] = learned
        space = self.vector_env.single_action_space
        if isinstance(space, spaces.MultiDiscrete):  # the same as below, faster
            return choices + space.start
        return _actions(space, iter(choices.T))

    def reset_ended(self, observations: np.ndarray, ended: np.ndarray) -> np.ndarray:
        """`observations` [num_envs, observation_size] with new ones where an episode `ended`, for DISABLED mode."""
        if not ended.any():
            return observations
        first, _ = self.vector_env.reset(options={"reset_mask": ended.copy()})
        return np.where(ended[:, None], np.asarray(first, observations.dtype), observations)


def make_environment(
    name: str,
    num_envs: int,
    vectorization: str = "sync",
    device: str = "cpu",
    kwargs: Mapping[str, Any] | None = None,
) -> TrainingEnvironment:
    """Build `num_envs` copies of the environment `name`.

    Args:
        name: `host-growth` or the id of a registered Gymnasium environment.
        num_envs: number of copies.
        vectorization: for Gymnasium's environments, one of `VECTORIZATIONS`.
        device: device of the policy. With a GPU and at least `DEVICE_ENVS` copies, the host networks are on it too,
            and take and return tensors.
        kwargs: arguments of the environment itself.

    Raises:
        UnsupportedEnvironment: unknown id, missing dependency, wrong arguments, or unsupported spaces.
    """
    kwargs = dict(kwargs or {})
    try:
        if name == DEFAULT_ENVIRONMENT:
            from trainer.environments.host_growth import HostGrowthVectorEnv

            on_device = device.startswith("cuda") and num_envs >= DEVICE_ENVS
            place = {"device": device if on_device else "cpu", "as_tensors": on_device}
            vector_env: VectorEnv = HostGrowthVectorEnv(num_envs, **place, **kwargs)
        else:
            # SAME_STEP uses no environment step for a reset. A vector class has its own mode.
            of_vector = {"autoreset_mode": AutoresetMode.SAME_STEP} if vectorization == "sync" else None
            vector_env = gym.make_vec(
                name, num_envs, vectorization_mode=vectorization, vector_kwargs=of_vector, **kwargs
            )
    except (gym.error.Error, ImportError) as error:
        raise UnsupportedEnvironment(f"environment {name!r}: {error}") from error
    except Exception as error:
        # An environment may raise anything about its arguments. Without arguments, the error is a bug of its own.
        if not kwargs:
            raise
        raise UnsupportedEnvironment(
            f"environment {name!r} cannot be made with env-kwargs {kwargs}: {type(error).__name__}: {error}"
        ) from error
    return training_environment(name, vector_env)


def training_environment(name: str, vector_env: VectorEnv) -> TrainingEnvironment:
    """Check that `vector_env` can be trained on and read its heads.

    Heads are named by their place in the action space, as by `exporter.space_heads`: `action`, `action_0`, or `arm_0`
    for the first part of the `Dict` entry `arm`. An attribute `action_heads` of the environment, name -> number of
    choices, gives other names.

    Raises:
        UnsupportedEnvironment: its spaces, its heads or its autoreset mode are not supported; the message says why.
    """
    try:
        parts = list(_parts(vector_env.single_action_space))
        choices = _named(parts, getattr(vector_env, "action_heads", None))
        notes = [f"head {part} has a single choice and is left out" for part, count in choices.items() if count == 1]
        if len(notes) == len(choices):
            raise UnsupportedEnvironment(f"action space {vector_env.single_action_space} leaves nothing to choose")
        observations = vector_env.single_observation_space
        if not (isinstance(observations, spaces.Box) and len(observations.shape) == 1):
            raise UnsupportedEnvironment(
                f"observation space {observations} is not supported; use a Box with one dimension "
                "(gymnasium.wrappers.FlattenObservation makes one)"
            )
        notes += _autoreset_notes(vector_env)
    except UnsupportedEnvironment as error:
        raise UnsupportedEnvironment(f"environment {name!r}: {error}") from None
    return TrainingEnvironment(vector_env, choices, observations.shape[0], tuple(notes))


def _parts(space: spaces.Space, name: str = "action") -> Iterator[tuple[str, int]]:
    """Name and number of choices of each part of an action, depth first."""
    if isinstance(space, spaces.Discrete):
        yield name, int(space.n)
    elif isinstance(space, spaces.MultiDiscrete) and space.nvec.ndim == 1:
        yield from ((f"{name}_{index}", int(count)) for index, count in enumerate(space.nvec))
    elif isinstance(space, (spaces.Dict, spaces.Tuple)):
        is_named = name == "action" and isinstance(space, spaces.Dict)  # by its keys alone
        for key, member in _members(space):
            yield from _parts(member, str(key) if is_named else f"{name}_{key}")
    else:
        raise UnsupportedEnvironment(
            f"action space {space} is not supported; use Discrete, one-dimensional MultiDiscrete, or Dict "
            "and Tuple of these"
        )


def _actions(space: spaces.Space, columns: Iterator[np.ndarray]) -> Any:
    """An action of `space` for all environments, from as many columns [num_envs] as `_parts` names."""
    if isinstance(space, spaces.Discrete):
        return next(columns) + space.start
    if isinstance(space, spaces.MultiDiscrete):
        return np.stack(list(islice(columns, len(space.nvec))), axis=1) + space.start
    members = {key: _actions(member, columns) for key, member in _members(space)}
    return members if isinstance(space, spaces.Dict) else tuple(members.values())


def _members(space: spaces.Dict | spaces.Tuple) -> Iterator[tuple[Any, spaces.Space]]:
    return space.items() if isinstance(space, spaces.Dict) else enumerate(space)


def _named(parts: list[tuple[str, int]], action_heads: Mapping[str, int] | None) -> dict[str, int]:
    """`parts` by name, or by the environment's own names."""
    choices = dict(parts if action_heads is None else action_heads)
    counts = [count for _, count in parts]
    if action_heads is not None and list(choices.values()) != counts:
        raise UnsupportedEnvironment(
            f"its attribute action_heads is {choices}, but its action space has {len(counts)} parts with "
            f"{', '.join(map(str, counts))} choices: give each part a name and its number of choices, in this order, "
            "or remove action_heads"
        )
    if len(choices) < len(parts):
        raise UnsupportedEnvironment(
            f"parts of its action space have the same name: {', '.join(name for name, _ in parts)}; rename a key"
        )
    return choices


def _autoreset_notes(vector_env: VectorEnv) -> list[str]:
    """A warning if the environment sets no mode. Like Gymnasium's own wrappers, assume NEXT_STEP then."""
    mode = vector_env.metadata.get("autoreset_mode")
    how = 'metadata = {"autoreset_mode": gymnasium.vector.AutoresetMode.SAME_STEP}'
    if mode is None:
        return [
            "the environment sets no autoreset_mode; NEXT_STEP, Gymnasium's default, is assumed. If that is wrong, it "
            f"learns from wrong steps. Set the mode in its class: {how}, or another mode"
        ]
    try:
        AutoresetMode(mode)
    except ValueError:
        raise UnsupportedEnvironment(
            f"its autoreset_mode is {mode!r}, which is not one of Gymnasium's; set it in its class: {how}, or another"
        ) from None
    return []
