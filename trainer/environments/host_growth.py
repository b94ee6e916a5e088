"""Vector environment in which every environment grows a small host network that is really trained.

Each environment holds a host classifier of two-dimensional points (two spirals, drawn anew for every
episode and split into a training and a validation set). In every environment step the host takes
`train_steps` Adam steps on minibatches of the training set. Alone it underfits. The agent manages seeds:
small modules in the host's slots, which lie one after the other between the host's hidden layer and its
output. A seed goes through stages:

    DORMANT -germinate-> TRAINING -advance-> BLENDING -(ramp done)-> HOLDING -fossilize-> FOSSILIZED
                            '-----------------'- prune -'-------> PRUNED -(cooldown)-> DORMANT

A TRAINING seed is blended into a part of every minibatch only (drop path), so it learns while the host's
output and the validation set do not see it. BLENDING ramps its alpha to a target, HOLDING keeps it, and
FOSSILIZED freezes its weights for the rest of the episode: it can no longer be pruned, and its parameters
no longer cost an optimizer's state.

The networks are batched tensors, and the backward pass is written by hand: the environment does not depend
on the caller's gradient mode, nor on global random state. Points run along the last axis and units along the one
before it, where torch's kernels work on whole vectors, whether a factor differs by host or by point; and biases
are columns of the weights, which meet a row of ones.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from enum import IntEnum
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium.vector.utils import batch_space
from torch import Tensor
from torch.nn.functional import softplus


class Stage(IntEnum):
    """Where a slot's seed stands."""

    DORMANT = 0
    TRAINING = 1
    BLENDING = 2
    HOLDING = 3
    FOSSILIZED = 4
    PRUNED = 5


class Blueprint(IntEnum):
    """Kind of module a seed is: its hidden units between two linear maps of the host's features."""

    BOTTLENECK = 0  # linear, low rank
    MLP = 1  # ReLU
    SINE = 2
    GATED = 3  # gated linear unit: one half times the sigmoid of the other


class Alpha(IntEnum):
    """How a seed's output f joins the host's features h at the blending level a."""

    ADD = 0  # h + a f
    MULTIPLY = 1  # h (1 + a f)
    INTERPOLATE = 2  # (1 - a) h + a f


class Curve(IntEnum):
    """Shape of the ramp of a blend."""

    LINEAR = 0
    COSINE = 1
    SIGMOID = 2


class Op(IntEnum):
    """What is done to the chosen slot. An op that its stage does not allow does nothing."""

    WAIT = 0
    GERMINATE = 1  # DORMANT only; reads blueprint, alpha and target (the level at which the seed trains)
    ADVANCE = 2  # TRAINING or HOLDING: (re)blend; reads target, speed and curve
    PRUNE = 3  # TRAINING, BLENDING or HOLDING
    FOSSILIZE = 4  # HOLDING only


# The stage that an op leads to; all others stay as they are.
_TRANSITIONS = {
    (Stage.DORMANT, Op.GERMINATE): Stage.TRAINING,
    (Stage.TRAINING, Op.ADVANCE): Stage.BLENDING,
    (Stage.HOLDING, Op.ADVANCE): Stage.BLENDING,
    (Stage.TRAINING, Op.PRUNE): Stage.PRUNED,
    (Stage.BLENDING, Op.PRUNE): Stage.PRUNED,
    (Stage.HOLDING, Op.PRUNE): Stage.PRUNED,
    (Stage.HOLDING, Op.FOSSILIZE): Stage.FOSSILIZED,
}

NUM_SLOTS = 3
TARGETS = (0.25, 0.5, 0.75, 1.0)  # blending level at the end of a ramp
SPEEDS = (1, 4, 8, 16)  # environment steps a ramp takes

# The action: name of each part -> number of choices, in order.
ACTION_HEADS: dict[str, int] = {
    "slot": NUM_SLOTS,
    "blueprint": len(Blueprint),
    "alpha": len(Alpha),
    "target": len(TARGETS),
    "speed": len(SPEEDS),
    "curve": len(Curve),
    "op": len(Op),
}

_WIDTH = 12  # features of the host
_UNITS = 12  # hidden units of the widest blueprint
_GATE = _UNITS // 2
# Into the features and out of them, with the biases; into a seed's units, with theirs, and back.
_HOST_SIZES = (_WIDTH * 3, _WIDTH + 1)
_SEED_SIZES = (_UNITS * (_WIDTH + 1), _WIDTH * _UNITS)
# Units that lead into and out of each blueprint's hidden layer; the rest of _UNITS stays exactly zero.
_UNITS_IN = {Blueprint.BOTTLENECK: 4, Blueprint.MLP: _UNITS, Blueprint.SINE: 6, Blueprint.GATED: _UNITS}
_UNITS_OUT = {**_UNITS_IN, Blueprint.GATED: _GATE}
_SEED_DRAWS = 8  # initial weights drawn for each episode; the k-th germination uses draw k modulo this
_PRUNE_COOLDOWN = 4  # environment steps

