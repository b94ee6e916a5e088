"""Faults for fire drills: they change gradients on purpose, so that an alert fires for a real reason."""

import math
import re
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trainer.policy import ActorCritic

KINDS = {
    "dominate": "the gradients of all heads but HEAD are scaled to zero",
    "starve": "the gradient of HEAD is scaled to zero",
    "nan": "the gradient of HEAD becomes NaN",
}
_SPAN = re.compile(r"(\d+)-(\d+)|(\d+(?:\.\d+)?)s-(\d+(?:\.\d+)?)s", re.ASCII)


@dataclass(frozen=True)
class Drill:
    """A fault, its head, and when it lasts.

    Attributes:
        kind: one of `KINDS`.
        head: name of an action head.
        first, last: PPO updates, from 1, inclusive; or seconds since the drill was made, when training begins.
        in_seconds: whether `first` and `last` are seconds.
        file: instead of a span, the fault lasts while this file exists.
    """

    kind: str
    head: str
    first: float = 0.0
    last: float = 0.0
    in_seconds: bool = False
    file: Path | None = None
    _made: float = field(default_factory=time.monotonic, init=False, repr=False, compare=False)

    @classmethod
    def parse(cls, text: str) -> "Drill":
        """Read `KIND:HEAD:FIRST-LAST`, with updates as in `dominate:op:20-60` or seconds as in `dominate:op:10s-130s`,
        or `KIND:HEAD:@FILE`.

        Raises:
            ValueError: the text has another form; the message says what is expected.
        """
        kind, head, span = parts if len(parts := text.split(":", 2)) == 3 else ("", "", "")
        file = Path(span[1:]) if span.startswith("@") and span != "@" else None
        match = _SPAN.fullmatch(span)
        if file is None and match is None:
            raise ValueError(
                "expected KIND:HEAD:FIRST-LAST, with a span of updates such as dominate:op:20-60 or of seconds such "
                f"as dominate:op:10s-130s, or KIND:HEAD:@FILE, got {text!r}"
            )
        if kind not in KINDS:
            raise ValueError(f"unknown kind {kind!r}; there are {', '.join(KINDS)}")
        if file is not None:
            return cls(kind, head, file=file)
        in_seconds = match[3] is not None
        first, last = map(float, match.group(3, 4) if in_seconds else match.group(1, 2))
        if in_seconds and not first < last:
            raise ValueError(f"seconds {span} are no span: FIRST must be before LAST")
        if not in_seconds and not 1 <= first <= last:
            raise ValueError(f"updates {span} are no span: they count from 1, and FIRST must not be after LAST")
        return cls(kind, head, first, last, in_seconds)

    def bend(self, policy: "ActorCritic", update: int) -> None:
        """Change the gradients of `policy` if the fault lasts at `update`, the one in progress."""
        if not self._lasts(update):
            return
        for name, rows_of_head in policy.head_rows.items():
            for rows in rows_of_head:
                gradient = rows.parameter.grad[rows.start : rows.stop]
                if self.kind == "dominate" and name != self.head or self.kind == "starve" and name == self.head:
                    gradient.zero_()
                elif self.kind == "nan" and name == self.head:
                    gradient.fill_(math.nan)

    def _lasts(self, update: int) -> bool:
        if self.file is not None:
            return self.file.exists()
        return self.first <= (time.monotonic() - self._made if self.in_seconds else update) <= self.last
