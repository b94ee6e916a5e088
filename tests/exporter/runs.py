"""Processes with a run, for tests of its deliveries."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from conftest import GENTLY, wait_until

from stack.servers import ROOT

TINY = ("--num-envs", "4", "--rollout-steps", "16", "--minibatch-size", "32", "--checkpoint-every", "0")
# Each line that it reads is an update; the end of its standard input is its own.
SCRIPT = """
import sys
from endpoint import UPDATE, trained_aggregator
from exporter import MetricsServer, emit_ppo_update
aggregator = trained_aggregator()
server = MetricsServer(aggregator, port=0)
server.deliver("r", targets_dir=sys.argv[1], textfile_dir=sys.argv[1], textfile_interval=3600)
print(server.port, flush=True)
for line in sys.stdin:
    emit_ppo_update(UPDATE, run="r", handler=aggregator)
    server.flush()
    print("updated", flush=True)
"""


class Script:
    """A process that keeps target file and text file of a run `r` in a folder, and is never in a hurry to write."""

    def __init__(self, process: subprocess.Popen) -> None:
        self._process = process
        self.port = int(process.stdout.readline())

    def update(self) -> None:
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        assert self._process.stdout.readline() == "updated\n"

    def end(self) -> None:
        self._process.stdin.close()
        assert self._process.wait(20) == 0

    def kill(self) -> None:
        """Kill it, and wait until its exporter process has left too."""
        self._process.kill()
        self._process.wait()
        wait_until(self._is_gone, "nobody listens on its port")

    def _is_gone(self) -> bool:
        with socket.socket() as client:
            return client.connect_ex(("127.0.0.1", self.port)) != 0


@contextmanager
def script(folder: Path, umask: int = -1) -> Iterator[Script]:
    paths = os.pathsep.join((str(ROOT), str(Path(__file__).parent)))
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPT, folder],
        env={**os.environ, "PYTHONPATH": paths},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        umask=umask,
    ) as process:
        try:
            yield Script(process)
        finally:
            process.kill()


def arguments(run: str, folder: Path, *flags: str | Path) -> list[str | Path]:
    """Of a trainer that keeps its target file and its text file in a folder."""
    places = ["--targets-dir", folder, "--textfile-dir", folder, "--textfile-interval", "0.2"]
    return ["--run", run, "--metrics-port", "0", *TINY, *places, *flags]


@contextmanager
def trainer(run: str, folder: Path, *flags: str | Path) -> Iterator[subprocess.Popen]:
    """A process that trains so."""
    command = [*GENTLY, sys.executable, "-m", "trainer", *arguments(run, folder, *flags)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def exporter_process() -> int:
    """Process id of the exporter process that this one has started last."""
    children = [pid for path in Path("/proc/self/task").glob("*/children") for pid in path.read_text().split()]
    return max(int(pid) for pid in children if b"exporter" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0"))


def names(folder: Path) -> set[str]:
    """All but the locks: what Prometheus and node_exporter may look at."""
    return {path.name for path in folder.iterdir() if not path.name.startswith(".")}


def let_age(path: Path, seconds: float) -> None:
    os.utime(path, (time.time() - seconds,) * 2)
