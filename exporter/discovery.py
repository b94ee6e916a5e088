"""The file by which Prometheus' file service discovery finds a trainer."""

import json
import os
import re
import socket
from pathlib import Path


class TargetFile:
    """Target file of one trainer: written atomically at start, removed at a clean end.

    After a crash the file stays on purpose: Prometheus goes on scraping, `up` is
    0, and the alert on it fires.

    Args:
        directory: folder that Prometheus' `file_sd_configs` watches; created if missing.
        run: name of the run; it becomes the `run` label of `up` and of the process metrics.
        target: `host:port` of the endpoint.

    Raises:
        OSError: the folder or the file cannot be written.
    """

    def __init__(self, directory: Path, run: str, target: str) -> None:
        name = re.sub(r"[^A-Za-z0-9_.-]+", "-", f"{run}-{target}")
        self.path = directory / f"{name}.json"
        directory.mkdir(parents=True, exist_ok=True)
        # Prometheus reads *.json only, so it never sees the file half-written.
        unfinished = self.path.with_suffix(f".{os.getpid()}.tmp")
        unfinished.write_text(json.dumps([{"targets": [target], "labels": {"run": run}}], indent=2) + "\n")
        unfinished.replace(self.path)

    @staticmethod
    def reachable(address: str) -> str:
        """What others call a server bound to `address`: this machine's name where that is a wildcard."""
        return socket.gethostname() if address in ("0.0.0.0", "::", "") else address

    def remove(self) -> None:
        """Take the trainer out of service discovery; harmless when the file is gone already."""
        self.path.unlink(missing_ok=True)

    def __enter__(self) -> "TargetFile":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.remove()
