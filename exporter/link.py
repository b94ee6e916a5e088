"""The training process' side of the endpoint: a server that hands the newest snapshot to the exporter process."""

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
"""Not the job of running trainers: a Pushgateway keeps what it was given, and a finished run must not look stalled."""
_PERIOD_SECONDS = 0.1  # between two looks for a new snapshot, so that many updates a second cost no more than ten
_MOST_OF_A_CORE = 0.05  # for snapshots of many runs, for which training has to wait
_REGISTRY_SECONDS = 1.0  # between two readings of a registry of the user's, whose values have no snapshot
LONGEST_PAUSE_SECONDS = 60.0  # before the next attempt, when exporter processes end as soon as they have started
_ANSWER_SECONDS = 5.0
_PUSH_SECONDS = 15.0  # more than the push itself may take
_CLOSE_SECONDS = 5.0
_EXIT_SECONDS = 1.0
_log = logging.getLogger(__name__)


class Registry(Protocol):
    """A `prometheus_client.CollectorRegistry`, or whatever else has its `collect()`."""

    def collect(self) -> Iterable[Any]: ...


class MetricsServer:
    """Serves the runs of an aggregator from a process of its own until `close()`; also a context manager.

    A thread hands the newest snapshot over, at most ten times a second. Training never waits for it. The exporter
    process ends with this one, however this one ends. If it is killed, another one takes its place on the same port.
    In a forked child nothing happens.

    Args:
        aggregator: whose newest snapshot is served.
        address: IP address or host name to bind; the default is reachable from this machine only. `::` takes IPv4 too
            where the system can.
        port: TCP port; 0 takes any free one, which `port` then names.
        process_labels: added to every sample of a run, such as a rank.
        web_config_file: TLS, users, headers and a rate limit, in the format of Prometheus' exporter-toolkit.
        max_requests: scrapes at a time, above which they get 503; 0 for no limit.
        registry: metrics of your own, served beside ours. It is read once a second in a thread of this process,
            and has to answer quickly: snapshots wait for it.

    Attributes:
        port, scheme, url: where it serves.

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
        # Their figures are of this process, and have to be read here.
        self._collectors: dict[str, Registry] = {"gc": GCCollector(CollectorRegistry())}
        if registry is not None:
            self._collectors["registry"] = registry
        self._failing: set[str] = set()
        self._given_up: Future[dict[str, Any]] | None = None
        self._pid = os.getpid()
        self._process = self._start()
        self._thread = threading.Thread(target=self._hand_over, name="ppo-exporter-link", daemon=True)
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
        """Announce a run by a target file, and keep it in a file for node_exporter, until `end()`.

        Args:
            run: name of the run.
            targets_dir: folder that Prometheus' `file_sd_configs` watches; created if missing.
            target: `host:port` that the target file names; by default where this server is reachable.
            textfile_dir: folder of node_exporter's `--collector.textfile.directory`; created if missing.
            textfile_interval: seconds between two versions of that file, above 0.

        Raises:
            OSError: a file cannot be written, or another process writes a text file of that run; then there is none
                of both.
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
        """The run has ended: remove its files. With `crashed` they stay, with its last state. Failure is logged."""
        if not any(frame["run"] == run for frame in self._deliveries):
            return
        try:
            self._ask({"op": "end", "run": run, "crashed": crashed}, _ANSWER_SECONDS)
        except OSError as error:
            _log.warning("%s; files of run %s stay as they are", error, run)
        finally:
            # Not before: of a process that has just been killed another one has to take the files over.
            self._deliveries = [frame for frame in self._deliveries if frame["run"] != run]

    def push(self, run: str, url: str) -> None:
        """Replace what the Pushgateway at `url` has of `run` by its last state. Failure is logged."""
        self._tell({"op": "push", "run": run, "url": url}, _PUSH_SECONDS)

    def flush(self) -> None:
        """Wait until a scrape shows what the aggregator has now.

        Raises:
            OSError: the exporter process does not answer.
        """
        self._ask({}, _ANSWER_SECONDS)

    def close(self, *, crashed: bool = False) -> None:
        """End every run that has files, as `end()` does, stop serving and free the port; harmless the second time."""
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
        """Whether it has been waited for in vain, or a second Ctrl-C ends its push: it is not waited for again."""
        return self._given_up is not None and not self._given_up.done()

    def _tell(self, frame: dict[str, Any], seconds: float) -> None:
        """Like `_ask`, where failure must not end a run."""
        try:
            self._ask(frame, seconds)
        except OSError as error:
            _log.warning("%s", error)

    def _ask(self, frame: dict[str, Any], seconds: float) -> None:
        """Send a frame by the thread, and wait until the exporter process has done what it asks for.

        Raises:
            OSError: it cannot be done, or there is no answer.
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

    def _hand_over(self) -> None:
        """Send what is asked for, and every new snapshot, until `close()`."""
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
        """As `_exchange`, with `error` in the answer where that fails."""
        try:
            return self._exchange(frame)
        except Exception as error:
            if not self._is_down and not isinstance(error, OSError):
                _log.exception("a snapshot could not be handed to the exporter process")
            return {"error": f"the exporter process is not to be had: {error}"}

    def _exchange(self, frame: dict[str, Any] | None) -> dict[str, Any]:
        """Send the newest snapshot if there is one, then `frame` if there is one; the answer to it.

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
                _log.error(
                    "the exporter process has ended (exit code %s), and no other can be started: %s", code, error
                )
            self._is_down = True
            raise OSError(str(error)) from error
        self._process, self._sent, self._is_down = process, None, False
        _log.warning("the exporter process has ended (exit code %s); another one serves %s", code, self.url)
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
        """The metrics of a collector as JSON can say them; None where they cannot be read."""
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
                _log.exception("the metrics of %s cannot be read; they are missing until they can", name)
            self._failing.add(name)
            return None
        self._failing.discard(name)
        return families


def check_pushgateway_url(url: str) -> None:
    """Check that a final state could be pushed there.

    Raises:
        ValueError: it is no URL of a Pushgateway.
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
    """What others call a server bound to `address`: this machine's name where that is a wildcard."""
    return socket.gethostname() if address in ("0.0.0.0", "::") else address


def _seconds(timestamp: Any) -> float | None:
    return None if timestamp is None else float(timestamp)


def _close_all(crashed: bool) -> None:
    for server in list(_open):
        server.close(crashed=crashed)


_open: set[MetricsServer] = set()
at_goodbye(_close_all)
