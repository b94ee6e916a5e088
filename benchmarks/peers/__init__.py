"""PPO trainers to compare: each module's `start(setting)` builds one that is ready for updates."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Setting:
    """The task and hyperparameters of all trainers; names as in `trainer.config.TrainerConfig`.

    Everywhere actor and critic are networks of their own, of two tanh layers with orthogonal initialization; the
    learning rate is constant, advantages are normalized per minibatch.
    """

    env: str
    num_envs: int
    rollout_steps: int
    minibatch_size: int
    hidden_size: int
    vectorization: str = "sync"
    seed: int = 1
    epochs: int = 4
    learning_rate: float = 2.5e-4
    adam_eps: float = 1e-5
    gamma: float = 0.99
    gae_lambda: float = 0.95
    clip_range: float = 0.2
    value_clip_range: float | None = 0.2
    entropy_coef: float = 0.01
    value_coef: float = 0.5
    max_grad_norm: float = 0.5

    @property
    def steps_per_update(self) -> int:
        return self.num_envs * self.rollout_steps


@dataclass(frozen=True)
class Contestant:
    """A running trainer.

    Attributes:
        update: collects one rollout and learns from it.
        metrics_url: address of its metrics; None if it serves none.
        close: ends everything that it started, and removes everything that it wrote.
    """

    update: Callable[[], object]
    metrics_url: str | None = None
    close: Callable[[], object] = lambda: None
