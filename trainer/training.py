"""A run: rollout, update, emit, until the end or a signal."""

import signal
import sys
import types
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from gymnasium.vector import AutoresetMode

from exporter.aggregator import RunAggregator
from exporter.child import WebConfigError
from exporter.gradient_cv import unreachable_critical_warning
from exporter.link import MetricsServer
from exporter.snapshot import RunSnapshot
from exporter.telemetry import PPOUpdateMetrics, emit_ppo_update
from trainer.agent import NonFiniteGradientError, PPOAgent, PPOHyperparameters
from trainer.checkpoint import Checkpoints
from trainer.checkpoint_files import CheckpointError, load, totals
from trainer.config import ConfigError, StartError, TelemetryConfig, TrainerConfig, settings_of_run
from trainer.display import open_display, say
from trainer.distributed import Ranks
from trainer.drill import Drill
from trainer.environments import TrainingEnvironment, UnsupportedEnvironment, make_environment
from trainer.policy import ActorCritic
from trainer.rollout import Rollout, RolloutCollector
from trainer.stop import StopRequest


class LostRankError(Exception):
    """Another rank of the run or torchrun has failed, so this rank cannot continue."""


class Training:
    """One run and its parts, built from the settings or from the checkpoint that they name.

    Args:
        config: the settings; `num_envs` counts the environments of all ranks.
        ranks: the processes that train the run together. Each builds a `Training` and calls the same methods.

    Attributes:
        updates: completed updates of the run; a resume continues from the checkpoint's number.
        notes: warnings about the environment and a resume.

    Raises:
        ConfigError: the environment, the device or the drill's head is not available, or the checkpoint does not fit.
    """

    def __init__(self, config: TrainerConfig, ranks: Ranks = Ranks()) -> None:
        self.config = config
        self.ranks = ranks
        self.updates = 0
        self._settings = settings_of_run(config)
        torch.set_num_threads(config.threads)
        initialization, sampling, shuffling = _seeds(config.seed, 3)
        device = ranks.device(config.device)
        _check_device(device, config.device)
        self.environment = _make_environment(config, ranks, device)
        self.notes = list(self.environment.notes)
        drill = _make_drill(config, self.environment)
        torch.manual_seed(initialization)
        policy = make_policy(config, self.environment, device)
        self._generators = {
            "collector": torch.Generator(device).manual_seed(sampling),
            "agent": torch.Generator(device if ranks.size == 1 else "cpu").manual_seed(shuffling),
        }
        hyperparameters = PPOHyperparameters(
            **{name: getattr(config, name) for name in PPOHyperparameters.__dataclass_fields__}
        )
        self.agent = PPOAgent(policy, hyperparameters, self._generators["agent"], drill, ranks)
        self.collector = RolloutCollector(
            self.environment,
            policy,
            steps=config.rollout_steps,
            gamma=config.gamma,
            gae_lambda=config.gae_lambda,
            seed=config.seed,
            generator=self._generators["collector"],
            ranks=ranks,
        )
        self.aggregator = _make_aggregator(config, self.environment)
        if config.resume is not None:
            self._resume(Path(config.resume))

    def state_dict(self) -> dict[str, Any]:
        """Everything that determines the rest of the run, between two updates; all ranks must call it.

        Tensors, plain values and the snapshot, in the form that `trainer.checkpoint_files.save` takes. Tensors are not
        copied.
        """
        return {
            "config": self._settings,
            "updates": self.updates,
            "agent": self.agent.state_dict(),
            "collector": self.collector.state_dict(),
            "torch_generator": torch.get_rng_state(),
            "run": self.run_snapshot,
        }

    @property
    def run_snapshot(self) -> RunSnapshot:
        return self.aggregator.snapshot.runs[self.config.run_name]

    def run(self, stop: StopRequest) -> Iterator[int]:
        """Train until the end, or until a signal reaches any rank. Yields the number of every completed update.

        Raises:
            NonFiniteGradientError: as `update`.
        """
        while self.updates < self.config.total_updates and not self.ranks.any(stop()):
            if self.update(stop):
                yield self.updates

    def update(self, stop: StopRequest) -> bool:
        """One rollout and one PPO update, emitted to the aggregator; False if a signal came before its end.

        An update that a signal interrupts is discarded: a resume repeats it.

        Raises:
            NonFiniteGradientError: as `PPOAgent.update`, after emitting the update.
        """
        # Ranks that stop at different points would wait for each other for ever.
        should_stop = stop if self.ranks.size == 1 else lambda: False
        rollout = self.collector.collect(should_stop)
        if rollout is None:
            return False
        done = self.updates / self.config.total_updates
        learning_rate = self.config.learning_rate * (1 - done if self.config.anneal_learning_rate else 1)
        try:
            metrics = self.agent.update(rollout, learning_rate=learning_rate, should_stop=should_stop)
        except NonFiniteGradientError as error:
            self._emit(error.metrics, rollout)
            raise
        if should_stop():
            return False
        self.updates += 1
        self._emit(metrics, rollout)
        return True

    def _emit(self, metrics: PPOUpdateMetrics, rollout: Rollout) -> None:
        returns, lengths = self.collector.recent_returns, self.collector.recent_lengths
        emit_ppo_update(
            metrics,
            run=self.config.run_name,
            handler=self.aggregator,
            environment_steps=rollout.environment_steps,
            episodes=rollout.episodes,
            episode_return_mean=fmean(returns) if returns else None,
            episode_length_mean=fmean(lengths) if lengths else None,
            # All ranks wait for the slowest.
            rollout_duration_seconds=max(rollout.seconds_of_ranks),
            rank_rollout_seconds=rollout.seconds_of_ranks,
        )

    def _resume(self, path: Path) -> None:
        try:
            state = load(path)
            self._load_state_dict(state)
            self.aggregator.resume_run(self.config.run_name, totals(path, state))
        except CheckpointError as error:
            raise ConfigError(str(error)) from error
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            reason = f"no {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
            raise ConfigError(f"{path}: it does not fit {self.config.env} in this version: {reason}") from error
        if not self.collector.environment_can_be_saved:
            self.notes.append(
                f"{self.config.env} cannot be saved: its episodes in progress are lost, new ones begin; "
                "weights, optimizer, schedule and counters continue"
            )
        now, before = self._settings, state["config"]
        changes = [f"{name} {value} -> {now[name]}" for name, value in before.items() if now[name] != value]
        if changes:
            self.notes.append(f"settings that differ from the checkpoint: {', '.join(changes)}")
        if self.updates >= self.config.total_updates:
            self.notes.append(
                f"the run has reached its end, update {self.updates}; set a larger --total-timesteps to continue"
            )

    def _load_state_dict(self, state: dict[str, Any]) -> None:
        # If the run cannot continue exactly, its random numbers must still be new ones.
        sampling, shuffling, episodes = _seeds((self.config.seed, state["updates"]), 3)
        for part, seed in (("collector", sampling), ("agent", shuffling)):
            generator = self._generators[part]
            # A GPU's generator cannot load the state of a CPU's.
            if state[part]["generator"].shape != generator.get_state().shape:
                self.notes.append(f"random numbers of the {part} start anew on {generator.device}")
                state[part]["generator"] = generator.manual_seed(seed).get_state()
        self.agent.load_state_dict(state["agent"])
        self.collector.load_state_dict(state["collector"], seed=episodes)
        torch.set_rng_state(state["torch_generator"])
        self.updates = state["updates"]


