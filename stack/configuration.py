"""Ports and folders of one stack, and the configuration files adapted to them."""

import re
import shutil
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from exporter.link import DEFAULT_PORT as METRICS_PORT
from stack.receiver import DEFAULT_PORT as RECEIVER_PORT
from stack.servers import ROOT


@dataclass(frozen=True)
class Ports:
    """TCP ports on 127.0.0.1. The defaults are those in the repository's files."""

    prometheus: int = 9090
    alertmanager: int = 9093
    receiver: int = RECEIVER_PORT
    grafana: int = 3000
    metrics: int = METRICS_PORT

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{getattr(self, name)}"


def adapt(text: str, ports: Ports) -> str:
    """`text` with the default ports on 127.0.0.1 and localhost replaced by those of `ports`."""
    new = {str(field.default): str(getattr(ports, field.name)) for field in fields(Ports)}
    return re.sub(
        r"\b(127\.0\.0\.1|localhost):(\d+)\b", lambda match: f"{match[1]}:{new.get(match[2], match[2])}", text
    )


def prometheus_configuration(ports: Ports, targets: Path) -> dict[str, Any]:
    """The repository's prometheus.yml for other ports and another targets folder; works in any folder."""
    configuration = yaml.safe_load(adapt((ROOT / "prometheus.yml").read_text(), ports))
    configuration["rule_files"] = [str(ROOT / pattern) for pattern in configuration.get("rule_files", [])]
    for job in configuration["scrape_configs"]:
        for discovery in job.get("file_sd_configs", []):
            discovery["files"] = [str(targets.resolve() / Path(pattern).name) for pattern in discovery["files"]]
    return configuration


def alertmanager_configuration(ports: Ports) -> dict[str, Any]:
    """The repository's alertmanager.yml for other ports; works in any folder.

    Raises:
        FileNotFoundError: the file is missing.
    """
    configuration = yaml.safe_load(adapt((ROOT / "alerts/alertmanager.yml").read_text(), ports))
    configuration["templates"] = [str(ROOT / "alerts" / pattern) for pattern in configuration.get("templates", [])]
    return configuration


def write_yaml(path: Path, content: dict[str, Any], source: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"# Made from {source}; change that file.\n" + yaml.safe_dump(content, sort_keys=False))
    return path


def copy_provisioning(ports: Ports, destination: Path) -> Path:
    """A copy of grafana/provisioning for other ports."""
    shutil.rmtree(destination, ignore_errors=True)
    for source in sorted((ROOT / "grafana/provisioning").rglob("*.y*ml")):
        path = destination / source.relative_to(ROOT / "grafana/provisioning")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(adapt(source.read_text(), ports))
    return destination
