"""Checks and measures training and monitoring on a CUDA device, in less than ten minutes, and prints Markdown.

Every check runs in its own process with a time limit, so that one that fails, hangs or breaks the device's context does
not affect the others. Exit code: 0 if all hold, 1 if not, 2 without a CUDA device.

A synchronization is what torch's sync debug mode reports: the host waits for the device in the middle of its work. Zero
means that the mode "error" would pass. Waiting for an event, such as an update's result in pinned memory, does not
count.

    python -m benchmarks.gpu
"""

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
import traceback

import torch

from benchmarks.gpu_checks import CHECKS, ROOT, as_rank, table
from benchmarks.machine import machine

MOST_SECONDS = 570.0  # for all checks
CHECK_SECONDS = 200.0  # time limit of a check
END_SECONDS = 10.0


def run_check(name: str, device: torch.device, seconds: float, limit: float) -> str:
    """Run one check in its own process and print its section. Returns the result."""
    print(f"### {CHECKS[name].__doc__}\n", flush=True)
    command = [sys.executable, "-m", "benchmarks.gpu", "--device", str(device), "--seconds", str(seconds)]
    started = time.perf_counter()
    # In its own process group, to end it with the ranks that it starts.
    process = subprocess.Popen([*command, "--check", name], cwd=ROOT, start_new_session=True)
    try:
        code = process.wait(limit)
        result = {0: "holds", 1: "does NOT hold"}.get(code, f"FAILED, exit code {code}")
    except subprocess.TimeoutExpired:
        result = f"FAILED, not done after {limit:.0f} s"
    finally:
        end(process)
    print(f"\n{name}: {result}, {time.perf_counter() - started:.0f} s\n", flush=True)
    return result


def end(process: subprocess.Popen) -> None:
    """End its group: torchrun passes SIGTERM on to its ranks."""
    for signum in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signum)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(END_SECONDS)
            return


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.split("\n\n")[0])
    parser.add_argument("--checks", nargs="+", choices=CHECKS, default=list(CHECKS), help="what to do (default: all)")
    parser.add_argument("--seconds", type=float, default=3.0, help="for a single measurement (default: 3)")
    # For its child processes, and to try it without a GPU.
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"), help=argparse.SUPPRESS)
    parser.add_argument("--check", choices=CHECKS, help=argparse.SUPPRESS)
    parser.add_argument("--as-rank", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    device = options.device
    if device.type == "cuda" and not torch.cuda.is_available():
        print("python -m benchmarks.gpu: error: torch sees no CUDA device here; nothing was measured", file=sys.stderr)
        return 2
    if options.as_rank:
        return as_rank(device)
    if options.check:
        torch.set_num_threads(1)
        try:
            return 0 if CHECKS[options.check](device, options.seconds) else 1
        except Exception:
            print(f"```\n{traceback.format_exc()[-3000:]}```", flush=True)
            return 3
    print(machine("torch", "numpy", "gymnasium"))
    for number in range(torch.cuda.device_count() if device.type == "cuda" else 0):
        gpu = torch.cuda.get_device_properties(number)
        print(f"cuda:{number}: {gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}")
    print(f"`python -m benchmarks.gpu {' '.join(sys.argv[1:])}`\n", flush=True)
    results, started = {}, time.perf_counter()
    for name in options.checks:
        limit = min(CHECK_SECONDS, max(1.0, started + MOST_SECONDS - time.perf_counter()))
        results[name] = run_check(name, device, options.seconds, limit)
    table(["check", "result"], [[name, result] for name, result in results.items()])
    return 0 if set(results.values()) == {"holds"} else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
