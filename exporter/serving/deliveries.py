"""Deliveries of a run besides `/metrics`: a target file, a text file for node_exporter, a push to a Pushgateway."""

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
from urllib.error import HTTPError
from urllib.parse import quote

from prometheus_client import push_to_gateway, write_to_textfile
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from exporter.link import PUSH_JOB
from exporter.metrics import METRIC_FAMILIES, RUN_LABEL
from exporter.serving.state import State

PUSH_SECONDS = 10.0
END_SECONDS = 3.0
"""Time that the end of a run waits for the folder of a file."""
STALE_SECONDS = 3600.0
"""Minimum age at which a dead process' target file is removed; the alert has fired by then."""
TARGET_FILE_SECONDS = 60.0
"""Interval at which a live process writes its target file again."""
_LONGEST_NAME = 150  # with suffixes still below the 255 bytes of common file systems
_log = logging.getLogger(__name__)


class RunFamilies(Collector):
    """The families of one run, without process metrics: node_exporter and Pushgateway have their own."""

    def __init__(self, state: State, run: str) -> None:
        self._state, self._run = state, run

    def collect(self) -> Iterator[Metric]:
        runs = [run for run in self._state.snapshot.runs.values() if run.run == self._run]
        return (family.collect(runs, self._state.process_labels) for family in METRIC_FAMILIES if family.is_per_run)


class Deliveries:
    """The files of every run of the training process."""

    def __init__(self, state: State, scheme: str) -> None:
        self._state = state
        self._scheme = scheme
        self._files: dict[str, list[_RunFile]] = {}

    def add(self, run: str, target: str, targets_dir: str | None, textfile_dir: str | None, interval: float) -> None:
        """Start writing the files of a run, in the given folders.

        Raises:
            OSError: a file cannot be written, or another process writes that run's text file; then neither file
                exists.
        """
        files = self._files.setdefault(run, [])
        before = len(files)
        name = _file_name(run, self._state.process_labels)
        try:
            if targets_dir is not None:
                with _explained(f"a target file to {targets_dir}"):
                    files.append(_target_file(Path(targets_dir), name, run, target, self._scheme))
            if textfile_dir is not None:
                with _explained(f"a file to {textfile_dir}"):
                    collector = RunFamilies(self._state, run)
                    path = Path(textfile_dir, f"{name}.prom")
                    files.append(
                        _RunFile(
                            path, run, lambda path: write_to_textfile(str(path), collector), interval, shows_state=True
                        )
                    )
        except BaseException:
            for file in files[before:]:
                file.end(remove=True)
            del files[before:]
            raise

    def end(self, run: str, *, crashed: bool) -> None:
        """Remove the files of a run; with `crashed` leave them with its last state. Failure is logged."""
        for file in self._files.pop(run, ()):
            file.end(remove=not crashed)

    def end_all(self, *, crashed: bool) -> None:
        """`end` every run."""
        for run in list(self._files):
            self.end(run, crashed=crashed)

    def push(self, run: str, url: str) -> None:
        """Replace the group of `run` at the Pushgateway `url` (job `ppo_final`, grouping key `run` and labels).

        Raises:
            OSError: the push failed; the message has the URL and the reason.
        """
        key = {RUN_LABEL: run, **self._state.process_labels}
        reason: list[object] = [f"no answer within {PUSH_SECONDS:g} s"]

        def push() -> None:
            try:
                push_to_gateway(url, PUSH_JOB, RunFamilies(self._state, run), key, timeout=PUSH_SECONDS)
                reason.clear()
            except Exception as error:  # also http.client's errors for a server with another protocol
                reason[:] = [_reason(error)]

        # Use a thread: a socket's timeout limits neither an answer that comes byte by byte nor a DNS look-up.
        thread = threading.Thread(target=push, daemon=True)
        thread.start()
        thread.join(PUSH_SECONDS)
        if reason:
            raise OSError(f"cannot push the final state to {url}: {reason[0]}")


