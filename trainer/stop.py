"""How SIGINT and SIGTERM reach a run; imports nothing heavy, so that they count from the first moment."""

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType


class StopRequest:
    """Set by SIGINT or SIGTERM; training looks at it after every environment and gradient step."""

    def __init__(self) -> None:
        self.signum: int | None = None

    def __call__(self) -> bool:
        return self.signum is not None

    @property
    def exit_code(self) -> int:
        """As a shell has it: 128 + signal number, 0 without a signal."""
        return 128 + self.signum if self.signum is not None else 0

    @contextlib.contextmanager
    def listening(self) -> Iterator["StopRequest"]:
        """Take SIGINT and SIGTERM; a second one interrupts at once, through the usual clean-up."""

        def request(signum: int, frame: FrameType | None) -> None:
            if self.signum is not None:
                raise KeyboardInterrupt
            self.signum = signum

        before = {signum: signal.signal(signum, request) for signum in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield self
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)
