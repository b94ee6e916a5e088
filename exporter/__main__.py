"""`python -m exporter`: the exporter process. A training process starts it and sends it snapshots on standard input.

`python -m exporter calibrate` is a command for people: exporter/calibrate.
"""

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
from collections.abc import Callable
from pathlib import Path
from typing import Any

from exporter.child import PROTOCOL_VERSION, WebConfigError, host_and_port
from exporter.link import DEFAULT_ADDRESS, DEFAULT_MAX_REQUESTS, DEFAULT_PORT
from exporter.serving.access import Access
from exporter.serving.application import Application
from exporter.serving.deliveries import Deliveries
from exporter.serving.server import BACKLOG, serve
from exporter.serving.state import State
from exporter.serving.web_config import WebConfigFile

_PARENT_SECONDS = 0.2  # between two checks that the training process exists
_LAST_WRITE_SECONDS = 0.5
_MOST_DESCRIPTORS = 1024
_MOST_BYTES = 1 << 30
_leaving = threading.Lock()
_log = logging.getLogger("exporter")


def main() -> int:
    """Serve until the training process closes the endpoint or is gone. Returns the exit code."""
    if sys.argv[1:2] == ["calibrate"]:
        from exporter import calibrate

        return calibrate.main(sys.argv[2:])
    parent = os.getppid()
    parser = _parser()
    arguments = parser.parse_args()
    if sys.stdin is None or sys.stdin.isatty():
        parser.error("a training process starts this, see README.md; without one there is nothing to serve")
    # Keep other output out of the answers.
    answers = os.dup(1)
    os.dup2(2, 1)
    logging.basicConfig(format="%(message)s")
    _restrain()
    try:
        web_config = None if arguments.web_config_file is None else WebConfigFile(arguments.web_config_file)
        listener = _listen(arguments.address, arguments.port)
    except (WebConfigError, OSError) as error:
        _answer(answers, kind="web config" if isinstance(error, WebConfigError) else "address", error=str(error))
        return 1
    scheme = "https" if web_config is not None and web_config.context is not None else "http"
    _answer(answers, port=listener.getsockname()[1], scheme=scheme)
    access = Access(web_config)
    if hasattr(os, "nice"):
        os.nice(19)
    state = State(json.loads(arguments.labels))
    deliveries = Deliveries(state, scheme)
    threading.Thread(target=_watch_parent, args=(parent, deliveries), daemon=True).start()
    threading.Thread(target=_take_frames, args=(state, deliveries, answers), daemon=True).start()
    state.has_come.wait()  # until then clients wait in the backlog
    try:
        serve(Application(state, access, arguments.max_requests, parent), listener, web_config)
    except BaseException:
        _log.exception("the exporter process cannot serve")
    os._exit(1)  # the threads would keep the interpreter running


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m exporter",
        description="Serve the metrics of a training process, which starts this program and ends it.",
        epilog="`python -m exporter calibrate --help`: thresholds from healthy runs; needs no training process.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--address", default=DEFAULT_ADDRESS, help="address to bind")
    add("--port", type=int, default=DEFAULT_PORT, help="port to bind; 0 takes any free one")
    add("--web.config.file", dest="web_config_file", type=Path, help="file with TLS, users, headers and a rate limit")
    add("--max-requests", type=int, default=DEFAULT_MAX_REQUESTS, help="scrapes at the same time; 0 for no limit")
    add("--labels", default="{}", help="JSON object of labels that every sample of a run gets")
    return parser


def _restrain() -> None:
    """Leave signals to the training process, limit resources, and make files readable for others."""
    # SIGTTOU: it runs in the background, so under `stty tostop` its own output would stop it.
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGTTOU"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    os.umask(0o022)
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        for kind, most in ((resource.RLIMIT_NOFILE, _MOST_DESCRIPTORS), (resource.RLIMIT_DATA, _MOST_BYTES)):
            hard = resource.getrlimit(kind)[1]
            resource.setrlimit(kind, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


def _listen(address: str, port: int) -> socket.socket:
    """A listening socket; `::` also accepts IPv4 if the system supports that.

    Raises:
        OSError: the address cannot be bound; the message names it and the reason.
    """
    try:
        if not 0 <= port <= 65535:
            raise OverflowError("a port is 0 to 65535")  # the look-up would use the port modulo 65536
        family, *_, name = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        is_dual = family == socket.AF_INET6 and name[0] == "::" and socket.has_dualstack_ipv6()
        return socket.create_server(name, family=family, backlog=BACKLOG, dualstack_ipv6=is_dual)
    except (OSError, OverflowError, UnicodeError) as error:
        # The standard library's strerror repeats the address: use the system's text.
        code = error.errno if isinstance(error, OSError) else None
        reason = os.strerror(code) if code is not None and code > 0 else error
        raise OSError(f"cannot serve /metrics on {host_and_port(address, port)}: {reason}") from error


def _watch_parent(parent: int, deliveries: Deliveries) -> None:
    """End when the training process is gone, even if a child that it forked still holds the pipe."""
    while os.getppid() == parent:
        time.sleep(_PARENT_SECONDS)
    _leave(deliveries)


def _take_frames(state: State, deliveries: Deliveries, answers: int) -> None:
    """Execute frames, one after the other, until the pipe ends."""
    operations: dict[str, Callable[..., None]] = {
        "state": state.take,
        "deliver": deliveries.add,
        "end": deliveries.end,
        "push": deliveries.push,
        "close": lambda: None,
    }
    try:
        pipe = sys.stdin.buffer
        while len(head := pipe.read(4)) == 4:
            length = struct.unpack("!I", head)[0]
            if len(body := pipe.read(length)) < length:
                break
            try:
                frame = json.loads(body)
                if (version := frame.pop("version")) != PROTOCOL_VERSION:
                    raise ValueError(f"it has version {version!r}, and this program reads {PROTOCOL_VERSION}")
                operation = frame.pop("op")
                operations[operation](**frame)
            except OSError as error:
                _answer(answers, error=str(error))
            except Exception as error:
                _log.exception("a frame of the training process cannot be read, and is skipped")
                _answer(answers, error=f"the exporter process cannot do that: {error!r}")
            else:
                _answer(answers)
                if operation == "close":
                    os._exit(0)
    finally:
        _leave(deliveries)


def _leave(deliveries: Deliveries) -> None:
    """The training process is gone without `close`: write its last state, if its folders answer."""
    _leaving.acquire()  # a second caller must not end the process while the first one writes
    writing = threading.Thread(target=deliveries.end_all, kwargs={"crashed": True}, daemon=True)
    writing.start()
    writing.join(_LAST_WRITE_SECONDS)
    os._exit(0)


def _answer(answers: int, **content: Any) -> None:
    with contextlib.suppress(OSError):  # the training process is gone; the pipe will show it
        os.write(answers, json.dumps(content).encode() + b"\n")


if __name__ == "__main__":
    sys.exit(main())
