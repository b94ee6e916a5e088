"""The training process' side of the endpoint: sends the newest snapshot to the exporter process."""

import errno
import logging
import os
import queue
import socket
import threading
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import Future
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol
from urllib.parse import urlsplit

from prometheus_client import CollectorRegistry, GCCollector

from exporter.aggregator import RunAggregator
from exporter.child import ExporterProcess, host_and_port
from exporter.goodbye import at_goodbye, cover_worker, is_crash
from exporter.snapshot import Snapshot

DEFAULT_ADDRESS = "127.0.0.1"
DEFAULT_PORT = 9842
DEFAULT_MAX_REQUESTS = 40
DEFAULT_TEXTFILE_INTERVAL = 15.0
PUSH_JOB = "ppo_final"
"""Differs from the job of running trainers: a Pushgateway keeps a final state, and that run must not look stalled."""
_PERIOD_SECONDS = 0.1  # between two checks for a new snapshot: at most ten snapshots a second
_MOST_OF_A_CORE = 0.05  # limit for encoding snapshots of many runs, because training waits for that
_REGISTRY_SECONDS = 1.0  # between two readings of the user's registry, which has no snapshot
LONGEST_PAUSE_SECONDS = 60.0  # before the next attempt, if exporter processes end right after their start
_ANSWER_SECONDS = 5.0
_PUSH_SECONDS = 15.0  # longer than the limit of the push itself
_CLOSE_SECONDS = 5.0
_EXIT_SECONDS = 1.0
_log = logging.getLogger(__name__)


class Registry(Protocol):
    """A `prometheus_client.CollectorRegistry`, or any object with its `collect()`."""

    def collect(self) -> Iterable[Any]: ...


