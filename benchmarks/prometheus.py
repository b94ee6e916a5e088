"""A Prometheus to measure: queries, and writing past samples to it."""

import json
import math
import re
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.remote_write import STALE, encode_samples, encode_series, write
from benchmarks.replay import Runs
from stack.servers import Servers

HOUR = 3600
LONG = ("ppo_updates_total", "ppo_last_update_timestamp_seconds", "ppo_run_info")
LONG_HOURS = 6
"""How far rules look back at those series; at the recorded sum of the norms, a day."""

_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class BenchmarkFailed(RuntimeError):
    """A step of the benchmark failed."""


class Prometheus:
    """Client of a running Prometheus."""

    def __init__(self, url: str) -> None:
        self.url = url

    def raw(self, path: str, **parameters: Any) -> bytes:
        try:
            with _opener.open(f"{self.url}{path}?{urllib.parse.urlencode(parameters)}", timeout=300) as answer:
                return answer.read()
        except urllib.error.HTTPError as error:
            raise BenchmarkFailed(f"{path} {parameters}: {error.code} {error.read().decode()[:300]}") from error

    def ask(self, path: str, **parameters: Any) -> Any:
        """The data of an answer."""
        return json.loads(self.raw(path, **parameters))["data"]

    def number(self, expression: str) -> float:
        """The value of the expression's single series; NaN if there is none."""
        result = self.ask("/api/v1/query", query=expression)["result"]
        return float(result[0]["value"][1]) if result else math.nan


def prometheus_command(servers: Servers, config: Path, port: int) -> list[str | Path]:
    return [
        servers.prometheus,
        f"--config.file={config}",
        f"--storage.tsdb.path={config.parent / 'tsdb'}",
        f"--web.listen-address=127.0.0.1:{port}",
        "--web.enable-remote-write-receiver",
        *servers.prometheus_options,
    ]


def seconds(duration: str) -> float:
    """Seconds of a duration in Prometheus' form, such as 1m30s."""
    units = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86400}
    return sum(int(number) * units[unit] for number, unit in re.findall(r"(\d+)(ms|[smhd])", duration))


class History:
    """Writes the past samples of runs and recording rules, in order of time."""

    def __init__(self, prometheus: Prometheus, runs: Runs, groups: Sequence[dict]) -> None:
        self._prometheus, self._runs, self._groups = prometheus, runs, groups

    def write(self, now: Callable[[], float]) -> None:
        """Write from the runs' start until it has caught up with `now`."""
        runs, began = self._runs, now()
        done, hour = 0, round(HOUR / runs.interval)
        while (ahead := runs.tick(began) - hour - done) > 0:
            ticks = range(done, done + min(ahead, hour))
            self._send(self._long(run, ticks, ahead < LONG_HOURS * hour) for run in range(runs.number))
            done = ticks.stop
        while (behind := runs.tick(now()) - done) > 4:
            ticks = range(done, done + min(behind, hour // 12))
            self._send(runs.stored(run, ticks) for run in range(runs.number))
            for group in self._groups:
                for rule in group["rules"]:
                    if "record" in rule:
                        self._record(rule, max(seconds(group["interval"]), runs.interval), ticks)
            done = ticks.stop

    def _long(self, run: int, ticks: range, is_recent: bool) -> list[bytes]:
        """The series on which rules look back for more than an hour."""
        rare = range(ticks.start, ticks.stop, max(1, round(30 / self._runs.interval)))
        is_norm = [name.startswith("ppo_head_gradient_norm{") for name in self._runs.series]
        sums = encode_samples(self._runs.milliseconds(run, rare), self._runs.values(run, rare)[:, is_norm].sum(1))
        series = encode_series(self._runs.labels(run, "run:ppo_head_gradient_norm:sum"), sums)
        return [series, *(self._runs.stored(run, ticks, LONG) if is_recent else ())]

    def _record(self, rule: dict, step: float, ticks: range) -> None:
        """Write a recording rule's series, computed by Prometheus from the rule's expression."""
        since, until = (self._runs.start + tick * self._runs.interval for tick in (ticks.start, ticks.stop))
        times = np.arange(math.ceil(since / step), math.ceil(until / step)) * step
        if not len(times):
            return
        # Adding zero drops metric names, as a rule does, so that two of them become one series.
        parameters = {"query": f"({rule['expr']}) + 0", "start": times[0], "end": times[-1], "step": step}
        # Each series ends after its last sample, at the latest at the end of this period.
        milliseconds = np.append(times * 1000, times[-1] * 1000 + 1).astype(np.int64)

        def of(found: dict) -> list[bytes]:
            moments, values = np.array(found["values"], dtype=np.float64).T
            column = np.full(len(milliseconds), np.nan)
            column[np.rint((moments - times[0]) / step).astype(int)] = values
            is_there = ~np.isnan(column)
            column[1:][is_there[:-1] & ~is_there[1:]] = STALE
            written = is_there | np.append(False, is_there[:-1])
            labels = found["metric"] | {"__name__": rule["record"]}
            return [encode_series(labels, encode_samples(milliseconds[written], column[written]))]

        self._send(map(of, self._prometheus.ask("/api/v1/query_range", **parameters)["result"]))

    def _send(self, series: Iterable[list[bytes]]) -> None:
        """Send in messages of at least 4 MiB."""
        message, size = [], 0
        for each in series:
            message += each
            size += sum(map(len, each))
            if size > 1 << 22:
                write(self._prometheus.url, message)
                message, size = [], 0
        if message:
            write(self._prometheus.url, message)
