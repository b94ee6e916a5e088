"""The file by which Prometheus' file service discovery finds a trainer."""

import contextlib
import fcntl
import itertools
import json
import logging
import os
import re
import socket
import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

STALE_AFTER_SECONDS = 3600.0
"""How long the file of a dead process stays at least, so that the alert on it has been told."""
TOUCH_SECONDS = 60.0
"""So often a living process touches its file."""
_CLEAN_UP_TOUCHES = 60  # between two looks for what the dead have left
_LOCK_SECONDS = 5.0
_MAX_BYTES = 64 * 1024  # of a target file of ours
PROCESS_LABEL = "__meta_ppo_process"
"""Prometheus drops labels that begin with two underscores before it scrapes."""
_INITIAL_PID_NAMESPACE = "pid:[4026531836]"  # a constant of Linux; containers have others
_kept: set[Path] = set()
"""The target files of this process, without those that were left behind."""
_log = logging.getLogger(__name__)


class TargetFile:
    """Target file of one endpoint: written atomically, and removed at a clean end.

    After a crash the file stays on purpose: Prometheus goes on scraping, `up` is 0,
    and the alert on it fires. The next endpoint at the same address replaces it, and
    so does the same run at another one, of this process too. Otherwise an endpoint on
    the same host removes it, at its start and once an hour, when its process is certain
    to be gone and has not touched it for `STALE_AFTER_SECONDS`.

    Its label `instance` is the target, so that a restart at the same address continues
    the same series, whatever Prometheus' configuration makes of the address. In a
    forked child nothing happens.

    Args:
        directory: folder that Prometheus' `file_sd_configs` watches; created if missing.
        target: `host:port` of the endpoint, which also names the file.
        runs: the runs behind it; their names, joined by a comma, become the `run`
            label of `up` and of the process metrics.
        scheme: http, or https where the endpoint speaks TLS.

    Raises:
        OSError: the folder or the file cannot be written.
    """

    def __init__(self, directory: Path, target: str, *runs: str, scheme: str = "http") -> None:
        self.path = directory.resolve() / f"{re.sub(r'[^A-Za-z0-9_.-]', '-', target)}.json"
        self._target = target
        self._scheme = scheme
        self._process = ProcessIdentity.own()
        self._pid = os.getpid()
        self._runs: list[str] = []
        self._ended = threading.Event()
        directory.mkdir(parents=True, exist_ok=True)
        # Nobody may replace a file between the look at it and its removal.
        with _locked(self.path.parent) as is_alone:
            self.add(*runs)
            _kept.add(self.path)
            if is_alone:
                self._clean_up()
        threading.Thread(target=self._keep, name="ppo-target-file", daemon=True).start()

    def add(self, *runs: str) -> None:
        """Name further runs behind the endpoint."""
        self._runs.extend(run for run in runs if run not in self._runs)
        self._write()

    def discard(self, run: str) -> None:
        """A run has ended cleanly; with the last one the target goes out of service discovery. Failure is logged."""
        if os.getpid() != self._pid:
            return
        if run in self._runs:
            self._runs.remove(run)
        try:
            if self._runs:
                self._write()
            else:
                self.leave_behind()
                self.path.unlink(missing_ok=True)
        except OSError as error:
            # The end of a run must not fail for it.
            _log.warning("%s still names run %s, which will look down: %s", self.path, run, error.strerror)

    @property
    def has_ended(self) -> bool:
        """Whether nobody keeps the file any more."""
        return self._ended.is_set()

    def leave_behind(self) -> None:
        """As after a crash of the process: nobody keeps the file any more."""
        self._ended.set()
        _kept.discard(self.path)

    def _keep(self) -> None:
        """In a thread of its own, for a file system may keep one waiting, and training must not wait."""
        for touches in itertools.count(1):
            if self._ended.wait(TOUCH_SECONDS):
                return
            with contextlib.suppress(OSError):
                os.utime(self.path)
                if touches % _CLEAN_UP_TOUCHES == 0:
                    with _locked(self.path.parent) as is_alone:
                        if is_alone:
                            self._clean_up()

    def _clean_up(self) -> None:
        for path in self.path.parent.glob("*.json"):
            if path != self.path and _is_left_behind(path, self._runs):
                with contextlib.suppress(OSError):
                    path.unlink()
                    _log.warning("removed %s, for its process is gone, or its run begins again", path)

    def _write(self) -> None:
        labels = {"run": ",".join(self._runs), "instance": self._target}
        if self._scheme != "http":
            labels["__scheme__"] = self._scheme
        if self._process is not None:
            labels[PROCESS_LABEL] = str(self._process)
        content = [{"targets": [self._target], "labels": labels}]
        # Prometheus reads *.json only, so it never sees the file half-written.
        unfinished = self.path.with_suffix(f".{os.getpid()}.tmp")
        try:
            unfinished.write_text(json.dumps(content, indent=2) + "\n")
            unfinished.replace(self.path)
        except OSError:
            unfinished.unlink(missing_ok=True)
            raise

    @staticmethod
    def reachable(address: str) -> str:
        """What others call a server bound to `address`: this machine's name where that is a wildcard."""
        return socket.gethostname() if address in ("0.0.0.0", "::", "") else address


