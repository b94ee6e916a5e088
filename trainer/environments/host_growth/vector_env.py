"""The vector environment; the package's docstring explains the task."""

from collections.abc import Mapping
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium.vector.utils import batch_space
from torch import Tensor
from torch.nn.functional import softplus

from trainer.environments.host_growth.episodes import SEED_DRAWS, TRAINING_POINTS, VALIDATION_POINTS, draw_episodes
from trainer.environments.host_growth.networks import (
    LEARNING_RATE,
    HostNetworks,
    Pass,
    seed_scales,
    shares_of_newest,
)
from trainer.environments.host_growth.slots import ACTION_HEADS, NUM_SLOTS, SLOT_FEATURES, Slots

_BATCH = 32  # points of a minibatch; the first quarter of them sees the seeds in TRAINING
_UNSEEN = _BATCH // 4
_MAX_LOSS = 2.0  # of losses in observation and reward
_IMPROVEMENT_SCALE = 10.0
_VALIDATION_LOSS = 2  # its index in `_measured`

Array = np.ndarray | Tensor


class HostGrowthVectorEnv(gymnasium.vector.VectorEnv):
    """N host networks that learn while the agent grows them; see the package's description.

    Action: `MultiDiscrete`, one part for each of `ACTION_HEADS` (also `action_heads`), in that order.
    Observation: float32 in [-2, 2]: training loss, training accuracy, validation loss, validation accuracy
    (losses in nats, capped at 2), the change of each in the last step, the elapsed fraction of the episode,
    the seeds' living parameters as a fraction of the maximum; then for each slot: stage (one-hot), age in
    steps over `max_episode_steps`, blending level, blueprint (one-hot, zero in an empty slot).
    Reward: 10 times the decrease of the validation loss in this step, minus the seeds' rent. The rent is 0.001 for as
    many seed parameters as the host has; a parameter in training counts three times (it needs Adam's state).

    All episodes *terminate* together after `max_episode_steps`: the end belongs to the task and the observation shows
    the time, so there is nothing to bootstrap. Autoreset mode is SAME_STEP: at the end `infos` has `final_obs`, an
    array or tensor [num_envs, features].

    Episode e of environment i depends only on `(seed + i, e)`.

    Args:
        num_envs: at least 1.
        max_episode_steps: at least 1.
        device: device of the networks.
        as_tensors: take and return tensors on `device` instead of NumPy arrays on the host. Then no step waits for the
            device, and the range of actions is not checked.

    Raises:
        ValueError: a size is out of range.
    """

    metadata = {"render_modes": [], "autoreset_mode": gymnasium.vector.AutoresetMode.SAME_STEP}
    action_heads = ACTION_HEADS

    @torch.inference_mode()
    def __init__(
        self,
        num_envs: int = 64,
        *,
        max_episode_steps: int = 64,
        device: str | torch.device = "cpu",
        as_tensors: bool = False,
    ) -> None:
        for name, value in (("num_envs", num_envs), ("max_episode_steps", max_episode_steps)):
            if not isinstance(value, (int, np.integer)) or value < 1:
                raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
        self.num_envs = num_envs
        self.max_episode_steps = max_episode_steps
        self.device = device = torch.device(device)
        self.as_tensors = as_tensors
        self.single_action_space = gymnasium.spaces.MultiDiscrete(list(ACTION_HEADS.values()))
        self.action_space = batch_space(self.single_action_space, num_envs)
        features = 10 + NUM_SLOTS * SLOT_FEATURES
        self.single_observation_space = gymnasium.spaces.Box(-_MAX_LOSS, _MAX_LOSS, (features,), np.float32)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self._rows = torch.arange(num_envs, device=device)
        self._slots = Slots(num_envs, max_episode_steps, device)
        self._networks = HostNetworks(num_envs, NUM_SLOTS, device=device)
        self._training = Pass(self._networks, _BATCH, one_level=False, has_gradient=True)
        self._validation = Pass(self._networks, VALIDATION_POINTS, one_level=True, has_gradient=False)
        self._drop_path = (torch.arange(_BATCH, device=device) < _UNSEEN).float()
        self._shares = shares_of_newest(max_episode_steps, device)
        self._scales = seed_scales(device)
        self._no_seed = torch.tensor(len(self._scales) - 1, device=device)
        self._kept = (torch.arange(len(self._scales), device=device) == self._no_seed).float().unsqueeze(1)
        self._measured = torch.zeros(4, num_envs, device=device)  # loss and accuracy, training and validation
        self._seeds = self._rows.clone()
        # Plain numbers, for all environments are at the same step of the same episode: nothing waits for the device.
        self._episode = self._step = 0
        self._begun = False

    @torch.inference_mode()
    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Array, dict[str, Any]]:
        """Begin a new episode everywhere.

        With a seed, environment i starts with the first episode of `seed + i`; without one, with its next episode.

        Returns:
            Observations [num_envs, features] and an empty dict.

        Raises:
            ValueError: the seed is negative or too large.
        """
        if seed is not None and not 0 <= seed < 2**62:
            raise ValueError(f"seed must be from 0 to 2**62 - 1, got {seed}")
        super().reset(seed=seed)
        if seed is None and not self._begun:
            seed = int(self.np_random.integers(2**31))
        if seed is not None:
            torch.add(self._rows, seed, out=self._seeds)
            self._episode = -1
        self._begun = True
        self._next_episode()
        return self._given(self._observe(torch.zeros_like(self._measured))), {}

    @torch.inference_mode()
    def step(self, actions: Array) -> tuple[Array, Array, Array, Array, dict[str, Any]]:
        """Apply the actions, and train and measure every host.

        Args:
            actions: integers [num_envs, 7] within the sizes of `ACTION_HEADS`; as a tensor int64 on `device`.

        Returns:
            Observations [num_envs, features] float32, rewards [num_envs] (float64; float32 as tensors), terminations
            and truncations [num_envs] bool (truncations always False), infos.

        Raises:
            ValueError: shape, dtype or range of the actions is wrong; not checked with `as_tensors`.
            RuntimeError: called before `reset`.
        """
        if not self._begun:
            raise RuntimeError("call reset() before step()")
        if not self.as_tensors:
            actions = self._checked(actions)
        self._germinate(actions, self._slots.apply(actions))
        self._networks.set_modules(self._slots.blueprint, self._slots.combination)
        measured = torch.cat((self._train(), self._validate())).clamp_(max=_MAX_LOSS)
        change = measured - self._measured
        self._measured = measured
        self._step += 1
        rewards = (change[_VALIDATION_LOSS] * -_IMPROVEMENT_SCALE).sub_(self._slots.rent)
        observations = self._observe(change)
        ended = self._step >= self.max_episode_steps
        terminations = torch.full((self.num_envs,), ended, device=self.device)
        truncations = torch.zeros_like(terminations)
        infos: dict[str, Any] = {}
        if ended:
            infos = {"final_obs": self._given(observations), "_final_obs": self._given(terminations.clone())}
            self._next_episode()
            observations = self._observe(change.zero_())
        if not self.as_tensors:
            rewards = rewards.double()
        return *map(self._given, (observations, rewards, terminations, truncations)), infos

    @torch.inference_mode(False)
    def state_dict(self) -> dict[str, Tensor]:
        """Everything that determines the rest of every episode, besides the actions.

        There is no generator in it: an episode depends only on seed and number, and is drawn again on loading.

        Returns:
            Copies by name, with the environment as first axis.

        Raises:
            RuntimeError: called before `reset`.
        """
        if not self._begun:
            raise RuntimeError("call reset() before state_dict()")
        numbers = {"episode": self._episode, "step": self._step}
        return {
            **{name: torch.full_like(self._seeds, number) for name, number in numbers.items()},
            **{name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in self._state().items()},
        }

    @torch.inference_mode()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from `state_dict()` of an environment with the same arguments. An error changes nothing.

        Raises:
            ValueError: names, shapes or dtypes do not fit, or the environments are not at the same step of the same
                episode.
        """
        own = self._state()
        for name, expected in {"episode": self._seeds, "step": self._seeds, **own}.items():
            given = state.get(name)
            if not isinstance(given, Tensor) or (given.shape, given.dtype) != (expected.shape, expected.dtype):
                found = f"{given.dtype} {list(given.shape)}" if isinstance(given, Tensor) else "nothing"
                raise ValueError(
                    f"{name} must be {expected.dtype} {list(expected.shape)}, the saved environment has {found}"
                )
        numbers = []
        for name in ("episode", "step"):
            first, *others = state[name].unique().tolist()
            if others:
                raise ValueError(f"{name} must be the same in all environments, the saved ones have {[first, *others]}")
            numbers.append(first)
        self._episode, self._step = numbers
        for name, tensor in own.items():
            tensor.copy_(state[name])
        self._begun = True
        self._episodes = draw_episodes(self._seeds, self._episode)
        self._slots.see()

    def _state(self) -> dict[str, Tensor]:
        """The tensors that change within an episode, not copied, with the environment as first axis."""
        host, seeds = self._networks.host_adam, self._networks.seeds_adam
        of_seeds = {"seeds": self._networks.seeds, "seed_mean": seeds.mean, "seed_square": seeds.square}
        return {
            "seed": self._seeds,
            "measured": self._measured.t(),
            "host": self._networks.host,
            "host_mean": host.mean,
            "host_square": host.square,
            **{name: tensor.transpose(0, 1) for name, tensor in of_seeds.items()},
            **self._slots.state(),
        }

    def _checked(self, actions: np.ndarray) -> Tensor:
        actions = np.asarray(actions)
        limits = self.single_action_space.nvec
        if actions.shape != (self.num_envs, len(limits)) or actions.dtype.kind not in "iu":
            raise ValueError(
                f"actions must be integers of shape ({self.num_envs}, {len(limits)}), "
                f"got {actions.dtype} of shape {actions.shape}"
            )
        actions = actions.astype(np.int64, order="C", copy=False)
        outside = actions.view(np.uint64) >= limits.view(np.uint64)  # as unsigned, a negative number is very large
        if outside.any():
            env, part = np.argwhere(outside)[0]
            raise ValueError(
                f"action {list(ACTION_HEADS)[part]!r} of environment {env} must be from 0 to {limits[part] - 1}, "
                f"got {actions[env, part]}"
            )
        return torch.from_numpy(actions).to(self.device)

    def _given(self, tensor: Tensor) -> Array:
        if not self.as_tensors:
            return tensor.cpu().numpy()
        with torch.inference_mode(False):
            return tensor.clone()  # an ordinary tensor

    def _next_episode(self) -> None:
        """Start with a new task, a new host and empty slots."""
        self._episode, self._step = self._episode + 1, 0
        self._episodes = draw_episodes(self._seeds, self._episode)
        networks = self._networks
        networks.host.copy_(self._episodes.host)
        for tensor in (
            networks.seeds,
            *(a for adam in (networks.host_adam, networks.seeds_adam) for a in (adam.mean, adam.square)),
        ):
            tensor.zero_()
        self._slots.clear()
        networks.set_modules(self._slots.blueprint, self._slots.combination)
        points, signs = self._minibatch()
        logits = self._training.forward(points, self._training_levels())
        torch.cat((_score(logits * signs), self._validate()), out=self._measured).clamp_(max=_MAX_LOSS)

    def _germinate(self, actions: Tensor, germinated: Tensor) -> None:
        """Set initial weights in the slots of `actions` where a seed `germinated` (bool [N])."""
        places = torch.add(self._rows, actions[:, 0], alpha=self.num_envs)
        draws = (self._slots.germinations - 1).remainder_(SEED_DRAWS).add_(self._rows, alpha=SEED_DRAWS)
        # The last row of the scales is zero: where no seed germinated, weights are multiplied by one, plus zero.
        kinds = torch.where(germinated, actions[:, 1], self._no_seed)
        seeds = self._networks.seeds.flatten(0, 1)
        weights = seeds.index_select(0, places).mul_(self._kept.index_select(0, kinds))
        weights.addcmul_(self._episodes.seeds.flatten(0, 1).index_select(0, draws), self._scales.index_select(0, kinds))
        seeds.index_copy_(0, places, weights)

    def _minibatch(self) -> tuple[Tensor, Tensor]:
        """Points [N, 3, B] and signs [N, B] of this step."""
        start = self._step * _BATCH % TRAINING_POINTS
        points, signs, *_ = self._episodes
        return points[..., start : start + _BATCH], signs[..., start : start + _BATCH]

    def _training_levels(self) -> Tensor:
        slots = self._slots
        return torch.addcmul(slots.level.unsqueeze(-1), slots.hidden.unsqueeze(-1), self._drop_path)

    def _train(self) -> Tensor:
        """Take an Adam step. Returns loss and accuracy [2, N] over the part of the minibatch without TRAINING seeds."""
        slots, networks = self._slots, self._networks
        points, signs = self._minibatch()
        wrong = self._training.forward(points, self._training_levels()) * signs
        by_logits = torch.sigmoid(wrong).mul_(signs).mul_(1 / _BATCH)  # gradient of the mean of softplus(wrong)
        host, seeds = self._training.backward(points, by_logits)
        networks.host_adam.step(host, self._shares[self._step + 1], LEARNING_RATE)
        shares = self._shares.index_select(0, slots.updates.flatten()).view(*slots.updates.shape, -1)
        networks.seeds_adam.step(seeds, shares, slots.learning_rate)
        return _score(wrong[:, _UNSEEN:])

    def _validate(self) -> Tensor:
        """Loss and accuracy [2, N] on the validation set."""
        points, signs = (tensor[..., TRAINING_POINTS:] for tensor in self._episodes[:2])
        return _score(self._validation.forward(points, self._slots.level.unsqueeze(-1)) * signs)

    def _observe(self, change: Tensor) -> Tensor:
        """Observations [N, features]."""
        time = torch.full((1, self.num_envs), self._step / self.max_episode_steps, device=self.device)
        common = torch.cat((self._measured, change, time, self._slots.living.unsqueeze(0)))
        return torch.cat((common.t(), self._slots.features()), dim=1)


def _score(wrong: Tensor) -> Tensor:
    """Cross-entropy in nats and accuracy [2, N], from the wrong label's logits [N, B]."""
    return torch.stack((softplus(wrong), (wrong < 0).float())).mean(-1)
