"""The run: rollout, update, emit, until the end or a signal."""

import contextlib
import signal
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from gymnasium.vector import AutoresetMode

from exporter.aggregator import RunAggregator
from exporter.gradient_cv import unreachable_critical_warning
from exporter.link import MetricsServer, WebConfigError
from exporter.snapshot import RunSnapshot
from exporter.telemetry import PPOUpdateMetrics, emit_ppo_update
from trainer.agent import NonFiniteGradientError, PPOAgent, PPOHyperparameters
from trainer.checkpoint import CheckpointError, RunFolder, copied, load, totals
from trainer.config import ConfigError, TrainerConfig, settings_of_run
from trainer.display import open_display, say
from trainer.distributed import Ranks
from trainer.drill import Drill
from trainer.environments import TrainingEnvironment, UnsupportedEnvironment, make_environment
from trainer.policy import ActorCritic
from trainer.rollout import Rollout, RolloutCollector
from trainer.stop import StopRequest


class LostRankError(Exception):
    """Another rank of the run has failed, and this one cannot go on without it."""


class StartError(Exception):
    """The run cannot start here and now: an address or a folder is not to be had."""


def make_policy(config: TrainerConfig, environment: TrainingEnvironment, device: str = "cpu") -> ActorCritic:
    """The network that `config` trains on this environment, with new weights."""
    return ActorCritic(
        environment.observation_size,
        environment.heads,
        config.hidden_size,
        separate_critic=config.separate_critic,
        device=device,
    )


@dataclass
class Training:
    """One run: everything it is made of, built from its settings, or from the checkpoint that they name.

    Attributes:
        config: its settings; `num_envs` counts the environments of all ranks.
        ranks: the processes that train it together; each builds a `Training` and calls its methods alike.
        updates: completed since the run began; a resume goes back to those of the checkpoint.
        notes: what a person should know of a resume.

    Raises:
        ConfigError: the environment, the device or the drill's head is not available, or the checkpoint does not fit.
    """

    config: TrainerConfig
    ranks: Ranks = field(default_factory=Ranks)
    environment: TrainingEnvironment = field(init=False)
    agent: PPOAgent = field(init=False)
    collector: RolloutCollector = field(init=False)
    aggregator: RunAggregator = field(init=False, default_factory=RunAggregator)
    updates: int = field(init=False, default=0)
    notes: list[str] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        config, ranks = self.config, self.ranks
        if config.num_envs % ranks.size:
            raise ConfigError(f"num-envs must be a multiple of the {ranks.size} ranks, got {config.num_envs}")
        device = ranks.device(config.device)
        try:
            self.environment = make_environment(config.env, config.num_envs // ranks.size, config.vectorization, device)
        except UnsupportedEnvironment as error:
            raise ConfigError(str(error)) from error
        if config.rollout_steps == 1 and self.environment.autoreset_mode is AutoresetMode.NEXT_STEP:
            raise ConfigError(
                f"rollout-steps must be at least 2: {config.env} spends a step on every reset, and a rollout of one "
                "may hold nothing to learn from"
            )
        heads = self.environment.heads
        drill = Drill.parse(config.drill) if config.drill else None
        if drill is not None and drill.head not in heads:
            raise ConfigError(f"drill: {config.env} has no head {drill.head!r}; its heads are {', '.join(heads)}")
        torch.set_num_threads(config.threads)
        torch.manual_seed(config.seed)
        try:
            policy = make_policy(config, self.environment, device)
            sampling = torch.Generator(device).manual_seed(config.seed)
        except (RuntimeError, AssertionError) as error:
            raise ConfigError(f"device {config.device!r}: {str(error).splitlines()[0]}") from error
        hyperparameters = PPOHyperparameters(
            **{name: getattr(config, name) for name in PPOHyperparameters.__dataclass_fields__}
        )
        self.agent = PPOAgent(policy, hyperparameters, torch.Generator().manual_seed(config.seed), drill, ranks)
        self.collector = RolloutCollector(
            self.environment,
            policy,
            steps=config.rollout_steps,
            gamma=config.gamma,
            gae_lambda=config.gae_lambda,
            seed=config.seed,
            generator=sampling,
            ranks=ranks,
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
            config.thresholds,
        )
        if config.resume is not None:
            self._resume(Path(config.resume))

    def state_dict(self) -> dict[str, Any]:
        """All that the run's future depends on, between two updates; all ranks have to call it. Tensors are not copied.

        Tensors and plain values, as `trainer.checkpoint.save` wants them.
        """
        return {
            "config": settings_of_run(self.config),
            "updates": self.updates,
            "agent": self.agent.state_dict(),
            "collector": self.collector.state_dict(),
            "torch_generator": torch.get_rng_state(),
            "run": self.run_snapshot.plain(),
        }

    @property
    def run_snapshot(self) -> RunSnapshot:
        return self.aggregator.snapshot.runs[self.config.run_name]

    def _resume(self, path: Path) -> None:
        try:
            state = load(path)
            # Experience that nobody has seen yet, where the environment cannot go on from where it was.
            fresh_seed = int(np.random.SeedSequence((self.config.seed, state["updates"])).generate_state(1)[0])
            saved_device = state["config"]["device"]
            if torch.device(saved_device).type != torch.device(self.config.device).type:
                self.notes.append(f"actions are drawn anew, for {self.config.device} cannot continue {saved_device}")
                generator = torch.Generator(self.config.device).manual_seed(fresh_seed)
                state["collector"]["generator"] = generator.get_state()
            self.agent.load_state_dict(state["agent"])
            self.collector.load_state_dict(state["collector"], seed=fresh_seed)
            torch.set_rng_state(state["torch_generator"])
            self.aggregator.resume_run(self.config.run_name, totals(path, state))
        except CheckpointError as error:
            raise ConfigError(str(error)) from error
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            reason = f"no {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
            raise ConfigError(
                f"{path}: it does not fit {self.config.env} as this version trains it: {reason}"
            ) from error
        self.updates = state["updates"]
        if not self.collector.environment_can_be_saved:
            self.notes.append(
                f"{self.config.env} cannot be saved: its episodes in progress are lost, new ones begin; "
                "weights, optimizer, schedule and counters go on"
            )
        now = settings_of_run(self.config)
        changes = [f"{name} {value} -> {now[name]}" for name, value in state["config"].items() if now[name] != value]
        if changes:
            self.notes.append(f"other settings than in the checkpoint: {', '.join(changes)}")
        if self.updates >= self.config.updates:
            self.notes.append(
                f"the run has reached its end, update {self.updates}; a larger --total-timesteps takes it further"
            )

    def run(self, stop: StopRequest) -> Iterator[int]:
        """Train until the end, or until a signal reaches any rank; the number of every completed update.

        Raises:
            NonFiniteGradientError: as `update`.
        """
        while self.updates < self.config.updates and not self.ranks.any(stop()):
            if self.update(stop):
                yield self.updates

    def update(self, stop: StopRequest) -> bool:
        """One rollout and one PPO update, emitted to the aggregator; False if a signal came before its end.

        An update that a signal cuts short is given up: the run goes on from before it, from a checkpoint.

        Raises:
            NonFiniteGradientError: as `PPOAgent.update`; the update was emitted before.
        """
        # Ranks that stopped at different places would wait for each other for ever.
        should_stop = stop if self.ranks.size == 1 else lambda: False
        rollout = self.collector.collect(should_stop)
        if rollout is None:
            return False
        done = self.updates / self.config.updates
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
            # The others wait for the slowest.
            rollout_duration_seconds=max(rollout.seconds_of_ranks),
            rank_rollout_seconds=rollout.seconds_of_ranks,
        )


