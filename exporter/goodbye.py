"""The end of the training process: whom to call, and whether it has crashed."""

import atexit
import multiprocessing
import multiprocessing.util
import sys
import threading
from collections.abc import Callable
from types import FrameType

_WORKER_CALL = ("multiprocessing.process", "_bootstrap")  # of which all of a worker is part
_worker: FrameType | None = None
_farewells: list[Callable[[bool], None]] = []


def is_crash(error: BaseException | None) -> bool:
    """Whether a run that `error` ends has crashed: Ctrl-C is a wish, and so is an exit without an error code."""
    if isinstance(error, SystemExit):
        return bool(error.code)
    return error is not None and not isinstance(error, KeyboardInterrupt)


def at_goodbye(farewell: Callable[[bool], None]) -> None:
    """Call `farewell` at the end of the process, the last one first, with whether an exception ends it."""
    _farewells.append(farewell)


def cover_worker() -> None:
    """Make sure that a process started by `multiprocessing` says goodbye too; call it from within that process."""
    global _worker
    if multiprocessing.parent_process() is None:
        return
    _worker = sys._current_frames().get(threading.main_thread().ident or 0)
    while _worker is not None and (_worker.f_globals.get("__name__"), _worker.f_code.co_name) != _WORKER_CALL:
        _worker = _worker.f_back
    # A worker ends without exit handlers where it was forked, and they see no exception where it was spawned.
    multiprocessing.util.Finalize(None, _say_goodbye, exitpriority=100)


def _say_goodbye() -> None:
    # In a notebook an old error is none.
    error = sys.exception() or (None if hasattr(sys, "ps1") else getattr(sys, "last_value", None))
    # From Python 3.13 on a worker's exception, be it Ctrl-C, has gone by now: only its call knows the exit code.
    crashed = is_crash(error) or _worker is not None and bool(_worker.f_locals.get("exitcode"))
    for farewell in reversed(_farewells):
        farewell(crashed)


atexit.register(_say_goodbye)