_POINTS = 256  # training points of an episode
_TURNS = (1.0, 1.4)  # of a spiral arm; drawn for each episode
_INNER_RADIUS = 0.1
_NOISE = 0.03
_POINT_SCALE = 1.5
_LEARNING_RATE = 0.03
_BETA1, _BETA2, _EPSILON = 0.9, 0.99, 1e-8
_GRADIENT_LIMIT = 1.0  # clip by value; keeps the squares in Adam's state finite
_MAX_LOSS = 2.0  # of losses in observation and reward

_IMPROVEMENT_SCALE = 10.0
_RENT = 0.001  # per environment step, for frozen seed parameters as many as the host's own
_OPTIMIZER_STATE = 3  # a parameter in training costs this many: itself and Adam's two moments


@dataclass
class _State:
    """Everything an episode needs; the first axis of every tensor is the environment."""

    seed: Tensor  # [N] int64
    episode: Tensor  # [N] int64: episodes begun since seeding
    step: Tensor  # [N] int64: steps taken in this episode
    train_x: Tensor  # [N, 3, P]: two coordinates and a one
    train_y: Tensor  # [N, P] labels, 0 or 1
    valid_x: Tensor  # [N, 3, V]
    valid_y: Tensor  # [N, V]
    seed_draws: Tensor  # [N, _SEED_DRAWS, seed parameters]: normal draws for the seeds to come
    germinations: Tensor  # [N] int64: in this episode
    host: Tensor  # [N, host parameters]
    host_first: Tensor  # as `host`: Adam's moments
    host_second: Tensor
    seeds: Tensor  # [N, S, seed parameters]
    seed_first: Tensor  # as `seeds`: Adam's moments
    seed_second: Tensor
    seed_updates: Tensor  # [N, S] int64: Adam steps taken
    stage: Tensor  # [N, S] int64
    age: Tensor  # [N, S] int64: steps in this stage
    blueprint: Tensor  # [N, S] int64
    combination: Tensor  # [N, S] int64: Alpha
    level: Tensor  # [N, S]: how far the seed is blended into the host, 0 to 1
    ramp_start: Tensor  # [N, S]: level at which the ramp began
    target: Tensor  # [N, S]: level at which it ends
    speed: Tensor  # [N, S] int64: steps it takes
    curve: Tensor  # [N, S] int64
    measured: Tensor  # [N, 4]: loss and accuracy, training and validation, after the last step