class _RunFile:
    """A file locked by this process; a thread rewrites it every `interval` seconds until `end()`.

    With `shows_state` it is written once more after a crash of its run.

    Raises:
        BlockingIOError: another process has locked it.
        OSError: it cannot be written.
    """

    def __init__(
        self, path: Path, run: str, write: Callable[[Path], None], interval: float, *, shows_state: bool
    ) -> None:
        self.path = path
        self._run = run
        self._write = write
        self._shows_state = shows_state
        self._is_failing = False
        self._is_removed = False
        self._has_ended = threading.Event()
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = _hold(_lock_of(path))
        if lock is None:
            raise BlockingIOError(errno.EBUSY, f"another process writes a run named {run} there")
        try:
            for unfinished in path.parent.glob(f"{glob.escape(path.name)}.*"):
                unfinished.unlink()
            write(path)
        except BaseException:
            _lock_of(path).unlink(missing_ok=True)
            os.close(lock)
            raise
        self._lock = lock
        self._thread = threading.Thread(target=self._keep, args=(interval,), name="run-file", daemon=True)
        self._thread.start()

    def end(self, *, remove: bool) -> None:
        """Remove the file, or write it a last time; waits `END_SECONDS` for its folder. Failure is logged."""
        self._is_removed = remove
        self._has_ended.set()
        self._thread.join(END_SECONDS)
        if self._thread.is_alive():
            _log.warning("%s stays as it is: its folder has not answered for %g s", self.path, END_SECONDS)

    def _keep(self, interval: float) -> None:
        while not self._has_ended.wait(interval):
            self._write_again()
        if self._is_removed:
            self._remove()
        elif self._shows_state:  # otherwise nothing is new, and the folder may be going away
            self._write_again()
        os.close(self._lock)

    def _write_again(self) -> None:
        try:
            self._write(self.path)
            self._is_failing = False
        except Exception as error:
            if not self._is_failing:
                reason = getattr(error, "strerror", None) or error
                _log.warning("%s is out of date: %s; it is tried again, training continues", self.path, reason)
            self._is_failing = True

    def _remove(self) -> None:
        try:
            self.path.unlink(missing_ok=True)
        except OSError as error:
            _log.warning("%s still names run %s, which will look down: %s", self.path, self._run, error.strerror)
        with contextlib.suppress(OSError):
            _lock_of(self.path).unlink()


def _target_file(folder: Path, name: str, run: str, target: str, scheme: str) -> _RunFile:
    """A run's file for Prometheus' file service discovery; its name gets a number if the name is locked."""
    # With the parameter /metrics shows only this run, so each run of a process is a target.
    labels = {"run": run, "instance": target, "__param_run": run}
    if scheme != "http":
        labels["__scheme__"] = scheme
    text = json.dumps([{"targets": [target], "labels": labels}], indent=2) + "\n"

    def write(path: Path) -> None:
        unfinished = path.with_name(f"{path.name}.tmp")  # Prometheus reads only *.json
        try:
            unfinished.write_text(text)
            unfinished.replace(path)
        except OSError:
            unfinished.unlink(missing_ok=True)
            raise
        _remove_stale(folder)

    for number in range(1, 1000):
        with contextlib.suppress(BlockingIOError):
            path = folder / (f"{name},{number}.json" if number > 1 else f"{name}.json")
            return _RunFile(path, run, write, TARGET_FILE_SECONDS, shows_state=False)
    raise OSError(errno.EBUSY, f"a thousand processes write runs named {run} there")


def _remove_stale(folder: Path) -> None:
    """Remove target files of dead processes that are at least an hour old."""
    for lock in folder.glob(".ppo-*.json.lock"):
        path = folder / lock.name[1:].removesuffix(".lock")
        with contextlib.suppress(OSError):
            is_stale = time.time() - path.stat().st_mtime > STALE_SECONDS
            if is_stale and (descriptor := _hold(lock)) is not None:
                with os.fdopen(descriptor):
                    path.unlink()
                    lock.unlink()
                    _log.warning("removed %s: its process has been gone for an hour", path)


def _file_name(run: str, labels: Mapping[str, str]) -> str:
    """A unique file name for a run: special characters are escaped, and a name that is cut gets a digest."""
    name = "".join([f"ppo-{quote(run, safe='')}", *(f",{key}={quote(text, safe='')}" for key, text in labels.items())])
    if len(name) <= _LONGEST_NAME:
        return name
    return f"{name[: _LONGEST_NAME - 17]}-{hashlib.sha256(name.encode()).hexdigest()[:16]}"


def _lock_of(path: Path) -> Path:
    return path.with_name(f".{path.name}.lock")


def _hold(lock: Path) -> int | None:
    """Lock a file until the descriptor is closed; None if another process has locked it. Works without locks too.

    Raises:
        OSError: it cannot be opened.
    """
    # Try read-only first: a file open for writing keeps its file system from being made read-only. NFS needs writing.
    for mode in (os.O_RDONLY, os.O_RDWR):
        descriptor = os.open(lock, mode | os.O_CREAT, 0o644)
        try:
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            os.close(descriptor)
            return None
        except (ImportError, OSError):
            if mode == os.O_RDONLY:
                os.close(descriptor)
    return descriptor


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
        # The body says which metrics the Pushgateway refuses, and why.
        body = " ".join(error.read(500).decode(errors="replace").split())
        return f"{error.code} {error.reason}: {body}".removesuffix(": ")
    return f"{error.code} {error.reason}"
