"""The end of the training process: whom to call, and whether it has crashed."""

import atexit
import multiprocessing
import multiprocessing.util
import sys
from collections.abc import Callable

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
    if multiprocessing.parent_process() is not None:
        # A worker ends without exit handlers where it was forked, and they see no exception where it was spawned.
        multiprocessing.util.Finalize(None, _say_goodbye, exitpriority=100)


def _say_goodbye() -> None:
    # In a notebook an old error is none.
    error = sys.exception() or (None if hasattr(sys, "ps1") else getattr(sys, "last_value", None))
    for farewell in reversed(_farewells):
        farewell(is_crash(error))


atexit.register(_say_goodbye)
