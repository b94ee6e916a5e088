"""RLlib's new API stack: learners measure their modules and serve them with RLlib's own results.

Measurement and endpoint are in the process of the first learner, where the gradients are.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from typing import Any

import ray
import torch
from gymnasium import spaces
from ray.rllib.algorithms.algorithm import Algorithm
from ray.rllib.algorithms.algorithm_config import AlgorithmConfig
from ray.rllib.core.learner.torch.torch_learner import TorchLearner
from ray.rllib.core.rl_module.rl_module import RLModule

from exporter.action_spaces import space_heads
from exporter.heads import Head, Rows, head_parts
from exporter.health import Thresholds
from exporter.monitor import GradientMonitor
from exporter.one_call import watch

_Callback = Callable[..., None]
# RLlib's results of a module and of the env runners -> our signals.
_MODULE_RESULTS = {
    "policy_loss": "policy_loss",
    "vf_loss": "value_loss",
    "entropy": "entropy",
    "mean_kl_loss": "approx_kl",
    "vf_explained_var": "explained_variance",
    "default_optimizer_learning_rate": "learning_rate",
}
_COEFFICIENTS = {"curr_kl_coeff": "kl_coef", "curr_entropy_coeff": "entropy_coef"}
_OPTIONS = "gradient_monitor"  # key of `learner_config_dict`
_ALL_MODULES = "__all_modules__"
_GOODBYE_SECONDS = 20.0  # a push may need most of it


def module_heads(module: RLModule) -> dict[str, list[Rows]]:
    """Action heads of a module with RLlib's default policy head: rows of the last layer of `module.pi`.

    `Discrete` is one head, `MultiDiscrete` one per entry, `Box` one per dimension (its mean and its log standard
    deviation). Parts of a `Dict` or `Tuple` have their key or index in the name. A part with a single choice is left
    out.

    Args:
        module: an `RLModule` of torch, also one that is wrapped for several learners.

    Raises:
        TypeError: another kind of action space.
        ValueError: there is no such layer, its rows do not fit the action space, or no part has two choices.
    """
    module = module.unwrapped()
    layers = [
        layer for layer in getattr(module, "pi", torch.nn.Module()).modules() if isinstance(layer, torch.nn.Linear)
    ]
    if not layers:
        raise ValueError(
            f"{type(module).__name__} has no `pi` that ends in a linear layer; "
            "pass monitored(heads=...), a function from module to heads"
        )
    log_std = getattr(module.pi, "log_std", None)
    try:
        return space_heads(layers[-1], _in_order(module.action_space), log_std=log_std, std_rows=log_std is None)
    except ValueError as error:
        raise ValueError(f"{error}; pass monitored(heads=...), a function from module to heads") from error


def _in_order(space: spaces.Space[Any]) -> spaces.Space[Any]:
    """The space with its parts in RLlib's order: sorted by key."""
    if isinstance(space, spaces.Dict):
        return spaces.Dict({key: _in_order(part) for key, part in space.items()})
    return spaces.Tuple([_in_order(part) for part in space]) if isinstance(space, spaces.Tuple) else space