class Checkpoints:
    """Keeps what a run needs to go on from the last completed update, and writes it every so often and at the end.

    Everything is inert where the settings want no checkpoints. A checkpoint that cannot be written is a warning:
    training goes on. Of several ranks the first one writes; all have to call `updated` and `finish`.

    Raises:
        StartError: the folder cannot be had.
    """

    def __init__(self, training: Training) -> None:
        self._training = training
        self._every = training.config.checkpoint_every
        self._boundary: dict[str, Any] | None = None
        self.last: Path | None = Path(training.config.resume) if training.config.resume else None
        self._folder: RunFolder | None = None
        if not self._every or not training.ranks.is_first:
            return
        config = training.config
        try:
            if self.last is not None:
                self._folder = RunFolder.of_resumed_run(self.last, config.run_name, config.keep_checkpoints)
            else:
                directory = Path(config.checkpoint_dir)
                self._folder = RunFolder.of_new_run(directory, config.run_name, config.keep_checkpoints)
        except BlockingIOError as error:
            raise StartError(f"another process is writing the checkpoints in {self.last.parent}") from error
        except OSError as error:
            where = self.last.parent if self.last else config.checkpoint_dir
            raise StartError(
                f"cannot write checkpoints to {where}: {error.strerror}; --checkpoint-dir chooses another folder, "
                "--checkpoint-every 0 writes none"
            ) from error

    def updated(self) -> None:
        """An update is complete."""
        if not self._every:
            return
        is_due = self._training.updates % self._every == 0
        # A copy, because a signal or an error may come in the middle of the next update. Of several ranks none
        # ends there, and gathering their states takes time.
        if is_due or self._training.ranks.size == 1:
            self._boundary = copied(self._training.state_dict())
        if self._folder is not None:
            self._note_totals(self._training.run_snapshot.plain())
            if is_due:
                self._write()

    def finish(self) -> None:
        """The run has ended after a completed update, on every rank."""
        if self._every and self._training.ranks.size > 1 and self._training.updates % self._every:
            self._boundary = self._training.state_dict()

    def close(self) -> None:
        """Write the last completed update, and let go of the folder; nothing the second time."""
        if self._folder is None:
            return
        try:
            if self._training.run_snapshot.updates:
                self._note_totals(self._training.run_snapshot.plain())
            if self._boundary is not None:
                self._write()
        finally:
            self._folder.close()
            self._folder = None

    def _note_totals(self, run: dict[str, Any]) -> None:
        # What fails here fails for the checkpoint too, which says so.
        with contextlib.suppress(OSError):
            self._folder.note_totals(run)

    def _write(self) -> None:
        try:
            self.last = self._folder.write(self._boundary)
            self._boundary = None
        except OSError as error:
            say(
                f"warning: no checkpoint of update {self._training.updates} in {self._folder.path}: "
                f"{error.strerror or error}; training goes on",
                to_stderr=True,
            )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def train(config: TrainerConfig, stop: StopRequest) -> int:
    """Train as `config` says, with /metrics, target file, checkpoints and display.

    The target file is removed at the end and after a signal. It stays when an
    error ends the run, as after a crash: somebody should be told. A checkpoint of
    the last completed update is written in any case.

    Returns:
        Exit code: 0 at the end, 128 + signal number after SIGINT, SIGTERM or SIGHUP.

    Raises:
        ConfigError: the run cannot start as configured.
        StartError: the port is taken, or the target file or checkpoints cannot be written.
        NonFiniteGradientError: a gradient was not finite and `on_nonfinite` is `raise`.
        LostRankError: another rank has failed.
        KeyboardInterrupt: a second signal came.
    """
    ranks = Ranks.of_torchrun()
    try:
        training = Training(config, ranks)
        if ranks.is_first:
            return _lead(training, stop)
        with Checkpoints(training) as checkpoints:
            for _ in training.run(stop):
                checkpoints.updated()
            checkpoints.finish()
        return stop.exit_code
    except RuntimeError as error:
        if not ranks.is_lost_rank(error):
            raise
        reason = str(error).strip().splitlines()[0]
        raise LostRankError(f"rank {ranks.rank} cannot go on without the others: {reason}") from error
    finally:
        ranks.close()


