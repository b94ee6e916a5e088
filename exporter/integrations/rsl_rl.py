"""rsl-rl: one head per joint of a runner's Gaussian actor. A window is one update of its algorithm."""

import statistics
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import torch
from rsl_rl.runners import OnPolicyRunner

from exporter.heads import Rows
from exporter.integrations.joints import joint_heads, last_linear, measure_after_averaging
from exporter.monitor import GradientMonitor
from exporter.one_call import watch

_LOSSES = {"surrogate": "policy_loss", "value": "value_loss", "entropy": "entropy"}


def runner_heads(runner: OnPolicyRunner, names: Sequence[str] | None = None) -> dict[str, list[Rows]]:
    """One head per joint: its rows of the actor's last layer, and its own standard deviation if that is a parameter.

    Args:
        runner: a runner whose actor has a distribution of rsl-rl, such as `GaussianDistribution`.
        names: names of the joints, in the action's order; by default `joint_0`, `joint_1`, ...

    Raises:
        ValueError: as `joint_heads`, or the actor does not end in a linear layer.
    """
    actor, count = runner.alg.get_policy(), runner.env.num_actions
    spread = getattr(actor.distribution, "std_param", getattr(actor.distribution, "log_std_param", None))
    if spread is not None and not spread.requires_grad:
        spread = None
    return joint_heads(count, last_linear(actor.mlp, (count, 2 * count)), spread, names)


def watch_runner(
    runner: OnPolicyRunner,
    run: str,
    *,
    joint_names: Sequence[str] | None = None,
    info: Mapping[str, str] | None = None,
    **options: Any,
) -> GradientMonitor:
    """Measure every update of `runner.learn()` and serve it, until the monitor is closed.

    Exports rsl-rl's mean losses and entropy, the learning rate, durations and steps. If the runner has a `log_dir`,
    also the mean of its last 100 returns and episode lengths; without one it keeps none.

    Args:
        runner: the runner, before its `learn()`.
        run: name of the run.
        joint_names: as `names` of `runner_heads`.
        info: labels of `ppo_run_info` besides algorithm, device and versions.
        options: as for `exporter.watch`: `port`, `targets_dir`, `thresholds`, ...

    Returns:
        The monitor; use it in a `with` block, or close it.

    Raises:
        OSError, TypeError, ValueError: as `runner_heads` and `exporter.watch`.
    """
    algorithm = runner.alg
    monitor = watch(
        algorithm.optimizer,
        runner_heads(runner, joint_names),
        run,
        window_steps=None,
        # With several processes rsl-rl averages gradients itself: measure after that.
        before_clipping=not runner.is_distributed,
        info={
            "algorithm": type(algorithm).__name__,
            "device": str(runner.device),
            "torch_version": torch.__version__,
            "rsl_rl_version": version("rsl-rl-lib"),
            "exporter_version": version("ppo-gradient-exporter"),
            **(info or {}),
        },
        **options,
    )
    if runner.is_distributed:
        measure_after_averaging(monitor, algorithm)
    update, resting_since = algorithm.update, time.perf_counter()

    def measured_update() -> dict[str, float]:
        nonlocal resting_since
        with monitor.update(rollout_duration_seconds=time.perf_counter() - resting_since):
            losses = update()
            logger = runner.logger
            monitor.record(
                **{ours: losses[key] for key, ours in _LOSSES.items() if key in losses},
                learning_rate=algorithm.learning_rate,
                environment_steps=runner.cfg["num_steps_per_env"] * runner.env.num_envs * runner.gpu_world_size,
                episode_return_mean=statistics.fmean(logger.rewbuffer) if logger.rewbuffer else None,
                episode_length_mean=statistics.fmean(logger.lenbuffer) if logger.lenbuffer else None,
            )
        resting_since = time.perf_counter()
        return losses

    algorithm.update = measured_update
    return monitor
