"""Settings of a run and of its telemetry; `trainer.parsing` reads them."""

from dataclasses import Field, dataclass, field, fields
from typing import Any

from exporter.health import CRITICAL_THRESHOLD, WARNING_THRESHOLD, Thresholds
from exporter.link import DEFAULT_ADDRESS, DEFAULT_MAX_REQUESTS, DEFAULT_PORT, DEFAULT_TEXTFILE_INTERVAL, PUSH_JOB
from trainer.drill import KINDS
from trainer.environments import DEFAULT_ENVIRONMENT, VECTORIZATIONS


class ConfigError(ValueError):
    """A setting is unknown, of the wrong type or impossible; the message names it and its place."""


class StartError(Exception):
    """The run cannot start here and now: an address is in use, or a folder is not writable."""


def _option(default: Any, description: str, *, group: str, **limits: Any) -> Any:
    """A setting: the one source of its flag, its key in the YAML file and its help.

    `limits`: `minimum` and `maximum` (inclusive), `above` (exclusive), `choices`. `flag` replaces the flag made from
    the field's name; `alias` adds a second flag. A checkpoint keeps the settings of `TrainerConfig`, and a resume reads
    them from it. A resume cannot change a `fixed` setting. A checkpoint does not keep a `local` one.
    """
    return field(default=default, metadata={"description": description, "group": group, **limits})