def make_policy(config: TrainerConfig, environment: TrainingEnvironment, device: str = "cpu") -> ActorCritic:
    """The network that `config` trains on this environment, with new weights."""
    return ActorCritic(
        environment.observation_size,
        environment.heads,
        config.hidden_size,
        separate_critic=config.separate_critic,
        device=device,
    )


def train(config: TrainerConfig, telemetry: TelemetryConfig, stop: StopRequest) -> int:
    """Train with these settings: serve /metrics, write target file and checkpoints, show the display.

    Removes the target file at the end and after a signal. Leaves it after an error, as after a crash, so that an alert
    fires. Always writes a checkpoint of the last completed update.

    Returns:
        Exit code: 0 at the end, 128 + signal number after SIGINT, SIGTERM or SIGHUP.

    Raises:
        ConfigError: the run cannot start as configured.
        StartError: the port is in use, or the target file or checkpoints cannot be written.
        NonFiniteGradientError: a gradient was not finite and `on_nonfinite` is `raise`.
        LostRankError: another rank or torchrun has failed.
        KeyboardInterrupt: a second signal came.
    """
    ranks = Ranks.of_torchrun(config.rank_timeout)
    try:
        training = Training(config, ranks)
        if ranks.is_first:
            return _lead(training, telemetry, stop)
        with Checkpoints(training) as checkpoints:
            for _ in training.run(stop):
                checkpoints.updated()
            checkpoints.finish()
        return stop.exit_code
    except RuntimeError as error:
        if not ranks.is_lost_rank(error):
            raise
        reason = str(error).strip().splitlines()[0]
        raise LostRankError(f"rank {ranks.rank} cannot continue without the others: {reason}") from error
    finally:
        ranks.close()


