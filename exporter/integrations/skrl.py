"""skrl: one head per part of the action of an agent's policy. A window is one update of the agent."""

import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import torch
from gymnasium import spaces
from skrl import config
from skrl.agents.torch import Agent
from torch import nn

from exporter.action_spaces import space_heads
from exporter.heads import Rows
from exporter.integrations.joints import last_linear, measure_after_averaging
from exporter.monitor import GradientMonitor
from exporter.one_call import watch

# Keys of skrl's tracking data -> our signals.
_SIGNALS = {
    "Loss / Policy loss": "policy_loss",
    "Loss / Value loss": "value_loss",
    "Reward / Total reward (mean)": "episode_return_mean",
    "Episode / Total timesteps (mean)": "episode_length_mean",
}


def agent_heads(
    agent: Agent, names: Sequence[str] | None = None, layer: nn.Linear | None = None
) -> dict[str, list[Rows]]:
    """Action heads of an agent's policy: rows of its last layer, split as by `space_heads`.

    A dimension of a `Box` also has its entry of `log_std_parameter`, if the policy has one.

    Args:
        agent: a PPO, RPO or A2C agent.
        names: as for `space_heads`.
        layer: the policy's output layer; by default the last linear layer with as many outputs as the action needs.

    Raises:
        TypeError, ValueError: as `space_heads`, or there is no such layer.
    """
    space, policy = agent.action_space, agent.policy
    layer = layer or last_linear(policy, (spaces.flatdim(space),))
    log_std = getattr(policy, "log_std_parameter", None)
    return space_heads(layer, space, names, log_std=log_std if isinstance(space, spaces.Box) else None)


def watch_agent(
    agent: Agent,
    run: str,
    *,
    head_names: Sequence[str] | None = None,
    layer: nn.Linear | None = None,
    info: Mapping[str, str] | None = None,
    **options: Any,
) -> GradientMonitor:
    """Measure every update of `agent` and serve it, until the monitor is closed.

    Exports the losses of skrl's tracking data (with their scales), the learning rate, the mean return and length of
    the last episodes, durations and steps.

    Args:
        agent: a PPO, RPO or A2C agent, before its trainer's `train()`.
        run: name of the run.
        head_names, layer: as `names` and `layer` of `agent_heads`.
        info: labels of `ppo_run_info` besides algorithm, device and versions.
        options: as for `exporter.watch`: `port`, `targets_dir`, `thresholds`, ...

    Returns:
        The monitor; use it in a `with` block, or close it.

    Raises:
        OSError, TypeError, ValueError: as `agent_heads` and `exporter.watch`.
    """
    monitor = watch(
        agent.optimizer,
        agent_heads(agent, head_names, layer),
        run,
        window_steps=None,
        # With several processes skrl averages gradients itself: measure after that.
        before_clipping=not config.torch.is_distributed,
        grad_scaler=agent.scaler,
        info={
            "algorithm": type(agent).__name__,
            "device": str(agent.device),
            "torch_version": torch.__version__,
            "skrl_version": version("skrl"),
            "exporter_version": version("ppo-gradient-exporter"),
            **(info or {}),
        },
        **options,
    )
    if config.torch.is_distributed:
        measure_after_averaging(monitor, *{agent.policy, agent.value})
    update, resting_since = agent.update, time.perf_counter()

    def measured_update(**timing: int) -> None:
        nonlocal resting_since
        with monitor.update(rollout_duration_seconds=time.perf_counter() - resting_since):
            update(**timing)
            tracked = {key: values for key, values in agent.tracking_data.items() if values}
            values = {ours: tracked[key][-1] for key, ours in _SIGNALS.items() if key in tracked}
            if entropy := tracked.get("Loss / Entropy loss"):
                values["entropy"] = -entropy[-1] / agent.cfg.entropy_loss_scale
            monitor.record(
                **values,
                learning_rate=agent.optimizer.param_groups[0]["lr"],
                environment_steps=agent.cfg.rollouts * agent.memory.num_envs,
            )
        resting_since = time.perf_counter()

    agent.update = measured_update
    return monitor
