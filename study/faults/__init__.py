"""Faults as people make them, one a file: what it is and how it happens stands in the module's docstring.

`inject(training, task)` of a module puts its fault into a run that has been built, before an update.
"""

import importlib
from collections.abc import Callable
from typing import NamedTuple


class Fault(NamedTuple):
    """Attributes:
    inject: puts it into a run.
    title: what it is.
    in_the_middle: whether it begins in the middle of a run; otherwise it is there from the start.
    tasks: where it can happen; all if empty.
    """

    inject: Callable
    title: str
    in_the_middle: bool = False
    tasks: tuple[str, ...] = ()


_TITLES = {
    "learning_rate": "learning rate 30 times too high",
    "sparse_reward": "sparse reward, no entropy bonus",
    "reward_scale": "rewards of 1000, not normalized",
    "value_coefficient": "value coefficient 100 times too high",
    "entropy_bonus": "entropy bonus 100 times too high",
    "entropy_sign": "entropy bonus with the wrong sign",
    "advantage_sign": "advantage with the wrong sign",
    "reward_shifted": "rewards one step late",
    "no_bootstrap": "no bootstrap at truncation",
    "not_shuffled": "minibatches not shuffled",
    "stale_log_probs": "log-probabilities of a stale policy",
    "vanishing_inputs": "inputs and gradients vanish slowly",
    "float16": "Adam's moments of a head in float16",
    "head_left_out": "head left out of the log-probability",
    "head_detached": "head's output detached",
    "trunk_detached": "head on detached features",
    "head_initialization": "head initialized 100 times too large",
    "head_masked": "head masked, never matters",
    "head_saturated": "head saturated, gradient zero",
    "head_not_optimized": "head not in the optimizer",
    "sensor_stuck": "half of the sensors stuck",
    "sensor_scale": "observations 1000 times larger",
    "sensor_nan": "NaN in observations",
    "dynamics_change": "actuators reversed",
}
_IN_THE_MIDDLE = ("sensor_stuck", "sensor_scale", "sensor_nan", "dynamics_change")
# Only the drone's episodes are truncated.
_TASKS = {"no_bootstrap": ("drone",)}

FAULTS = {
    name: Fault(
        importlib.import_module(f"study.faults.{name}").inject, title, name in _IN_THE_MIDDLE, _TASKS.get(name, ())
    )
    for name, title in _TITLES.items()
}
"""By name; the order is that of the tables."""
