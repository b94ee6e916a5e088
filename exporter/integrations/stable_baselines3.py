"""Stable-Baselines3: a callback that measures an on-policy algorithm and serves it with SB3's own logger values."""

import math
import re
import threading
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.vec_env import VecEnv

from exporter.action_spaces import space_heads
from exporter.aggregator import RunAggregator
from exporter.heads import Rows
from exporter.health import Thresholds
from exporter.integrations.rollout_sample import RolloutSample
from exporter.link import DEFAULT_ADDRESS, Registry
from exporter.monitor import GradientMonitor
from exporter.reporter import OnLevel, OnUpdate
from exporter.snapshot import RunSnapshot

# Keys of SB3's logger (of PPO, and A2C's if different) -> our signals. SB3's entropy has the opposite sign.
_SIGNALS = {
    "train/policy_gradient_loss": "policy_loss",
    "train/policy_loss": "policy_loss",
    "train/value_loss": "value_loss",
    "train/approx_kl": "approx_kl",
    "train/clip_fraction": "clip_fraction",
    "train/explained_variance": "explained_variance",
    "train/learning_rate": "learning_rate",
}
_ENTROPY_LOSS = "train/entropy_loss"


def policy_heads(policy: BasePolicy, names: Sequence[str] | None = None) -> dict[str, list[Rows]]:
    """Action heads of an actor-critic policy: rows of its `action_net`, in the action space's order.

    Args:
        policy: `model.policy`. Heads are those of `space_heads`; a dimension of a `Box` also has its entry of
            `log_std`, if the policy has one for each.
        names: one for every part of the action, including those with a single choice; by default
            `action_0`, `action_1`, ..., or `action` for `Discrete`.

    Raises:
        TypeError, ValueError: as `space_heads`, or the policy has no `action_net`.
    """
    layer, space = getattr(policy, "action_net", None), policy.action_space
    if not isinstance(layer, torch.nn.Module):
        raise TypeError(f"{type(policy).__name__} has no action_net; use an actor-critic policy")
    log_std = getattr(policy, "log_std", None)
    if log_std is not None and log_std.shape != (math.prod(space.shape or ()),):
        log_std = None  # with `use_sde` it belongs to features
    return space_heads(layer, space, names, log_std=log_std)