def _lead(training: Training, telemetry: TelemetryConfig, stop: StopRequest) -> int:
    """What only the first rank does: serve metrics, write checkpoints and show progress while training."""
    config = training.config

    def read_run() -> RunSnapshot:
        return training.run_snapshot

    for note in training.notes:
        say(f"warning: {note}", to_stderr=True)
    try:
        server = MetricsServer(
            training.aggregator,
            telemetry.metrics_address,
            telemetry.metrics_port,
            web_config_file=telemetry.web_config_file,
            max_requests=telemetry.web_max_requests,
        )
    except WebConfigError as error:
        raise ConfigError(str(error)) from error
    except OSError as error:
        raise StartError(f"{error}; --metrics-address and --metrics-port choose another one") from error
    with server, Checkpoints(training) as checkpoints:
        try:
            server.deliver(
                config.run_name,
                targets_dir=telemetry.targets_dir,
                target=telemetry.metrics_target,
                textfile_dir=telemetry.textfile_dir,
                textfile_interval=telemetry.textfile_interval,
            )
        except OSError as error:
            raise StartError(str(error)) from error
        where = f", from {config.resume} on" if config.resume else ""
        say(f"{config.run_name}: {config.total_updates} updates on {config.env}{where}, metrics at {server.url}")
        warning = unreachable_critical_warning(len(training.environment.heads), config.thresholds)
        if warning is not None:
            say(f"warning: {warning}", to_stderr=True)
        how = "failed"
        try:
            follow = Path(telemetry.follow) if telemetry.follow else None
            with open_display(read_run, training.updates, config.total_updates, config.log_interval, follow) as display:
                for update in training.run(stop):
                    checkpoints.updated()
                    display.updated(update)
            checkpoints.finish()
            if training.ranks.has_lost_launcher:
                raise LostRankError("torchrun has died, so its ranks stop")
            how = "finished" if training.updates >= config.total_updates else "stopped with another rank"
        finally:
            # A signal after an error is not a clean end: torchrun sends SIGTERM to all ranks when one fails.
            if stop() and isinstance(sys.exception(), (KeyboardInterrupt, types.NoneType)):
                how = f"stopped by {signal.Signals(stop.signum).name}"
            # The checkpoint first: it would be lost, and the target file's folder may be slow.
            with stop.deaf():
                checkpoints.close()
                server.end(config.run_name, crashed=how == "failed")
            say(_closing_line(training, how, checkpoints.last))
        if telemetry.pushgateway is not None:
            server.push(config.run_name, telemetry.pushgateway)
    return stop.exit_code


def _closing_line(training: Training, how: str, checkpoint: Path | None) -> str:
    config, run = training.config, training.run_snapshot
    episode_return = run.signals.get("episode_return_mean")
    return (
        f"{config.run_name}: {how} after update {training.updates} of {config.total_updates}, "
        f"{run.environment_steps} environment steps, {run.episodes} episodes"
        + (f", return {episode_return:.3f}" if episode_return is not None else "")
        + f", {run.gradient_quality.skipped_steps} gradient steps skipped"
        + (f"; checkpoint {checkpoint}" if checkpoint else "")
    )


def _check_device(device: str, name: str) -> None:
    """Check that `device` is usable and make it the current one; errors call it `name`."""
    try:
        torch.zeros(1, device=device)
        if torch.device(device).type == "cuda":
            torch.cuda.set_device(device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device {name!r}: {str(error).splitlines()[0]}") from error


def _make_environment(config: TrainerConfig, ranks: Ranks, device: str) -> TrainingEnvironment:
    """This rank's part of the environments."""
    if config.num_envs % ranks.size:
        raise ConfigError(f"num-envs must be a multiple of the {ranks.size} ranks, got {config.num_envs}")
    try:
        environment = make_environment(
            config.env, config.num_envs // ranks.size, config.vectorization, device, config.env_kwargs
        )
    except UnsupportedEnvironment as error:
        raise ConfigError(str(error)) from error
    if config.rollout_steps == 1 and environment.autoreset_mode is AutoresetMode.NEXT_STEP:
        raise ConfigError(
            f"rollout-steps must be at least 2: {config.env} uses a step for every reset, so a rollout of one step may "
            "hold nothing to learn from"
        )
    return environment


def _make_drill(config: TrainerConfig, environment: TrainingEnvironment) -> Drill | None:
    if config.drill is None:
        return None
    drill = Drill.parse(config.drill)
    if drill.head not in environment.heads:
        raise ConfigError(
            f"drill: {config.env} has no head {drill.head!r}; its heads are {', '.join(environment.heads)}"
        )
    return drill


def _make_aggregator(config: TrainerConfig, environment: TrainingEnvironment) -> RunAggregator:
    """An aggregator with the run registered."""
    aggregator = RunAggregator()
    info = {
        "environment": config.env,
        "seed": str(config.seed),
        "device": config.device,
        "torch_version": torch.__version__,
        "exporter_version": version("ppo-gradient-exporter"),
    }
    aggregator.register_run(config.run_name, environment.heads, info, config.thresholds)
    return aggregator


def _seeds(entropy: int | tuple[int, ...], count: int) -> list[int]:
    """`count` seeds for independent generators, 64 bits each."""
    children = np.random.SeedSequence(entropy).spawn(count)
    return [int(child.generate_state(1, np.uint64)[0]) for child in children]
