"""Environment steps per second of this trainer beside CleanRL's loop, Stable-Baselines3 and TorchRL.

Every trainer runs in its own process, which starts before the first round and stays: the comparison is about training,
not importing. In every round each trains for some seconds, in whole updates, one after the other. The order changes
from round to round, so that other load affects all alike; a ratio compares turns of the same round. Ours measures its
gradients, writes its checkpoints and serves /metrics, which is scraped once a second while it trains.

    .venv/bin/python -m benchmarks.throughput --help
"""

import argparse
import contextlib
import importlib
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from importlib.util import find_spec
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from statistics import median, quantiles
from typing import NamedTuple
from urllib.request import urlopen

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from benchmarks.machine import machine
from benchmarks.peers import Setting

SCRAPE_INTERVAL = 1.0  # seconds
END_SECONDS = 30.0  # for a trainer to finish its turn and clean up
MOST_LOAD = 0.5  # of other programs, before the first round
MOST_SPREAD = 0.1  # between the quartiles of a ratio, of its median


class Task(NamedTuple):
    """A task.

    Attributes:
        setting: the same for all trainers.
        goal: our speed relative to the best peer.
        peers: modules in benchmarks/peers.
    """

    setting: Setting
    goal: float
    peers: tuple[str, ...]


OURS = "ours"
TRAINERS = {OURS: "ours", "cleanrl": "CleanRL's loop", "sb3": "Stable-Baselines3", "torchrl_ppo": "TorchRL"}
"""Module in benchmarks/peers -> its name in the tables."""
PACKAGES = {"sb3": "stable_baselines3", "torchrl_ppo": "torchrl"}

CARTPOLE = Setting(env="CartPole-v1", num_envs=8, rollout_steps=128, minibatch_size=256, hidden_size=64)
SEVEN_HEADS = Setting(
    env="benchmarks.synthetic:SevenHeads-v0",
    num_envs=64,
    rollout_steps=64,
    minibatch_size=512,
    hidden_size=128,
    vectorization="vector_entry_point",
)
TASKS = {
    "seven-heads": Task(SEVEN_HEADS, 2.5, ("cleanrl", "sb3", "torchrl_ppo")),
    "cartpole": Task(CARTPOLE, 1.5, ("cleanrl", "sb3", "torchrl_ppo")),
    # Without TorchRL: it refuses vector environments that reset in the step after an episode's end.
    "cartpole-native": Task(replace(CARTPOLE, vectorization="vector_entry_point"), 3.0, ("cleanrl", "sb3")),
}


class TrainerFailed(Exception):
    """A trainer's process raised; the message holds its traceback."""


def work(module: str, setting: Setting, threads: int, pipe: Connection) -> None:
    """A trainer's process: builds it, then trains for each number of seconds that it receives, until None."""
    try:
        import torch

        torch.set_num_threads(threads)
        contestant = importlib.import_module(f"benchmarks.peers.{module}").start(setting)
        try:
            contestant.update()  # the first update allocates and compiles
            pipe.send(contestant.metrics_url)
            while (seconds := pipe.recv()) is not None:
                updates, started = 0, time.perf_counter()
                while (elapsed := time.perf_counter() - started) < seconds or not updates:
                    contestant.update()
                    updates += 1
                pipe.send(updates * setting.steps_per_update / elapsed)
        finally:
            contestant.close()
    except (EOFError, BrokenPipeError):
        pass  # the parent is gone
    except Exception:
        pipe.send(TrainerFailed(traceback.format_exc()))


class Worker:
    """A trainer in its process, as the parent sees it; `ready()` before the first turn."""

    def __init__(self, module: str, setting: Setting, threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=work, args=(module, setting, threads, theirs), daemon=True)
        # Ctrl-C reaches the whole process group. The child inherits the mask, so that only the parent decides. Start
        # the tracker before, because it would remove the mask.
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
        """Environment steps per second, over whole updates for at least `seconds`."""
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
        """Ask it to end after its turn: terminating it would leave semaphores and files."""
        with contextlib.suppress(OSError):
            self._pipe.send(None)
        self._process.join(END_SECONDS)
        if self._process.is_alive():
            self._process.kill()
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
    task: Task, trainers: Sequence[str], threads: int, rounds: int, seconds: float, progress: Progress, title: str
) -> dict[str, list[float]]:
    """Steps per second of each trainer in each round.

    Raises:
        TrainerFailed: a trainer could not be built, or ended; the message names it and says why.
    """
    bar = progress.add_task(f"{title}: starting", total=rounds * len(trainers))
    speeds: dict[str, list[float]] = {name: [] for name in trainers}
    with ExitStack() as stack:
        workers = {}
        for name in trainers:
            workers[name] = Worker(name, task.setting, threads)
            stack.callback(workers[name].close)
        try:
            for name in trainers:
                workers[name].ready()
            for number in range(rounds):
                first = number % len(trainers)
                for name in (*trainers[first:], *trainers[:first]):
                    progress.update(bar, description=f"{title}: {TRAINERS[name]}")
                    speeds[name].append(workers[name].turn(seconds))
                    progress.advance(bar)
        except TrainerFailed as error:
            raise TrainerFailed(f"{TRAINERS[name]}: {error}") from None
    progress.remove_task(bar)
    return speeds