def _lead(training: Training, stop: StopRequest) -> int:
    """Train, and serve, write and show what there is of it: the part of the first rank."""
    config = training.config

    def read_run() -> RunSnapshot:
        return training.run_snapshot

    for note in training.notes:
        say(f"warning: {note}", to_stderr=True)
    try:
        server = MetricsServer(
            training.aggregator,
            config.metrics_address,
            config.metrics_port,
            web_config_file=config.web_config_file,
            max_requests=config.web_max_requests,
        )
    except WebConfigError as error:
        raise ConfigError(str(error)) from error
    except OSError as error:
        raise StartError(f"{error}; --metrics-address and --metrics-port choose another one") from error
    with server, Checkpoints(training) as checkpoints:
        try:
            server.deliver(
                config.run_name,
                targets_dir=config.targets_dir,
                target=config.metrics_target,
                textfile_dir=config.textfile_dir,
                textfile_interval=config.textfile_interval,
            )
        except OSError as error:
            raise StartError(str(error)) from error
        where = f", from {config.resume} on" if config.resume else ""
        say(f"{config.run_name}: {config.updates} updates on {config.env}{where}, metrics at {server.url}")
        warning = unreachable_critical_warning(len(training.environment.heads), config.thresholds)
        if warning is not None:
            say(f"warning: {warning}", to_stderr=True)
        how = "failed"
        try:
            follow = Path(config.follow) if config.follow else None
            with open_display(read_run, training.updates, config.updates, config.log_interval, follow) as display:
                for update in training.run(stop):
                    checkpoints.updated()
                    display.updated(update)
            checkpoints.finish()
            how = "finished" if training.updates >= config.updates else "stopped with another rank"
        finally:
            # With an error it is no clean end: torchrun sends SIGTERM to all ranks when one of them fails.
            if stop() and isinstance(sys.exception(), (KeyboardInterrupt, types.NoneType)):
                how = f"stopped by {signal.Signals(stop.signum).name}"
            # First what cannot be had again: a folder of the others may keep one waiting.
            with stop.deaf():
                checkpoints.close()
                server.end(config.run_name, crashed=how == "failed")
            say(_closing_line(training, how, checkpoints.last))
        if config.pushgateway is not None:
            server.push(config.run_name, config.pushgateway)
    return stop.exit_code


def _closing_line(training: Training, how: str, checkpoint: Path | None) -> str:
    config, run = training.config, training.run_snapshot
    episode_return = run.signals.get("episode_return_mean")
    return (
        f"{config.run_name}: {how} after update {training.updates} of {config.updates}, "
        f"{run.environment_steps} environment steps, {run.episodes} episodes"
        + (f", return {episode_return:.3f}" if episode_return is not None else "")
        + f", {run.gradient_quality.skipped_steps} gradient steps skipped"
        + (f"; checkpoint {checkpoint}" if checkpoint else "")
    )
