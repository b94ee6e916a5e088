"""`python -m mixin`: writes alert rules, their tests, Grafana's provisioning and dashboards."""

import argparse
import json
import sys
from collections import ChainMap
from collections.abc import Callable
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any

import yaml

from mixin.alertmanager import alertmanager, templates
from mixin.alerts import prometheus_rules
from mixin.config import TIMINGS, MixinConfig, duration, flag, parse_duration
from mixin.dashboards import dashboards
from mixin.grafana import alerting, dashboard_provider, datasources
from mixin.rule_tests import rule_tests

REPOSITORY = Path(__file__).resolve().parent.parent
HEADER = "# Generated: do not edit. Change mixin/ and run `python -m mixin`.\n"


def generate(config: MixinConfig) -> dict[str, str]:
    """Text of every generated file by its path, relative to the repository or to --output."""
    documents: dict[str, Callable[[MixinConfig], dict | str]] = {
        "alerts/alertmanager.yml": alertmanager,
        "alerts/ppo.rules.yml": prometheus_rules,
        "alerts/ppo.rules.test.yml": rule_tests,
        "grafana/provisioning/datasources/ppo.yml": datasources,
        "grafana/provisioning/dashboards/ppo.yml": dashboard_provider,
        "grafana/provisioning/alerting/ppo.yml": alerting,
    }
    files = {path: HEADER + _yaml(document(config)) for path, document in documents.items()}
    files["alerts/templates/ppo.tmpl"] = templates(config)
    for dashboard in dashboards(config):
        # JSON has no comments: the dashboard says in its description where it comes from.
        files[f"grafana/dashboards/{dashboard['uid']}.json"] = json.dumps(dashboard, indent=2) + "\n"
    return files


def _settings_of(path: str) -> dict[str, Any]:
    """Fields of `MixinConfig` that the YAML file at `path` sets, for argparse."""
    try:
        settings = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise argparse.ArgumentTypeError(f"cannot read {path}: {error}") from error
    options = {flag(option).removeprefix("--"): option for option in fields(MixinConfig)}
    if not isinstance(settings, dict) or (unknown := set(map(str, settings)) - set(options)):
        wrong = ", ".join(sorted(unknown)) if isinstance(settings, dict) else "no mapping"
        raise argparse.ArgumentTypeError(f"{path}: {wrong}; there are {', '.join(options)}")
    given = {}
    for name, value in settings.items():
        option = options[name]
        try:
            if value is None:
                raise ValueError("has no value")
            if option.default is MISSING:
                given[option.name] = {alert: parse_duration(time) for alert, time in dict(value).items()}
            else:
                given[option.name] = option.metadata["parse"](value)
        except (TypeError, ValueError) as error:
            raise argparse.ArgumentTypeError(f"{path}: {name}: {error}") from error
    return given


def _argument(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """`parse` with its error's text, which argparse shows of this type only."""

    def parsed(text: str) -> Any:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return parsed


def _default_text(option: Field) -> str:
    return duration(option.default) if option.metadata["parse"] is parse_duration else str(option.default)


def _times_text() -> str:
    lines = [f"  {key!s:40} {duration(hold):>6} {duration(keep):>18}" for key, (hold, keep) in TIMINGS.items()]
    return "\n".join(["default times:", f"  {'alert':40} {'--for':>6} {'--keep-firing-for':>18}", *lines])


class _Dumper(yaml.SafeDumper):
    """Without anchors, which Prometheus would accept but nobody wants to read."""

    def ignore_aliases(self, data: object) -> bool:
        return True


def _yaml(document: dict | str) -> str:
    """`document` as YAML; one that is text already, for its comments, as it is."""
    if isinstance(document, str):
        return document
    return yaml.dump(document, Dumper=_Dumper, sort_keys=False, width=float("inf"), allow_unicode=True)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m mixin", description=__doc__, epilog=_times_text())
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "--output", type=Path, default=REPOSITORY, metavar="DIR", help="where the files go (default: this repository)"
    )
    parser.add_argument("--check", action="store_true", help="write nothing; list files that differ and exit with 1")
    parser.add_argument(
        "--config",
        type=_settings_of,
        default={},
        metavar="FILE",
        help="YAML file with any of the options below by their long names without the dashes, such as `job: rl`; "
        "`for` and `keep-firing-for` are mappings from alert to duration. Options given here win over it",
    )
    for option in fields(MixinConfig):
        many = option.default is MISSING
        default = "" if many else f" (default: {_default_text(option)})".replace("%", "%%")
        parser.add_argument(
            flag(option),
            dest=option.name,
            action="append" if many else "store",
            type=_argument(option.metadata["parse"]),
            metavar=option.metadata["metavar"],
            help=option.metadata["help"] + default,
        )
    options = parser.parse_args(arguments)
    given = {
        option.name: value for option in fields(MixinConfig) if (value := getattr(options, option.name)) is not None
    }
    for name in ("hold", "keep"):
        here = dict(ChainMap(*reversed(given.get(name, []))))
        # ALERT here wins over ALERT/SEVERITY of the file, too.
        of_file = {
            alert: time for alert, time in options.config.get(name, {}).items() if alert.split("/")[0] not in here
        }
        given[name] = {**of_file, **here}
    try:
        config = MixinConfig(**{**options.config, **given})
    except ValueError as error:
        parser.error(str(error))

    differing = []
    try:
        for path, text in generate(config).items():
            file = options.output / path
            if file.is_file() and file.read_bytes() == text.encode():
                continue
            differing.append(path)
            if not options.check:
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(text.encode())
    except OSError as error:
        verb = "read" if options.check else "write"
        print(
            f"error: cannot {verb} {error.filename}: {error.strerror}; --output names another folder", file=sys.stderr
        )
        return 1
    for path in differing:
        print(f"{path}: {'differs' if options.check else 'written'}")
    return int(options.check and bool(differing))


if __name__ == "__main__":
    sys.exit(main())
