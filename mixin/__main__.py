"""`python -m mixin`: writes alert rules, their tests, Grafana's provisioning and dashboards."""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import yaml

from mixin.alerts import prometheus_rules
from mixin.config import MixinConfig
from mixin.dashboards import dashboards
from mixin.grafana import alerting, dashboard_provider, datasources
from mixin.rule_tests import rule_tests

REPOSITORY = Path(__file__).resolve().parent.parent
HEADER = "# Generated: do not edit. Change mixin/ and run `python -m mixin`.\n"


def generate(config: MixinConfig) -> dict[str, str]:
    """Text of every generated file by its path, relative to the repository or to --output."""
    documents: dict[str, Callable[[MixinConfig], dict]] = {
        "alerts/ppo.rules.yml": prometheus_rules,
        "alerts/ppo.rules.test.yml": rule_tests,
        "grafana/provisioning/datasources/ppo.yml": datasources,
        "grafana/provisioning/dashboards/ppo.yml": dashboard_provider,
        "grafana/provisioning/alerting/ppo.yml": alerting,
    }
    files = {path: HEADER + _yaml(document(config)) for path, document in documents.items()}
    for dashboard in dashboards(config):
        # JSON has no comments: the dashboard says in its description where it comes from.
        files[f"grafana/dashboards/{dashboard['uid']}.json"] = json.dumps(dashboard, indent=2) + "\n"
    return files


class _Dumper(yaml.SafeDumper):
    """Without anchors, which Prometheus would accept but nobody wants to read."""

    def ignore_aliases(self, data: object) -> bool:
        return True


def _yaml(document: dict) -> str:
    return yaml.dump(document, Dumper=_Dumper, sort_keys=False, width=float("inf"), allow_unicode=True)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m mixin", description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=REPOSITORY, metavar="DIR", help="where the files go")
    parser.add_argument("--check", action="store_true", help="write nothing; list files that differ and exit with 1")
    for option in fields(MixinConfig):
        flag = f"--{option.name.replace('_', '-')}"
        parser.add_argument(flag, default=option.default, metavar="TEXT", help=option.metadata["help"])
    options = parser.parse_args(arguments)
    config = MixinConfig(**{option.name: getattr(options, option.name) for option in fields(MixinConfig)})

    differing = []
    for path, text in generate(config).items():
        file = options.output / path
        if file.is_file() and file.read_text(encoding="utf-8") == text:
            continue
        differing.append(path)
        if not options.check:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
    for path in differing:
        print(f"{path}: {'differs' if options.check else 'written'}")
    return int(options.check and bool(differing))


if __name__ == "__main__":
    sys.exit(main())
