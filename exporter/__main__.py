"""`python -m exporter`: the exporter process. A training process starts it and hands it snapshots on standard input."""

import argparse
import contextlib
import json
import logging
import os
import signal
import socket
import struct
import sys
import threading
import time
from pathlib import Path
from typing import Any, BinaryIO

from exporter.link import (
    DEFAULT_ADDRESS,
    DEFAULT_MAX_REQUESTS,
    DEFAULT_PORT,
    PROTOCOL_VERSION,
    WebConfigError,
    host_and_port,
)
from exporter.serving.application import Application
from exporter.serving.deliveries import Deliveries
from exporter.serving.server import serve
from exporter.serving.state import State
from exporter.serving.web_config import WebConfigFile

_BACKLOG = 512
_PARENT_SECONDS = 0.2  # between two looks whether the training process is there
_MOST_DESCRIPTORS = 1024
_MOST_BYTES = 1 << 30
_log = logging.getLogger("exporter")


def main() -> int:
    """Serve until the training process says goodbye or has gone. Returns the exit code."""
    arguments = _parser().parse_args()
    if sys.stdin is None or sys.stdin.isatty():
        _parser().error("a training process starts this, see README.md; there is nothing to serve without one")
    # Whatever else prints must not come between the answers.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb", buffering=0)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    logging.basicConfig(format="%(message)s")
    _become_humble()
    try:
        web_config = None if arguments.web_config_file is None else WebConfigFile(arguments.web_config_file)
        listener = _listen(arguments.address, arguments.port)
    except WebConfigError as error:
        _answer(answers, kind="web config", error=str(error))
        return 1
    except OSError as error:
        _answer(answers, kind="address", error=str(error))
        return 1
    scheme = "https" if web_config is not None and web_config.is_tls else "http"
    _answer(answers, port=listener.getsockname()[1], scheme=scheme)
    if hasattr(os, "nice"):
        os.nice(19)
    state = State(json.loads(arguments.labels))
    deliveries = Deliveries(state, scheme)
    threading.Thread(target=_watch_parent, args=(deliveries,), name="parent", daemon=True).start()
    threading.Thread(target=_take_frames, args=(state, deliveries, answers), name="frames", daemon=True).start()
    state.has_come.wait()  # until then clients wait for the connection's first answer
    serve(Application(state, web_config, arguments.max_requests, os.getppid()), listener, web_config)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m exporter",
        description="Serve the metrics of a training process, which starts this and ends it.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--address", default=DEFAULT_ADDRESS, help="address to bind")
    parser.add_argument("--port", type=int, default=DEFAULT_PORT, help="port to bind; 0 takes any free one")
    parser.add_argument(
        "--web.config.file", dest="web_config_file", type=Path, help="TLS, users, headers and a rate limit"
    )
    parser.add_argument(
        "--max-requests", type=int, default=DEFAULT_MAX_REQUESTS, help="scrapes at a time; 0 for no limit"
    )
    parser.add_argument("--labels", default="{}", help="JSON object of labels that every sample of a run gets")
    return parser


def _become_humble() -> None:
    """Leave signals to the training process, bound what clients can use up, and write files that others can read."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    os.umask(0o022)
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        for kind, most in ((resource.RLIMIT_NOFILE, _MOST_DESCRIPTORS), (resource.RLIMIT_DATA, _MOST_BYTES)):
            hard = resource.getrlimit(kind)[1]
            most = most if hard == resource.RLIM_INFINITY else min(most, hard)
            resource.setrlimit(kind, (most, hard))


def _listen(address: str, port: int) -> socket.socket:
    """A listening socket; `::` takes IPv4 too where the system can.

    Raises:
        OSError: the address cannot be bound; the message names it and the reason.
    """
    try:
        family, *_, name = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        both = family == socket.AF_INET6 and name[0] == "::" and socket.has_dualstack_ipv6()
        return socket.create_server(name, family=family, backlog=_BACKLOG, dualstack_ipv6=both)
    except (OSError, OverflowError, UnicodeError) as error:
        # The standard library adds the address to strerror, which is there already.
        reason = os.strerror(error.errno) if (getattr(error, "errno", None) or 0) > 0 else error
        raise OSError(f"cannot serve /metrics on {host_and_port(address, port)}: {reason}") from error


def _watch_parent(deliveries: Deliveries) -> None:
    """Leave when the training process has gone, though a child that it forked still holds the pipe."""
    parent = os.getppid()
    while os.getppid() == parent:
        time.sleep(_PARENT_SECONDS)
    deliveries.leave_behind()
    os._exit(0)


def _take_frames(state: State, deliveries: Deliveries, answers: BinaryIO) -> None:
    """Do what frames ask for, one after the other, until the pipe ends."""
    pipe = sys.stdin.buffer
    while len(head := pipe.read(4)) == 4:
        body = pipe.read(struct.unpack("!I", head)[0])
        try:
            frame = json.loads(body)
            if frame["version"] != PROTOCOL_VERSION:
                raise ValueError(f"it has version {frame['version']!r}, and this program reads {PROTOCOL_VERSION}")
            _do(state, deliveries, frame)
        except OSError as error:
            _answer(answers, error=str(error))
        except Exception as error:
            _log.exception("a frame of the training process cannot be read, and is skipped")
            _answer(answers, error=f"the exporter process cannot do that: {error!r}")
        else:
            _answer(answers)
            if frame["op"] == "close":
                os._exit(0)
    deliveries.leave_behind()
    os._exit(0)


def _do(state: State, deliveries: Deliveries, frame: dict[str, Any]) -> None:
    match frame["op"]:
        case "state":
            state.take(frame)
        case "deliver":
            deliveries.add(frame)
        case "end":
            deliveries.end(frame["run"], crashed=frame["crashed"])
        case "push":
            deliveries.push(frame["run"], frame["url"])
        case "close":
            deliveries.end_all(crashed=frame["crashed"])
        case other:
            raise ValueError(f"there is no operation {other!r}")


def _answer(answers: BinaryIO, **content: Any) -> None:
    with contextlib.suppress(OSError):  # the training process has gone; its pipe says so next
        answers.write(json.dumps(content).encode() + b"\n")


if __name__ == "__main__":
    sys.exit(main())
