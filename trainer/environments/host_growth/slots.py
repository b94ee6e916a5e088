"""The actions, and the stages of the seeds."""

import math
from enum import IntEnum

import torch
from torch import Tensor

from trainer.environments.host_growth.networks import HOST_SIZES, LEARNING_RATE, Alpha, Blueprint, parameter_count


class Stage(IntEnum):
    """Stage of a slot's seed."""

    DORMANT = 0
    TRAINING = 1
    BLENDING = 2
    HOLDING = 3
    FOSSILIZED = 4
    PRUNED = 5


class Curve(IntEnum):
    """Shape of a blending ramp."""

    LINEAR = 0
    COSINE = 1
    SIGMOID = 2


class Op(IntEnum):
    """Operation on the chosen slot. It does nothing if the slot's stage does not allow it."""

    WAIT = 0
    GERMINATE = 1  # DORMANT only; reads blueprint, alpha and target (the level at which the seed trains)
    ADVANCE = 2  # TRAINING or HOLDING: (re)blend; reads target, speed and curve
    PRUNE = 3  # TRAINING, BLENDING or HOLDING
    FOSSILIZE = 4  # HOLDING only


# The stage after an op; other combinations change nothing.
_TRANSITIONS = {
    (Stage.DORMANT, Op.GERMINATE): Stage.TRAINING,
    (Stage.TRAINING, Op.ADVANCE): Stage.BLENDING,
    (Stage.HOLDING, Op.ADVANCE): Stage.BLENDING,
    (Stage.TRAINING, Op.PRUNE): Stage.PRUNED,
    (Stage.BLENDING, Op.PRUNE): Stage.PRUNED,
    (Stage.HOLDING, Op.PRUNE): Stage.PRUNED,
    (Stage.HOLDING, Op.FOSSILIZE): Stage.FOSSILIZED,
}
_READS = {Op.GERMINATE: ("blueprint", "alpha", "target"), Op.ADVANCE: ("target", "speed", "curve")}

NUM_SLOTS = 3
TARGETS = (0.25, 0.5, 0.75, 1.0)
"""Blending level at the end of a ramp."""
SPEEDS = (1, 4, 8, 16)
"""Duration of a ramp in environment steps."""

ACTION_HEADS: dict[str, int] = {
    "slot": NUM_SLOTS,
    "blueprint": len(Blueprint),
    "alpha": len(Alpha),
    "target": len(TARGETS),
    "speed": len(SPEEDS),
    "curve": len(Curve),
    "op": len(Op),
}
"""The action: name of each part -> number of choices, in order."""
_SETTINGS = list(ACTION_HEADS)[1:-1]
_BLUEPRINT, _ALPHA, _TARGET, _SPEED, _CURVE = range(len(_SETTINGS))

_COOLED = 5  # environment steps after which a pruned slot is free
_RENT = 0.001  # per environment step, for as many frozen seed parameters as the host has
_OPTIMIZER_STATE = 3  # a parameter in training costs this many: itself and Adam's two moments
_TRAINED = (Stage.TRAINING, Stage.BLENDING, Stage.HOLDING)

SLOT_FEATURES = len(Stage) + 2 + len(Blueprint)
"""Features of a slot in the observation: stage (one-hot), age, level, blueprint (one-hot)."""
_AGE, _LEVEL = len(Stage), len(Stage) + 1