class Ratio(NamedTuple):
    """Our speed relative to another's, over the rounds."""

    least: float
    lower: float
    median: float
    upper: float
    most: float

    @classmethod
    def of(cls, ours: Sequence[float], others: Sequence[float]) -> "Ratio":
        values = [mine / other for mine, other in zip(ours, others, strict=True)]
        inner = quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
        return cls(min(values), *inner, max(values))

    @property
    def cells(self) -> list[str]:
        return [f"{self.median:.2f}", f"{self.lower:.2f} to {self.upper:.2f}", f"{self.least:.2f} to {self.most:.2f}"]

    @property
    def is_noisy(self) -> bool:
        return self.upper - self.lower > MOST_SPREAD * self.median


def best_peer(speeds: dict[str, list[float]]) -> Ratio | None:
    """Our speed relative to the fastest peer of each round; None if one is missing."""
    peers = [values for name, values in speeds.items() if name != OURS]
    return Ratio.of(speeds[OURS], [max(of_round) for of_round in zip(*peers)]) if peers and OURS in speeds else None


RATIO = ["ours to it", "quartiles", "min to max"]


def table(speeds: dict[str, list[float]]) -> str:
    """Markdown: steps per second of each trainer, and paired ratios of ours to it."""
    rows = []
    for name, values in speeds.items():
        ratio = Ratio.of(speeds[OURS], values).cells if name != OURS and OURS in speeds else [""] * 3
        rows.append(
            [TRAINERS[name], *(f"{value:,.0f}" for value in (median(values), min(values), max(values))), *ratio]
        )
    if best := best_peer(speeds):
        rows.append(["best peer of each round", "", "", "", *best.cells])
    return markdown(["", "median steps/s", "min", "max", *RATIO], rows)


def table_of_goals(results: dict[tuple[str, int], Ratio]) -> str:
    rows = []
    for (name, threads), ratio in results.items():
        goal = TASKS[name].goal
        verdict = ("yes" if ratio.median >= goal else "NO") + (", noisy" if ratio.is_noisy else "")
        rows.append([name, str(threads), f"{goal}", *ratio.cells, verdict])
    return markdown(["setting", "threads", "goal", "ours to the best peer", *RATIO[1:], "reached"], rows)


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def installed(module: str) -> bool:
    return module not in PACKAGES or find_spec(PACKAGES[module]) is not None


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.throughput",
        description=__doc__.split("\n\n")[0],
        epilog="seven-heads is an environment of seven heads and 64 observations that costs next to nothing, 64 x 64, "
        "minibatch 512, two layers of 128; cartpole is CartPole-v1, 8 environments x 128 steps, minibatch 256, two "
        "layers of 64, stepped one by one, and cartpole-native the same in Gymnasium's own vector environment. The "
        "peers want the extra `peers`; those that are not installed are left out.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--settings", nargs="+", choices=TASKS, default=list(TASKS), help="what to train")
    parser.add_argument("--trainers", nargs="+", choices=TRAINERS, default=list(TRAINERS), help="who trains")
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2], metavar="N", help="torch's CPU threads")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each trainer")
    parser.add_argument("--seconds", type=float, default=3.0, help="length of a turn")
    parser.add_argument("--quick", action="store_true", help="3 rounds of 1 second: a look, not a measurement")
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.seconds = 3, 1.0
    if options.rounds < 1 or options.seconds <= 0 or min(options.threads) < 1:
        parser.error("--rounds and --threads must be at least 1, --seconds above 0")
    missing = [name for name in options.trainers if not installed(name)]
    for name in missing:
        print(f"{TRAINERS[name]} is not installed: left out", file=sys.stderr)

    print(machine("torch", "numpy", "gymnasium", "stable-baselines3", "torchrl"))
    print(f"`python -m benchmarks.throughput {' '.join(sys.argv[1:])}`", flush=True)
    if os.getloadavg()[0] > MOST_LOAD:
        print(f"**Other programs are running** (load average above {MOST_LOAD}): repeat it on an idle machine.")
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    progress = Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), refresh_per_second=1)
    results: dict[tuple[str, int], Ratio] = {}
    try:
        with progress:
            for setting in options.settings:
                task = TASKS[setting]
                takes_part = [n for n in (OURS, *task.peers) if n in options.trainers and n not in missing]
                for threads in options.threads:
                    title = f"{setting}, {threads} thread{'s' * (threads > 1)}"
                    speeds = measure(task, takes_part, threads, options.rounds, options.seconds, progress, title)
                    print(f"\n### {title}\n\n{table(speeds)}", flush=True)
                    if best := best_peer(speeds):
                        results[setting, threads] = best
    except TrainerFailed as error:
        print(f"python -m benchmarks.throughput: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    finally:
        if results:
            print(f"\n### Goals\n\n{table_of_goals(results)}", flush=True)
            if any(ratio.is_noisy for ratio in results.values()):
                print(f"\nNoisy: the quartiles of the ratio are further apart than {MOST_SPREAD:.0%} of its median.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
