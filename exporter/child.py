"""The exporter process from its parent's side: start it, send it frames, end it.

A frame is four bytes of length (big-endian) and a JSON object with `version` and `op`; `state` frames carry the newest
snapshot. The process answers each frame with one line of JSON before the next is sent, so nothing queues.
"""

import contextlib
import errno
import json
import os
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PROTOCOL_VERSION = 2
_START_SECONDS = 60.0


class WebConfigError(ValueError):
    """The web configuration file cannot be used; the message names it and the key."""


def host_and_port(address: str, port: int) -> str:
    """`address:port`, with brackets around an IPv6 address."""
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


class ExporterProcess:
    """A running `python -m exporter` that has bound its address; arguments are those of `MetricsServer`.

    Attributes:
        port, scheme: of its URL.
        send_seconds: CPU time for encoding the last frame as JSON.

    Raises:
        OSError: the address cannot be bound, or the process does not start; the message says why.
        WebConfigError: the web configuration file cannot be used.
    """

    def __init__(
        self,
        address: str,
        port: int,
        process_labels: Mapping[str, str],
        web_config_file: Path | None,
        max_requests: int,
    ) -> None:
        command = [sys.executable, "-P", "-m", "exporter", "--address", address, "--port", str(port)]
        command += ["--max-requests", str(max_requests), "--labels", json.dumps(dict(process_labels))]
        if web_config_file is not None:
            command += ["--web.config.file", str(web_config_file)]
        self._process = subprocess.Popen(
            command,
            bufsize=0,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": _import_path()},
            # Keep the terminal's Ctrl-C away from it. Not a new session: where the kernel groups processes by session,
            # that would double its share of the CPU.
            process_group=0 if os.name == "posix" else None,
        )
        assert self._process.stdin is not None and self._process.stdout is not None  # pipes, as requested above
        self._stdin, self._stdout = self._process.stdin, self._process.stdout
        self.send_seconds = 0.0
        answer = self._first_answer()
        if answer is None or "error" in answer:
            self.close_pipes()
            code = self.wait()
            if answer is None:
                where = host_and_port(address, port)
                raise OSError(f"cannot serve /metrics on {where}: the exporter process ended with exit code {code}")
            raise (WebConfigError if answer["kind"] == "web config" else OSError)(answer["error"])
        self.port: int = answer["port"]
        self.scheme: str = answer["scheme"]

    @property
    def has_ended(self) -> bool:
        return self._process.poll() is not None

    def send(self, frame: Mapping[str, Any]) -> dict[str, Any]:
        """Send a frame. Returns the answer.

        Raises:
            OSError: the process has ended.
        """
        started = time.thread_time()
        body = json.dumps({"version": PROTOCOL_VERSION, **frame}).encode()
        self.send_seconds = time.thread_time() - started
        unsent = memoryview(struct.pack("!I", len(body)) + body)
        while unsent:
            unsent = unsent[self._stdin.write(unsent) :]
        if line := self._stdout.readline():
            answer: dict[str, Any] = json.loads(line)
            return answer
        raise BrokenPipeError(errno.EPIPE, "it has ended")

    def wait(self) -> int:
        """Wait until it has ended. Returns the exit code."""
        return self._process.wait()

    def kill(self, after_seconds: float = 0.0) -> None:
        """Kill it, unless it ends by itself within `after_seconds`."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(after_seconds)
        self._process.kill()
        self._process.wait()

    def close_pipes(self) -> None:
        """Close the pipes; call it when no more frames are sent."""
        self._stdin.close()
        self._stdout.close()

    def _first_answer(self) -> dict[str, Any] | None:
        """Its port and scheme, or `error` and its `kind`; None if the process ends without an answer."""
        watchdog = threading.Timer(_START_SECONDS, self._process.kill)
        watchdog.start()
        line = b""
        try:
            line = self._stdout.readline()
            answer: dict[str, Any] | None = json.loads(line or b"null")
            return answer
        except ValueError:
            self._process.kill()
            return {
                "error": f"the exporter process did not start: {line.decode(errors='replace').strip()}",
                "kind": "",
            }
        except BaseException:
            self._process.kill()
            raise
        finally:
            watchdog.cancel()


def _import_path() -> str:
    """PYTHONPATH with which the exporter process can import the same modules."""
    # Put the script's own folder last, so that no file in it hides a library.
    script = getattr(sys.modules["__main__"], "__file__", None) or ""
    last = (os.getcwd(), os.path.dirname(os.path.abspath(script)))
    return os.pathsep.join(sorted((str(entry) or last[0] for entry in sys.path), key=last.__contains__))
