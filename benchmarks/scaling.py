"""Environment steps per second of one run trained by one process and by several, with torchrun."""

import argparse
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console

from benchmarks.machine import machine

ROOT = Path(__file__).resolve().parent.parent
WORKLOADS = {
    "host-growth": ["--total-timesteps", "163840"],
    "seven-heads": [
        *("--env", "benchmarks.synthetic:SevenHeads-v0", "--vectorization", "vector_entry_point"),
        *("--separate-critic", "--total-timesteps", "819200"),
    ],
}


def steps_per_second(workload: str, ranks: int) -> float:
    """Steps per second of one whole run, from its first rollout to its last update.

    Raises:
        RuntimeError: the run failed; the message is the end of its output.
    """
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    with tempfile.TemporaryDirectory() as folder:
        places = ["--metrics-port", "0", "--targets-dir", folder, "--checkpoint-every", "0"]
        command = [sys.executable, *launcher, "-m", "trainer", *WORKLOADS[workload], *places]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    speeds = re.findall(r"steps/s (\d+)", done.stdout)
    if done.returncode or not speeds:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr[-2000:]}")
    return float(speeds[-1])


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scaling",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS), help="what to train")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], metavar="N", help="numbers of processes")
    parser.add_argument("--rounds", type=int, default=5, help="runs of each, taking turns")
    options = parser.parse_args()

    speeds: dict[tuple[str, int], list[float]] = {
        (workload, ranks): [] for workload in options.workloads for ranks in options.ranks
    }
    before = machine("torch", "numpy", "gymnasium")
    with Console(stderr=True).status("") as status:
        for number in range(options.rounds):
            for workload, ranks in speeds:
                status.update(f"round {number + 1} of {options.rounds}: {workload}, {ranks} ranks")
                speeds[workload, ranks].append(steps_per_second(workload, ranks))
    print(f"{before}\n`{' '.join(['python -m benchmarks.scaling', *sys.argv[1:]])}`\n")
    first = options.ranks[0]
    print(f"| workload | ranks | median steps/s | min | max | median ratio to {first} |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for (workload, ranks), of_rounds in speeds.items():
        ratio = statistics.median(a / b for a, b in zip(of_rounds, speeds[workload, first]))
        median, least, most = statistics.median(of_rounds), min(of_rounds), max(of_rounds)
        print(f"| {workload} | {ranks} | {median:,.0f} | {least:,.0f} | {most:,.0f} | {ratio:.2f} |")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
