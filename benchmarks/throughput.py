"""Environment steps per second of this trainer beside CleanRL's loop, Stable-Baselines3 and TorchRL.

Every trainer runs in a process of its own, which is started before the first round and stays: what is compared is
training, not importing. In every round each of them trains for some seconds, in whole updates, one after the other and
in an order that changes from round to round, so that whatever else the machine does hits all alike; a ratio is taken
between turns of the same round, and the median over rounds is shown. Ours measures its gradients and serves /metrics,
which is scraped once a second while it trains.

    .venv/bin/python -m benchmarks.throughput --help
"""

import argparse
import importlib.util
import multiprocessing
import os
import platform
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import NamedTuple
from urllib.request import urlopen

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from benchmarks.machine import machine
from benchmarks.peers import Setting

SCRAPE_INTERVAL = 1.0  # seconds

CARTPOLE = Setting(env="CartPole-v1", num_envs=8, rollout_steps=128, minibatch_size=256, hidden_size=64)
NATIVE_CARTPOLE = replace(CARTPOLE, vectorization="vector_entry_point")
SEVEN_HEADS = Setting(
    env="benchmarks.synthetic:SevenHeads-v0",
    num_envs=64,
    rollout_steps=64,
    minibatch_size=512,
    hidden_size=128,
    vectorization="vector_entry_point",
)


class Entry(NamedTuple):
    """A line of a table: who trains what."""

    module: str  # in benchmarks/peers
    setting: Setting

    @property
    def ours(self) -> bool:
        return self.module == "ours"


SETTINGS: dict[str, dict[str, Entry]] = {
    "cartpole": {
        "ours": Entry("ours", CARTPOLE),
        "ours, native vector environment": Entry("ours", NATIVE_CARTPOLE),
        "CleanRL's loop": Entry("cleanrl", CARTPOLE),
        "CleanRL's loop, native vector environment": Entry("cleanrl", NATIVE_CARTPOLE),
        "Stable-Baselines3": Entry("sb3", CARTPOLE),
        "TorchRL": Entry("torchrl_ppo", CARTPOLE),
    },
    "seven-heads": {
        "ours": Entry("ours", SEVEN_HEADS),
        "CleanRL's loop": Entry("cleanrl", SEVEN_HEADS),
        "Stable-Baselines3": Entry("sb3", SEVEN_HEADS),
        "TorchRL": Entry("torchrl_ppo", SEVEN_HEADS),
    },
}


class TrainerFailed(Exception):
    """A trainer's process raised; the message holds its traceback."""


def work(entry: Entry, threads: int, pipe: Connection) -> None:
    """A trainer's process: builds it, then trains for as many seconds as it is told, again and again."""
    try:
        import torch

        torch.set_num_threads(threads)
        contestant = importlib.import_module(f"benchmarks.peers.{entry.module}").start(entry.setting)
        contestant.update()  # the first one allocates, and compiles what wants to be compiled
        pipe.send(contestant.metrics_url)
        while True:
            seconds = pipe.recv()
            updates, started = 0, time.perf_counter()
            while (elapsed := time.perf_counter() - started) < seconds or not updates:
                contestant.update()
                updates += 1
            pipe.send(updates * entry.setting.steps_per_update / elapsed)
    except Exception:
        pipe.send(TrainerFailed(traceback.format_exc()))


class Worker:
    """A trainer in its process, as the parent sees it; `ready()` before the first turn."""

    def __init__(self, entry: Entry, threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=work, args=(entry, threads, theirs), daemon=True)
        # Ctrl-C reaches the whole process group. The child inherits the mask and leaves the decision to its parent;
        # the tracker, which would lift it, is started before.
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            self._process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        theirs.close()

    def ready(self) -> None:
        self._metrics_url: str | None = self._receive()

    def turn(self, seconds: float) -> float:
        """Environment steps per second over whole updates that take `seconds` or a little more."""
        with scraping(self._metrics_url):
            self._pipe.send(seconds)
            return self._receive()

    def _receive(self) -> object:
        try:
            answer = self._pipe.recv()
        except (EOFError, ConnectionError):
            self._process.join()
            raise TrainerFailed(f"its process ended with exit code {self._process.exitcode}") from None
        if isinstance(answer, TrainerFailed):
            raise answer
        return answer

    def close(self) -> None:
        self._process.terminate()
        self._process.join()
        self._pipe.close()


@contextmanager
def scraping(url: str | None) -> Iterator[None]:
    """Scrape `url` once a second, as Prometheus would."""
    if url is None:
        yield
        return
    done, failures = threading.Event(), []

    def scrape() -> None:
        while not done.is_set():
            try:
                with urlopen(url, timeout=10) as response:
                    response.read()
            except OSError as error:
                failures.append(error)
                return
            done.wait(SCRAPE_INTERVAL)

    thread = threading.Thread(target=scrape)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
    if failures:
        raise TrainerFailed(f"{url} could not be scraped: {failures[0]}")


