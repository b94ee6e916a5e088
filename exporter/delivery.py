"""Ways to deliver a run other than being scraped: a file for node_exporter, and a push to a Pushgateway at the end."""

import contextlib
import errno
import fcntl
import glob
import logging
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from urllib.error import HTTPError
from urllib.parse import quote, urlsplit

from prometheus_client import push_to_gateway, write_to_textfile
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from exporter.aggregator import RunAggregator
from exporter.metrics import METRIC_FAMILIES, RUN_LABEL

DEFAULT_TEXTFILE_INTERVAL = 15.0
PUSH_JOB = "ppo_final"
"""Not the job of running trainers: a Pushgateway keeps what it was given, and a finished run must not look stalled."""
PUSH_TIMEOUT_SECONDS = 10.0
_MOST_OF_A_BODY = 500
_CLOSE_SECONDS = 5.0
_LOCK_TRIES = 10
_LONGEST_NAME = 200  # with what is added while it is written, below the 255 bytes of common file systems
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Run(Collector):
    """The families of one run, and nothing of its process, which node_exporter and Pushgateway have of their own."""

    aggregator: RunAggregator
    run: str
    labels: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))

    def collect(self) -> Iterator[Metric]:
        run = self.aggregator.snapshot.runs.get(self.run)
        for family in METRIC_FAMILIES:
            if family.is_per_run:
                yield family.collect([] if run is None else [run], self.labels)


class Textfile:
    """A run in a file for node_exporter's textfile collector, rewritten by a thread until `close()`.

    The file is replaced whole and never open between two writes. It is rewritten even when nothing has changed: its
    age then says whether the process is alive, and `ppo_last_update_timestamp_seconds` in it whether it trains. The
    name follows from the run (and its labels) alone, so a restarted run goes on in its own file, and any number of
    runs with names of their own share a folder. What fails after the first write is logged once and tried again. In
    a forked child nothing happens.

    Args:
        directory: the one of node_exporter's `--collector.textfile.directory`; created if missing.
        aggregator: whose snapshot is written.
        run: name of the run.
        labels: added to every sample, such as a rank.
        interval: seconds between two writes.

    Raises:
        OSError: the folder or the file cannot be written, or another process writes a run of that name there.
        ValueError: `interval` is not above 0.
    """

    def __init__(
        self,
        directory: str | Path,
        aggregator: RunAggregator,
        run: str,
        labels: Mapping[str, str] = MappingProxyType({}),
        *,
        interval: float = DEFAULT_TEXTFILE_INTERVAL,
    ) -> None:
        if not interval > 0:
            raise ValueError(f"interval must be above 0, got {interval}")
        # Two runs must not meet in one file, so what a file name cannot hold is escaped, not replaced.
        name = "".join([f"ppo-{quote(run, safe='')}", *(f",{key}={quote(text)}" for key, text in labels.items())])
        if len(name) > _LONGEST_NAME:
            raise OSError(errno.ENAMETOOLONG, "the name of the run is too long for that of a file")
        self.path = Path(directory).resolve() / f"{name}.prom"
        self._collector = _Run(aggregator, run, labels)
        self._interval = interval
        self._is_failing = False
        self._pid = os.getpid()
        self._ended = threading.Event()
        self._last_change: Callable[[], None] = self._write
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = self._locked(run)
        try:
            for unfinished in self.path.parent.glob(f"{glob.escape(self.path.name)}.*"):
                unfinished.unlink(missing_ok=True)
            self._write()
        except BaseException:
            self._unlock()
            raise
        self._thread = threading.Thread(target=self._keep_writing, name="ppo-textfile", daemon=True)
        self._thread.start()

    def close(self, *, remove: bool) -> None:
        """End. With `remove` the file goes, as after a clean end; else it stays, with the last state of the run."""
        if os.getpid() != self._pid:
            return
        change = self._remove if remove else self._write
        if self._ended.is_set():
            return self._try(change)
        self._last_change = change
        self._ended.set()
        self._thread.join(_CLOSE_SECONDS)
        if self._thread.is_alive():
            _log.warning("%s is out of date: its file system has not answered for %g s", self.path, _CLOSE_SECONDS)

    def _keep_writing(self) -> None:
        while not self._ended.wait(self._interval):
            self._try(self._write)
        self._try(self._last_change)
        self._unlock()

    def _locked(self, run: str) -> int:
        """The descriptor of a file that only one process can hold, until it ends.

        It is open for reading, so that a file system can be made read-only meanwhile.
        """
        for _ in range(_LOCK_TRIES):
            descriptor = os.open(self._lock_path, os.O_RDONLY | os.O_CREAT, 0o666)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                with contextlib.suppress(FileNotFoundError):
                    if os.path.samestat(os.fstat(descriptor), os.stat(self._lock_path)):
                        break
            except BlockingIOError as error:
                os.close(descriptor)
                raise OSError(errno.EBUSY, f"another process writes a run of the name {run} there") from error
            except OSError:
                break  # a file system without locks
            os.close(descriptor)  # who had it has ended meanwhile, and taken the file along
        else:
            raise OSError(errno.EBUSY, "its lock is another one each time")
        _locks.add(descriptor)
        return descriptor

    def _unlock(self) -> None:
        with contextlib.suppress(OSError):
            self._lock_path.unlink()
        _locks.discard(self._lock)
        os.close(self._lock)

    @property
    def _lock_path(self) -> Path:
        return self.path.with_name(f".{self.path.stem}.lock")

    def _write(self) -> None:
        write_to_textfile(str(self.path), self._collector)

    def _remove(self) -> None:
        self.path.unlink(missing_ok=True)

    def _try(self, change: Callable[[], None]) -> None:
        try:
            change()
        except Exception as error:
            if not self._is_failing:
                reason = getattr(error, "strerror", None) or error
                _log.warning("%s is out of date: %s; it is tried again, and training goes on", self.path, reason)
            self._is_failing = True
        else:
            self._is_failing = False