class ProcessIdentity(NamedTuple):
    """A process, told apart from every other one that had or will have its number.

    Attributes:
        host: machine id and name.
        boot: id of the host's boot.
        pid_namespace: in which `pid` counts.
        pid: process id.
        started: clock ticks from boot to the start of the process.
    """

    host: str
    boot: str
    pid_namespace: str
    pid: int
    started: int

    def __str__(self) -> str:
        return " ".join(map(str, self))

    @classmethod
    def parse(cls, text: str) -> "ProcessIdentity":
        """The inverse of `str`.

        Raises:
            ValueError: it is something else.
        """
        host, boot, pid_namespace, pid, started = text.split(" ")
        return cls(host, boot, pid_namespace, int(pid), int(started))

    @classmethod
    def own(cls) -> "ProcessIdentity | None":
        """This process; None where the system (other than Linux) does not tell."""
        try:
            return cls(
                f"{Path('/etc/machine-id').read_text().strip()}/{socket.gethostname()}",
                Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
                os.readlink("/proc/self/ns/pid"),
                os.getpid(),
                _start_ticks(os.getpid()),
            )
        except OSError:
            return None

    @property
    def is_gone(self) -> bool:
        """Whether it is certain, from here, that the process does not run any more."""
        own = ProcessIdentity.own()
        if own is None or self.host != own.host or self.pid_namespace != own.pid_namespace:
            return False
        if self.boot != own.boot:
            # Containers of several hosts may have the same machine id; a host has only one boot at a time.
            return own.pid_namespace == _INITIAL_PID_NAMESPACE
        try:
            return _start_ticks(self.pid) != self.started
        except ProcessLookupError:
            return True
        except OSError:
            return False


def _start_ticks(pid: int) -> int:
    """When a process started, in clock ticks after boot (proc_pid_stat(5), field 22).

    Raises:
        ProcessLookupError: there is none of that number, or only a zombie.
        OSError: it is there, but hidden.
    """
    with contextlib.suppress(PermissionError):
        os.kill(pid, 0)  # /proc may hide processes of others (hidepid); this does not
    # A name that the kernel has cut need not be text any more.
    state, *fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].decode().split()
    if state in "ZX":
        raise ProcessLookupError(f"{pid} has ended")
    return int(fields[18])


def _is_left_behind(path: Path, runs: list[str]) -> bool:
    """Whether its process is gone, and nobody has to be told any more: for long, or because its run is one of `runs`."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode) or status.st_size > _MAX_BYTES:
            return False
        (entry,) = json.loads(path.read_text())
        labels = entry["labels"]
        is_told = time.time() - status.st_mtime > STALE_AFTER_SECONDS or labels["run"] in (*runs, ",".join(runs))
        process = ProcessIdentity.parse(labels[PROCESS_LABEL])
        return is_told and (process.is_gone or (process == ProcessIdentity.own() and path not in _kept))
    except Exception:
        return False  # somebody else's, whatever it may be


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[bool]:
    """Whether one is alone among those that take this lock on `directory`; not where somebody keeps it for long."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        yield _is_taken(descriptor)
    finally:
        os.close(descriptor)


def _is_taken(descriptor: int) -> bool:
    until = time.monotonic() + _LOCK_SECONDS
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > until:
                return False
            time.sleep(0.05)
        except OSError:
            return True  # a file system without locks
        else:
            return True
