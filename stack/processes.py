"""Child processes that end with their parent, however it ends, and the signal that asks for the end."""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

START_TIMEOUT = 120.0  # seconds; a cold import of torch from a slow disk is slow
POLL_INTERVAL = 0.2  # seconds
_PR_SET_PDEATHSIG = 1
# Load it here: little is safe between fork and exec.
_libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


class StopRequested(Exception):
    """A signal has requested the end."""


class StopSignal:
    """The first signal that requests the end; `number` is None until it comes. Create it in the main thread.

    The handlers stay until the process ends: a second Ctrl-C must not interrupt the clean-up.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self._on_signal)

    def check(self) -> None:
        """Raise StopRequested if a signal has come."""
        if self.number is not None:
            raise StopRequested

    def _on_signal(self, number: int, frame: object) -> None:
        self.number = self.number or number


class ChildProcess:
    """A command in a process group of its own, so that Ctrl-C in the terminal reaches only the runner.

    Start it from the main thread: the kernel kills it when the thread that started it ends.

    Args:
        name: its name in messages.
        command: executable and arguments.
        ready_url: answers with status 200 when the process is ready.
        output, errors: files for stdout and stderr, emptied first; None inherits the terminal. Without
            `errors`, stderr goes to `output`.
        environment: added to the current one.

    Raises:
        OSError: the command cannot be started.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str | Path],
        ready_url: str,
        output: Path | None = None,
        errors: Path | None = None,
        environment: Mapping[str, str] | None = None,
        directory: Path | None = None,
    ) -> None:
        self.name = name
        self.log = errors or output
        self._ready_url = ready_url
        runner = os.getpid()

        def end_with_runner() -> None:
            # Allow writing to the terminal from the background, even under `stty tostop`.
            signal.signal(signal.SIGTTOU, signal.SIG_IGN)
            if _libc is not None:
                _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
                if os.getppid() != runner:  # the runner died before the line above
                    os._exit(1)

        self._process = subprocess.Popen(
            [str(part) for part in command],
            stdin=subprocess.DEVNULL,
            stdout=_emptied(output),
            stderr=_emptied(errors) if errors else subprocess.STDOUT if output else None,
            env={**os.environ, **(environment or {})},
            cwd=directory,
            process_group=0,
            preexec_fn=end_with_runner,
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """The exit code as in a shell (128 + signal number); None while the process runs."""
        code = self._process.poll()
        return code if code is None or code >= 0 else 128 - code

    @property
    def is_ready(self) -> bool:
        try:
            with _opener.open(self._ready_url, timeout=2) as answer:
                return answer.status == 200
        except (OSError, ValueError):
            return False

    def log_tail(self, lines: int = 12) -> str:
        """The last lines of its log, indented; empty if the process writes to the terminal."""
        if self.log is None:
            return ""
        content = self.log.read_text(errors="replace").splitlines()
        return "".join(f"    {line}\n" for line in content[-lines:])

    def send(self, number: int) -> None:
        """Send a signal to the process and its own children."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, number)

    def stop(self, number: int = signal.SIGTERM, seconds: float = 10.0) -> None:
        """Send a signal, and kill the process group after `seconds`."""
        if self.exit_code is not None:
            return  # another process may have its PID by now
        self.send(number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)
        # Also kill children that it left in its group.
        self.send(signal.SIGKILL)
        self._process.wait()


# Ignore proxies from the environment for 127.0.0.1.
_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def _emptied(path: Path | None) -> IO[bytes] | None:
    if path is None:
        return None
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"")
    # Append, so that others may write to the same file.
    return path.open("ab")
