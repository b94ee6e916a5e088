"""Faults for fire drills: gradients are bent on purpose, so that an alert has a real cause."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trainer.policy import ActorCritic

KINDS = {
    "dominate": "the gradients of all heads but HEAD are scaled to zero",
    "starve": "the gradient of HEAD is scaled to zero",
    "nan": "the gradient of HEAD becomes NaN",
}


@dataclass(frozen=True)
class Drill:
    """`KIND:HEAD:FIRST-LAST`: the fault, the head and the updates (from 1, inclusive) it spans."""

    kind: str
    head: str
    first_update: int
    last_update: int

    @classmethod
    def parse(cls, text: str) -> "Drill":
        """Read `KIND:HEAD:FIRST-LAST`, such as `dominate:op:20-60`.

        Raises:
            ValueError: the text is something else; the message says what is expected.
        """
        try:
            kind, head, span = text.split(":")
            first, last = map(int, span.split("-"))
        except ValueError:
            raise ValueError(f"expected KIND:HEAD:FIRST-LAST such as dominate:op:20-60, got {text!r}") from None
        if kind not in KINDS:
            raise ValueError(f"unknown kind {kind!r}; there are {', '.join(KINDS)}")
        if not 1 <= first <= last:
            raise ValueError(f"updates {span} are no span: they count from 1, and FIRST must not be after LAST")
        return cls(kind, head, first, last)

    def bend(self, policy: "ActorCritic", update: int) -> None:
        """Change the gradients of `policy` if `update` is within the span."""
        if not self.first_update <= update <= self.last_update:
            return
        for name, rows_of_head in policy.head_rows.items():
            for rows in rows_of_head:
                gradient = rows.parameter.grad[rows.start : rows.stop]
                if self.kind == "dominate" and name != self.head or self.kind == "starve" and name == self.head:
                    gradient.zero_()
                elif self.kind == "nan" and name == self.head:
                    gradient.fill_(math.nan)
