"""Vector environment: each environment trains a small host network, and the agent grows modules in it.

The host classifies two-dimensional points (two spirals, drawn anew for every episode and split into a
training and a validation set). In every environment step it takes an Adam step on a minibatch of the
training set. Alone it underfits. The agent manages seeds: small modules in the host's slots. The slots
are in series between the host's hidden layer and its output. A seed goes through stages:

    DORMANT -germinate-> TRAINING -advance-> BLENDING -(ramp done)-> HOLDING -fossilize-> FOSSILIZED
                            '-----------------'- prune -'-------> PRUNED -(cooldown)-> DORMANT

A TRAINING seed is blended into only a part of every minibatch (drop path). So it learns, but does not
change the host's output on the rest and on the validation set. BLENDING ramps its level to a target and
HOLDING keeps it. FOSSILIZED freezes its weights for the rest of the episode: it can no longer be pruned,
and its parameters no longer cost optimizer state.

`vector_env` has the environment, `slots` the actions and the stages, `networks` the hosts and their
training, `episodes` the random tasks.
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
