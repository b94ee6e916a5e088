"""Ways to deliver a run besides `/metrics`: a target file, a text file for node_exporter, a push to a Pushgateway."""

import contextlib
import errno
import glob
import hashlib
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import quote, urlsplit

from prometheus_client import push_to_gateway, write_to_textfile
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from exporter.metrics import METRIC_FAMILIES, RUN_LABEL
from exporter.serving.state import State

PUSH_JOB = "ppo_final"
"""Not the job of running trainers: a Pushgateway keeps what it was given, and a finished run must not look stalled."""
STALE_SECONDS = 3600.0
"""How long the target file of a dead process stays at least, so that the alert on it has been told."""
TOUCH_SECONDS = 60.0
"""So often a living process touches its target file."""
_PUSH_SECONDS = 10.0
_LAST_WRITE_SECONDS = 0.5
_LONGEST_NAME = 150  # with what is added to it, below the 255 bytes of common file systems
_log = logging.getLogger(__name__)


class Deliveries:
    """The files of every run of the training process. A thread keeps each of them, for a folder may not answer."""

    def __init__(self, state: State, scheme: str) -> None:
        self._state = state
        self._scheme = scheme
        self._files: list[_RunFile] = []

    def add(self, frame: Mapping[str, Any]) -> None:
        """Raises:
        OSError: a file cannot be written, or another process writes that run's text file; then there is none of both.
        """
        run, added = frame["run"], []
        collector = RunFamilies(self._state, run)
        try:
            if frame["targets_dir"] is not None:
                added.append(_target_file(frame, self._scheme, self._state.process_labels))
            if frame["textfile_dir"] is not None:
                what = f"a file to {frame['textfile_dir']}"
                with _explained(what):
                    file = _RunFile(Path(frame["textfile_dir"]), run, self._state.process_labels, ".prom")
                    file.hold()
                    added.append(file)
                    file.keep(lambda path: write_to_textfile(str(path), collector), frame["textfile_interval"])
        except BaseException:
            for file in added:
                file.end(remove=True)
            raise
        self._files += added

    def end(self, run: str, *, crashed: bool) -> None:
        """Remove the files of a run, or leave them with its last state."""
        ended = [file for file in self._files if file.run == run]
        self._files = [file for file in self._files if file.run != run]
        for file in ended:
            file.end(remove=not crashed)

    def end_all(self, *, crashed: bool) -> None:
        for run in {file.run for file in self._files}:
            self.end(run, crashed=crashed)

    def leave_behind(self) -> None:
        """The training process has gone without a goodbye: write its last state, if that takes no time."""
        thread = threading.Thread(target=self.end_all, kwargs={"crashed": True}, daemon=True)
        thread.start()
        thread.join(_LAST_WRITE_SECONDS)

    def push(self, run: str, url: str) -> None:
        """Replace what the Pushgateway at `url` has of `run` (job `ppo_final`, grouping key `run` and labels).

        Raises:
            OSError: it could not be pushed; the message says where to and why.
        """
        key = {RUN_LABEL: run, **self._state.process_labels}
        failures: list[Exception] = []

        def push() -> None:
            try:
                push_to_gateway(url, PUSH_JOB, RunFamilies(self._state, run), key, timeout=_PUSH_SECONDS)
            except Exception as error:  # also what http.client makes of a server that speaks something else
                failures.append(error)

        # The timeout of a socket does not bound the whole, and nothing bounds the look-up of a name.
        thread = threading.Thread(target=push, daemon=True)
        thread.start()
        thread.join(_PUSH_SECONDS)
        if thread.is_alive():
            raise OSError(f"cannot push the final state to {url}: no answer within {_PUSH_SECONDS:g} s")
        for error in failures:
            raise OSError(f"cannot push the final state to {url}: {_reason(error)}") from error