class HostGrowthVectorEnv(gymnasium.vector.VectorEnv):
    """N host networks that learn while the agent grows them; see the module's description.

    Action: `MultiDiscrete`, one part for each of `ACTION_HEADS` (also `action_heads`), in that order.
    Observation: float32 in [-2, 2]: training loss, training accuracy, validation loss, validation accuracy
    (losses in nats, cut at 2), the change of each in the last step, the part of the episode that is over,
    the seeds' living parameters as a part of what fits; then for each slot: stage (one-hot), age in steps
    over `max_episode_steps`, blending level, blueprint (one-hot, zero in an empty slot).
    Reward: 10 times the fall of the validation loss in this step, less 0.001 for each of the host's own parameter
    counts that lives in seeds; a parameter that is still trained counts three times (it needs Adam's state).

    An episode *terminates* after `max_episode_steps`: the end belongs to the task and the observation shows the
    time, so there is no value beyond it to bootstrap. All environments end together unless `reset` was told a
    `reset_mask`. Autoreset mode is SAME_STEP: at the end `infos` has `final_obs` and `final_info` (validation
    loss and accuracy, parameters grown, seeds fossilized).

    Environment i draws its e-th episode from `(seed + i, e)` alone.

    Args:
        num_envs: at least 1.
        max_episode_steps: at least 1.
        train_steps: Adam steps in each environment step, at least 1.
        batch_size: training points in each of them, 4 to 256.
        validation_points: at least 1.
        device: where the networks live; actions and observations are NumPy arrays on the host.

    Raises:
        ValueError: a size is out of range.
    """

    metadata = {"render_modes": [], "autoreset_mode": gymnasium.vector.AutoresetMode.SAME_STEP}
    action_heads = ACTION_HEADS

    def __init__(
        self,
        num_envs: int = 64,
        *,
        max_episode_steps: int = 64,
        train_steps: int = 1,
        batch_size: int = 32,
        validation_points: int = 64,
        device: str | torch.device = "cpu",
    ) -> None:
        for name, value, low, high in (
            ("num_envs", num_envs, 1, None),
            ("max_episode_steps", max_episode_steps, 1, None),
            ("train_steps", train_steps, 1, None),
            ("batch_size", batch_size, 4, _POINTS),
            ("validation_points", validation_points, 1, None),
        ):
            if not isinstance(value, (int, np.integer)) or value < low or (high is not None and value > high):
                bounds = f"at least {low}" if high is None else f"from {low} to {high}"
                raise ValueError(f"{name} must be an integer {bounds}, got {value!r}")
        self.num_envs = num_envs
        self.max_episode_steps = max_episode_steps
        self.train_steps = train_steps
        self.batch_size = batch_size
        self.validation_points = validation_points
        self.device = torch.device(device)
        self.single_action_space = gymnasium.spaces.MultiDiscrete(list(ACTION_HEADS.values()))
        self.action_space = batch_space(self.single_action_space, num_envs)
        features = 10 + NUM_SLOTS * (len(Stage) + 2 + len(Blueprint))
        self.single_observation_space = gymnasium.spaces.Box(-_MAX_LOSS, _MAX_LOSS, (features,), np.float32)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self._rows = torch.arange(num_envs, device=self.device)
        self._slots = torch.arange(NUM_SLOTS, device=self.device)
        self._transitions = torch.tensor(
            [[_TRANSITIONS.get((stage, op), stage) for op in Op] for stage in Stage], device=self.device
        )
        self._batch = torch.arange(batch_size, device=self.device)
        # The first quarter of every minibatch sees the seeds in TRAINING.
        self._drop_path = (self._batch < batch_size // 4).float()
        self._speeds = torch.tensor(SPEEDS, device=self.device)
        self._targets = torch.tensor(TARGETS, device=self.device)
        self._sizes = torch.tensor([parameter_count(b) for b in Blueprint], device=self.device)
        self._most_parameters = NUM_SLOTS * max(parameter_count(b) for b in Blueprint)
        self._state: _State | None = None

    @torch.inference_mode(False)
    @torch.no_grad()
    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Begin a new episode everywhere, or where `options["reset_mask"]` (bool, [num_envs]) says.

        With a seed, environment i counts its episodes anew from `seed + i`; without one it goes on to its next.

        Returns:
            Observations [num_envs, features] and an empty dict.

        Raises:
            ValueError: a negative seed, or a mask of another shape or dtype.
        """
        if seed is not None and not 0 <= seed < 2**62:
            raise ValueError(f"seed must be from 0 to 2**62 - 1, got {seed}")
        super().reset(seed=seed)
        mask = np.ones(self.num_envs, dtype=bool)
        if options and "reset_mask" in options:
            mask = np.asarray(options["reset_mask"])
            if mask.shape != (self.num_envs,) or mask.dtype != bool:
                raise ValueError(f"reset_mask must be a bool array of shape ({self.num_envs},)")
        if self._state is None:
            if not mask.all():
                raise ValueError("reset_mask: the first reset must begin every environment")
            first = int(self.np_random.integers(2**31)) if seed is None else seed
            self._state = self._empty_state(first)
        elif seed is not None:
            chosen = torch.as_tensor(mask, device=self.device)
            self._state.seed[chosen] = (seed + self._rows)[chosen]
            self._state.episode[chosen] = 0
        self._begin_episodes(np.flatnonzero(mask))
        return self._observe(torch.zeros_like(self._state.measured)), {}

    @torch.inference_mode(False)
    @torch.no_grad()
    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Apply the actions, train every host, and measure it.

        Args:
            actions: integers [num_envs, 7] within the sizes of `ACTION_HEADS`.

        Returns:
            Observations [num_envs, features] float32, rewards [num_envs] float64, terminations and truncations
            [num_envs] bool (truncations always False), infos.

        Raises:
            ValueError: the actions' shape, dtype or range is wrong.
            RuntimeError: called before `reset`.
        """
        state = self._state
        if state is None:
            raise RuntimeError("call reset() before step()")
        actions = np.asarray(actions)
        limits = self.single_action_space.nvec
        if actions.shape != (self.num_envs, len(limits)) or not np.issubdtype(actions.dtype, np.integer):
            raise ValueError(
                f"actions must be integers of shape ({self.num_envs}, {len(limits)}), "
                f"got {actions.dtype} of shape {actions.shape}"
            )
        outside = (actions < 0) | (actions >= limits)
        if outside.any():
            env, part = np.argwhere(outside)[0]
            raise ValueError(
                f"action {list(ACTION_HEADS)[part]!r} of environment {env} must be from 0 to {limits[part] - 1}, "
                f"got {actions[env, part]}"
            )
        state.age += 1
        self._apply(torch.as_tensor(actions, dtype=torch.int64, device=self.device))
        self._ramp()
        loss, accuracy = self._train()
        before = state.measured
        state.measured = torch.stack((loss, accuracy, *self._validate()), dim=1)
        state.step += 1
        change = state.measured - before
        rewards = (-_IMPROVEMENT_SCALE * change[:, 2] - self._rent()).double().cpu().numpy()
        observations = self._observe(change)
        terminations = (state.step >= self.max_episode_steps).cpu().numpy()
        infos: dict[str, Any] = {}
        if terminations.any():
            infos = self._final_infos(observations, terminations)
            self._begin_episodes(np.flatnonzero(terminations))
            change[torch.as_tensor(terminations, device=self.device)] = 0.0
            observations = self._observe(change)
        return observations, rewards, terminations, np.zeros(self.num_envs, dtype=bool), infos

    def state_dict(self) -> dict[str, Tensor]:
        """Every episode in progress, and all that its future depends on besides the actions.

        No generator is among it, for every episode is drawn from a seed and its number.

        Returns:
            Tensors by name, the environment as their first axis; they are this object's own.

        Raises:
            RuntimeError: called before `reset`.
        """
        if self._state is None:
            raise RuntimeError("call reset() before state_dict()")
        return {field.name: getattr(self._state, field.name) for field in fields(_State)}

    @torch.inference_mode(False)
    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from `state_dict()` of an environment with the same arguments; nothing changes at an error.

        Raises:
            ValueError: names, shapes or dtypes are those of another environment.
        """
        empty = self._empty_state(0)
        restored = {}
        for field in fields(_State):
            expected, given = getattr(empty, field.name), state.get(field.name)
            if not isinstance(given, Tensor) or (given.shape, given.dtype) != (expected.shape, expected.dtype):
                found = f"{given.dtype} {list(given.shape)}" if isinstance(given, Tensor) else "nothing"
                raise ValueError(
                    f"{field.name} must be {expected.dtype} {list(expected.shape)}, the saved environment has {found}"
                )
            restored[field.name] = given.to(self.device, copy=True)
        self._state = _State(**restored)

    def _empty_state(self, seed: int) -> _State:
        n, device = self.num_envs, self.device

        def numbers(*shape: int) -> Tensor:
            return torch.zeros(n, *shape, device=device)

        def integers(*shape: int) -> Tensor:
            return torch.zeros(n, *shape, dtype=torch.int64, device=device)

        host, grown = sum(_HOST_SIZES), sum(_SEED_SIZES)
        return _State(
            seed=seed + self._rows,
            episode=integers(),
            step=integers(),
            train_x=numbers(3, _POINTS),
            train_y=numbers(_POINTS),
            valid_x=numbers(3, self.validation_points),
            valid_y=numbers(self.validation_points),
            seed_draws=numbers(_SEED_DRAWS, grown),
            germinations=integers(),
            host=numbers(host),
            host_first=numbers(host),
            host_second=numbers(host),
            seeds=numbers(NUM_SLOTS, grown),
            seed_first=numbers(NUM_SLOTS, grown),
            seed_second=numbers(NUM_SLOTS, grown),
            seed_updates=integers(NUM_SLOTS),
            stage=integers(NUM_SLOTS),
            age=integers(NUM_SLOTS),
            blueprint=integers(NUM_SLOTS),
            combination=integers(NUM_SLOTS),
            level=numbers(NUM_SLOTS),
            ramp_start=numbers(NUM_SLOTS),
            target=numbers(NUM_SLOTS),
            speed=torch.ones(n, NUM_SLOTS, dtype=torch.int64, device=device),
            curve=integers(NUM_SLOTS),
            measured=numbers(4),
        )

    def _begin_episodes(self, environments: np.ndarray) -> None:
        """Fresh task, host and empty slots in the environments of these indices."""
        state = self._state
        rows = torch.as_tensor(environments, device=self.device)
        kept = ("seed", "episode", "train_x", "train_y", "valid_x", "valid_y", "seed_draws", "host", "measured")
        for field in fields(state):
            if field.name not in kept:
                getattr(state, field.name)[rows] = 0
        state.speed[rows] = 1
        drawn = [
            _draw_episode(np.random.default_rng((seed, episode)), self.validation_points)
            for seed, episode in torch.stack((state.seed, state.episode), dim=1)[rows].tolist()
        ]
        state.episode[rows] += 1
        names = ("train_x", "train_y", "valid_x", "valid_y", "host", "seed_draws")
        for name, values in zip(names, zip(*drawn)):
            getattr(state, name)[rows] = torch.from_numpy(np.stack(values)).to(self.device)
        # Computed for all, kept for those that begin: a reset is rare, and mostly one of all.
        logits, _ = self._forward(state.train_x[..., : self.batch_size], state.level.unsqueeze(-1))
        measured = torch.stack((*_score(logits, state.train_y[:, : self.batch_size]), *self._validate()), dim=1)
        state.measured[rows] = measured[rows]

    def _apply(self, actions: Tensor) -> None:
        """Do each environment's op on its slot, where the slot's stage allows it."""
        state = self._state
        slot, *choices, op = actions.unsqueeze(-1).unbind(1)  # each [N, 1]
        blueprint, combination, target, speed, curve = choices
        op = torch.where(slot == self._slots, op, Op.WAIT)  # [N, S]
        stage = self._transitions[state.stage, op]
        stage.masked_fill_((state.stage == Stage.PRUNED) & (state.age > _PRUNE_COOLDOWN), Stage.DORMANT)
        entered = stage != state.stage
        germinated, advanced, pruned = (entered & (stage == s) for s in (Stage.TRAINING, Stage.BLENDING, Stage.PRUNED))
        state.stage = stage
        state.age.masked_fill_(entered, 0)

        state.blueprint = torch.where(germinated, blueprint, state.blueprint)
        state.combination = torch.where(germinated, combination, state.combination)
        state.target = torch.where(germinated | advanced, self._targets[target], state.target)
        state.ramp_start = torch.where(advanced, state.level, state.ramp_start)
        state.speed = torch.where(advanced, self._speeds[speed], state.speed)
        state.curve = torch.where(advanced, curve, state.curve)

        rows, _ = where = germinated.nonzero(as_tuple=True)
        draws = state.seed_draws[rows, state.germinations[rows] % _SEED_DRAWS]
        state.seeds[where] = _seed_weights(draws, state.blueprint[where])
        state.germinations += germinated.sum(1)

        state.level.masked_fill_(pruned, 0.0)
        state.seed_updates.masked_fill_(pruned, 0)
        where = pruned.nonzero(as_tuple=True)
        state.seeds[where] = state.seed_first[where] = state.seed_second[where] = 0.0

    def _ramp(self) -> None:
        """Move the levels of blending seeds along their curves; those at their target hold."""
        state = self._state
        blending = state.stage == Stage.BLENDING
        progress = ((state.age + 1) / state.speed).clamp(max=1.0)
        ramp = state.ramp_start + (state.target - state.ramp_start) * ramp_shape(progress, state.curve)
        state.level = torch.where(blending, ramp, state.level)
        done = blending & (progress >= 1.0)
        state.stage[done] = Stage.HOLDING
        state.age[done] = 0

    def _train(self) -> tuple[Tensor, Tensor]:
        """Take the step's Adam steps; returns loss and accuracy [N] over the rows without drop path."""
        state = self._state
        hidden = torch.where(state.stage == Stage.TRAINING, state.target, 0.0).unsqueeze(-1)
        levels = state.level.unsqueeze(-1) + hidden * self._drop_path  # [N, S, B]
        trained = (state.stage == Stage.TRAINING) | (state.stage == Stage.BLENDING) | (state.stage == Stage.HOLDING)
        losses, accuracies = [], []
        seen = self.batch_size // 4
        for update in range(self.train_steps):
            taken = state.step * self.train_steps + update
            batch = (taken.unsqueeze(1) * self.batch_size + self._batch) % _POINTS
            x = state.train_x.gather(2, batch.unsqueeze(1).expand(-1, 3, -1))
            y = state.train_y.gather(1, batch)
            logits, saved = self._forward(x, levels)
            loss, accuracy = _score(logits[:, seen:], y[:, seen:])
            losses.append(loss)
            accuracies.append(accuracy)
            host_gradient, seed_gradient = self._backward((torch.sigmoid(logits) - y) / self.batch_size, saved)
            one = taken.unsqueeze(1) + 1
            _adam(state.host, state.host_first, state.host_second, host_gradient, one, torch.ones_like(one))
            state.seed_updates += trained
            updates = state.seed_updates.clamp(min=1)
            _adam(state.seeds, state.seed_first, state.seed_second, seed_gradient, updates, trained)
        return sum(losses) / len(losses), sum(accuracies) / len(accuracies)

    def _validate(self) -> tuple[Tensor, Tensor]:
        """Loss and accuracy [N] on the validation set."""
        logits, _ = self._forward(self._state.valid_x, self._state.level.unsqueeze(-1))
        return _score(logits, self._state.valid_y)

    def _forward(self, x: Tensor, levels: Tensor) -> tuple[Tensor, "_Saved"]:
        state = self._state
        return forward(state.host, state.seeds, state.blueprint, state.combination, levels, x)

    def _backward(self, logit_gradient: Tensor, saved: "_Saved") -> tuple[Tensor, Tensor]:
        return backward(self._state.host, self._state.seeds, logit_gradient, saved)

    def _rent(self) -> Tensor:
        """Rent [N] of one step."""
        state = self._state
        frozen = state.stage == Stage.FOSSILIZED
        cost = torch.where(frozen, 1, _OPTIMIZER_STATE) * self._living()
        return _RENT * cost.sum(1) / sum(_HOST_SIZES)

    def _living(self) -> Tensor:
        """Parameters [N, S] of the seeds in the slots."""
        return self._sizes[self._state.blueprint] * self._occupied()

    def _occupied(self) -> Tensor:
        return (self._state.stage != Stage.DORMANT) & (self._state.stage != Stage.PRUNED)

    def _observe(self, change: Tensor) -> np.ndarray:
        state = self._state
        horizon = self.max_episode_steps
        slots = torch.cat(
            (
                _one_hot(state.stage, Stage, torch.float32),
                (state.age / horizon).unsqueeze(-1),
                state.level.unsqueeze(-1),
                _one_hot(state.blueprint, Blueprint, torch.float32) * self._occupied().unsqueeze(-1),
            ),
            dim=-1,
        )
        whole = torch.stack((state.step / horizon, self._living().sum(1) / self._most_parameters), dim=1)
        observation = torch.cat((state.measured, change, whole, slots.flatten(1)), dim=1)
        return observation.clamp(-_MAX_LOSS, _MAX_LOSS).cpu().numpy()

    def _final_infos(self, observations: np.ndarray, ended: np.ndarray) -> dict[str, Any]:
        """As Gymnasium's SyncVectorEnv reports the end of episodes in SAME_STEP mode."""
        state = self._state
        final_obs = np.full(self.num_envs, None, dtype=object)
        for environment in np.flatnonzero(ended):
            final_obs[environment] = observations[environment]
        final_info: dict[str, Any] = {}
        for name, values in (
            ("validation_loss", state.measured[:, 2]),
            ("validation_accuracy", state.measured[:, 3]),
            ("parameters_grown", self._living().sum(1)),
            ("seeds_fossilized", (state.stage == Stage.FOSSILIZED).sum(1)),
        ):
            values = values.cpu().numpy()
            final_info[name] = np.where(ended, values, np.zeros_like(values))
            final_info[f"_{name}"] = ended.copy()
        return {
            "final_obs": final_obs,
            "_final_obs": ended.copy(),
            "final_info": final_info,
            "_final_info": ended.copy(),
        }


def parameter_count(blueprint: Blueprint) -> int:
    """Number of parameters of a seed of this blueprint."""
    entering, leaving = _UNITS_IN[blueprint], _UNITS_OUT[blueprint]
    return (_WIDTH + 1) * entering + leaving * _WIDTH


def ramp_shape(progress: Tensor, curve: Tensor) -> Tensor:
    """Part of the way from 0 to 1 that each `Curve` has covered at `progress` in [0, 1]; exact at both ends."""
    cosine = (1 - torch.cos(math.pi * progress)) / 2
    steepness = 10.0
    edge = 1 / (1 + math.exp(steepness / 2))
    sigmoid = (torch.sigmoid(steepness * (progress - 0.5)) - edge) / (1 - 2 * edge)
    shaped = torch.where(curve == Curve.COSINE, cosine, torch.where(curve == Curve.SIGMOID, sigmoid, progress))
    return torch.where(progress >= 1.0, 1.0, shaped.clamp(0.0, 1.0))


@dataclass
class _Saved:
    """What the forward pass leaves for the backward pass."""

    x: Tensor
    features: Tensor  # [N, D + 1, B]
    kinds: Tensor  # [N, S, blueprints, 1, 1]
    ways: Tensor  # [N, S, combinations, 1, 1]
    slots: list[tuple[Tensor, ...]]


def _host_weights(host: Tensor) -> tuple[Tensor, Tensor]:
    """Views [N, D, 3] and [N, 1, D + 1] into [N, host parameters]; the last column of each is the bias."""
    inward, outward = host.split(_HOST_SIZES, dim=1)
    return inward.view(-1, _WIDTH, 3), outward.view(-1, 1, _WIDTH + 1)


def _slot_weights(seed: Tensor) -> tuple[Tensor, Tensor]:
    """Views [N, M, D + 1], the last column the bias, and [N, D, M] into one slot's [N, seed parameters]."""
    inward, outward = seed.split(_SEED_SIZES, dim=1)
    return inward.view(-1, _UNITS, _WIDTH + 1), outward.view(-1, _WIDTH, _UNITS)


def forward(
    host: Tensor, seeds: Tensor, blueprint: Tensor, combination: Tensor, levels: Tensor, x: Tensor
) -> tuple[Tensor, _Saved]:
    """Logits of N hosts with S slots.

    Args:
        host: [N, host parameters]; seeds: [N, S, seed parameters].
        blueprint, combination: [N, S].
        levels: [N, S, B], or [N, S, 1] for all points alike.
        x: points [N, 3, B]: two coordinates and a one.

    Returns:
        Logits [N, B], and what `backward` needs.
    """
    n, points = len(x), x.shape[-1]
    inward, outward = _host_weights(host)
    features = x.new_ones(n, _WIDTH + 1, points)
    torch.tanh(torch.bmm(inward, x), out=features[:, :_WIDTH])
    kinds, ways = (
        _one_hot(chosen, choices, x.dtype)[..., None, None]
        for chosen, choices in ((blueprint, Blueprint), (combination, Alpha))
    )
    slots = []
    for slot in range(seeds.shape[1]):
        h = features[:, :_WIDTH]
        seed_in, seed_out = _slot_weights(seeds[:, slot])
        bottleneck, mlp, sine, gated = kinds[:, slot].unbind(1)
        _, multiplies, interpolates = ways[:, slot].unbind(1)
        level = levels[:, slot].unsqueeze(1)
        u = torch.bmm(seed_in, features)
        gate = torch.sigmoid(u[:, _GATE:])
        z = u * bottleneck
        z.addcmul_(u.relu(), mlp)
        z.addcmul_(u.sin(), sine)
        z[:, :_GATE].addcmul_(u[:, :_GATE] * gate, gated)
        f = torch.bmm(seed_out, z)
        # The output is h + level * (f * factor - h * interpolates), with a factor of h or of 1.
        factor = (h * multiplies).add_(1 - multiplies)
        joined = x.new_ones(n, _WIDTH + 1, points)
        torch.addcmul(h, (f * factor).addcmul_(h, -interpolates), level, out=joined[:, :_WIDTH])
        slots.append((features, u, gate, z, f, level, factor))
        features = joined
    return torch.bmm(outward, features).squeeze(1), _Saved(x, features, kinds, ways, slots)


def backward(host: Tensor, seeds: Tensor, logit_gradient: Tensor, saved: _Saved) -> tuple[Tensor, Tensor]:
    """Gradients in the layout of `host` and `seeds`, of a scalar whose gradient by the logits is [N, B]."""
    _, outward = _host_weights(host)
    by_logits = logit_gradient.unsqueeze(1)
    outward_gradient = torch.bmm(by_logits, saved.features.mT)
    g = outward[..., :_WIDTH].mT * by_logits
    seed_gradients = []
    for slot in reversed(range(seeds.shape[1])):
        features, u, gate, z, f, level, factor = saved.slots[slot]
        seed_in, seed_out = _slot_weights(seeds[:, slot])
        bottleneck, mlp, sine, gated = saved.kinds[:, slot].unbind(1)
        _, multiplies, interpolates = saved.ways[:, slot].unbind(1)
        by_change = g * level
        by_f = by_change * factor
        by_z = torch.bmm(seed_out.mT, by_f)
        slope = (u.cos() * sine).add_(bottleneck).addcmul_(u.relu().sign_(), mlp)
        by_u = by_z * slope
        by_gated = (by_z[:, :_GATE] * gated).mul_(gate)
        by_u[:, :_GATE] += by_gated
        by_u[:, _GATE:].addcmul_(by_gated.mul_(u[:, :_GATE]), 1 - gate)
        seed_gradients.append(torch.bmm(by_f, z.mT).flatten(1))
        seed_gradients.append(torch.bmm(by_u, features.mT).flatten(1))
        g.addcmul_(by_change, (f * multiplies).sub_(interpolates))
        g += torch.bmm(seed_in[..., :_WIDTH].mT, by_u)
    first = (saved.slots[0][0] if saved.slots else saved.features)[:, :_WIDTH]
    inward_gradient = torch.bmm(g.addcmul_(g * first, first, value=-1), saved.x.mT)
    host_gradient = torch.cat((inward_gradient.flatten(1), outward_gradient.flatten(1)), dim=1)
    return host_gradient, torch.cat(seed_gradients[::-1], dim=1).view_as(seeds)


def _one_hot(chosen: Tensor, choices: type[IntEnum], dtype: torch.dtype) -> Tensor:
    """[..., choices]; torch's own looks for wrong choices first, which takes four times as long here."""
    return (chosen.unsqueeze(-1) == torch.arange(len(choices), device=chosen.device)).to(dtype)


def _adam(weights: Tensor, first: Tensor, second: Tensor, gradient: Tensor, updates: Tensor, trained: Tensor) -> None:
    """One Adam step in place (Kingma and Ba 2015, algorithm 1 in the order of the end of its section 2).

    `weights`, the moments and `gradient` are [..., P], `updates` (counted from 1) and `trained` [...] up to a
    trailing axis of 1.
    """
    gradient = gradient.clamp(-_GRADIENT_LIMIT, _GRADIENT_LIMIT)
    first.lerp_(gradient, 1 - _BETA1)
    second.mul_(_BETA2).addcmul_(gradient, gradient, value=1 - _BETA2)
    # 1 - beta**updates; a power of an integer tensor takes five times as long.
    correction1, correction2 = (-torch.expm1(updates * math.log(beta)) for beta in (_BETA1, _BETA2))
    rate = -_LEARNING_RATE * correction2.sqrt() / correction1 * trained
    # Epsilon squared under the root: roots of exact zeros, which unused units have, take 20 times as long.
    weights.addcmul_(first / (second + _EPSILON**2).sqrt_(), rate.view(*weights.shape[:-1], 1))


def _score(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy in nats, cut at _MAX_LOSS, and accuracy: both [N], of logits and labels [N, B]."""
    margin = logits * (2 * labels - 1)
    return softplus(-margin).mean(1).clamp(max=_MAX_LOSS), (margin > 0).float().mean(1)


def _seed_weights(draws: Tensor, blueprint: Tensor) -> Tensor:
    """Initial weights [n, seed parameters] from normal draws of that shape; zero where the blueprint has no unit."""
    units = torch.arange(_UNITS, device=draws.device)
    entering = torch.tensor([_UNITS_IN[b] for b in Blueprint], device=draws.device)[blueprint, None] > units
    leaving = torch.tensor([_UNITS_OUT[b] for b in Blueprint], device=draws.device)[blueprint, None] > units
    weights = draws.clone()
    seed_in, seed_out = _slot_weights(weights)
    seed_in.mul_(entering.unsqueeze(-1) * math.sqrt(2 / _WIDTH))
    seed_in[..., -1] = 0.0
    # Small, so that a new seed hardly disturbs the host.
    seed_out.mul_(leaving.unsqueeze(1) * 0.1)
    return weights


def _draw_episode(random: np.random.Generator, validation_points: int) -> tuple[np.ndarray, ...]:
    """Training and validation points, host weights and normal draws for seeds, of one environment's episode."""
    count = _POINTS + validation_points
    turns = random.uniform(*_TURNS)
    phase = random.uniform(0.0, 2 * math.pi)
    handed = random.choice((-1.0, 1.0))
    label = random.integers(0, 2, count)
    radius = np.sqrt(random.uniform(_INNER_RADIUS**2, 1.0, count))
    angle = phase + handed * 2 * math.pi * turns * radius + math.pi * label
    points = radius[:, None] * np.stack((np.cos(angle), np.sin(angle)), axis=1)
    points = _POINT_SCALE * (points + _NOISE * random.standard_normal((count, 2)))
    points, label = np.vstack((points.T, np.ones(count))).astype(np.float32), label.astype(np.float32)
    scales = np.array([*(1.0, 1.0, 0.5) * _WIDTH, *[1 / math.sqrt(_WIDTH)] * _WIDTH, 0.0], np.float32)
    host = random.standard_normal(sum(_HOST_SIZES), np.float32) * scales
    seeds = random.standard_normal((_SEED_DRAWS, sum(_SEED_SIZES)), np.float32)
    return points[:, :_POINTS], label[:_POINTS], points[:, _POINTS:], label[_POINTS:], host, seeds
