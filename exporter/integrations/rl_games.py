"""rl_games: an observer that measures one head per joint, or per part of a discrete action. A window is one epoch."""

import inspect
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import torch
from rl_games.common.a2c_common import A2CBase
from rl_games.common.algo_observer import AlgoObserver, DefaultAlgoObserver
from torch import nn

from exporter.heads import Head, row_heads
from exporter.integrations.joints import joint_heads
from exporter.monitor import GradientMonitor
from exporter.one_call import watch


def network_heads(network: nn.Module, names: Sequence[str] | None = None) -> dict[str, Head]:
    """Action heads of one of rl_games' actor-critic networks.

    A continuous action has one head per dimension: its rows of `mu` and its part of `sigma`. A discrete action is one
    head. A multi-discrete action has a head for each layer of `logits` with more than one choice.

    Args:
        network: `algo.model.a2c_network`.
        names: names of the heads; by default `joint_0`, ... or `action_0`, ...

    Raises:
        ValueError: the network has neither `mu` nor `logits`, or `names` has the wrong length or a duplicate.
    """
    if isinstance(mean := getattr(network, "mu", None), nn.Linear):
        return dict(joint_heads(mean.out_features, mean, getattr(network, "sigma", None), names))
    logits = getattr(network, "logits", None)
    choices = list(logits) if isinstance(logits, nn.ModuleList) else [logits]
    layers = [layer for layer in choices if isinstance(layer, nn.Linear)]
    if not layers or len(layers) < len(choices):
        raise ValueError(f"{type(network).__name__} has neither `mu` nor `logits`; give PrometheusObserver(heads=...)")
    names = [f"action_{i}" for i in range(len(layers))] if names is None else list(names)
    if len(names) != len(layers) or len(set(names)) < len(names):
        raise ValueError(f"the action has {len(layers)} parts, so give {len(layers)} different names; got {names!r}")
    return {
        name: row_heads(layer, {name: layer.out_features})[name]
        for name, layer in zip(names, layers)
        if layer.out_features > 1
    }


class PrometheusObserver(AlgoObserver):
    """Serves `/metrics` while `Runner(PrometheusObserver(run=...))` trains, until `close()` or the end of the script.

    A window is one epoch. Exports rl_games' mean losses, entropy, KL and learning rate, durations, frames, and the
    mean return and length of the games that it tracks. In a multi-GPU run the first process measures and serves.

    Args:
        observer: another observer, such as Isaac Lab's, that gets all calls too; by default rl_games' own.
        run: name of the run; by default that of the experiment.
        heads: as for `GradientMonitor`; needed if the network is not one of rl_games'.
        head_names: as `names` of `network_heads`.
        info: labels of `ppo_run_info` besides environment, algorithm, device and versions.
        options: as for `exporter.watch`: `port`, `targets_dir`, `thresholds`, ...

    Attributes:
        monitor: the `GradientMonitor` in use, or None.
    """

    def __init__(
        self,
        observer: AlgoObserver | None = None,
        run: str | None = None,
        *,
        heads: Mapping[str, Head] | None = None,
        head_names: Sequence[str] | None = None,
        info: Mapping[str, str] | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self.monitor: GradientMonitor | None = None
        self._observer = observer or DefaultAlgoObserver()
        self._run = run
        self._heads = heads
        self._head_names = head_names
        self._info = dict(info or {})
        self._options = options

    def close(self) -> None:
        """Stop measuring and serving; a second call does nothing."""
        if self.monitor is not None:
            self.monitor.close()
            self.monitor = None

    def before_init(self, base_name: str, config: dict[str, Any], experiment_name: str) -> None:
        self._observer.before_init(base_name, config, experiment_name)

    def after_init(self, algo: A2CBase) -> None:
        self._observer.after_init(algo)
        if algo.multi_gpu and torch.distributed.get_rank() != 0:
            return
        self.close()
        self.monitor = watch(
            algo.optimizer,
            self._heads or network_heads(algo.model.a2c_network, self._head_names),
            self._run or algo.experiment_name,
            window_steps=None,
            # With several processes rl_games averages gradients itself, between backward and clipping.
            before_clipping=not algo.multi_gpu,
            grad_scaler=algo.scaler,
            info={
                "environment": str(algo.config.get("env_name", "")),
                "algorithm": type(algo).__name__,
                "device": str(algo.ppo_device),
                "torch_version": torch.__version__,
                "rl_games_version": version("rl-games"),
                "exporter_version": version("ppo-gradient-exporter"),
                **self._info,
            },
            **self._options,
        )
        self._watch_statistics(algo)

    def _watch_statistics(self, algo: A2CBase) -> None:
        """Take the losses of an epoch from `write_stats`, because rl_games does not pass them to observers."""
        write_stats = algo.write_stats
        parameters = inspect.signature(write_stats)

        def measured(*args: Any, **kwargs: Any) -> None:
            write_stats(*args, **kwargs)
            if self.monitor is None:
                return
            epoch = parameters.bind(*args, **kwargs).arguments
            games = {}
            if algo.game_rewards.current_size > 0:
                games["episode_return_mean"] = float(algo.game_rewards.get_mean()[0])
                games["episode_length_mean"] = float(algo.game_lengths.get_mean())
            self.monitor.update_completed(
                policy_loss=_mean(epoch["a_losses"]),
                value_loss=_mean(epoch["c_losses"]),
                entropy=_mean(epoch["entropies"]),
                approx_kl=_mean(epoch["kls"]),
                learning_rate=epoch["last_lr"] * epoch["lr_mul"],
                environment_steps=int(epoch["curr_frames"]),
                update_duration_seconds=epoch["update_time"],
                rollout_duration_seconds=epoch["play_time"],
                **games,
            )

        algo.write_stats = measured

    def process_infos(self, infos: Any, done_indices: torch.Tensor) -> None:
        self._observer.process_infos(infos, done_indices)

    def after_steps(self) -> None:
        self._observer.after_steps()

    def after_clear_stats(self) -> None:
        if hasattr(self._observer, "after_clear_stats"):  # rl_games' base class has none
            self._observer.after_clear_stats()

    def after_print_stats(self, frame: int, epoch_num: int, total_time: float) -> None:
        self._observer.after_print_stats(frame, epoch_num, total_time)


def _mean(values: Sequence[torch.Tensor]) -> float:
    return float(torch.stack([torch.as_tensor(value).detach().float().mean() for value in values]).mean())