def check_pushgateway_url(url: str) -> None:
    """Raises:
    ValueError: no final state can be pushed there, for it is no URL of a Pushgateway.
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


class RunFamilies(Collector):
    """The families of one run, and nothing of its process, which node_exporter and Pushgateway have of their own."""

    def __init__(self, state: State, run: str) -> None:
        self._state = state
        self._run = run

    def collect(self) -> Iterator[Metric]:
        run = self._state.snapshot.runs.get(self._run)
        for family in METRIC_FAMILIES:
            if family.is_per_run:
                yield family.collect([] if run is None else [run], self._state.process_labels)


class _RunFile:
    """A file named by its run, in a folder that many processes share; one process at a time holds the name."""

    def __init__(self, folder: Path, run: str, labels: Mapping[str, str], suffix: str, number: int = 1) -> None:
        self.run = run
        name = "".join([f"ppo-{quote(run, safe='')}", *(f",{key}={quote(text)}" for key, text in labels.items())])
        if len(name) > _LONGEST_NAME:
            name = f"{name[: _LONGEST_NAME - 17]}-{hashlib.sha256(name.encode()).hexdigest()[:16]}"
        self.path = folder / f"{name}{f'.{number}' if number > 1 else ''}{suffix}"
        self._lock = -1
        self._has_ended = threading.Event()
        self._last: Callable[[], None] | None = None
        self._thread: threading.Thread | None = None

    def hold(self) -> None:
        """Raises:
        BlockingIOError: another process holds the name.
        OSError: the folder cannot be written.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lock = _lock_path(self.path)
        while True:
            self._lock = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
            if not _is_free(self._lock):
                os.close(self._lock)
                reason = f"another process writes a run of the name {self.run} there"
                raise BlockingIOError(errno.EBUSY, reason)
            # Whoever had it may have taken it along.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(self._lock), os.stat(lock)):
                    break
            os.close(self._lock)
        for unfinished in self.path.parent.glob(f"{glob.escape(self.path.name)}.*"):
            unfinished.unlink(missing_ok=True)

    def keep(self, write: Callable[[Path], None], interval: float) -> None:
        """Write the file now, and let a thread call `write` every `interval` seconds until `end()`.

        Raises:
            OSError: it cannot be written.
        """
        write(self.path)
        self._last = lambda: write(self.path)
        self._thread = threading.Thread(target=self._keep, args=(interval,), name="run-file", daemon=True)
        self._thread.start()

    def _keep(self, interval: float) -> None:
        is_failing = False
        while not self._has_ended.wait(interval):
            try:
                self._last()
                is_failing = False
            except Exception as error:
                if not is_failing:
                    reason = getattr(error, "strerror", None) or error
                    _log.warning("%s is out of date: %s; it is tried again, and training goes on", self.path, reason)
                is_failing = True

    def end(self, *, remove: bool) -> None:
        """Raises:
        OSError: the file cannot be removed or written for the last time.
        """
        self._has_ended.set()
        if self._thread is not None:
            self._thread.join()
        try:
            if remove:
                self.path.unlink(missing_ok=True)
            elif self._last is not None:
                self._last()
        except OSError as error:
            what = f"still names run {self.run}, which will look down" if self.path.suffix == ".json" else "is out of date"
            raise OSError(f"{self.path} {what}: {error.strerror}") from error
        finally:
            if remove:
                with contextlib.suppress(OSError):
                    _lock_path(self.path).unlink()
            os.close(self._lock)


def _target_file(frame: Mapping[str, Any], scheme: str, labels: Mapping[str, str]) -> _RunFile:
    """The file by which Prometheus' file service discovery finds a run, one target entry a run."""
    target, run = frame["target"], frame["run"]
    # The parameter makes /metrics say this run alone, so that several runs of a process are targets of their own.
    entry = {"run": run, "instance": target, "__param_run": run}
    if scheme != "http":
        entry["__scheme__"] = scheme
    text = json.dumps([{"targets": [target], "labels": entry}], indent=2) + "\n"

    def write(path: Path) -> None:
        if file.is_there:  # what somebody has deleted stays deleted
            os.utime(path)
        else:
            unfinished = path.with_name(f"{path.name}.tmp")  # Prometheus reads *.json only
            try:
                unfinished.write_text(text)
                unfinished.replace(path)
            except OSError:
                unfinished.unlink(missing_ok=True)
                raise
            file.is_there = True
        _remove_stale(path.parent)

    with _explained(f"a target file to {frame['targets_dir']}"):
        for number in range(1, 1000):
            file = _RunFile(Path(frame["targets_dir"]), run, labels, ".json", number)
            with contextlib.suppress(BlockingIOError):
                file.hold()
                file.is_there = False
                file.keep(write, TOUCH_SECONDS)
                return file
        raise BlockingIOError(errno.EBUSY, f"a thousand processes write runs of the name {run} there")


def _remove_stale(folder: Path) -> None:
    """Remove target files of processes that are gone, and have not touched them for an hour."""
    for lock in folder.glob(".ppo-*.json.lock"):
        path = folder / lock.name[1:].removesuffix(".lock")
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > STALE_SECONDS:
                descriptor = os.open(lock, os.O_RDWR)
                try:
                    if _is_free(descriptor):
                        path.unlink()
                        lock.unlink()
                        _log.warning("removed %s, for its process has been gone for an hour", path)
                finally:
                    os.close(descriptor)


def _lock_path(path: Path) -> Path:
    return path.with_name(f".{path.name}.lock")


def _is_free(descriptor: int) -> bool:
    """Whether nobody holds the lock, which this process then does; so where there are no locks."""
    try:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (ImportError, OSError):
        return True
    return True


@contextlib.contextmanager
def _explained(what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OSError(f"cannot write {what}: {error.strerror or error}") from error


def _reason(error: Exception) -> object:
    if not isinstance(error, HTTPError):
        return getattr(error, "reason", error)
    with contextlib.suppress(Exception):
        # Which of the metrics it does not want, and why, stands in the body.
        body = " ".join(error.read(500).decode(errors="replace").split())
        return f"{error.code} {error.reason}" + (f": {body}" if body else "")
    return f"{error.code} {error.reason}"
