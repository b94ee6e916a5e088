"""`python -m exporter calibrate`: thresholds for your runs, from healthy ones. Never imports torch."""

import argparse
import re
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from exporter.calibrate.proposal import CRITICAL_PART, DEFAULT_RATE, LEAST_RUNS, NoThresholds, heads_of, propose
from exporter.calibrate.report import data_lines, histogram_lines, proposal_lines, write_plot
from exporter.calibrate.sources import RUN_COLUMNS, Prometheus, SourceError, runs_of_files

_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}


def main(arguments: Sequence[str]) -> int:
    """Read, propose and print. Returns the exit code: 1 if something is missing; stderr says what."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if bool(options.files) == bool(options.prometheus):
        parser.error("give files, or --prometheus URL")
    try:
        if options.prometheus:
            end = time.time() if options.end is None else options.end
            start = end - options.range if options.start is None else options.start
            if start >= end:
                parser.error("--start must be before --end")
            found = Prometheus(options.prometheus, start, end, options.headers).runs(options.selector)
        else:
            found = runs_of_files(options.files, dict(options.where))
        runs, heads = heads_of(found, options.heads)
        cvs = [cv for run in runs for cv in run.cvs]
        _say(*data_lines(runs, heads))
        proposal = propose(runs, heads, options.false_alarm_rate)
        _say("", *histogram_lines(cvs, vars(proposal.thresholds)), "", *proposal_lines(cvs, heads, proposal))
    except (SourceError, NoThresholds) as error:
        return _fail(str(error))
    if options.plot:
        try:
            write_plot(options.plot, runs, heads, proposal)
        except ImportError as error:
            return _fail(f"--plot needs Matplotlib: pip install matplotlib ({error})")
        except (OSError, ValueError) as error:
            return _fail(f"cannot write {options.plot}: {error}")
    return 0


def _fail(reason: str) -> int:
    print(f"error: {reason}", file=sys.stderr)
    return 1


def _say(*lines: str) -> None:
    print(*lines, sep="\n", flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m exporter calibrate",
        description="Propose a warning and a critical threshold from healthy runs of one kind: the same number of "
        f"heads, at least {LEAST_RUNS} runs. You decide which runs were healthy; this command cannot.",
    )
    add = parser.add_argument
    add(
        "files",
        nargs="*",
        type=Path,
        metavar="FILE",
        default=[],
        help="text files of the exporter, OpenMetrics dumps, tables (.csv with columns run, heads, gradient_cv, one "
        f"row an update; runs may be named by {', '.join(RUN_COLUMNS[1:])} too), each possibly .gz, .xz or .bz2; or "
        "folders of these",
    )
    add(
        "--false-alarm-rate",
        type=_rate,
        default=DEFAULT_RATE,
        metavar="RATE",
        help="expected share of healthy updates that reach the warning threshold, at most 0.1; of the critical "
        f"threshold {CRITICAL_PART:g} of that. Needs 10/RATE updates (default: %(default)s)",
    )
    add("--heads", type=int, metavar="N", help="use the runs of N heads, and those with an unknown number")
    add("--plot", type=Path, metavar="FILE", help="also write a picture: .svg, .png or .pdf; needs Matplotlib")
    add(
        "--where",
        type=_condition,
        action="append",
        default=[],
        metavar="COLUMN=VALUE",
        help="use only these rows of a table; may be repeated",
    )
    prometheus = parser.add_argument_group("from a Prometheus")
    add = prometheus.add_argument
    add("--prometheus", metavar="URL", help="read from its HTTP API, such as http://127.0.0.1:9090")
    add(
        "--selector",
        default="{}",
        metavar="SELECTOR",
        help="""labels of the runs, such as '{run=~"walker-.*"}' (default: all)""",
    )
    add(
        "--range",
        type=_duration,
        default="1d",
        metavar="TIME",
        help="how far back from --end: 30m, 12h, 7d (default: %(default)s)",
    )
    add("--start", type=_time, metavar="TIME", help="instead of --range: 2026-11-28T07:00 (UTC) or Unix seconds")
    add("--end", type=_time, metavar="TIME", help="as --start; default: now")
    add(
        "--headers",
        type=_headers,
        default={},
        metavar="FILE",
        help="headers to send, one a line: 'Authorization: Bearer TOKEN'",
    )
    return parser


def _rate(text: str) -> float:
    if not 0 < (rate := float(text)) <= 0.1:
        raise argparse.ArgumentTypeError(f"must be above 0 and at most 0.1, got {text}")
    return rate


def _condition(text: str) -> tuple[str, str]:
    column, sign, value = text.partition("=")
    if not sign:
        raise argparse.ArgumentTypeError(f"must be COLUMN=VALUE, got {text}")
    return column, value


def _duration(text: str) -> int:
    if not re.fullmatch(r"(\d+[smhdw])+", text):
        raise argparse.ArgumentTypeError(f"must be a time such as 30m, 12h or 7d, got {text}")
    return sum(int(number) * _SECONDS[unit] for number, unit in re.findall(r"(\d+)([smhdw])", text))


def _time(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        pass
    try:
        at = datetime.fromisoformat(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"must be a time such as 2026-11-28T07:00 or 1796000000, got {text}"
        ) from error
    return (at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp()


def _headers(path: str) -> dict[str, str]:
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise argparse.ArgumentTypeError(f"cannot read {path}: {error}") from error
    headers = [line.partition(":") for line in lines if line.strip()]
    if any(not sign for _, sign, _ in headers):
        raise argparse.ArgumentTypeError(f"{path} must have lines such as 'Authorization: Bearer TOKEN'")
    return {name.strip(): value.strip() for name, _, value in headers}
