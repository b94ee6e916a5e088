"""`python -m study`: every run that is missing, then the table, the tables of docs/meaning.md and its figures."""

import argparse
import csv
import io
import os
import signal
import sys
from pathlib import Path

from study.plots import draw_all
from study.report import Study, put_into
from study.runs import Job, all_jobs, do_all
from study.table import DATA, read, write
from study.verdicts import verdicts

PEERS_DATA = DATA.with_name("peers.csv")
ROOT = Path(__file__).resolve().parent.parent


def report(data: Path, folder: Path, workers: int, page: Path, images: Path) -> Study:
    """Ask the alerts, and write tables and figures."""
    runs = read(data)
    study = Study(runs, verdicts(runs, folder, workers))
    peers = PEERS_DATA.read_text() if PEERS_DATA.exists() else ""
    put_into(
        page,
        {
            "peers": study.peers_table(list(csv.DictReader(io.StringIO(peers)))),
            "truth": study.truth_table(),
            "told": study.told_table(),
            "goal": study.goal_table(),
            "false alarms": study.false_alarm_table(),
            "areas": study.area_table(),
            "areas by fault": study.fault_area_table(),
            "heads": study.heads_table(),
        },
    )
    draw_all(study, images)
    return study


def collect(jobs: list[Job], folder: Path, data: Path) -> None:
    """Put the finished ones of `jobs` into the table."""
    write(data, (path.read_text() for job in jobs if (path := folder / job.file).exists()))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m study", description=__doc__)
    parser.add_argument(
        "--folder", type=Path, default=ROOT / ".study", metavar="DIR", help="finished runs lie here (default: .study)"
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), metavar="N", help="runs at a time (one a core)")
    parser.add_argument("--report", action="store_true", help="train nothing: tables and figures of the data as it is")
    options = parser.parse_args()
    # Also in the background of a shell, where SIGINT is ignored.
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, signal.default_int_handler)
    try:
        if not options.report:
            jobs = all_jobs()
            do_all(jobs, options.folder, options.jobs)
            collect(jobs, options.folder, DATA)
        report(DATA, options.folder, options.jobs, ROOT / "docs" / "meaning.md", ROOT / "docs" / "images")
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