_RUN, _PPO, _CHECKPOINTS, _TELEMETRY = "run", "PPO", "checkpoints", "telemetry"
GROUPS = (_RUN, _PPO, _CHECKPOINTS, _TELEMETRY)
LATEST = "latest"
"""`resume` without a path."""


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """How a run trains. Field names are the keys of the file and, with hyphens, the flags."""

    env: str = _option(
        DEFAULT_ENVIRONMENT,
        "environment: host-growth, or the id of a registered Gymnasium environment",
        group=_RUN,
        fixed=True,
    )
    env_kwargs: dict | None = _option(
        None,
        "arguments of the environment, in YAML or JSON: '{sutton_barto_reward: true}' for CartPole-v1, "
        "'{max_episode_steps: 32}' for host-growth and most others (default: its own)",
        group=_RUN,
        fixed=True,
    )
    run: str | None = _option(
        None,
        "name of the run, its label on /metrics (default: ENV-seedSEED); use --run-name under torchrun, which reads "
        "--run as its own",
        group=_RUN,
        fixed=True,
        alias="--run-name",
    )
    seed: int = _option(
        1,
        "seed of environment, initialization and sampling; environment i gets seed + i, so runs to compare need seeds "
        "at least num-envs apart",
        group=_RUN,
        minimum=0,
        maximum=2**32 - 1,
        fixed=True,
    )
    device: str = _option("cpu", "torch device", group=_RUN)
    threads: int = _option(
        1,
        "torch's CPU threads; a second thread helps if a core is idle, and slows training down much if none is",
        group=_RUN,
        minimum=1,
        maximum=256,
    )
    total_timesteps: int = _option(2_000_000, "environment steps to train for", group=_RUN, minimum=1)
    num_envs: int = _option(64, "parallel environments", group=_RUN, minimum=1, fixed=True)
    vectorization: str = _option(
        "sync",
        "how to step the copies of a Gymnasium environment: one after the other, or with its own vector class",
        group=_RUN,
        choices=VECTORIZATIONS,
    )
    log_interval: int = _option(10, "updates per line of output if there is no terminal", group=_RUN, minimum=1)
    rank_timeout: float = _option(
        60.0,
        "under torchrun: seconds that a rank waits for another before it gives up",
        group=_RUN,
        above=0.0,
        maximum=86_400.0,
        local=True,
    )

    rollout_steps: int = _option(64, "steps per environment and rollout", group=_PPO, minimum=1, fixed=True)
    minibatch_size: int = _option(
        512, "samples per gradient step, rounded so that they divide a rollout evenly", group=_PPO, minimum=2
    )
    epochs: int = _option(4, "passes over a rollout per update", group=_PPO, minimum=1)
    learning_rate: float = _option(1e-3, "Adam's learning rate at the start", group=_PPO, above=0.0)
    anneal_learning_rate: bool = _option(True, "lower the learning rate linearly to zero", group=_PPO)
    adam_eps: float = _option(1e-5, "Adam's epsilon", group=_PPO, above=0.0)
    gamma: float = _option(0.99, "discount factor", group=_PPO, minimum=0.0, maximum=1.0)
    gae_lambda: float = _option(0.95, "lambda of GAE", group=_PPO, minimum=0.0, maximum=1.0)
    clip_range: float = _option(0.2, "clip range of the probability ratio", group=_PPO, above=0.0)
    value_clip_range: float | None = _option(
        None,
        "clip range of the value's change, in standard deviations of the returns if normalize-returns is on",
        group=_PPO,
        above=0.0,
    )
    entropy_coef: float = _option(0.01, "weight of the entropy bonus", group=_PPO, minimum=0.0)
    value_coef: float = _option(0.5, "weight of the value loss", group=_PPO, minimum=0.0)
    max_grad_norm: float = _option(0.5, "clip gradients to this global norm", group=_PPO, above=0.0)
    target_kl: float | None = _option(
        None, "end an update after an epoch whose last minibatch has an approx_kl above this", group=_PPO, above=0.0
    )
    hidden_size: int = _option(128, "width of the two layers of a trunk", group=_PPO, minimum=1, fixed=True)
    separate_critic: bool = _option(False, "give the value function its own trunk", group=_PPO, fixed=True)
    normalize_returns: bool = _option(
        True, "train the value function on returns with mean 0 and standard deviation 1", group=_PPO
    )
    on_nonfinite: str = _option(
        "skip",
        "at a NaN or infinite gradient: skip the gradient step, or raise an error that names the head",
        group=_PPO,
        choices=("skip", "raise"),
    )

    resume: str | None = _option(
        None,
        "continue from a checkpoint, or from the newest one in a run's folder; without a PATH from the newest one of "
        "this run in checkpoint-dir; settings come from the checkpoint unless the file or a flag sets them",
        group=_CHECKPOINTS,
        local=True,
    )
    checkpoint_dir: str = _option(
        "checkpoints", "folder for the checkpoints of runs: DIR/RUN/update-00000020.pt", group=_CHECKPOINTS, local=True
    )
    checkpoint_every: int = _option(
        20,
        "updates between two checkpoints; one more is written at the end; 0 writes none",
        group=_CHECKPOINTS,
        minimum=0,
    )
    keep_checkpoints: int = _option(3, "number of newest checkpoints to keep", group=_CHECKPOINTS, minimum=1)

    warning_threshold: float = _option(
        WARNING_THRESHOLD,
        "gradient CV from which the run's level is warning; label, terminal, status page, rules and dashboards use it",
        group=_TELEMETRY,
        above=0.0,
    )
    critical_threshold: float = _option(
        CRITICAL_THRESHOLD,
        "gradient CV from which the run's level is critical, used in the same way; n heads reach at most sqrt(n)",
        group=_TELEMETRY,
        above=0.0,
    )
    drill: str | None = _option(
        None,
        "change gradients to test alerts. KIND:HEAD:FIRST-LAST does it from update FIRST to LAST (dominate:op:20-60), "
        "or from second FIRST to LAST of training (dominate:op:10s-130s). KIND:HEAD:@FILE does it while FILE exists. "
        "Kinds: " + "; ".join(f"{kind}, {meaning}" for kind, meaning in KINDS.items()),
        group=_TELEMETRY,
        local=True,
    )

    @property
    def run_name(self) -> str:
        return self.run or f"{self.env}-seed{self.seed}"

    @property
    def thresholds(self) -> Thresholds:
        return Thresholds(self.warning_threshold, self.critical_threshold)

    @property
    def steps_per_update(self) -> int:
        return self.num_envs * self.rollout_steps

    @property
    def total_updates(self) -> int:
        """Updates in the whole run, at least one."""
        return max(1, self.total_timesteps // self.steps_per_update)


@dataclass(frozen=True, kw_only=True)
class TelemetryConfig:
    """Where the metrics of a run go. It belongs to the machine, not to the run: checkpoints do not keep it."""

    metrics_address: str = _option(DEFAULT_ADDRESS, "address that serves /metrics", group=_TELEMETRY)
    metrics_port: int = _option(
        DEFAULT_PORT,
        "port that serves /metrics; 0 takes any free one",
        group=_TELEMETRY,
        minimum=0,
        maximum=65535,
    )
    web_config_file: str | None = _option(
        None,
        "file with TLS, users, headers and a rate limit for /metrics, in the format of Prometheus' exporter-toolkit",
        group=_TELEMETRY,
        flag="--web.config.file",
    )
    web_max_requests: int = _option(
        DEFAULT_MAX_REQUESTS,
        "scrapes at the same time; more get 503; 0 for no limit",
        group=_TELEMETRY,
        minimum=0,
        flag="--web.max-requests",
    )
    metrics_target: str | None = _option(
        None,
        "HOST:PORT in the target file (default: address and port of /metrics; this machine's name instead of 0.0.0.0)",
        group=_TELEMETRY,
    )
    targets_dir: str = _option(
        "targets", "folder for the run's target file (Prometheus file service discovery)", group=_TELEMETRY
    )
    textfile_dir: str | None = _option(
        None,
        "write the run's metrics to a file in this folder, for node_exporter's textfile collector; removed at a clean "
        "end",
        group=_TELEMETRY,
    )
    textfile_interval: float = _option(
        DEFAULT_TEXTFILE_INTERVAL,
        "seconds between two versions of the file in textfile-dir",
        group=_TELEMETRY,
        minimum=0.1,
    )
    pushgateway: str | None = _option(
        None,
        f"URL of a Pushgateway; gets the run's final state, as job {PUSH_JOB}, at a clean end and after SIGINT, "
        "SIGTERM or SIGHUP",
        group=_TELEMETRY,
    )
    follow: str | None = _option(None, "print lines appended to this file above the live display", group=_TELEMETRY)


OPTIONS: dict[str, Field] = {
    option.name: option for kind in (TrainerConfig, TelemetryConfig) for option in fields(kind)
}
"""Every setting by name."""


def settings_of_run(config: TrainerConfig) -> dict[str, Any]:
    """The settings that a checkpoint keeps: all but the `local` ones."""
    kept = {option.name: getattr(config, option.name) for option in fields(config) if is_of_run(option.name)}
    return {**kept, "run": config.run_name}


def is_of_run(name: str) -> bool:
    """Whether `name` is a setting that a checkpoint keeps."""
    option = TrainerConfig.__dataclass_fields__.get(name)
    return option is not None and not option.metadata.get("local")