class PrometheusCallback(BaseCallback):
    """Serves `/metrics` while `model.learn(..., callback=PrometheusCallback(run=...))` trains.

    For PPO, A2C and their subclasses. A window is one update. It exports the heads'
    gradients, SB3's logged values of the update (losses, entropy, KL, clip fraction,
    explained variance, learning rate), mean return and length of the episodes in
    `ep_info_buffer`, counts of environment steps and episodes, and the durations of
    rollout and update. For PPO with discrete actions it also exports each head's entropy,
    KL and clip fraction, from a sample of the rollout. Signals are as SB3 computes them:
    for example, the value loss is the mean squared error without its coefficient.

    The endpoint lives for one `learn()`: at its end the run, its target file and the
    endpoint go, and a later `learn()` starts from zero. With `reset_num_timesteps=False`
    they stay, and the next `learn()` of the same model with the same callback continues to
    count, until `close()` or the end of the script. After an exception or Ctrl-C in
    `learn()` they also stay, because SB3 does not tell callbacks. The last values can still
    be read, and the alert on a stalled run fires, until the next `learn()` of this run in
    this thread takes over, `close()` is called, or the script ends.

    Args:
        run: name of the run; by default the environment's id and the model's seed, or the time without a seed.
        port, address, targets_dir, textfile_dir, pushgateway, web_config_file, registry: as for
            `GradientMonitor.serve`.
        head_names: as `names` of `policy_heads`.
        info: labels of `ppo_run_info` besides environment, algorithm, seed, device and versions.
        thresholds: as for `GradientMonitor`.
        before_clipping, global_norm: as for `GradientMonitor`. SB3 always clips, so by default norms are taken before.
        log_gradients: also record `gradient/cv`, `gradient/share/HEAD` and `gradient/norm/HEAD` of each update in
            SB3's logger, beside SB3's values of that update.
        on_update, on_level: as for `GradientMonitor`.
        keep_serving: whether the endpoint stays open after `learn()`; by default this depends on `reset_num_timesteps`.
        aggregator: as for `GradientMonitor`.
        verbose: 1 prints the URL.

    Attributes:
        monitor: the `GradientMonitor` in use, or None.

    Raises:
        TypeError, ValueError: `thresholds` are not 0 < warning < critical.
        TypeError: from `learn()`: the algorithm is not on-policy, or is TRPO, or as `policy_heads`.
        ValueError: from `learn()`: as `policy_heads`, or another training has the same `run`.
        OSError: from `learn()`: as `GradientMonitor.serve`.
    """

    _open_by_run: dict[tuple[RunAggregator | None, str], "PrometheusCallback"] = {}

    def __init__(
        self,
        run: str | None = None,
        port: int | None = None,
        address: str = DEFAULT_ADDRESS,
        *,
        targets_dir: str | Path | None = None,
        textfile_dir: str | Path | None = None,
        pushgateway: str | None = None,
        web_config_file: str | Path | None = None,
        registry: Registry | None = None,
        head_names: Sequence[str] | None = None,
        info: Mapping[str, str] | None = None,
        thresholds: Thresholds | Sequence[float] = Thresholds(),
        before_clipping: bool = True,
        global_norm: bool = False,
        log_gradients: bool = False,
        on_update: OnUpdate | None = None,
        on_level: OnLevel | None = None,
        keep_serving: bool | None = None,
        aggregator: RunAggregator | None = None,
        verbose: int = 0,
    ) -> None:
        super().__init__(verbose)
        self.monitor: GradientMonitor | None = None
        self._run = run
        self._delivery: dict[str, Any] = {
            "port": port,
            "address": address,
            "targets_dir": targets_dir,
            "textfile_dir": textfile_dir,
            "pushgateway": pushgateway,
            "web_config_file": web_config_file,
            "registry": registry,
        }
        self._head_names = head_names
        self._info = dict(info or {})
        self._thresholds = Thresholds.of(thresholds)
        self._before_clipping = before_clipping
        self._global_norm = global_norm
        self._log_gradients = log_gradients
        self._on_update = on_update
        self._on_level = on_level
        self._logged_update: RunSnapshot | None = None
        self._keep_serving = keep_serving
        self._aggregator = aggregator
        self._stays_open: bool | None = keep_serving
        self._thread: int | None = None  # the thread in learn(), or the one in which an exception ended it
        self._measured_policy: BasePolicy | None = None
        self._sample: RolloutSample | None = None
        self._counted_timesteps = 0
        self._uncounted_episodes = 0
        self._rollout_started = 0.0
        # Time at which the rollout ended; None after its update has been exported.
        self._update_started: float | None = None

    @property
    def url(self) -> str | None:
        """URL of `/metrics`; None if nothing is served."""
        return self.monitor.url if self.monitor is not None else None

    def close(self) -> None:
        """Stop measuring and serving, and remove the run from the endpoint; a second call does nothing."""
        if self.monitor is None:
            return
        run = self._aggregator, self.monitor.run
        if self._open_by_run.get(run) is self:
            del self._open_by_run[run]
        self.monitor.close()
        self.monitor = self._measured_policy = None

    def _init_callback(self) -> None:
        if not isinstance(self.model, OnPolicyAlgorithm):
            raise TypeError(
                f"{type(self.model).__name__} is not an on-policy algorithm; "
                "PrometheusCallback measures PPO, A2C and their subclasses"
            )
        # By name, because sb3_contrib may not be installed.
        if any(kind.__name__ == "TRPO" for kind in type(self.model).__mro__):
            raise TypeError(
                f"{type(self.model).__name__} cannot be measured: TRPO updates the policy by a line search, "
                "and the steps of its optimizer leave the heads without gradients"
            )

    def _on_training_start(self) -> None:
        if self.monitor is not None and self._measured_policy is self.model.policy:
            self.monitor.detach()
            self.monitor.attach(self.model.policy.optimizer)
        else:
            self.close()
            self._open()
        self._thread = threading.get_ident()
        self._stays_open = self._keep_serving
        if self._stays_open is None:
            self._stays_open = not self.locals.get("reset_num_timesteps", True)
        self._counted_timesteps = self.model.num_timesteps
        self._update_started = None

    def _open(self) -> None:
        environment = _environment_name(self.training_env) or type(self.model).__name__
        seed = self.model.seed
        run = self._run or f"{environment}-{time.strftime('%Y%m%d-%H%M%S') if seed is None else f'seed{seed}'}"
        # learn() blocks, so an earlier training of this thread is over.
        before = self._open_by_run.get((self._aggregator, run))
        if before is not None and before._thread in (None, threading.get_ident()):
            before.close()
        self._uncounted_episodes = 0
        self._logged_update = None
        monitor = GradientMonitor(
            policy_heads(self.model.policy, self._head_names),
            run,
            window_steps=None,
            before_clipping=self._before_clipping,
            global_norm=self._global_norm,
            thresholds=self._thresholds,
            info={
                "environment": environment,
                "algorithm": type(self.model).__name__,
                **({} if seed is None else {"seed": str(seed)}),
                "device": str(self.model.device),
                "torch_version": torch.__version__,
                "exporter_version": version("ppo-gradient-exporter"),
                **self._info,
            },
            on_update=self._after_update,
            on_level=self._on_level,
            aggregator=self._aggregator,
        )
        try:
            monitor.attach(self.model.policy.optimizer)
            monitor.serve(**self._delivery)
        except BaseException:
            monitor.close()
            raise
        self.monitor = monitor
        self._measured_policy = self.model.policy
        self._open_by_run[self._aggregator, run] = self
        if self.verbose and self.url is not None:
            print(f"{run}: metrics at {self.url}", flush=True)

    def _on_rollout_start(self) -> None:
        self._export_update()
        self._rollout_started = time.perf_counter()

    def _on_step(self) -> bool:
        # Only count: this runs at every step. The update records the count.
        self._uncounted_episodes += int(np.count_nonzero(self.locals["dones"]))
        return True

    def _after_update(self, run: RunSnapshot) -> None:
        self._logged_update = run
        if self._on_update is not None:
            self._on_update(run)

    def _on_rollout_end(self) -> None:
        # Right after this, SB3 writes its log of the last update.
        if self._log_gradients and self._logged_update is not None:
            for name, value in self._logged_update.scalars().items():
                if name.startswith("gradient/"):
                    self.logger.record(name, value)
        if self.monitor is not None:
            self._sample = RolloutSample.of(self.model, self.monitor.heads)
        self._update_started = time.perf_counter()

    def _on_training_end(self) -> None:
        self._export_update()
        self._thread = None
        if self.monitor is None:
            return
        self.monitor.detach()
        if not self._stays_open:
            self.close()

    def _export_update(self) -> None:
        """Export the update that has just ended, if any; its values are in the logger until SB3 writes the log."""
        if self._update_started is None or self.monitor is None:
            return
        logged = self.logger.name_to_value
        values: dict[str, Any] = {signal: logged[key] for key, signal in _SIGNALS.items() if key in logged}
        if _ENTROPY_LOSS in logged:
            values["entropy"] = -logged[_ENTROPY_LOSS]
        if self._sample is not None:
            values |= self._sample.signals()
        if episodes := self.model.ep_info_buffer:
            values["episode_return_mean"] = np.mean([episode["r"] for episode in episodes])
            values["episode_length_mean"] = np.mean([episode["l"] for episode in episodes])
        self.monitor.update_completed(
            **values,
            environment_steps=self.model.num_timesteps - self._counted_timesteps,
            episodes=self._uncounted_episodes,
            rollout_duration_seconds=self._update_started - self._rollout_started,
            update_duration_seconds=time.perf_counter() - self._update_started,
        )
        self._counted_timesteps = self.model.num_timesteps
        self._uncounted_episodes = 0
        self._update_started = None


def _environment_name(env: VecEnv) -> str | None:
    """Id of the environment, or its class; None if neither is known."""
    # Use its text, not its `spec`: a worker process dies if it has to send a spec that cannot be pickled, for example
    # one with a lambda.
    try:
        text = str(env.env_method("__str__", indices=0)[0])
    except Exception:  # the vector environment is not made of Gymnasium's; a missing name must not stop training
        return None
    found = re.search(r"<(\w+)(?:<([^<>]+)>| instance)>+$", text)
    return found and (found[2] or found[1])
