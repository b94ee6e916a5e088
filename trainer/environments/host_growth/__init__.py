"""Vector environment in which every environment grows a small host network that is really trained.

Each environment holds a host classifier of two-dimensional points (two spirals, drawn anew for every
episode and split into a training and a validation set). In every environment step the host takes an
Adam step on a minibatch of the training set. Alone it underfits. The agent manages seeds: small modules
in the host's slots, which lie one after the other between the host's hidden layer and its output. A seed
goes through stages:

    DORMANT -germinate-> TRAINING -advance-> BLENDING -(ramp done)-> HOLDING -fossilize-> FOSSILIZED
                            '-----------------'- prune -'-------> PRUNED -(cooldown)-> DORMANT

A TRAINING seed is blended into a part of every minibatch only (drop path), so it learns while the host's
output and the validation set do not see it. BLENDING ramps its level to a target, HOLDING keeps it, and
FOSSILIZED freezes its weights for the rest of the episode: it can no longer be pruned, and its parameters
no longer cost an optimizer's state.

`vector_env` is the environment, `slots` the actions and the stages, `networks` the hosts and their training,
`episodes` the random tasks.
"""

from trainer.environments.host_growth.networks import Alpha, Blueprint, parameter_count
from trainer.environments.host_growth.slots import (
    ACTION_HEADS,
    NUM_SLOTS,
    SPEEDS,
    TARGETS,
    Curve,
    Op,
    Stage,
    ramp_shape,
)
from trainer.environments.host_growth.vector_env import HostGrowthVectorEnv

__all__ = [
    "ACTION_HEADS",
    "Alpha",
    "Blueprint",
    "Curve",
    "HostGrowthVectorEnv",
    "NUM_SLOTS",
    "Op",
    "SPEEDS",
    "Stage",
    "TARGETS",
    "parameter_count",
    "ramp_shape",
]
