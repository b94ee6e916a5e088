"""The study's table: one row an update, as compressed CSV."""

import csv
import io
import lzma
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

DATA = Path(__file__).parent / "data" / "updates.csv.xz"


@dataclass(frozen=True, slots=True)
class Row:
    """One update; names and order are those of the columns. A number that does not exist is NaN.

    Attributes:
        task, fault, seed: of the run; the fault is `none` in a healthy one.
        onset: the first update with the fault; 0 in a healthy run.
        heads: their number.
        update: from 1.
        episode_return: mean over the episodes that ended in this update's rollout, as the task pays them, whatever
            the fault makes of it.
        gradient_cv: mean over the gradient steps; inf if one was not finite.
        healthy, warning, critical: part of the gradient steps in each level.
        smallest_share: of the sum of the head's norms, 0 to 1.
        gradient_norm ... value_loss: as `PPOUpdatePayload` has them.
        gradient_steps, skipped_steps: number of gradient steps, and of those that were skipped.
        head_gradient_norms ... head_nonfinite_steps: a number for each head, in the order of the task's heads.
    """

    task: str
    fault: str
    seed: int
    onset: int
    heads: int
    update: int
    episode_return: float
    gradient_cv: float
    healthy: float
    warning: float
    critical: float
    smallest_share: float
    gradient_norm: float
    approx_kl: float
    clip_fraction: float
    entropy: float
    explained_variance: float
    policy_loss: float
    value_loss: float
    gradient_steps: int
    skipped_steps: int
    head_gradient_norms: tuple[float, ...]
    head_entropy_ratios: tuple[float, ...]
    head_approx_kls: tuple[float, ...]
    head_clip_fractions: tuple[float, ...]
    head_update_ratios: tuple[float, ...]
    head_nonfinite_steps: tuple[float, ...]

    def texts(self) -> Iterator[str]:
        for column in fields(self):
            value = getattr(self, column.name)
            yield " ".join(map(_short, value)) if isinstance(value, tuple) else _short(value)

    @classmethod
    def of_texts(cls, texts: Iterable[str]) -> "Row":
        return cls(*(read(text) for read, text in zip(_READERS, texts, strict=True)))


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(map(float, text.split()))


_READERS = [{str: str, int: int, float: float}.get(column.type, _numbers) for column in fields(Row)]


def _short(value: str | float) -> str:
    """Three digits of a number, which are enough, and keep the table small."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def to_text(rows: Iterable[Row]) -> str:
    """Lines of CSV, without the header."""
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows(row.texts() for row in rows)
    return out.getvalue()


def of_text(text: str) -> list[Row]:
    return [Row.of_texts(line) for line in csv.reader(io.StringIO(text))]


def write(path: Path, texts: Iterable[str]) -> None:
    """Put what `to_text` made of the runs together in one compressed file."""
    header = ",".join(column.name for column in fields(Row))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(lzma.compress("".join([header + "\n", *texts]).encode(), preset=9))


def read(path: Path = DATA) -> "list[Run]":
    """The runs of the table, in its order."""
    _, _, body = lzma.decompress(path.read_bytes()).decode().partition("\n")
    runs: dict[tuple[str, str, int], list[Row]] = {}
    for row in of_text(body):
        runs.setdefault((row.task, row.fault, row.seed), []).append(row)
    return [Run(*name, rows) for name, rows in runs.items()]


@dataclass
class Run:
    """The rows of one run."""

    task: str
    fault: str
    seed: int
    rows: list[Row]

    @property
    def is_healthy(self) -> bool:
        return self.fault == "none"

    @property
    def onset(self) -> int:
        return self.rows[0].onset

    def column(self, name: str) -> np.ndarray:
        """[updates], or [updates, heads] of a head's column."""
        return np.array([getattr(row, name) for row in self.rows], float)
