"""Sources of healthy runs: a Prometheus, text files of the exporter, or a CSV table."""

import bz2
import csv
import gzip
import http.client
import json
import lzma
import math
import urllib.error
import urllib.parse
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, TextIO

from prometheus_client.parser import text_string_to_metric_families

from exporter.link import PUSH_JOB
from exporter.metrics import (
    GRADIENT_CV,
    GRADIENT_CV_CEILING,
    GRADIENT_CV_PER_STEP,
    GRADIENT_CV_THRESHOLD,
    HEALTH_LABEL,
    LEVEL_LABEL,
    RUN_LABEL,
)

HEADS_COLUMN, CV_COLUMN, FAULT_COLUMN = "heads", "gradient_cv", "fault"
RUN_COLUMNS = ("run", "task", "environment", FAULT_COLUMN, "seed")
"""Those of these columns that a table has identify its runs."""
_OPENERS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}
_SUFFIXES = (".prom", ".txt", ".om", ".csv")
_BUCKET, _BOUND_LABEL = f"{GRADIENT_CV_PER_STEP.name}_bucket", "le"
_QUERIES = {
    GRADIENT_CV.name: "{}",
    GRADIENT_CV_CEILING.name: "max_over_time({})",
    GRADIENT_CV_THRESHOLD.name: "last_over_time({})",
    _BUCKET: "increase({})",
}
_BEGINNINGS = tuple(f"{name}{{" for name in _QUERIES)
_ANSWER_SECONDS = 120

Sample = tuple[str, Mapping[str, str], float, float]
"""Family, labels, any number that rises with time, value."""


class SourceError(Exception):
    """The source gives no runs; the message says why, and what to do."""


@dataclass
class HealthyRun:
    """A run's data.

    Attributes:
        heads: number of contributing heads, None if unknown.
        cvs: finite gradient CV of each update, in order of time.
        nonfinite: number of updates with a non-finite CV, which `cvs` leaves out.
        steps: upper bound of a CV -> gradient steps at or below it; empty if unknown.
        judged_by: the run's own warning and critical threshold; empty if unknown.
    """

    name: str
    heads: int | None = None
    cvs: list[float] = field(default_factory=list)
    nonfinite: int = 0
    steps: dict[float, float] = field(default_factory=dict)
    judged_by: tuple[float, ...] = ()

    def add(self, cv: float) -> None:
        if math.isfinite(cv):
            self.cvs.append(cv)
        else:
            self.nonfinite += 1


@dataclass(frozen=True)
class Prometheus:
    """A server, and the time range (Unix seconds) in which its runs were healthy.

    Raises:
        SourceError: the URL is not valid.
    """

    url: str
    start: float
    end: float
    headers: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        parts = urllib.parse.urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise SourceError(f"{self.url!r} is not the URL of a Prometheus, such as http://127.0.0.1:9090")
        if parts.username is not None:
            raise SourceError("no user in the URL; put an Authorization header into a file for --headers")

    def runs(self, selector: str) -> list[HealthyRun]:
        """The runs that match `selector`, such as `{run=~"walker-.*"}`, with each scraped update once.

        Raises:
            SourceError: the server does not answer, refuses the selector, or has no such run.
        """
        given = selector.strip().removeprefix("{").removesuffix("}").strip().removesuffix(",")
        # A Pushgateway keeps the last update of a run for ever.
        matchers = ", ".join(filter(None, (f'job!="{PUSH_JOB}"', given)))
        span = f"[{max(1, math.ceil(self.end - self.start))}s]"
        samples = [
            (name, series["metric"], float(at), float(value))
            for name, query in _QUERIES.items()
            for series in self._query(query.format(f"{name}{{{matchers}}}{span}"))
            for at, value in series.get("values") or [series["value"]]
        ]
        if runs := _runs(samples):
            return runs
        found = self._query(f"group by ({RUN_LABEL}) (last_over_time({GRADIENT_CV.name}{span}))")
        names = ", ".join(sorted(series["metric"].get(RUN_LABEL, "") for series in found)) or "none"
        raise SourceError(
            f"{self.url} has no update of {GRADIENT_CV.name}{{{given}}} in this time; its runs then: {names}"
        )

    def _query(self, expression: str) -> list[dict[str, Any]]:
        """Result of an instant query; with a range selector, the raw samples."""
        parameters = urllib.parse.urlencode({"query": expression, "time": self.end})
        request = urllib.request.Request(f"{self.url.rstrip('/')}/api/v1/query?{parameters}")
        for name, value in self.headers.items():
            request.add_unredirected_header(name, value)  # do not send a token to the target of a redirect
        try:
            try:
                with urllib.request.urlopen(request, timeout=_ANSWER_SECONDS) as answer:
                    return json.load(answer)["data"]["result"]
            except urllib.error.HTTPError as error:
                reason = f"{error.code} {error.reason}"
                try:
                    reason = json.load(error)["error"]
                except (ValueError, TypeError, KeyError):  # not an answer of Prometheus
                    pass
                raise SourceError(f"{self.url} refuses {expression}: {reason}") from error
        except (OSError, http.client.HTTPException) as error:
            raise SourceError(f"{self.url} cannot be reached: {getattr(error, 'reason', error)}") from error
        except (ValueError, TypeError, KeyError) as error:
            raise SourceError(f"{self.url} does not answer like a Prometheus; is it the URL of one?") from error


