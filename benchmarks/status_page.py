"""Cost of the status page in the exporter process: CPU time per request, and bytes.

`python -m benchmarks.status_page` prints a row per number of runs; it takes seconds.
"""

import argparse
import gzip
import math
import random
import time
from statistics import median

from exporter import RunAggregator, emit_ppo_update
from exporter.serving.status import StatusPage
from exporter.snapshot import HISTORY_UPDATES
from exporter.telemetry import TRAINING_SIGNALS, GradientStep, summarize_gradient_steps


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.status_page",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--runs", type=int, nargs="+", default=[1, 10], help="runs in the process")
    parser.add_argument("--heads", type=int, default=7, help="heads per run")
    parser.add_argument("--requests", type=int, default=100, help="requests per median")
    arguments = parser.parse_args()
    print("| runs in the process | first request | each further one | sent with gzip |")
    print("|---|---|---|---|")
    for runs in arguments.runs:
        print(row(runs, arguments.heads, arguments.requests))


def row(runs: int, heads: int, requests: int) -> str:
    """One row of the table: milliseconds of CPU time of this thread, and kB of a response."""
    aggregator, random_norms = RunAggregator(), random.Random(1)

    def update(run: int) -> None:
        norms = {f"head-{head}": math.exp(random_norms.gauss(0.0, 0.3)) for head in range(heads)}
        metrics = summarize_gradient_steps([GradientStep(norms, math.hypot(*norms.values()))])
        emit_ppo_update(metrics, run=f"run-{run}", handler=aggregator, **dict.fromkeys(TRAINING_SIGNALS, 0.125))

    for run in range(runs):
        for _ in range(HISTORY_UPDATES):
            update(run)
    page, times = StatusPage(aggregator), []  # an aggregator has a `snapshot`, as that process' state does
    first, _ = timed(page)
    for request in range(requests):
        update(request % runs)
        milliseconds, body = timed(page)
        times.append(milliseconds)
    return f"| {runs} | {first:.0f} ms | {median(times):.1f} ms | {len(body) / 1000:.0f} kB |"


def timed(page: StatusPage) -> tuple[float, bytes]:
    started = time.thread_time()
    _, _, body = page.answer()
    body = gzip.compress(body, 1)  # as it is sent
    return 1000 * (time.thread_time() - started), body


if __name__ == "__main__":
    main()
