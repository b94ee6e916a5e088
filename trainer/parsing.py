"""Reads the settings from defaults, checkpoint, YAML file and flags. Every error says where the setting comes from."""

import argparse
import contextlib
import difflib
import json
import math
import os
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

import yaml

from exporter.link import check_pushgateway_url
from trainer.config import GROUPS, LATEST, OPTIONS, ConfigError, TelemetryConfig, TrainerConfig, is_of_run
from trainer.drill import Drill


def _check_plain(arguments: dict) -> None:
    """Raise ValueError for values that a checkpoint cannot keep, such as dates, and for names that are not strings."""
    try:
        is_plain = json.loads(json.dumps(arguments)) == arguments
    except (TypeError, ValueError, RecursionError):
        is_plain = False
    if not is_plain:
        raise ValueError(f"must be names with plain values, as JSON has them, got {arguments!r}")


_HINTS = {**get_type_hints(TrainerConfig), **get_type_hints(TelemetryConfig)}
_KINDS = {name: get_args(_HINTS[name]) or (_HINTS[name],) for name in OPTIONS}
_TYPES = {name: kinds[0] for name, kinds in _KINDS.items()}
_OPTIONAL = {name for name, kinds in _KINDS.items() if types.NoneType in kinds}
_PARSERS = {"drill": Drill.parse, "env_kwargs": _check_plain, "pushgateway": check_pushgateway_url}
_Config = TypeVar("_Config", TrainerConfig, TelemetryConfig)


@dataclass(frozen=True)
class _Setting:
    value: Any
    place: str
    """Where it was set: `run.yml:3: num_envs` or `--num-envs`."""


def parse_config(arguments: Sequence[str] | None = None) -> tuple[TrainerConfig, TelemetryConfig]:
    """The settings from the command line and the file that it names.

    With `resume`, the checkpoint's settings replace the defaults, and `resume` becomes the path of that checkpoint.
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
    config, telemetry = _made(TrainerConfig, settings), _made(TelemetryConfig, settings)
    _check_combinations(config, telemetry, settings)
    return config, telemetry


def _made(kind: type[_Config], settings: Mapping[str, _Setting]) -> _Config:
    """A `kind`, from those `settings` that are fields of it."""
    return kind(**{name: setting.value for name, setting in settings.items() if name in kind.__dataclass_fields__})


def config_of_run(path: Path, content: Mapping[str, Any]) -> TrainerConfig:
    """The settings in the checkpoint at `path`, and the defaults for all others.

    Raises:
        ConfigError: this version does not know a setting, or its value is impossible.
    """
    return _made(TrainerConfig, _saved(path, content))


def _saved(path: Path, content: Mapping[str, Any]) -> dict[str, _Setting]:
    saved = {}
    for name, value in content["config"].items():
        if not is_of_run(name):
            raise ConfigError(f"{path}: it has a setting {name!r} that this version does not know")
        saved[name] = _Setting(_of_type(name, value, str(path)), f"{path}: {name}")
        _check(name, saved[name])
    return saved


def _resumed(settings: dict[str, _Setting]) -> dict[str, _Setting]:
    """The settings of the checkpoint that `settings` name, replaced by `settings` where these have a value."""
    # These import torch: only a resume needs that.
    from trainer.checkpoint_files import CheckpointError, latest_folder, resolve
    from trainer.display import say

    def warn(text: str) -> None:
        say(f"warning: {text}", to_stderr=True)

    place, asked = settings["resume"].place, settings["resume"].value
    try:
        if asked == LATEST:
            wanted = _made(TrainerConfig, settings)
            asked = latest_folder(Path(wanted.checkpoint_dir), wanted.run_name, warn)
        path, content = resolve(Path(asked), warn)
    except CheckpointError as error:
        raise ConfigError(f"{place}: {error}") from error
    saved = _saved(path, content)
    for name, setting in settings.items():
        if OPTIONS[name].metadata.get("fixed") and name in saved and setting.value != saved[name].value:
            raise ConfigError(
                f"{setting.place}: the run in {path} has {saved[name].value!r}, which a resume cannot change; "
                f"got {setting.value!r}"
            )
    return {**saved, **settings, "resume": _Setting(str(path), place)}


def _flag(name: str) -> str:
    return OPTIONS[name].metadata.get("flag", "--" + name.replace("_", "-"))


class Parser(argparse.ArgumentParser):
    """Raises `ConfigError` for arguments that it cannot parse, with the nearest known flag."""

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
        epilog="A flag replaces a setting of the file, and the file a default. Two more commands, each with its own "
        "--help: `python -m trainer evaluate CHECKPOINT` plays episodes, `python -m trainer inspect CHECKPOINT` shows "
        "its content.",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file with the same names as the flags")
    groups = {name: parser.add_argument_group(name) for name in GROUPS}
    for name, option in OPTIONS.items():
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
                type=_mapping if _TYPES[name] is dict else _TYPES[name],
                choices=option.metadata.get("choices"),
                metavar=None
                if "choices" in option.metadata
                else "MAPPING"
                if _TYPES[name] is dict
                else _TYPES[name].__name__.upper(),
                help=text,
            )
    return parser


def _mapping(text: str) -> dict:
    """The mapping in a flag, in JSON or YAML. JSON first, because YAML 1.1 reads 1e-3 as a string."""
    value = None
    for read in (json.loads, yaml.safe_load):
        with contextlib.suppress(yaml.YAMLError, ValueError, RecursionError):
            value = read(text)
            break
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"expected a mapping such as '{{max_episode_steps: 32}}', got {text!r}")
    return value


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
            if name not in OPTIONS:
                raise ConfigError(f"{path}:{line}: unknown key {str(key)!r}{_suggestion(name, list(OPTIONS))}")
            if name in settings:
                raise ConfigError(f"{path}:{line}: key {str(key)!r} is set twice, first at {settings[name].place}")
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
        words = {int: "a whole number", float: "a number", bool: "true or false", str: "a string", dict: "a mapping"}
        raise ConfigError(f"{place}: {name} must be {words[expected]}, got {value!r}")
    return value


def _check(name: str, setting: _Setting) -> None:
    value, limits = setting.value, OPTIONS[name].metadata
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


def _check_combinations(config: TrainerConfig, telemetry: TelemetryConfig, settings: Mapping[str, _Setting]) -> None:
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
    if telemetry.follow is not None and not os.path.exists(telemetry.follow):
        raise ConfigError(f"{places('follow')}: there is no file {telemetry.follow!r}")


def _suggestion(word: str, known: list[str]) -> str:
    nearest = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"; did you mean {nearest[0]}?" if nearest else ""