def runs_of_files(paths: Sequence[Path], where: Mapping[str, str]) -> list[HealthyRun]:
    """The runs in files and in folders of files: `.csv` is a table, everything else text.

    Args:
        paths: files or folders. In a folder, files that end with .prom, .txt, .om or .csv are read, also compressed
            ones (.gz, .xz, .bz2). Copies of a text file are read in the order of their names.
        where: column -> value that rows of tables must have.

    Raises:
        SourceError: a file cannot be read or holds something else, or there is no run.
    """
    samples: list[Sample] = []
    tables: dict[str, HealthyRun] = {}
    for order, path in enumerate(_files(paths)):
        try:
            with _OPENERS.get(path.suffix, open)(path, "rt", encoding="utf-8-sig", newline="") as file:
                if _kind(path) == ".csv":
                    _read_table(file, path, where, tables)
                else:
                    samples += _read_text(file, path, order)
        except UnicodeDecodeError as error:
            raise SourceError(f"{path} is not a text file") from error
        except (OSError, EOFError, lzma.LZMAError) as error:
            raise SourceError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
    if runs := [*_runs(samples), *tables.values()]:
        return runs
    raise SourceError(f"there is no update of a run in {', '.join(map(str, paths))}")


def _files(paths: Iterable[Path]) -> Iterator[Path]:
    for path in paths:
        if path.is_dir():
            yield from sorted(
                each for each in path.iterdir() if _kind(each) in _SUFFIXES and not each.name.startswith(".")
            )
        else:
            yield path


def _kind(path: Path) -> str:
    """The suffix, without that of a compression."""
    return (path.with_suffix("") if path.suffix in _OPENERS else path).suffix


def _read_text(file: TextIO, path: Path, order: int) -> Iterator[Sample]:
    """Samples of the text format or of OpenMetrics; their lines of samples look the same."""
    for number, line in enumerate(file, 1):
        if line.startswith(_BEGINNINGS):
            try:
                for family in text_string_to_metric_families(line):
                    for sample in family.samples:
                        at = float(sample.timestamp) if sample.timestamp is not None else order
                        yield sample.name, sample.labels, at, sample.value
            except ValueError as error:
                raise SourceError(f"{path}, line {number}: not a sample of the text format: {line.strip()}") from error


def _read_table(file: TextIO, path: Path, where: Mapping[str, str], runs: dict[str, HealthyRun]) -> None:
    """Add the rows of a table, one per update, to `runs`."""
    rows = csv.DictReader(file)
    columns = rows.fieldnames or ()
    of_run = [column for column in RUN_COLUMNS if column in columns]
    if missing := [column for column in (*(of_run or RUN_COLUMNS[:1]), CV_COLUMN, *where) if column not in columns]:
        raise SourceError(f"{path} has no column {', '.join(missing)}, but {', '.join(columns) or 'nothing'}")
    faults = set()
    for row in rows:
        if any(row[column] != value for column, value in where.items()):
            continue
        faults.add(row.get(FAULT_COLUMN))
        name = " ".join(row[column] or "" for column in of_run)
        run = runs.setdefault(name, HealthyRun(name))
        try:
            run.add(float(row[CV_COLUMN] or "nan"))
            if row.get(HEADS_COLUMN):
                run.heads = max(run.heads or 0, int(float(row[HEADS_COLUMN])))
        except (ValueError, TypeError, OverflowError) as error:
            raise SourceError(
                f"{path}, line {rows.line_num}: not numbers: {CV_COLUMN} {row[CV_COLUMN]!r}, "
                f"{HEADS_COLUMN} {row.get(HEADS_COLUMN)!r}"
            ) from error
    if len(faults) > 1:
        raise SourceError(
            f"{path} has rows of different faults: choose the healthy ones, "
            f"--where {FAULT_COLUMN}=VALUE with one of {', '.join(sorted(map(str, faults)))}"
        )


def _runs(samples: Iterable[Sample]) -> list[HealthyRun]:
    """A run for each set of labels. Equal consecutive values are one update, scraped several times."""
    runs: dict[Any, HealthyRun] = {}
    cvs: dict[Any, list[tuple[float, float]]] = {}
    for name, labels, at, value in samples:
        own = {k: v for k, v in labels.items() if k not in ("__name__", HEALTH_LABEL, LEVEL_LABEL, _BOUND_LABEL)}
        run = runs.setdefault(frozenset(own.items()), HealthyRun(own.get(RUN_LABEL, "?")))
        if name == GRADIENT_CV.name:
            cvs.setdefault(frozenset(own.items()), []).append((at, value))
        elif name == GRADIENT_CV_CEILING.name and math.isfinite(value):
            run.heads = max(run.heads or 0, round(value**2))
        elif name == GRADIENT_CV_THRESHOLD.name:
            run.judged_by = tuple(sorted({*run.judged_by, value}))
        elif name == _BUCKET:
            bound = float(labels[_BOUND_LABEL])
            run.steps[bound] = max(run.steps.get(bound, 0.0), value)
    for key, series in cvs.items():
        updates = [cv for cv, _ in groupby(cv for _, cv in sorted(series, key=lambda sample: sample[0]))]
        for cv in updates[1:] if updates[0] == 0.0 else updates:  # before its first update a run exports 0
            runs[key].add(cv)
    names = Counter(run.name for run in runs.values())
    for key, run in runs.items():
        if names[run.name] > 1:
            run.name = " ".join(value for _, value in sorted(key))
    return [run for run in runs.values() if run.cvs or run.nonfinite]
