"""How signals reach a run. This module imports quickly, so that the handlers are installed at once."""

import contextlib
import signal
import time
from collections.abc import Iterator
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
AGAIN_SECONDS = 1.0
"""A second signal within this time is the same request: a process group and its leader may both get one."""


class StopRequest:
    """Set by SIGINT, SIGTERM or SIGHUP; training checks it after every environment and gradient step."""

    def __init__(self) -> None:
        self.signum: int | None = None
        self._at = 0.0
        self._must_finish = False

    def __call__(self) -> bool:
        return self.signum is not None

    @property
    def exit_code(self) -> int:
        """As in a shell: 128 + signal number, 0 without a signal."""
        return 128 + self.signum if self.signum is not None else 0

    @contextlib.contextmanager
    def listening(self) -> Iterator["StopRequest"]:
        """Handle the signals. A second one raises KeyboardInterrupt, so that the usual clean-up runs.

        Signals that are ignored already, such as SIGHUP under `nohup`, stay ignored.
        """

        def request(signum: int, frame: FrameType | None) -> None:
            if self.signum is None:
                self.signum, self._at = signum, time.monotonic()
            elif not self._must_finish and time.monotonic() - self._at > AGAIN_SECONDS:
                raise KeyboardInterrupt

        heard = [signum for signum in SIGNALS if signal.getsignal(signum) is not signal.SIG_IGN]
        before = {signum: signal.signal(signum, request) for signum in heard}
        try:
            yield self
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)

    @contextlib.contextmanager
    def deaf(self) -> Iterator[None]:
        """A second signal does not interrupt this block: the clean end that it asks for is under way."""
        self._must_finish = True
        try:
            yield
        finally:
            self._must_finish = False