class MetricsServer:
    """Serves the runs of an aggregator from a separate process until `close()`; also a context manager.

    A thread sends the newest snapshot, at most ten times a second. Training never waits for it. The exporter process
    ends with this one, however this one ends. If it is killed, a new one starts on the same port. In a forked child
    the server does nothing.

    Args:
        aggregator: its newest snapshot is served.
        address: IP address or host name to bind; the default is reachable only from this machine. `::` also accepts
            IPv4 if the system supports that.
        port: TCP port; 0 takes a free one, and the attribute `port` has its number.
        process_labels: labels for every sample of a run, such as a rank.
        web_config_file: TLS, users, headers and a rate limit, in the format of Prometheus' exporter-toolkit.
        max_requests: scrapes at the same time; more get 503; 0 for no limit.
        registry: your own metrics, served beside ours. A thread of this process reads it once a second. It must answer
            quickly: snapshots wait for it.

    Attributes:
        port, scheme, url: address of the endpoint.

    Raises:
        OSError: the address cannot be bound; the message names it and the reason.
        WebConfigError: the web configuration file cannot be used.
    """

    def __init__(
        self,
        aggregator: RunAggregator,
        address: str = DEFAULT_ADDRESS,
        port: int = DEFAULT_PORT,
        process_labels: Mapping[str, str] = MappingProxyType({}),
        *,
        web_config_file: str | Path | None = None,
        max_requests: int = DEFAULT_MAX_REQUESTS,
        registry: Registry | None = None,
    ) -> None:
        if not address:
            raise OSError("cannot serve /metrics on no address; every address of this machine is 0.0.0.0, or ::")
        self.address = address
        self.port = port
        self.scheme = "http"
        self.web_config_file = None if web_config_file is None else Path(web_config_file).absolute()
        self.registry = registry
        self._aggregator = aggregator
        self._process_labels = dict(process_labels)
        self._max_requests = max_requests
        self._deliveries: list[dict[str, Any]] = []
        self._requests: queue.SimpleQueue[tuple[dict[str, Any], Future[dict[str, Any]]]] = queue.SimpleQueue()
        self._sent: Snapshot | None = None
        self._sent_at = 0.0
        self._closed = threading.Event()
        self._is_down = False
        self._pause = 0.0
        # These describe this process, so they must be read here.
        self._collectors: dict[str, Registry] = {"gc": GCCollector(CollectorRegistry())}
        if registry is not None:
            self._collectors["registry"] = registry
        self._failing: set[str] = set()
        self._given_up: Future[dict[str, Any]] | None = None
        self._pid = os.getpid()
        self._process = self._start()
        self._thread = threading.Thread(target=self._send_frames, name="ppo-exporter-link", daemon=True)
        self._thread.start()
        _open.add(self)
        cover_worker()
        try:
            self.flush()
        except BaseException:
            self.close()
            raise

    @property
    def url(self) -> str:
        return f"{self.scheme}://{host_and_port(self.address, self.port)}/metrics"

    def deliver(
        self,
        run: str,
        *,
        targets_dir: str | Path | None = None,
        target: str | None = None,
        textfile_dir: str | Path | None = None,
        textfile_interval: float = DEFAULT_TEXTFILE_INTERVAL,
    ) -> None:
        """Write a run's target file, and its text file for node_exporter, until `end()`.

        Args:
            run: name of the run.
            targets_dir: folder that Prometheus' `file_sd_configs` watches; created if missing.
            target: `host:port` in the target file; by default this server's address.
            textfile_dir: folder of node_exporter's `--collector.textfile.directory`; created if missing.
            textfile_interval: seconds between two versions of the text file, above 0.

        Raises:
            OSError: a file cannot be written, or another process writes a text file of that run; then neither file
                exists.
        """
        frame = {
            "op": "deliver",
            "run": run,
            "targets_dir": None if targets_dir is None else os.path.abspath(targets_dir),
            "target": target or host_and_port(_reachable(self.address), self.port),
            "textfile_dir": None if textfile_dir is None else os.path.abspath(textfile_dir),
            "interval": textfile_interval,
        }
        self._ask(frame, _ANSWER_SECONDS)
        self._deliveries.append(frame)

    def end(self, run: str, *, crashed: bool = False) -> None:
        """Remove the files of a run that has ended. With `crashed` they stay with its last state. Failure is logged."""
        if not any(frame["run"] == run for frame in self._deliveries):
            return
        try:
            self._ask({"op": "end", "run": run, "crashed": crashed}, _ANSWER_SECONDS)
        except OSError as error:
            _log.warning("%s; the files of run %s stay", error, run)
        finally:
            # Not earlier: if the exporter process was just killed, the next one must take over the files.
            self._deliveries = [frame for frame in self._deliveries if frame["run"] != run]

    def push(self, run: str, url: str) -> None:
        """Push the last state of `run` to the Pushgateway at `url`, replacing its group. Failure is logged."""
        self._tell({"op": "push", "run": run, "url": url}, _PUSH_SECONDS)

    def flush(self) -> None:
        """Wait until a scrape shows the aggregator's current state.

        Raises:
            OSError: the exporter process does not answer.
        """
        self._ask({}, _ANSWER_SECONDS)

    def close(self, *, crashed: bool = False) -> None:
        """End every run that has files, stop serving and free the port; a second call does nothing."""
        if self._pid != os.getpid() or self._closed.is_set():
            return
        _open.discard(self)
        try:
            for run in {frame["run"] for frame in self._deliveries}:
                self.end(run, crashed=crashed)
            if not self._process.has_ended and not self._is_silent:
                self._tell({"op": "close"}, _ANSWER_SECONDS)
        finally:
            patience = 0.0 if self._is_silent else _EXIT_SECONDS
            self._closed.set()
            self._process.kill(patience)
            self._thread.join(_CLOSE_SECONDS)
            self._process.close_pipes()

    def __enter__(self) -> "MetricsServer":
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        self.close(crashed=is_crash(error))

    @property
    def _is_silent(self) -> bool:
        """Whether a request got no answer in time, or a second Ctrl-C interrupted it: do not wait again."""
        return self._given_up is not None and not self._given_up.done()

    def _tell(self, frame: dict[str, Any], seconds: float) -> None:
        """Like `_ask`, but failure is only logged."""
        try:
            self._ask(frame, seconds)
        except OSError as error:
            _log.warning("%s", error)

    def _ask(self, frame: dict[str, Any], seconds: float) -> None:
        """Let the thread send a frame, and wait until the exporter process has executed it.

        Raises:
            OSError: the exporter process cannot do it, or there is no answer.
        """
        if self._pid != os.getpid():
            return
        if self._closed.is_set():
            raise OSError("the endpoint is closed")
        answer: Future[dict[str, Any]] = Future()
        seconds = 0 if self._is_silent else seconds
        self._requests.put((frame, answer))
        try:
            message = answer.result(seconds).get("error")
        except BaseException as error:
            self._given_up = answer
            if not isinstance(error, TimeoutError):
                raise
            message = f"the exporter process does not answer to {frame.get('op', 'state')!r}"
        if message:
            raise OSError(message)

    def _start(self) -> ExporterProcess:
        self._started_at = time.monotonic()
        process = ExporterProcess(
            self.address, self.port, self._process_labels, self.web_config_file, self._max_requests
        )
        self.port, self.scheme = process.port, process.scheme
        return process

    def _send_frames(self) -> None:
        """Send requested frames and every new snapshot, until `close()`."""
        while not self._closed.is_set():
            try:
                pause = max(_PERIOD_SECONDS, self._process.send_seconds / _MOST_OF_A_CORE)
                frame, answer = self._requests.get(timeout=pause)
            except queue.Empty:
                self._result(None)
                continue
            answer.set_result(self._result(frame))
            if frame.get("op") == "close":
                return

    def _result(self, frame: dict[str, Any] | None) -> dict[str, Any]:
        """The answer of `_exchange`, or an answer with `error` if it fails."""
        try:
            return self._exchange(frame)
        except Exception as error:
            if not self._is_down and not isinstance(error, OSError):
                _log.exception("a snapshot could not be sent to the exporter process")
            return {"error": f"the exporter process is not available: {error}"}

    def _exchange(self, frame: dict[str, Any] | None) -> dict[str, Any]:
        """Send the newest snapshot, if it is new, then `frame`, if there is one. Returns the answer to it.

        Raises:
            OSError: there is no exporter process, and none can be started.
        """
        while True:
            try:
                if self._process.has_ended:
                    raise BrokenPipeError(errno.EPIPE, "it has ended")
                self._send_news(is_needed=frame is not None)
                return self._process.send(frame) if frame else {}
            except OSError:
                if self._closed.is_set() or (frame and frame["op"] == "close"):
                    return {}
                self._restart()

    def _restart(self) -> None:
        code = self._process.wait()
        self._process.close_pipes()
        is_new = time.monotonic() < self._started_at + LONGEST_PAUSE_SECONDS
        self._pause = min(2 * self._pause + 0.5, LONGEST_PAUSE_SECONDS) if is_new else 0.0
        self._closed.wait(self._pause)
        try:
            process = self._start()
        except (OSError, ValueError) as error:
            if not self._is_down:
                _log.error("the exporter process has ended (exit code %s), and a new one cannot start: %s", code, error)
            self._is_down = True
            raise OSError(str(error)) from error
        self._process, self._sent, self._is_down = process, None, False
        _log.warning("the exporter process has ended (exit code %s); a new one serves %s", code, self.url)
        for frame in list(self._deliveries):
            self._send_news(is_needed=True)
            if message := self._process.send(frame).get("error"):
                _log.warning("%s", message)

    def _send_news(self, *, is_needed: bool) -> None:
        snapshot = self._aggregator.snapshot
        is_due = self.registry is not None and (is_needed or time.monotonic() - self._sent_at > _REGISTRY_SECONDS)
        if snapshot is self._sent and not is_due:
            return
        self._sent, self._sent_at = snapshot, time.monotonic()
        metrics = {name: self._read(name, collector) for name, collector in self._collectors.items()}
        self._process.send({"op": "state", "snapshot": snapshot.plain(), "metrics": metrics})

    def _read(self, name: str, collector: Registry) -> list[Any] | None:
        """A collector's metrics in a form that JSON can encode; None if they cannot be read."""
        try:
            families = [
                [
                    metric.name,
                    metric.documentation,
                    metric.type,
                    metric.unit,
                    [[s.name, dict(s.labels), float(s.value), _seconds(s.timestamp)] for s in metric.samples],
                ]
                for metric in collector.collect()
            ]
        except Exception:
            if name not in self._failing:
                _log.exception("the metrics of %s cannot be read; they are missing until this works", name)
            self._failing.add(name)
            return None
        self._failing.discard(name)
        return families


def check_pushgateway_url(url: str) -> None:
    """Check that `url` can be a Pushgateway's.

    Raises:
        ValueError: it cannot.
    """
    try:
        parts = urlsplit(url)
        is_usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        is_usable = False
    if not is_usable or parts.query or parts.fragment:
        raise ValueError(f"must be the URL of a Pushgateway such as http://127.0.0.1:9091, got {url!r}")
    if parts.username is not None:
        raise ValueError("a URL with a user is not supported; put a proxy that adds it before the Pushgateway")


def _reachable(address: str) -> str:
    """The address under which others reach a server bound to `address`: this machine's name for a wildcard."""
    return socket.gethostname() if address in ("0.0.0.0", "::") else address


def _seconds(timestamp: Any) -> float | None:
    return None if timestamp is None else float(timestamp)


def _close_all(crashed: bool) -> None:
    for server in list(_open):
        server.close(crashed=crashed)


_open: set[MetricsServer] = set()
at_goodbye(_close_all)
