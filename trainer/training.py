"""The run: rollout, update, emit, until the end or a signal."""

import signal
import sys
import time
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from statistics import fmean

import torch

from exporter.aggregator import RunAggregator
from exporter.discovery import TargetFile
from exporter.gradient_cv import unreachable_critical_warning
from exporter.server import MetricsServer, host_and_port
from exporter.snapshot import RunSnapshot
from exporter.telemetry import PPOUpdateMetrics, emit_ppo_update
from trainer.agent import NonFiniteGradientError, PPOAgent, PPOHyperparameters
from trainer.config import ConfigError, TrainerConfig
from trainer.display import open_display
from trainer.drill import Drill
from trainer.environments import TrainingEnvironment, UnsupportedEnvironment, make_environment
from trainer.policy import ActorCritic
from trainer.rollout import Rollout, RolloutCollector
from trainer.stop import StopRequest


class StartError(Exception):
    """The run cannot start here and now: an address or a folder is not to be had."""


@dataclass
class Training:
    """One run: everything it is made of, built from its settings.

    Raises:
        ConfigError: the environment, the device or the drill's head is not available.
    """

    config: TrainerConfig
    environment: TrainingEnvironment = field(init=False)
    agent: PPOAgent = field(init=False)
    collector: RolloutCollector = field(init=False)
    aggregator: RunAggregator = field(init=False, default_factory=RunAggregator)

    def __post_init__(self) -> None:
        config = self.config
        try:
            self.environment = make_environment(config.env, config.num_envs)
        except UnsupportedEnvironment as error:
            raise ConfigError(str(error)) from error
        heads = self.environment.heads
        drill = Drill.parse(config.drill) if config.drill else None
        if drill is not None and drill.head not in heads:
            raise ConfigError(f"drill: {config.env} has no head {drill.head!r}; its heads are {', '.join(heads)}")
        torch.set_num_threads(config.threads)
        torch.manual_seed(config.seed)
        try:
            policy = ActorCritic(self.environment.observation_size, heads, config.hidden_size).to(config.device)
            sampling = torch.Generator(config.device).manual_seed(config.seed)
        except (RuntimeError, AssertionError) as error:
            raise ConfigError(f"device {config.device!r}: {str(error).splitlines()[0]}") from error
        hyperparameters = PPOHyperparameters(
            **{name: getattr(config, name) for name in PPOHyperparameters.__dataclass_fields__}
        )
        self.agent = PPOAgent(policy, hyperparameters, torch.Generator().manual_seed(config.seed), drill)
        self.collector = RolloutCollector(
            self.environment,
            policy,
            steps=config.rollout_steps,
            gamma=config.gamma,
            gae_lambda=config.gae_lambda,
            seed=config.seed,
            generator=sampling,
        )
        self.aggregator.register_run(
            config.run_name,
            heads,
            {
                "environment": config.env,
                "seed": str(config.seed),
                "device": config.device,
                "torch_version": torch.__version__,
                "exporter_version": version("ppo-gradient-exporter"),
            },
        )

    def update(self, stop: StopRequest) -> bool:
        """One rollout and one PPO update, emitted to the aggregator; False if a signal came before the update.

        Raises:
            NonFiniteGradientError: as `PPOAgent.update`; the update was emitted before.
        """
        started = time.perf_counter()
        rollout = self.collector.collect(stop)
        if rollout is None:
            return False
        rollout_duration = time.perf_counter() - started
        done = self.agent.updates / self.config.updates
        learning_rate = self.config.learning_rate * (1 - done if self.config.anneal_learning_rate else 1)
        try:
            metrics = self.agent.update(rollout, learning_rate=learning_rate, should_stop=stop)
        except NonFiniteGradientError as error:
            self._emit(error.metrics, rollout, rollout_duration)
            raise
        self._emit(metrics, rollout, rollout_duration)
        return True

    def _emit(self, metrics: PPOUpdateMetrics, rollout: Rollout, rollout_duration: float) -> None:
        returns, lengths = self.collector.recent_returns, self.collector.recent_lengths
        emit_ppo_update(
            metrics,
            run=self.config.run_name,
            handler=self.aggregator,
            environment_steps=rollout.environment_steps,
            episodes=rollout.episodes,
            episode_return_mean=fmean(returns) if returns else None,
            episode_length_mean=fmean(lengths) if lengths else None,
            rollout_duration_seconds=rollout_duration,
        )


def train(config: TrainerConfig, stop: StopRequest) -> int:
    """Train as `config` says, with /metrics, target file and display.

    The target file is removed at the end and after a signal. It stays when an
    error ends the run, as after a crash: somebody should be told.

    Returns:
        Exit code: 0 at the end, 128 + signal number after SIGINT or SIGTERM.

    Raises:
        ConfigError: the run cannot start as configured.
        StartError: the port is taken, or the target file cannot be written.
        NonFiniteGradientError: a gradient was not finite and `on_nonfinite` is `raise`.
        KeyboardInterrupt: a second signal came.
    """
    training = Training(config)

    def read_run() -> RunSnapshot:
        return training.aggregator.snapshot.runs[config.run_name]

    try:
        server = MetricsServer(training.aggregator, config.metrics_address, config.metrics_port)
    except OSError as error:
        raise StartError(f"{error}; --metrics-address and --metrics-port choose another one") from error
    with server:
        target = config.metrics_target or host_and_port(TargetFile.reachable(server.address), server.port)
        try:
            target_file = TargetFile(Path(config.targets_dir), target, config.run_name)
        except OSError as error:
            raise StartError(f"cannot write a target file to {config.targets_dir}: {error.strerror}") from error
        print(f"{config.run_name}: {config.updates} updates on {config.env}, metrics at {server.url}", flush=True)
        warning = unreachable_critical_warning(len(training.environment.heads))
        if warning is not None:
            print(f"warning: {warning}", file=sys.stderr, flush=True)
        follow = Path(config.follow) if config.follow else None
        how = "failed"
        try:
            with open_display(read_run, config.updates, config.log_interval, follow) as display:
                while training.agent.updates < config.updates and not stop():
                    if training.update(stop):
                        display.updated()
            how = "finished"
        finally:
            if stop():
                how = f"stopped by {signal.Signals(stop.signum).name}"
            if how != "failed":
                target_file.discard(config.run_name)
            print(_closing_line(config, how, read_run()), flush=True)
    return stop.exit_code


def _closing_line(config: TrainerConfig, how: str, run: RunSnapshot) -> str:
    episode_return = run.signals.get("episode_return_mean")
    return (
        f"{config.run_name}: {how} after update {run.updates} of {config.updates}, "
        f"{run.environment_steps} environment steps, {run.episodes} episodes"
        + (f", return {episode_return:.3f}" if episode_return is not None else "")
        + f", {run.gradient_quality.skipped_steps} gradient steps skipped"
    )