class Slots:
    """S slots of N environments.

    Attributes:
        stage, age: [S, N] int64, age in steps in this stage.
        settings: [S, N, 5] int64, the seed's settings: the parts of the action between slot and op.
        level: [S, N], blending level of the seed in the host, 0 to 1.
        ramp_start: [S, N], level at the start of the ramp.
        updates: [S, N] int64, Adam steps since germination.
        germinations: [N] int64, in this episode.
        learning_rate: [S, N], 0 if no seed is trained.
        hidden: [S, N], blending level of a TRAINING seed in its part of a minibatch.
        living: [N], living seed parameters as a fraction of the maximum.
        rent: [N], their cost per step.
    """

    def __init__(self, num_envs: int, horizon: int, device: torch.device) -> None:
        shape = NUM_SLOTS, num_envs
        integers = {"dtype": torch.int64, "device": device}
        self.stage, self.age, self.updates = (torch.zeros(shape, **integers) for _ in range(3))
        self.settings = torch.zeros(*shape, len(_SETTINGS), **integers)
        self.germinations = torch.zeros(num_envs, **integers)
        self.level, self.ramp_start = (torch.zeros(shape, device=device) for _ in range(2))
        self._slots = torch.arange(NUM_SLOTS, device=device).unsqueeze(1)
        self._wait, self._holding = (torch.tensor(int(number), device=device) for number in (Op.WAIT, Stage.HOLDING))
        self._outcomes, self._reads = (table.to(device) for table in _outcome_tables())
        self._targets = torch.tensor(TARGETS, device=device)
        self._ramps = _ramp_table().to(device)
        self._looks = torch.tensor([_look(stage, kind) for stage in Stage for kind in Blueprint], device=device)
        self._ages = torch.arange(horizon + 1, device=device) / horizon
        self.see()

    def state(self) -> dict[str, Tensor]:
        """All state by name, as views with the environment as first axis."""
        names = ("stage", "age", "settings", "level", "ramp_start", "updates")
        return {"germinations": self.germinations, **{name: getattr(self, name).transpose(0, 1) for name in names}}

    def clear(self) -> None:
        """Empty every slot."""
        for tensor in self.state().values():
            tensor.zero_()
        self.see()

    def apply(self, actions: Tensor) -> Tensor:
        """Apply each environment's op to its slot, if the slot's stage allows it, and advance the ramps.

        Args:
            actions: [N, 7] int64.

        Returns:
            bool [N]: whether a seed germinated.
        """
        slot, *_, op = actions.unbind(1)
        op = torch.where(slot == self._slots, op, self._wait)  # [S, N]
        self.age.add_(1)
        codes = _code(self.stage, op, self.age).flatten()
        stage, stays, germinations, trained = self._outcomes.index_select(0, codes).view(*op.shape, 4).unbind(-1)
        reads = self._reads.index_select(0, codes).view(self.settings.shape)
        germinated, advanced = reads[..., _BLUEPRINT], reads[..., _SPEED]
        torch.where(reads, actions[:, 1:-1], self.settings, out=self.settings)
        torch.where(advanced, self.level, self.ramp_start, out=self.ramp_start)
        self.age.mul_(stays)
        self.germinations.add_(germinations.sum(0))
        self.updates.masked_fill_(germinated, 0).add_(trained)
        self._ramp(stage)
        self.see()
        return germinated.any(0)

    def _ramp(self, stage: Tensor) -> None:
        """Move the levels of blending seeds along their curves; at the target a seed is HOLDING."""
        _, _, target, speed, curve = self.settings.unbind(-1)
        blending = stage == Stage.BLENDING
        place = torch.add(speed, curve, alpha=len(SPEEDS))
        place = torch.add(self.age.clamp(max=max(SPEEDS) - 1), place, alpha=max(SPEEDS))
        covered = torch.take(self._ramps, place)
        ramp = torch.lerp(self.ramp_start, torch.take(self._targets, target), covered)
        torch.where(blending, ramp, self.level, out=self.level)
        done = blending.logical_and_(covered >= 1.0)
        torch.where(done, self._holding, stage, out=self.stage)
        self.age.masked_fill_(done, 0)

    def see(self) -> None:
        """Look up everything that depends on stage and blueprint."""
        codes = torch.add(self.settings[..., _BLUEPRINT], self.stage, alpha=len(Blueprint)).flatten()
        looks = self._looks.index_select(0, codes).view(*self.stage.shape, -1)
        self._shown, in_host, trains, self.learning_rate, shares = looks.split((SLOT_FEATURES, 1, 1, 1, 2), dim=-1)
        self.living, self.rent = shares.sum(0).unbind(-1)
        self.hidden = torch.take(self._targets, self.settings[..., _TARGET]).mul_(trains.squeeze(-1))
        self.level.mul_(in_host.squeeze(-1))

    @property
    def blueprint(self) -> Tensor:
        """[S, N] int64."""
        return self.settings[..., _BLUEPRINT]

    @property
    def combination(self) -> Tensor:
        """`Alpha` [S, N] int64."""
        return self.settings[..., _ALPHA]

    def features(self) -> Tensor:
        """The slots' features in an observation: [N, S * SLOT_FEATURES], a new tensor."""
        self._shown[..., _AGE] = torch.take(self._ages, self.age)
        self._shown[..., _LEVEL] = self.level
        return self._shown.transpose(0, 1).flatten(1)


