"""The actions, and the stages that the seeds go through under them."""

import math
from enum import IntEnum

import torch
from torch import Tensor

from trainer.environments.host_growth.networks import HOST_SIZES, LEARNING_RATE, Alpha, Blueprint, parameter_count


class Stage(IntEnum):
    """Where a slot's seed stands."""

    DORMANT = 0
    TRAINING = 1
    BLENDING = 2
    HOLDING = 3
    FOSSILIZED = 4
    PRUNED = 5


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
_READS = {Op.GERMINATE: ("blueprint", "alpha", "target"), Op.ADVANCE: ("target", "speed", "curve")}

NUM_SLOTS = 3
TARGETS = (0.25, 0.5, 0.75, 1.0)
"""Blending level at the end of a ramp."""
SPEEDS = (1, 4, 8, 16)
"""Environment steps a ramp takes."""

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
_RENT = 0.001  # per environment step, for frozen seed parameters as many as the host's own
_OPTIMIZER_STATE = 3  # a parameter in training costs this many: itself and Adam's two moments
_TRAINED = (Stage.TRAINING, Stage.BLENDING, Stage.HOLDING)

SLOT_FEATURES = len(Stage) + 2 + len(Blueprint)
"""Of each slot in the observation: stage (one-hot), age, level, blueprint (one-hot)."""
_AGE, _LEVEL = len(Stage), len(Stage) + 1


class Slots:
    """S slots of N environments.

    Attributes:
        stage, age: [S, N] int64, age in steps in this stage.
        settings: [S, N, 5] int64, the parts of the action between slot and op that the seed was given.
        level: [S, N], how far the seed is blended into the host, 0 to 1.
        ramp_start: [S, N], level at which the ramp began.
        updates: [S, N] int64, Adam steps since germination.
        germinations: [N] int64, in this episode.
        learning_rate: [S, N], 0 where no seed is trained.
        hidden: [S, N], level at which a TRAINING seed is blended into its part of a minibatch.
        living: [N], living seed parameters as a part of what fits.
        rent: [N], what they cost in a step.
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
        """All that changes, by name; views with the environment as their first axis."""
        names = ("stage", "age", "settings", "level", "ramp_start", "updates")
        return {"germinations": self.germinations, **{name: getattr(self, name).transpose(0, 1) for name in names}}

    def clear(self) -> None:
        """Every slot is empty."""
        for tensor in self.state().values():
            tensor.zero_()
        self.see()

    def apply(self, actions: Tensor) -> Tensor:
        """Do each environment's op on its slot, where the slot's stage allows it, and move the ramps.

        Args:
            actions: [N, 7] int64.

        Returns:
            bool [N]: where a seed germinated.
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
        """Move the levels of blending seeds along their curves; those at their target hold."""
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
        """Look up what follows from the stages and the blueprints."""
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
        """What an observation shows of the slots: [N, S * SLOT_FEATURES], a new tensor."""
        self._shown[..., _AGE] = torch.take(self._ages, self.age)
        self._shown[..., _LEVEL] = self.level
        return self._shown.transpose(0, 1).flatten(1)


def ramp_shape(progress: Tensor, curve: Curve) -> Tensor:
    """Part of the way from 0 to 1 that the curve has covered at `progress` in [0, 1]; exact at both ends."""
    steepness = 10.0
    edge = 1 / (1 + math.exp(steepness / 2))
    shaped = {
        Curve.LINEAR: progress,
        Curve.COSINE: (1 - torch.cos(math.pi * progress)) / 2,
        Curve.SIGMOID: (torch.sigmoid(steepness * (progress - 0.5)) - edge) / (1 - 2 * edge),
    }[curve]
    return torch.where(progress >= 1.0, 1.0, shaped.clamp(0.0, 1.0))


def _ramp_table() -> Tensor:
    """Covered part [curves, speeds, ages]: at an age the step that follows it is over."""
    ages = torch.arange(max(SPEEDS))
    return torch.stack(
        [torch.stack([ramp_shape(((ages + 1) / speed).clamp(max=1.0), curve) for speed in SPEEDS]) for curve in Curve]
    )


def _code(stage: Tensor, op: Tensor, age: Tensor) -> Tensor:
    """Row of the tables of outcomes."""
    return torch.add(age.clamp(max=_COOLED), torch.add(op, stage, alpha=len(Op)), alpha=_COOLED + 1)


def _outcome_tables() -> tuple[Tensor, Tensor]:
    """What an op does in a stage at an age, by `_code`.

    Returns:
        int64 [codes, 4]: the new stage, and as 0 or 1 whether it is the old one, whether a seed germinates, whether it
        is trained then; bool [codes, 5]: which settings the seed reads from the action.
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
    """Of a slot with such a seed: what is shown of it (age and level to come), whether its level can be above 0,
    whether it is in TRAINING, its learning rate, its part of the parameters that fit, its rent."""
    living = parameter_count(blueprint) if stage not in (Stage.DORMANT, Stage.PRUNED) else 0
    cost = living * (1 if stage is Stage.FOSSILIZED else _OPTIMIZER_STATE)
    fits = NUM_SLOTS * max(parameter_count(b) for b in Blueprint)
    shown = [*(stage is s for s in Stage), 0, 0, *(living > 0 and blueprint is b for b in Blueprint)]
    in_host = stage in (Stage.BLENDING, Stage.HOLDING, Stage.FOSSILIZED)
    rate = LEARNING_RATE if stage in _TRAINED else 0.0
    numbers = (*shown, in_host, stage is Stage.TRAINING, rate, living / fits, _RENT * cost / sum(HOST_SIZES))
    return [float(number) for number in numbers]
