"""The file by which Prometheus' file service discovery finds a trainer."""

import json
import os
import re
import socket
from pathlib import Path


class TargetFile:
    """Target file of one endpoint: written atomically, and removed at a clean end.

    After a crash the file stays on purpose: Prometheus goes on scraping, `up` is 0,
    and the alert on it fires. The next endpoint at the same address replaces it.

    Args:
        directory: folder that Prometheus' `file_sd_configs` watches; created if missing.
        target: `host:port` of the endpoint, which also names the file.
        runs: the runs behind it; their names, joined by a comma, become the `run`
            label of `up` and of the process metrics.

    Raises:
        OSError: the folder or the file cannot be written.
    """

    def __init__(self, directory: Path, target: str, *runs: str) -> None:
        self.path = directory / f"{re.sub(r'[^A-Za-z0-9_.-]+', '-', target)}.json"
        self._target = target
        self._runs: list[str] = []
        directory.mkdir(parents=True, exist_ok=True)
        self.add(*runs)

    def add(self, *runs: str) -> None:
        """Name further runs behind the endpoint."""
        self._runs.extend(run for run in runs if run not in self._runs)
        self._write()

    def discard(self, run: str) -> None:
        """A run has ended cleanly; with the last one the target goes out of service discovery."""
        if run in self._runs:
            self._runs.remove(run)
        if self._runs:
            self._write()
        else:
            self.path.unlink(missing_ok=True)

    def _write(self) -> None:
        content = [{"targets": [self._target], "labels": {"run": ",".join(self._runs)}}]
        # Prometheus reads *.json only, so it never sees the file half-written.
        unfinished = self.path.with_suffix(f".{os.getpid()}.tmp")
        unfinished.write_text(json.dumps(content, indent=2) + "\n")
        unfinished.replace(self.path)

    @staticmethod
    def reachable(address: str) -> str:
        """What others call a server bound to `address`: this machine's name where that is a wildcard."""
        return socket.gethostname() if address in ("0.0.0.0", "::", "") else address