def ramp_shape(progress: Tensor, curve: Curve) -> Tensor:
    """Value of the curve, 0 to 1, at `progress` in [0, 1]; exact at both ends."""
    steepness = 10.0
    edge = 1 / (1 + math.exp(steepness / 2))
    shaped = {
        Curve.LINEAR: progress,
        Curve.COSINE: (1 - torch.cos(math.pi * progress)) / 2,
        Curve.SIGMOID: (torch.sigmoid(steepness * (progress - 0.5)) - edge) / (1 - 2 * edge),
    }[curve]
    return torch.where(progress >= 1.0, 1.0, shaped.clamp(0.0, 1.0))


def _ramp_table() -> Tensor:
    """Values of the curves [curves, speeds, ages], each after the step that follows the age."""
    ages = torch.arange(max(SPEEDS))
    return torch.stack(
        [torch.stack([ramp_shape(((ages + 1) / speed).clamp(max=1.0), curve) for speed in SPEEDS]) for curve in Curve]
    )


def _code(stage: Tensor, op: Tensor, age: Tensor) -> Tensor:
    """Row in the outcome tables."""
    return torch.add(age.clamp(max=_COOLED), torch.add(op, stage, alpha=len(Op)), alpha=_COOLED + 1)


def _outcome_tables() -> tuple[Tensor, Tensor]:
    """The effect of an op in a stage at an age, by `_code`.

    Returns:
        int64 [codes, 4]: the new stage, and as 0 or 1: whether it is unchanged, whether a seed germinates, whether it
        is trained then. bool [codes, 5]: which settings the seed reads from the action.
    """
    outcomes, reads = [], []
    for stage in Stage:
        for op in Op:
            for age in range(_COOLED + 1):
                after = _TRANSITIONS.get((stage, op), stage)
                read = _READS.get(op, ()) if after is not stage else ()
                if stage is Stage.PRUNED and age == _COOLED:
                    after = Stage.DORMANT
                outcomes.append((after, after is stage, "blueprint" in read, after in _TRAINED))
                reads.append([setting in read for setting in _SETTINGS])
    return torch.tensor(outcomes), torch.tensor(reads)


def _look(stage: Stage, blueprint: Blueprint) -> list[float]:
    """For a slot with such a seed: its features (age and level are filled in later), whether its level can be above 0,
    whether it is in TRAINING, its learning rate, its fraction of the maximum number of parameters, its rent."""
    living = parameter_count(blueprint) if stage not in (Stage.DORMANT, Stage.PRUNED) else 0
    cost = living * (1 if stage is Stage.FOSSILIZED else _OPTIMIZER_STATE)
    fits = NUM_SLOTS * max(parameter_count(b) for b in Blueprint)
    shown = [*(stage is s for s in Stage), 0, 0, *(living > 0 and blueprint is b for b in Blueprint)]
    in_host = stage in (Stage.BLENDING, Stage.HOLDING, Stage.FOSSILIZED)
    rate = LEARNING_RATE if stage in _TRAINED else 0.0
    numbers = (*shown, in_host, stage is Stage.TRAINING, rate, living / fits, _RENT * cost / sum(HOST_SIZES))
    return [float(number) for number in numbers]