def measure(
    entries: dict[str, Entry], threads: int, rounds: int, seconds: float, progress: Progress, title: str
) -> dict[str, list[float]]:
    """Steps per second of each entry in each round.

    Raises:
        TrainerFailed: one could not be built, or ended; the message names it and says why.
    """
    task = progress.add_task(f"{title}: starting", total=rounds * len(entries))
    speeds: dict[str, list[float]] = {name: [] for name in entries}
    with ExitStack() as stack:
        workers = {}
        for name, entry in entries.items():
            workers[name] = Worker(entry, threads)
            stack.callback(workers[name].close)
        names = list(entries)
        try:
            for name in names:
                workers[name].ready()
            for number in range(rounds):
                first = number % len(names)
                for name in names[first:] + names[:first]:
                    progress.update(task, description=f"{title}: {name}")
                    speeds[name].append(workers[name].turn(seconds))
                    progress.advance(task)
        except TrainerFailed as error:
            raise TrainerFailed(f"{name}: {error}") from None
    progress.remove_task(task)
    return speeds


def table(entries: dict[str, Entry], speeds: dict[str, list[float]]) -> str:
    """Markdown: steps per second of each, and the median of the paired ratios of ours to it.

    The last line compares with the fastest peer of each round among those that take the environments one by one, or
    as they come where there is one way only.
    """
    ours = [name for name, entry in entries.items() if entry.ours]
    usual = entries[ours[0]].setting if ours else None
    peers = [name for name, entry in entries.items() if not entry.ours and entry.setting == usual]

    def ratio(own: str, others: Sequence[float]) -> str:
        return f"{median(mine / other for mine, other in zip(speeds[own], others)):.2f}"

    header = ["", "median steps/s", "min", "max", *(f"{name}: ratio" for name in ours)]
    rows = [
        [name, *(f"{value:,.0f}" for value in (median(values), min(values), max(values)))]
        + [ratio(own, values) if not entries[name].ours else "" for own in ours]
        for name, values in speeds.items()
    ]
    if ours and peers:
        best = [max(of_round) for of_round in zip(*(speeds[name] for name in peers))]
        rows.append(["best peer of each round", "", "", "", *(ratio(own, best) for own in ours)])
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def installed(entry: Entry) -> bool:
    package = {"sb3": "stable_baselines3", "torchrl_ppo": "torchrl"}.get(entry.module)
    return package is None or importlib.util.find_spec(package) is not None


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.throughput",
        description=__doc__.split("\n\n")[0],
        epilog="cartpole is CartPole-v1, 8 environments x 128 steps, minibatch 256, two layers of 64; seven-heads is an "
        "environment of seven heads and 64 observations that costs next to nothing, 64 x 64, minibatch 512, two layers "
        "of 128. The peers want the extra `peers`; those that are not installed are left out.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    names = list(SETTINGS)
    modules = sorted({entry.module for entries in SETTINGS.values() for entry in entries.values()})
    parser.add_argument("--settings", nargs="+", choices=names, default=names, help="what to train")
    parser.add_argument("--trainers", nargs="+", choices=modules, default=modules, help="who trains")
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2], metavar="N", help="torch's CPU threads")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each trainer")
    parser.add_argument("--seconds", type=float, default=3.0, help="length of a turn")
    parser.add_argument("--quick", action="store_true", help="3 rounds of 1 second: a look, not a measurement")
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.seconds = 3, 1.0
    if options.rounds < 1 or options.seconds <= 0 or min(options.threads) < 1:
        parser.error("--rounds and --threads must be at least 1, --seconds above 0")

    print(
        f"{machine('torch', 'numpy', 'gymnasium', 'stable-baselines3', 'torchrl')}\n`python -m benchmarks.throughput {' '.join(sys.argv[1:])}`",
        flush=True,
    )
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    progress = Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), refresh_per_second=1)
    try:
        with progress:
            for setting in options.settings:
                chosen = {name: entry for name, entry in SETTINGS[setting].items() if entry.module in options.trainers}
                for name in [name for name, entry in chosen.items() if not installed(entry)]:
                    print(f"{name} is not installed: left out", file=sys.stderr)
                    del chosen[name]
                for threads in options.threads:
                    title = f"{setting}, {threads} thread{'s' * (threads > 1)}"
                    speeds = measure(chosen, threads, options.rounds, options.seconds, progress, title)
                    print(f"\n### {title}\n\n{table(chosen, speeds)}", flush=True)
    except TrainerFailed as error:
        print(f"python -m benchmarks.throughput: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
