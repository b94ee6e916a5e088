"""Many synthetic runs: the answers of their endpoints, and the samples that Prometheus would have stored of them.

`python -m benchmarks.replay` is the process that serves them; `benchmarks.fleet` starts it.
"""

import argparse
import asyncio
import re
import time
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from prometheus_client import generate_latest

from benchmarks.remote_write import STALE, encode_samples, encode_series
from exporter.aggregator import RunAggregator
from exporter.collectors import build_registry
from exporter.gradient_cv import gradient_cv
from exporter.metrics import RUN_LABEL
from exporter.telemetry import PPOUpdatePayload

JOB = "ppo"
KINDS = {
    "fleet": "7 heads, critical for a twentieth of the time",
    "critical": "7 heads, always critical",
    "wide": "1,792 heads, 256 of them dead, 256 starved, 128 with a NaN in every update",
}
STEPS = 4
"""Gradient steps of an update; one scrape sees one update more."""

_ONE = "one"


@dataclass(frozen=True)
class Runs:
    """Runs that repeat the same sequence of updates, each from a different start.

    Attributes:
        kind: one of `KINDS`.
        number: how many runs there are.
        start: Unix time of the first scrape; counters rise from there.
        interval: seconds from one scrape of a run to the next.
    """

    kind: str
    number: int
    start: float
    interval: float

    @staticmethod
    def name(run: int) -> str:
        return f"run-{run:04d}"

    @staticmethod
    def instance(run: int) -> str:
        return f"host-{run:04d}:9842"

    def tick(self, moment: float) -> int:
        """The number of the scrape at a Unix time."""
        return int((moment - self.start) / self.interval)

    def moments(self, run: int, ticks: range) -> np.ndarray:
        """[ticks] Unix times: Prometheus spreads its targets over the interval."""
        return self.start + (np.array(ticks) + run / self.number) * self.interval

    def milliseconds(self, run: int, ticks: range) -> np.ndarray:
        """[ticks] int64, `moments` in milliseconds, as Prometheus stores them."""
        return np.rint(self.moments(run, ticks) * 1000).astype(np.int64)

    @cached_property
    def length(self) -> int:
        """Number of updates in the sequence."""
        return 40 if self.kind == "wide" else 240

    @cached_property
    def _loop(self) -> tuple[list[str], np.ndarray]:
        """The series in the form of `/metrics`, and their values [updates, series]; NaN means missing."""
        random, heads = np.random.default_rng(0), [f"head-{n}" for n in range(1792 if self.kind == "wide" else 7)]
        aggregator = RunAggregator()
        aggregator.register_run(_ONE, heads, {"environment": "synthetic", "seed": "1", "device": "cpu"})
        registry, answers = build_registry(aggregator), []
        for update in range(self.length):
            norms = random.lognormal(0.0, 0.3, (STEPS, len(heads)))
            if self.kind == "wide":
                norms[:, ::7] = 0.0
                norms[:, 1::7] *= 0.01
            elif self.kind == "critical" or self.length * 0.5 <= update < self.length * 0.55:
                norms[:, update % 7] *= 1000
            cvs = tuple(gradient_cv(step) for step in norms)
            aggregator.handle_ppo_update(
                PPOUpdatePayload(
                    run=_ONE,
                    gradient_cv=sum(cvs) / STEPS,
                    gradient_cv_per_step=cvs,
                    contributing_heads=len(heads),
                    head_gradient_norms=dict(zip(heads, norms.mean(0), strict=True)),
                    nonfinite_gradient_steps=dict.fromkeys(heads[2::14] if self.kind == "wide" else [], 1),
                    gradient_norm=float(np.linalg.norm(norms.mean(0))),
                    environment_steps=2048,
                    episodes=8,
                    **dict.fromkeys(
                        ("policy_loss", "value_loss", "entropy", "approx_kl", "clip_fraction", "explained_variance"),
                        float(random.random()),
                    ),
                    learning_rate=3e-4,
                    episode_return_mean=float(random.random()),
                    episode_length_mean=64.0,
                    update_duration_seconds=float(random.uniform(0.5, 2.0)),
                    rollout_duration_seconds=float(random.uniform(1.0, 3.0)),
                    timestamp_seconds=1.0 + update * self.interval,
                )
            )
            lines = generate_latest(registry).decode().splitlines()
            answers.append(dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#")))
        names = list(dict.fromkeys(name for answer in answers for name in answer))
        return names, np.array([[float(answer.get(name, "nan")) for name in names] for answer in answers])

    @property
    def series(self) -> list[str]:
        return self._loop[0]

    @cached_property
    def _growth(self) -> np.ndarray:
        """[series] increase of each counter over one repetition of the sequence; 0 for all others."""
        names, values = self._loop
        is_counter = [re.match(r"\w+_(total|count|sum|bucket)\b", name) is not None for name in names]
        return np.where(is_counter, values[-1], 0.0)

    def values(self, run: int, ticks: range) -> np.ndarray:
        """[ticks, series] the values of the run's endpoint; NaN if the series is missing."""
        names, loop = self._loop
        rounds, row = np.divmod(np.array(ticks) + run * self.length // self.number, self.length)
        values = loop[row] + rounds[:, None] * self._growth
        is_time = ["_timestamp_seconds" in name for name in names]
        values[:, is_time] += (self.moments(run, ticks) - 1.0 - row * self.interval)[:, None]
        values[:, [name.startswith("process_start_time") for name in names]] = self.start
        return values

    def answer(self, run: int, moment: float) -> bytes:
        """The answer of the run's endpoint at a Unix time."""
        tick = self.tick(moment - run / self.number * self.interval)
        (values,) = self.values(run, range(tick, tick + 1)).tolist()
        pairs = zip(self.series, values, strict=True)
        text = "".join(f"{name} {value!r}\n" for name, value in pairs if value == value)
        return text.replace(f'{RUN_LABEL}="{_ONE}"', f'{RUN_LABEL}="{self.name(run)}"').encode()

    def labels(self, run: int, name: str) -> dict[str, str]:
        """Labels of a series, as Prometheus stores them."""
        target = {"job": JOB, "instance": self.instance(run), RUN_LABEL: self.name(run)}
        return dict(re.findall(r'(\w+)="([^"]*)"', name), __name__=name.partition("{")[0]) | target

    def stored(self, run: int, ticks: range, only: tuple[str, ...] = ("",)) -> list[bytes]:
        """The samples that Prometheus would have stored of the run, with `up`, encoded for `write`.

        Args:
            only: prefixes of the names of the series to write.
        """
        times = self.milliseconds(run, ticks)
        before = self.values(run, range(ticks.start - 1, ticks.stop)).T
        is_there = ~np.isnan(before)
        ends = is_there[:, :-1] & ~is_there[:, 1:]
        samples = encode_samples(times, np.where(ends, STALE, before[:, 1:]))
        written = is_there[:, 1:] | ends
        encoded = [
            encode_series(self.labels(run, name), each[which])
            for name, each, which in zip(self.series, samples, written, strict=True)
            if name.startswith(only) and which.any()
        ]
        return [*encoded, encode_series(self.labels(run, "up"), encode_samples(times, np.ones(len(times))))]


async def serve(runs: Runs, port: int) -> None:
    """Answer `GET /NUMBER` on 127.0.0.1 with the metrics of that run, until cancelled."""

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                request = await reader.readuntil(b"\r\n\r\n")
                body = runs.answer(int(request.split()[1].strip(b"/")), time.time())
                head = (
                    f"HTTP/1.1 200 OK\r\nContent-Type: text/plain; version=0.0.4\r\nContent-Length: {len(body)}\r\n\r\n"
                )
                writer.write(head.encode() + body)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    _ = runs.series  # compute it before the first request
    async with await asyncio.start_server(connected, "127.0.0.1", port, backlog=runs.number) as server:
        await server.serve_forever()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.replay", description=__doc__.split("\n\n")[0])
    for name, kind in {"kind": str, "number": int, "start": float, "interval": float, "port": int}.items():
        parser.add_argument(name, type=kind)
    options = vars(parser.parse_args())
    asyncio.run(serve(port=options.pop("port"), runs=Runs(**options)))


if __name__ == "__main__":
    main()
