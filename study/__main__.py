"""`python -m study`: every run that is missing, then the table, the figures and the tables of docs/meaning.md."""

import argparse
import os
import sys
from pathlib import Path

from study.runs import all_jobs, do_all
from study.table import DATA, write

ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m study", description=__doc__)
    parser.add_argument(
        "--folder", type=Path, default=ROOT / ".study", metavar="DIR", help="finished runs lie here (default: .study)"
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), metavar="N", help="runs at a time (one a core)")
    parser.add_argument("--report", action="store_true", help="train nothing: tables and figures of the data as it is")
    options = parser.parse_args()
    if not options.report:
        jobs = all_jobs()
        try:
            do_all(jobs, options.folder, options.jobs)
        except KeyboardInterrupt:
            print("stopped; the same command goes on from here", file=sys.stderr)
            return 130
        write(DATA, ((options.folder / job.file).read_text() for job in jobs))
    return 0


if __name__ == "__main__":
    sys.exit(main())
