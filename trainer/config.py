"""Settings of a run: defaults, then a YAML file, then flags; every error says where it stands."""

import argparse
import difflib
import math
import os
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml

from exporter.health import CRITICAL_THRESHOLD, WARNING_THRESHOLD, Thresholds
from exporter.link import (
    DEFAULT_ADDRESS,
    DEFAULT_MAX_REQUESTS,
    DEFAULT_PORT,
    DEFAULT_TEXTFILE_INTERVAL,
    PUSH_JOB,
    check_pushgateway_url,
)
from trainer.drill import KINDS, Drill
from trainer.environments import DEFAULT_ENVIRONMENT, VECTORIZATIONS


class ConfigError(ValueError):
    """A setting is unknown, of the wrong type or impossible; the message names it and where it stands."""


def _option(default: Any, description: str, *, group: str, **limits: Any) -> Any:
    """A setting.

    `limits`: `minimum` and `maximum` (inclusive), `above` (exclusive), `choices`. `flag` is one that does not follow
    from the field's name. On resume a setting comes from the checkpoint; one that is `fixed` cannot differ from it, and
    one that is `local` is no part of it.
    """
    return field(default=default, metadata={"description": description, "group": group, **limits})


_RUN, _PPO, _CHECKPOINTS, _TELEMETRY = "run", "PPO", "checkpoints", "telemetry"
_GROUPS = (_RUN, _PPO, _CHECKPOINTS, _TELEMETRY)
LATEST = "latest"


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """Settings of a run. Field names are the keys of the file and, with hyphens, the flags."""

    env: str = _option(
        DEFAULT_ENVIRONMENT,
        "environment: host-growth, or the id of a registered Gymnasium environment",
        group=_RUN,
        fixed=True,
    )
    run: str | None = _option(
        None,
        "name of the run, its label on /metrics (default: ENV-seedSEED); the longer name is for torchrun, which takes "
        "the shorter one for its own",
        group=_RUN,
        fixed=True,
        alias="--run-name",
    )
    seed: int = _option(
        1,
        "seed of environment, initialization and sampling; environment i gets seed + i, so runs to compare want seeds "
        "at least num-envs apart",
        group=_RUN,
        minimum=0,
        maximum=2**32 - 1,
        fixed=True,
    )
    device: str = _option("cpu", "torch device", group=_RUN)
    threads: int = _option(
        1,
        "torch's CPU threads; a second one pays where a core is idle, and costs much where none is",
        group=_RUN,
        minimum=1,
        maximum=256,
    )
    total_timesteps: int = _option(2_000_000, "environment steps to train for", group=_RUN, minimum=1)
    num_envs: int = _option(64, "parallel environments", group=_RUN, minimum=1, fixed=True)
    vectorization: str = _option(
        "sync",
        "how copies of a Gymnasium environment are stepped: one after the other, or by its own vector class",
        group=_RUN,
        choices=VECTORIZATIONS,
    )
    log_interval: int = _option(10, "updates per line where there is no terminal", group=_RUN, minimum=1)

    rollout_steps: int = _option(64, "steps per environment and rollout", group=_PPO, minimum=1, fixed=True)
    minibatch_size: int = _option(
        512, "samples per gradient step, as nearly as they divide a rollout evenly", group=_PPO, minimum=2
    )
    epochs: int = _option(4, "passes over a rollout per update", group=_PPO, minimum=1)
    learning_rate: float = _option(1e-3, "Adam's learning rate at the start", group=_PPO, above=0.0)
    anneal_learning_rate: bool = _option(True, "lower the learning rate linearly to zero", group=_PPO)
    adam_eps: float = _option(1e-5, "Adam's epsilon", group=_PPO, above=0.0)
    gamma: float = _option(0.99, "discount factor", group=_PPO, minimum=0.0, maximum=1.0)
    gae_lambda: float = _option(0.95, "lambda of GAE", group=_PPO, minimum=0.0, maximum=1.0)
    clip_range: float = _option(0.2, "clip range of the probability ratio", group=_PPO, above=0.0)
    value_clip_range: float | None = _option(
        None, "clip range of the value's change, in what the value function thinks in", group=_PPO, above=0.0
    )
    entropy_coef: float = _option(0.01, "weight of the entropy bonus", group=_PPO, minimum=0.0)
    value_coef: float = _option(0.5, "weight of the value loss", group=_PPO, minimum=0.0)
    max_grad_norm: float = _option(0.5, "global norm to which gradients are clipped", group=_PPO, above=0.0)
    target_kl: float | None = _option(
        None, "end an update after an epoch whose last minibatch had an approx_kl above this", group=_PPO, above=0.0
    )
    hidden_size: int = _option(128, "width of the two layers of a trunk", group=_PPO, minimum=1, fixed=True)
    separate_critic: bool = _option(False, "give the value function a trunk of its own", group=_PPO, fixed=True)
    normalize_returns: bool = _option(
        True, "let the value function think in standard deviations of the returns around their mean", group=_PPO
    )
    on_nonfinite: str = _option(
        "skip",
        "what to do at a NaN or infinite gradient: skip the gradient step, or raise an error that names the head",
        group=_PPO,
        choices=("skip", "raise"),
    )

    resume: str | None = _option(
        None,
        "go on from a checkpoint, from the newest one in a run's folder, or without a PATH from the newest one of this "
        "run in checkpoint-dir; settings come from the checkpoint where neither file nor flag has them",
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
    keep_checkpoints: int = _option(3, "checkpoints that are kept, the newest", group=_CHECKPOINTS, minimum=1)

    warning_threshold: float = _option(
        WARNING_THRESHOLD,
        "gradient CV from which the run's level is warning; label, terminal, status page, rules and dashboards follow it",
        group=_TELEMETRY,
        above=0.0,
    )
    critical_threshold: float = _option(
        CRITICAL_THRESHOLD,
        "gradient CV from which the run's level is critical, followed in the same way; n heads reach at most sqrt(n)",
        group=_TELEMETRY,
        above=0.0,
    )
    metrics_address: str = _option(DEFAULT_ADDRESS, "address that serves /metrics", group=_TELEMETRY, local=True)
    metrics_port: int = _option(
        DEFAULT_PORT,
        "port that serves /metrics; 0 takes any free one",
        group=_TELEMETRY,
        local=True,
        minimum=0,
        maximum=65535,
    )
    web_config_file: str | None = _option(
        None,
        "file with TLS, users, headers and a rate limit for /metrics, in the format of Prometheus' exporter-toolkit",
        group=_TELEMETRY,
        local=True,
        flag="--web.config.file",
    )
    web_max_requests: int = _option(
        DEFAULT_MAX_REQUESTS,
        "scrapes at a time, above which they get 503; 0 for no limit",
        group=_TELEMETRY,
        minimum=0,
        local=True,
        flag="--web.max-requests",
    )
    metrics_target: str | None = _option(
        None,
        "HOST:PORT that the target file names (default: address and port of /metrics; this machine's name in place of "
        "0.0.0.0)",
        group=_TELEMETRY,
        local=True,
    )
    targets_dir: str = _option(
        "targets", "folder for the run's target file (Prometheus file service discovery)", group=_TELEMETRY, local=True
    )
    textfile_dir: str | None = _option(
        None,
        "keep the run's metrics in a file in this folder, for node_exporter's textfile collector; removed at a clean "
        "end",
        group=_TELEMETRY,
        local=True,
    )
    textfile_interval: float = _option(
        DEFAULT_TEXTFILE_INTERVAL,
        "seconds between two versions of the file in textfile-dir",
        group=_TELEMETRY,
        local=True,
        minimum=0.1,
    )
    pushgateway: str | None = _option(
        None,
        f"URL of a Pushgateway that gets the run's final state, as job {PUSH_JOB}, at a clean end and after SIGINT, "
        "SIGTERM or SIGHUP",
        group=_TELEMETRY,
        local=True,
    )
    follow: str | None = _option(
        None, "print the lines that are appended to this file above the live display", group=_TELEMETRY, local=True
    )
    drill: str | None = _option(
        None,
        "bend gradients to test alerts. KIND:HEAD:FIRST-LAST does it from update FIRST to LAST (dominate:op:20-60), or "
        "with s behind both numbers from second FIRST to LAST of training (dominate:op:10s-130s). KIND:HEAD:@FILE does "
        "it while FILE exists. Kinds: " + "; ".join(f"{kind}, {meaning}" for kind, meaning in KINDS.items()),
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
    def updates(self) -> int:
        """Updates in the whole run, at least one."""
        return max(1, self.total_timesteps // self.steps_per_update)


_FIELDS = {f.name: f for f in fields(TrainerConfig)}
_TYPES = {
    name: tuple(kind for kind in (get_args(hint) or (hint,)) if kind is not types.NoneType)[0]
    for name, hint in get_type_hints(TrainerConfig).items()
    if name in _FIELDS
}
_PARSERS = {"drill": Drill.parse, "pushgateway": check_pushgateway_url}
_OPTIONAL = {name for name, hint in get_type_hints(TrainerConfig).items() if types.NoneType in get_args(hint)}


@dataclass(frozen=True)
class _Setting:
    value: Any
    place: str
    """Where it was set: `run.yml:3: num_envs` or `--num-envs`."""


def parse_config(arguments: Sequence[str] | None = None) -> TrainerConfig:
    """Settings from the command line and the file that it names.

    With `resume` they come from the checkpoint first, and `resume` becomes that file.
    Prints help and exits for `--help`; otherwise raises only `ConfigError`.
    """
    parser = _parser()
    given = vars(parser.parse_args(arguments))
    path = given.pop("config", None)
    settings = _read_file(Path(path)) if path is not None else {}
    for name, value in given.items():
        settings[name] = _Setting(value, _flag(name))
    for name, setting in settings.items():
        _check(name, setting)
    if "resume" in settings and settings["resume"].value is not None:
        settings = _resumed(settings)
    config = _config(settings)
    _check_combinations(config, settings)
    return config


def _config(settings: dict[str, _Setting]) -> TrainerConfig:
    return TrainerConfig(**{name: setting.value for name, setting in settings.items()})


def settings_of_run(config: TrainerConfig) -> dict[str, Any]:
    """The settings that a checkpoint keeps: all but those that belong to a place, such as folders and addresses."""
    kept = {name: getattr(config, name) for name, option in _FIELDS.items() if not option.metadata.get("local")}
    return {**kept, "run": config.run_name}


def config_of_run(path: Path, content: Mapping[str, Any]) -> TrainerConfig:
    """The settings that the checkpoint at `path` keeps; the others are the defaults.

    Raises:
        ConfigError: they are not those of this version, or impossible.
    """
    return _config(_saved(path, content))


def _saved(path: Path, content: Mapping[str, Any]) -> dict[str, _Setting]:
    saved = {}
    for name, value in content["config"].items():
        if name not in _FIELDS or _FIELDS[name].metadata.get("local"):
            raise ConfigError(f"{path}: it has a setting {name!r} that this version does not know")
        saved[name] = _Setting(_of_type(name, value, str(path)), f"{path}: {name}")
        _check(name, saved[name])
    return saved


def _resumed(settings: dict[str, _Setting]) -> dict[str, _Setting]:
    """`settings` over those of the checkpoint that they name."""
    # Not before it is needed, for it imports torch.
    from trainer.checkpoint import CheckpointError, latest_folder, resolve
    from trainer.display import say

    def warn(text: str) -> None:
        say(f"warning: {text}", to_stderr=True)

    place, asked = settings["resume"].place, settings["resume"].value
    try:
        if asked == LATEST:
            wanted = _config(settings)
            asked = latest_folder(Path(wanted.checkpoint_dir), wanted.run_name, warn)
        path, content = resolve(Path(asked), warn)
    except CheckpointError as error:
        raise ConfigError(f"{place}: {error}") from error
    saved = _saved(path, content)
    for name, setting in settings.items():
        if _FIELDS[name].metadata.get("fixed") and name in saved and setting.value != saved[name].value:
            raise ConfigError(
                f"{setting.place}: the run in {path} has {saved[name].value!r}, and that cannot change on the way; "
                f"got {setting.value!r}"
            )
    return {**saved, **settings, "resume": _Setting(str(path), place)}


def _flag(name: str) -> str:
    return _FIELDS[name].metadata.get("flag", "--" + name.replace("_", "-"))


class Parser(argparse.ArgumentParser):
    """Raises `ConfigError` for what it cannot parse, with the nearest known flag."""

    def error(self, message: str) -> None:
        unknown = message.removeprefix("unrecognized arguments: ")
        if unknown != message:
            flags = [option for action in self._actions for option in action.option_strings]
            message += _suggestion(unknown.split()[0].split("=")[0], flags)
        raise ConfigError(message)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m trainer",
        description="Train a PPO agent and serve the health of its gradients on /metrics.",
        epilog="Settings come from the defaults, then the file, then the flags. Two more commands, each with its own "
        "--help: `python -m trainer evaluate CHECKPOINT` plays episodes, `python -m trainer inspect CHECKPOINT` says "
        "what is inside.",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file with the same names as the flags")
    groups = {name: parser.add_argument_group(name) for name in _GROUPS}
    for name, option in _FIELDS.items():
        text = option.metadata["description"].replace("%", "%%")
        if "(default:" not in text:
            default = option.default if type(option.default) in (int, float, str) else "on" if option.default else "off"
            text += f" (default: {default})"
        group = groups[option.metadata["group"]]
        if _TYPES[name] is bool:
            group.add_argument(_flag(name), action=argparse.BooleanOptionalAction, help=text)
        elif name == "resume":
            group.add_argument(_flag(name), nargs="?", const=LATEST, metavar="PATH", help=text)
        else:
            group.add_argument(
                *filter(None, (option.metadata.get("alias"), _flag(name))),
                dest=name,
                type=_TYPES[name],
                choices=option.metadata.get("choices"),
                metavar=None if "choices" in option.metadata else _TYPES[name].__name__.upper(),
                help=text,
            )
    return parser


def _read_file(path: Path) -> dict[str, _Setting]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
    loader = None
    try:
        loader = yaml.SafeLoader(text)
        root = loader.get_single_node()
        if root is None:
            return {}
        if not isinstance(root, yaml.MappingNode):
            raise ConfigError(f"{path}:{root.start_mark.line + 1}: expected `key: value` lines")
        settings: dict[str, _Setting] = {}
        for key_node, value_node in root.value:
            line = key_node.start_mark.line + 1
            key = loader.construct_object(key_node, deep=True)
            name = str(key).replace("-", "_").replace(".", "_")
            if name not in _FIELDS:
                raise ConfigError(f"{path}:{line}: unknown key {str(key)!r}{_suggestion(name, list(_FIELDS))}")
            if name in settings:
                raise ConfigError(f"{path}:{line}: key {str(key)!r} is there twice, before at {settings[name].place}")
            try:
                value = loader.construct_object(value_node, deep=True)
            except (ValueError, OverflowError) as error:
                raise ConfigError(f"{path}:{line}: {name}: {error}") from error
            settings[name] = _Setting(_of_type(name, value, f"{path}:{line}"), f"{path}:{line}: {name}")
        return settings
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{path}:{mark.line + 1}" if mark else str(path)
        raise ConfigError(f"{place}: {getattr(error, 'problem', None) or error}") from error
    except RecursionError:
        raise ConfigError(f"{path}: nested too deeply") from None
    finally:
        if loader is not None:
            loader.dispose()


def _of_type(name: str, value: Any, place: str) -> Any:
    expected = _TYPES[name]
    if value is None and name in _OPTIONAL:
        return None
    # YAML 1.1 reads 1e-3, without a dot, as a string.
    if expected is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        try:
            return float(value)
        except (ValueError, OverflowError):
            pass
    if type(value) is not expected:
        words = {int: "a whole number", float: "a number", bool: "true or false", str: "a string"}
        raise ConfigError(f"{place}: {name} must be {words[expected]}, got {value!r}")
    return value


def _check(name: str, setting: _Setting) -> None:
    value, limits = setting.value, _FIELDS[name].metadata
    if value is None:
        return
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{setting.place}: must be finite, got {value}")
    if "minimum" in limits and value < limits["minimum"]:
        raise ConfigError(f"{setting.place}: must be at least {limits['minimum']}, got {value}")
    if "maximum" in limits and value > limits["maximum"]:
        raise ConfigError(f"{setting.place}: must be at most {limits['maximum']}, got {value}")
    if "above" in limits and value <= limits["above"]:
        raise ConfigError(f"{setting.place}: must be above {limits['above']:g}, got {value}")
    if "choices" in limits and value not in limits["choices"]:
        raise ConfigError(
            f"{setting.place}: must be one of {', '.join(limits['choices'])}, got {value!r}"
            f"{_suggestion(str(value), list(limits['choices']))}"
        )
    if isinstance(value, str) and not value:
        raise ConfigError(f"{setting.place}: must not be empty")
    if isinstance(value, str) and not value.isprintable():
        raise ConfigError(f"{setting.place}: must be printable text, got {value!r}")
    if name in _PARSERS:
        try:
            _PARSERS[name](value)
        except ValueError as error:
            raise ConfigError(f"{setting.place}: {error}") from error


def _check_combinations(config: TrainerConfig, settings: dict[str, _Setting]) -> None:
    def places(*names: str) -> str:
        return " and ".join(settings[name].place if name in settings else f"{name} (default)" for name in names)

    if config.minibatch_size > config.steps_per_update:
        raise ConfigError(
            f"{places('minibatch_size', 'num_envs', 'rollout_steps')}: a minibatch of {config.minibatch_size} is "
            f"larger than the rollout of {config.num_envs} x {config.rollout_steps} = {config.steps_per_update} samples"
        )
    if config.total_timesteps < config.steps_per_update:
        raise ConfigError(
            f"{places('total_timesteps', 'num_envs', 'rollout_steps')}: {config.total_timesteps} environment steps are "
            f"less than one rollout of {config.num_envs} x {config.rollout_steps} = {config.steps_per_update}"
        )
    if config.warning_threshold >= config.critical_threshold:
        raise ConfigError(
            f"{places('warning_threshold', 'critical_threshold')}: the warning threshold must be below the critical "
            f"one, got {config.warning_threshold} and {config.critical_threshold}"
        )
    if config.follow is not None and not os.path.exists(config.follow):
        raise ConfigError(f"{places('follow')}: there is no file {config.follow!r}")


def _suggestion(word: str, known: list[str]) -> str:
    nearest = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"; did you mean {nearest[0]}?" if nearest else ""