class GradientMonitoring(TorchLearner):
    """A mixin before a torch learner, `class Mine(GradientMonitoring, PPOTorchLearner)`; `monitored` adds it.

    Measures every trained module, only on the first learner, because all learners have the same gradients. Measures
    after the gradients are averaged over the learners, and before RLlib clips them and sets NaN to zero.
    """

    _monitors: dict[str, GradientMonitor] = {}  # until `build()`

    @property
    def metrics_url(self) -> str | None:
        """URL of `/metrics`; None if nothing is served."""
        return next((monitor.url for monitor in self._monitors.values()), None)

    def build(self) -> None:
        super().build()
        self._monitors = {}
        self._unpublished: dict[str, float] = {}  # durations of an update whose results have not come
        self._resting_since = time.perf_counter()
        for module_id in self.module.keys():
            self._measure(module_id)

    def _measure(self, module_id: str) -> None:
        options = dict(self.config.learner_config_dict.get(_OPTIONS, {}))
        is_first = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
        if not is_first or not self.should_module_be_updated(module_id):
            return
        module = self.module[module_id]
        heads = (options.pop("heads", None) or module_heads)(module)
        if heads is None or module_id in self._monitors:
            return
        names = options.pop("head_names", None)
        if names is not None:
            if len(names) != len(heads):
                raise ValueError(f"module {module_id} has the heads {', '.join(heads)}, but the names are {names!r}")
            heads = dict(zip(names, heads.values(), strict=True))
        environment = _name(self.config.env)
        seed = self.config.seed
        suffix = time.strftime("%Y%m%d-%H%M%S") if seed is None else f"seed{seed}"
        run = options.pop("run", None) or f"{environment}-{suffix}"
        self._monitors[module_id] = monitor = watch(
            self._optimizer_of(module_id, heads),
            heads,
            run if len(self.module.keys()) == 1 else f"{run}-{module_id}",
            window_steps=None,
            before_clipping=True,  # after averaging, which DistributedDataParallel does
            info={
                "environment": environment,
                "algorithm": self.config.algo_class.__name__,
                **({} if seed is None else {"seed": str(seed)}),
                "module": module_id,
                "learners": str(self.config.num_learners),
                "device": str(self.device),
                "torch_version": torch.__version__,
                "ray_version": ray.__version__,
                "exporter_version": version("ppo-gradient-exporter"),
                **options.pop("info"),
            },
            **options,
        )
        print(f"{monitor.run}: metrics at {monitor.url}", flush=True)

    def _optimizer_of(self, module_id: str, heads: Mapping[str, Head]) -> torch.optim.Optimizer:
        """The optimizer that owns the first head's first parameter."""
        first = head_parts(*next(iter(heads.items())))[0]
        first = first.parameter if isinstance(first, Rows) else first
        for optimizer, parameters in self._optimizer_parameters.items():
            if any(parameter is first for parameter in parameters):
                return optimizer
        raise ValueError(f"no optimizer of this learner steps the heads of module {module_id}")

    def before_gradient_based_update(self, *, timesteps: dict[str, Any]) -> None:
        self._publish()  # an update without results: a train() may make several
        self._update_began_at = time.perf_counter()
        super().before_gradient_based_update(timesteps=timesteps)

    def after_gradient_based_update(self, *, timesteps: dict[str, Any]) -> None:
        super().after_gradient_based_update(timesteps=timesteps)
        now = time.perf_counter()
        self._unpublished = {
            "update_duration_seconds": now - self._update_began_at,
            "rollout_duration_seconds": self._update_began_at - self._resting_since,
        }
        self._resting_since = now

    def record_results(self, results: Mapping[str, Mapping[str, Any]]) -> None:
        """Publish the last update with RLlib's results.

        Args:
            results: module -> signals; `__all_modules__` for all modules.
        """
        self._publish(results)

    def _publish(self, results: Mapping[str, Mapping[str, Any]] = {}) -> None:
        durations, self._unpublished = self._unpublished, {}
        for module_id, monitor in self._monitors.items():
            values = {**results.get(_ALL_MODULES, {}), **results.get(module_id, {})}
            if durations:
                monitor.update_completed(**durations, **values)
            else:
                monitor.record(**values)

    def add_module(self, *, module_id: str, **kwargs: Any) -> Any:
        specification = super().add_module(module_id=module_id, **kwargs)
        self._measure(module_id)
        return specification

    def remove_module(self, module_id: str, **kwargs: Any) -> Any:
        if monitor := self._monitors.pop(module_id, None):
            monitor.close()
        return super().remove_module(module_id, **kwargs)

    def shutdown(self) -> None:
        super().shutdown()
        self.say_goodbye()

    def say_goodbye(self) -> None:
        """Publish the last update and close the monitors; a second call does nothing."""
        self._publish()
        while self._monitors:
            self._monitors.popitem()[1].close()


