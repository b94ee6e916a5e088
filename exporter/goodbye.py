"""The end of the training process: functions to call, and whether it has crashed."""

import atexit
import multiprocessing
import multiprocessing.util
import sys
import threading
from collections.abc import Callable
from types import FrameType

_WORKER_CALL = ("multiprocessing.process", "_bootstrap")  # a worker runs inside this call
_worker: FrameType | None = None
_farewells: list[Callable[[bool], None]] = []


def is_crash(error: BaseException | None) -> bool:
    """Whether a run that `error` ends has crashed. Ctrl-C and an exit without an error code are clean ends."""
    if isinstance(error, SystemExit):
        return bool(error.code)
    return error is not None and not isinstance(error, KeyboardInterrupt)


def at_goodbye(farewell: Callable[[bool], None]) -> None:
    """Call `farewell(crashed)` at the end of the process; the last one is called first."""
    _farewells.append(farewell)


def cover_worker() -> None:
    """Make a process started by `multiprocessing` call its farewells too; call this within that process."""
    global _worker
    if multiprocessing.parent_process() is None:
        return
    _worker = sys._current_frames().get(threading.main_thread().ident or 0)
    while _worker is not None and (_worker.f_globals.get("__name__"), _worker.f_code.co_name) != _WORKER_CALL:
        _worker = _worker.f_back
    # A forked worker ends without exit handlers. In a spawned worker, exit handlers do not see the exception.
    multiprocessing.util.Finalize(None, _say_goodbye, exitpriority=100)


def _say_goodbye() -> None:
    # In a notebook the last exception may be an old one: ignore it.
    error = sys.exception() or (None if hasattr(sys, "ps1") else getattr(sys, "last_value", None))
    # Since Python 3.13 a worker's exception, also Ctrl-C, is gone by now: only that call knows the exit code.
    crashed = is_crash(error) or _worker is not None and bool(_worker.f_locals.get("exitcode"))
    for farewell in reversed(_farewells):
        farewell(crashed)


atexit.register(_say_goodbye)
