"""Alertmanager webhook receiver: prints each alert and appends each notification to a file.

The file holds one webhook JSON a line, in order of arrival.
"""

import argparse
import json
import os
import signal
import sys
import threading
import time
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

DEFAULT_PORT = 9843
LARGEST_BODY = 16 * 2**20
PRINTED_ALERTS = 10  # of one notification; the file has all
_RED, _GREEN, _BOLD, _DIM, _RESET = "\x1b[1;31m", "\x1b[1;32m", "\x1b[1m", "\x1b[2m", "\x1b[0m"


class NotificationLog:
    """JSONL file; `append` adds a complete line, which is on disk when it returns.

    Args:
        path: the file; its folder is created. An incomplete last line, left by a crash, is removed.

    Raises:
        OSError: the file cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a+b", buffering=0)
        self._file.seek(0)
        content = self._file.read()
        if content and not content.endswith(b"\n"):
            self._file.truncate(content.rfind(b"\n") + 1)

    def append(self, notification: dict[str, Any]) -> None:
        line = json.dumps(notification, separators=(",", ":")).encode() + b"\n"
        end = os.fstat(self._file.fileno()).st_size
        try:
            written = self._file.write(line)
            if written != len(line):
                raise OSError(f"only {written} of {len(line)} bytes could be written")
            os.fsync(self._file.fileno())
        except OSError:
            self._file.truncate(end)
            raise


def alert_lines(alert: dict[str, Any], color: bool) -> list[str]:
    """One alert of a webhook for people: headline and, while it fires, description.

    Control characters, which labels may contain, are escaped.
    """
    labels, annotations = alert.get("labels", {}), alert.get("annotations", {})
    status = str(alert.get("status", "firing")).upper()
    paint = (_GREEN if status == "RESOLVED" else _RED, _BOLD, _DIM, _RESET) if color else ("", "", "", "")
    status_color, bold, dim, reset = paint
    headline = [
        time.strftime("%H:%M:%S"),
        f"{status_color}{_harmless(status):<8}{reset}",
        f"{bold}{_harmless(labels.get('alertname', '(no alertname)'))}{reset}",
        *(f"{name}={_harmless(labels[name])}" for name in ("severity", "run") if name in labels),
        _harmless(annotations.get("summary", "")),
    ]
    lines = ["  ".join(filter(None, headline))]
    # A description is true only while the alert fires.
    if status != "RESOLVED" and (description := _harmless(annotations.get("description", ""))):
        lines.append(f"          {dim}{description}{reset}")
    return lines


def notification_lines(notification: dict[str, Any], color: bool) -> list[str]:
    """`alert_lines` of the first ten alerts of a webhook, and the number of alerts if there are more."""
    alerts = notification["alerts"]
    lines = [line for alert in alerts[:PRINTED_ALERTS] for line in alert_lines(alert, color)]
    if len(alerts) > PRINTED_ALERTS:
        lines.append(f"          ... {len(alerts)} alerts in this notification")
    return lines


def _harmless(text: object) -> str:
    """`text` on one line, with every control character escaped."""
    words = " ".join(str(text).split(" ")).replace("\r\n", "\n").replace("\n", " ").strip()
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in words)


def _checked(body: bytes) -> dict[str, Any]:
    """The webhook in `body`.

    Raises:
        ValueError: not JSON, or not in Alertmanager's form.
    """
    try:
        notification = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}") from error
    alerts = notification.get("alerts") if isinstance(notification, dict) else None
    if not isinstance(alerts, list) or not all(isinstance(alert, dict) for alert in alerts):
        raise ValueError("expected an object with a list `alerts`, as Alertmanager's webhook sends it")
    for alert in alerts:
        for field in ("labels", "annotations"):
            if not isinstance(alert.get(field, {}), dict):
                raise ValueError(f"`{field}` of an alert must be an object")
    return notification


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 60  # seconds without a request before an idle connection is closed
    log: NotificationLog
    color: bool
    lock: threading.Lock

    def do_GET(self) -> None:
        if self.path == "/-/healthy":
            self._answer(HTTPStatus.OK, "receiver is healthy")
        elif self.path == "/":
            self._answer(HTTPStatus.METHOD_NOT_ALLOWED, "notifications are sent with POST", allow="POST")
        else:
            self._answer(HTTPStatus.NOT_FOUND, "only POST / and GET /-/healthy")

    def do_POST(self) -> None:
        try:
            length = int(self.headers["Content-Length"])
        except (TypeError, ValueError):
            self.close_connection = True
            self._answer(HTTPStatus.LENGTH_REQUIRED, "Content-Length is missing")
            return
        if not 0 <= length <= LARGEST_BODY:
            self.close_connection = True
            self._answer(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"at most {LARGEST_BODY} bytes")
            return
        body = self.rfile.read(length)
        if self.path != "/":
            self._answer(HTTPStatus.NOT_FOUND, "only POST / and GET /-/healthy")
            return
        try:
            notification = _checked(body)
        except ValueError as error:
            self._answer(HTTPStatus.BAD_REQUEST, str(error))
            return
        lines = notification_lines(notification, self.color)
        with self.lock:
            try:
                self.log.append(notification)
            except OSError as error:
                # Alertmanager retries after a 5xx.
                self._answer(HTTPStatus.INTERNAL_SERVER_ERROR, f"cannot write the notification: {error}")
                return
            for line in lines:
                print(line, flush=True)
        self._answer(HTTPStatus.OK, "received")

    def _answer(self, status: HTTPStatus, text: str, allow: str | None = None) -> None:
        content = text.encode(errors="replace") + b"\n"
        self.send_response(status)
        self.send_header("Content-Type", "text/plain; charset=utf-8")
        self.send_header("Content-Length", str(len(content)))
        if allow:
            self.send_header("Allow", allow)
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(content)

    def log_request(self, code: object = "-", size: object = "-") -> None:
        if isinstance(code, HTTPStatus) and code >= HTTPStatus.BAD_REQUEST:
            super().log_request(code, size)


class _Server(ThreadingHTTPServer):
    # The process finishes its requests before it ends; idle connections do not delay the end.
    daemon_threads = True


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m stack.receiver",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--address", default="127.0.0.1", help="IP address to listen on")
    parser.add_argument("--port", type=int, default=DEFAULT_PORT, help="TCP port; 0 takes any free one")
    parser.add_argument("--output", type=Path, default=Path(".stack/notifications.jsonl"), help="JSON lines file")
    parser.add_argument("--color", choices=["auto", "always", "never"], default="auto", help="auto: on a terminal")
    options = parser.parse_args(arguments)
    try:
        log = NotificationLog(options.output)
    except OSError as error:
        print(f"error: cannot write {options.output}: {error.strerror}", file=sys.stderr)
        return 1
    color = options.color == "always" or (
        options.color == "auto" and sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    )
    handler = type("Handler", (_Handler,), {"log": log, "color": color, "lock": threading.Lock()})
    try:
        server = _Server((options.address, options.port), handler)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        address = f"{options.address}:{options.port}"
        print(f"error: cannot listen on {address} (--address, --port): {reason}", file=sys.stderr)
        return 1
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with server:
        print(f"listening on http://{options.address}:{server.server_port}/", file=sys.stderr, flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            with handler.lock:  # wait until a notification is completely written
                pass
    return 0


if __name__ == "__main__":
    sys.exit(main())