def monitored(
    config: AlgorithmConfig,
    run: str | None = None,
    *,
    heads: Callable[[RLModule], Mapping[str, Head] | None] | None = None,
    head_names: Sequence[str] | None = None,
    thresholds: Thresholds | Sequence[float] = Thresholds(),
    info: Mapping[str, str] | None = None,
    **others: Any,
) -> AlgorithmConfig:
    """Make the learners of `config` measure and serve their gradients; call it last.

    Args:
        config: for PPO, APPO or another algorithm with torch learners; changed in place.
        run: name of the run; with several modules, each run's name ends with the module's id. By default the
            environment and the seed, or the time without a seed.
        heads: function from module to action heads, or to None for a module that is not measured; by default
            `module_heads`.
        head_names: other names for the heads, in their order.
        thresholds: as for `GradientMonitor`.
        info: labels of `ppo_run_info` besides environment, algorithm, seed, device and versions.
        others: as for `exporter.watch`: `port`, `targets_dir`, `on_update`, ... The first learner's process calls the
            callbacks.

    Returns:
        `config`.

    Raises:
        TypeError: it uses the old API stack, or its learner does not use torch.
        ValueError: `thresholds` are not 0 < warning < critical.
    """
    learner_class = config.learner_class if config.enable_rl_module_and_learner else None
    if learner_class is None or not issubclass(learner_class, TorchLearner):
        raise TypeError(
            f"{type(config).__name__} has no torch learner to measure; use the new API stack with framework='torch'"
        )
    if not issubclass(learner_class, GradientMonitoring):
        learner_class = type(f"Monitored{learner_class.__name__}", (GradientMonitoring, learner_class), {})
    options = {
        "run": run,
        "heads": heads,
        "head_names": head_names,
        "thresholds": Thresholds.of(thresholds),
        "info": dict(info or {}),
        **others,
    }
    config.learners(learner_class=learner_class, learner_config_dict={_OPTIONS: options})
    return config.callbacks(
        on_algorithm_init=_with(_before_shutdown, config.callbacks_on_algorithm_init),
        on_train_result=_with(_send_results, config.callbacks_on_train_result),
    )


def _with(callback: _Callback, others: _Callback | list[_Callback] | None) -> list[_Callback]:
    others = others if isinstance(others, list) else [] if others is None else [others]
    return [*(other for other in others if other is not callback), callback]


def _before_shutdown(*, algorithm: Algorithm, **_: Any) -> None:
    """Callback `on_algorithm_init`: close the learners' monitors before `algorithm.stop()` ends their processes.

    RLlib has no callback for that, and Ray first kills the children of its actors, including the exporter.
    """
    group = algorithm.learner_group
    shutdown = group.shutdown

    def goodbye_and_shutdown() -> None:
        group.shutdown = shutdown  # a second call must not reach ended learners
        group.foreach_learner(_say_goodbye, timeout_seconds=_GOODBYE_SECONDS)
        shutdown()

    group.shutdown = goodbye_and_shutdown


def _send_results(*, algorithm: Algorithm, result: Mapping[str, Any], **_: Any) -> None:
    """Callback `on_train_result`: send the learners RLlib's results, which they do not know."""
    sampled = result.get("env_runners", {})
    results: dict[str, dict[str, Any]] = {
        _ALL_MODULES: {
            signal: float(sampled[key])
            for key, signal in (
                ("episode_return_mean", "episode_return_mean"),
                ("episode_len_mean", "episode_length_mean"),
            )
            if key in sampled and sampled[key] == sampled[key]  # NaN: no episode has ended
        }
        | {
            signal: int(sampled[key])
            for key, signal in (("num_env_steps_sampled", "environment_steps"), ("num_episodes", "episodes"))
            if key in sampled
        }
    }
    for module_id, values in result.get("learners", {}).items():
        if module_id != _ALL_MODULES:
            results[module_id] = {ours: float(values[key]) for key, ours in _MODULE_RESULTS.items() if key in values}
            results[module_id]["signals"] = {
                ours: float(values[key]) for key, ours in _COEFFICIENTS.items() if key in values
            }
    for module_id, value in sampled.get("module_episode_returns_mean", {}).items():
        if value == value:
            results.setdefault(module_id, {})["episode_return_mean"] = float(value)
    # Do not wait: a learner executes calls in order.
    algorithm.learner_group.foreach_learner(_record, timeout_seconds=0.0, results=results)


def _say_goodbye(learner: TorchLearner) -> None:
    if isinstance(learner, GradientMonitoring):
        learner.say_goodbye()


def _record(learner: TorchLearner, results: Mapping[str, Mapping[str, Any]]) -> None:
    if isinstance(learner, GradientMonitoring):
        learner.record_results(results)


def _name(environment: object) -> str:
    return environment if isinstance(environment, str) else getattr(environment, "__name__", "rllib")