_locks: set[int] = set()


def _let_go_of_locks() -> None:
    """In a forked child, which may outlive its parent."""
    while _locks:
        os.close(_locks.pop())


os.register_at_fork(after_in_child=_let_go_of_locks)


def check_pushgateway_url(url: str) -> None:
    """Whether a final state could be pushed there.

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


def push_final_state(
    url: str,
    aggregator: RunAggregator,
    run: str,
    labels: Mapping[str, str] = MappingProxyType({}),
    *,
    timeout: float = PUSH_TIMEOUT_SECONDS,
) -> None:
    """Replace what the Pushgateway at `url` has of `run` (job `ppo_final`, grouping key `run` and `labels`).

    Takes no longer than `timeout` seconds, whatever the other side, a resolver or a proxy does.

    Raises:
        OSError: it could not be pushed; the message says where to and why.
        KeyboardInterrupt: a signal came while it waited.
    """
    failures: list[Exception] = []

    def push() -> None:
        try:
            push_to_gateway(url, PUSH_JOB, _Run(aggregator, run, labels), {RUN_LABEL: run, **labels}, timeout)
        except Exception as error:  # also what http.client makes of a server that speaks something else
            failures.append(error)

    # The timeout of a socket does not bound the whole, and nothing bounds the look-up of a name.
    thread = threading.Thread(target=push, name="ppo-pushgateway", daemon=True)
    thread.start()
    thread.join(timeout)
    if thread.is_alive():
        raise TimeoutError(f"cannot push the final state to {url}: no answer within {timeout:g} s")
    for error in failures:
        raise OSError(f"cannot push the final state to {url}: {_reason(error)}") from error


def _reason(error: Exception) -> object:
    if not isinstance(error, HTTPError):
        return getattr(error, "reason", error)
    with contextlib.suppress(Exception):
        # Which of the metrics it does not want, and why, stands in the body.
        body = " ".join(error.read(_MOST_OF_A_BODY).decode(errors="replace").split())
        return f"{error.code} {error.reason}" + (f": {body}" if body else "")
    return f"{error.code} {error.reason}"
