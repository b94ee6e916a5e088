"""What dashboards and rules cost a Prometheus that watches 10, 100 or 1000 runs.

A trainer with a drill is recorded, and replayed as many synthetic runs, each an endpoint of its own at another place in
the recording. A real Prometheus with the repository's prometheus.yml and rules gets an hour of them: the samples by
remote write, and what the recording rules would have made of them as its own answers to the rules' expressions. Then it
scrapes and evaluates live, and every query of both dashboards is timed as Grafana would send it for one hour.

    .venv/bin/python -m benchmarks.fleet --help
"""

import argparse
import itertools
import json
import math
import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks import replay
from benchmarks.machine import machine
from benchmarks.replay import History, Recording, Schedule, run_name
from exporter.metrics import GRADIENT_CV_CEILING, UPDATES
from mixin.config import parse_duration
from mixin.dashboards import FLEET_DASHBOARD_UID
from mixin.promql import CV_RECORD
from stack.configuration import Ports, prometheus_configuration, write_yaml
from stack.processes import ChildProcess
from stack.servers import ROOT, ServersMissing, provide

JOB = "ppo"
HOUR = 3600
GOAL_PANEL_SECONDS = 1.0
GOAL_RULES_PART = 0.1
NOISE = 1.1  # beyond linear growth that is still put down to the measurement
SECONDS_BETWEEN = 0.1
SCREEN_WIDTH = 1920
BROWSER_CONNECTIONS = 6

_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class BenchmarkFailed(RuntimeError):
    """Something that is to be measured did not come about."""


# Prometheus


class Prometheus:
    """A Prometheus that runs, asked over HTTP."""

    def __init__(self, url: str) -> None:
        self.url = url

    def post(self, path: str, **parameters: Any) -> bytes:
        body = urllib.parse.urlencode(parameters, doseq=True).encode()
        try:
            with _opener.open(urllib.request.Request(self.url + path, body), timeout=300) as answer:
                return answer.read()
        except urllib.error.HTTPError as error:
            raise BenchmarkFailed(f"{path}: {error.code} {error.read().decode()[:300]}") from error

    def range(self, expression: str, start: float, end: float, step: float) -> list[dict]:
        answer = self.post("/api/v1/query_range", query=expression, start=start, end=end, step=step)
        return json.loads(answer)["data"]["result"]

    def number(self, expression: str) -> float:
        """The value of the one series that the expression gives; NaN where there is none."""
        result = json.loads(self.post("/api/v1/query", query=expression))["data"]["result"]
        return float(result[0]["value"][1]) if result else math.nan

    def own(self, name: str) -> dict[str, float]:
        """A metric of the server itself, from its own /metrics, by the value of its only label."""
        with _opener.open(f"{self.url}/metrics", timeout=30) as answer:
            found = re.findall(rf'^{name}(?:{{\w+="([^"]*)"}})? (\S+)$', answer.read().decode(), re.MULTILINE)
        return {label: float(value) for label, value in found}

    def own_total(self, name: str) -> float:
        return sum(self.own(name).values())

    def rule_groups(self) -> dict[str, float]:
        """Seconds that the last evaluation took, by the name of the group."""
        durations = self.own("prometheus_rule_group_last_duration_seconds")
        return {group.rpartition(";")[2]: seconds for group, seconds in durations.items()}


# Queries as Grafana sends them


@dataclass(frozen=True)
class Query:
    """One request to Prometheus: of a panel, an annotation or a variable, which `title` names."""

    title: str
    kind: str
    path: str
    parameters: dict[str, Any]


def round_interval(seconds: float) -> float:
    """The step that Grafana chooses for a time between two points of a panel (its roundInterval)."""
    steps = (1, 2, 5, 10, 15, 20, 30, 60)
    return next((s for s, following in itertools.pairwise(steps) if seconds <= (s + following) / 2), steps[-1])


def queries(board: dict, now: float, scrape_interval: float, chosen: dict[str, str]) -> Iterator[Query]:
    """Every query of a dashboard over the hour before `now`, on a screen 1920 pixels wide.

    Args:
        scrape_interval: seconds, as the data source has it (`timeInterval`).
        chosen: regular expressions for the variables job, run and instance.
    """

    def at(expression: str, step: float) -> str:
        values = {
            "__rate_interval": f"{max(step + scrape_interval, 4 * scrape_interval):g}s",
            "__range": f"{HOUR}s",
            "__interval": f"{step:g}s",
            "__interval_ms": f"{step * 1000:g}",
            **chosen,
        }
        return re.sub(r"\$(\w+)", lambda found: values[found[1]], expression)

    def over(step: float) -> dict[str, float]:
        return {"start": (now - HOUR) // step * step, "end": now // step * step, "step": step}

    for variable in board["templating"]["list"]:
        if variable["type"] == "query":
            selector = re.fullmatch(r"label_values\((.+), \w+\)", variable["query"])[1]
            parameters = {"match[]": at(selector, scrape_interval), "start": now - HOUR, "end": now}
            yield Query(variable["name"], "variable", "/api/v1/series", parameters)
    for annotation in board["annotations"]["list"]:
        step = float(parse_duration(annotation["step"]))
        yield Query(
            annotation["name"],
            "annotation",
            "/api/v1/query_range",
            {"query": at(annotation["expr"], step)} | over(step),
        )
    for panel in board["panels"]:
        points = panel.get("maxDataPoints") or panel["gridPos"]["w"] * SCREEN_WIDTH // 24
        step = max(round_interval(HOUR / points), scrape_interval)
        for target in panel.get("targets", []):
            expression = {"query": at(target["expr"], step)}
            if target.get("instant"):
                yield Query(panel["title"], "panel", "/api/v1/query", expression | {"time": now})
            else:
                yield Query(panel["title"], "panel", "/api/v1/query_range", expression | over(step))


def views(instance: str) -> dict[str, tuple[dict, dict[str, str]]]:
    """Dashboards and what is chosen in them: as they open, and the run dashboard as a link to a run opens it."""
    boards = {
        b["uid"]: b for b in map(json.loads, (p.read_text() for p in (ROOT / "grafana/dashboards").glob("*.json")))
    }
    fleet = boards.pop(FLEET_DASHBOARD_UID)
    (run,) = boards.values()
    everything = {"job": JOB, "run": ".+", "instance": ".+"}
    one = {"job": JOB, "run": run_name(0), "instance": instance.replace(".", r"\\.")}
    return {"fleet": (fleet, everything), "one run": (run, one), "run, all chosen": (run, everything)}


def timed(prometheus: Prometheus, query: Query, repeats: int) -> float | str:
    """Median seconds until the whole answer is there, or why there is none."""
    seconds: list[float] = []
    while len(seconds) < repeats and sum(seconds) < 20:
        began = time.perf_counter()
        try:
            prometheus.post(query.path, **query.parameters)
        except BenchmarkFailed as error:
            return str(error)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


# An hour of history


class Backfill:
    """Writes what the runs and the recording rules would have given, in order of time, until it has caught up."""

    def __init__(self, prometheus: Prometheus, history: History, schedule: Schedule, groups: Sequence[dict]) -> None:
        self._prometheus, self._history, self._schedule = prometheus, history, schedule
        self._recordings = [
            (rule["record"], rule["expr"], group_interval(group, schedule.interval))
            for group in groups
            for rule in group["rules"]
            if "record" in rule
        ]
        self._present: dict[str, set[bytes]] = {name: set() for name, _, _ in self._recordings}

    def fill(self, ticks: range) -> None:
        with ThreadPoolExecutor(2) as pool:
            batches = [range(first, min(first + 8, self._schedule.runs)) for first in range(0, self._schedule.runs, 8)]
            list(pool.map(lambda batch: self._scrapes(batch, ticks), batches))
        since, until = (self._schedule.start + tick * self._schedule.interval for tick in (ticks.start, ticks.stop))
        for name, expression, step in self._recordings:
            times = np.arange(math.ceil(since / step), math.ceil(until / step)) * step
            if len(times):
                self._record(name, expression, times, step)

    def _scrapes(self, runs: range, ticks: range) -> None:
        replay.write(self._prometheus.url, [series for run in runs for series in self._history.of(run, ticks)])

    def _record(self, name: str, expression: str, times: np.ndarray, step: float) -> None:
        series, present = [], set()
        for found in self._prometheus.range(expression, times[0], times[-1], step):
            labels = replay.encode_labels({**found["metric"], "__name__": name})
            moments, values = np.array(found["values"], dtype=np.float64).T
            column = np.full(len(times), np.nan)
            column[np.rint((moments - times[0]) / step).astype(int)] = values
            is_there = ~np.isnan(column)
            ends = ~is_there & np.concatenate(([labels in self._present[name]], is_there[:-1]))
            column[ends] = replay.STALE
            written = is_there | ends
            samples = replay.encode_samples((times[written] * 1000).astype(np.int64), column[written])
            series.append(replay.encode_series(labels, samples))
            if is_there[-1]:
                present.add(labels)
            self._present[name].discard(labels)
        for labels in self._present[name]:  # none of them had a sample in this piece
            end = replay.encode_samples((times[:1] * 1000).astype(np.int64), np.array([replay.STALE]))
            series.append(replay.encode_series(labels, end))
        self._present[name] = present
        for first in range(0, len(series), 1000):
            replay.write(self._prometheus.url, series[first : first + 1000])


# One size


def measure(
    recording: Recording, runs: int, interval: float, settle: float, repeats: int, status: Callable[[str], None]
) -> dict[str, Any]:
    """Figures of a Prometheus that watches `runs` runs; seconds and bytes.

    Raises:
        BenchmarkFailed: a server does not start, or the hour of data is not there.
    """
    servers = provide()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ppo-fleet-")))
        schedule = Schedule(runs, len(recording), (time.time() - HOUR) // interval * interval, interval)
        replay.save(folder / "recording.json", recording, schedule)
        ports_file = folder / "ports.json"
        command = [sys.executable, "-m", "benchmarks.replay", folder / "recording.json", ports_file]
        served = ChildProcess("runs", command, "", folder / "runs.log", directory=ROOT)
        stack.callback(served.stop)
        wait_for(served, ports_file.exists)
        instances = [f"127.0.0.1:{port}" for port in json.loads(ports_file.read_text())]

        ports = Ports(prometheus=free_port())
        content = prometheus_configuration(ports, folder / "targets")
        del content["alerting"]  # nobody is told
        content["scrape_configs"] = [j for j in content["scrape_configs"] if j["job_name"] != "alertmanager"]
        content["global"]["scrape_interval"] = content["global"]["evaluation_interval"] = f"{interval:g}s"
        for job in content["scrape_configs"]:
            job.pop("scrape_interval", None)
            job.pop("scrape_timeout", None)
        quiet = {"global": content["global"]}
        config = write_yaml(folder / "prometheus.yml", quiet, "prometheus.yml")
        command = [
            servers.prometheus,
            f"--config.file={config}",
            f"--storage.tsdb.path={folder / 'tsdb'}",
            f"--web.listen-address=127.0.0.1:{ports.prometheus}",
            "--web.enable-remote-write-receiver",
            *servers.prometheus_options,
        ]
        process = ChildProcess("prometheus", command, f"{ports.url('prometheus')}/-/ready", folder / "prometheus.log")
        stack.callback(process.stop)
        wait_for(process, lambda: process.is_ready)
        prometheus = Prometheus(ports.url("prometheus"))

        files = sorted((ROOT / "alerts").glob("*.rules.yml"))
        groups = [group for file in files for group in yaml.safe_load(file.read_text())["groups"]]
        backfill = Backfill(prometheus, History(recording, schedule, JOB, instances), schedule, groups)
        began, done = time.monotonic(), 0
        while (behind := schedule.tick(time.time()) - done) > 1:
            following = done + min(behind, 60)
            status(f"writing the hour before, {done * interval / 60:.0f} minutes done")
            backfill.fill(range(done, following))
            done = following
        filled = time.monotonic() - began

        (targets := folder / "targets").mkdir()
        for run, instance in enumerate(instances):
            entry = {"targets": [instance], "labels": {"run": run_name(run), "instance": instance}}
            (targets / f"ppo-{run_name(run)}.json").write_text(json.dumps([entry]))
        write_yaml(config, content, "prometheus.yml")
        process.send(signal.SIGHUP)

        evaluations: dict[str, list[float]] = {group["name"]: [] for group in groups}
        cpu, live, others = 0.0, time.monotonic(), OtherPrograms(process.pid, served.pid)
        while (passed := time.monotonic() - live) < settle:
            status(f"scraping live, {settle - passed:.0f} s left")
            time.sleep(min(interval, settle - passed))
            if passed > settle / 2:
                for group, seconds in prometheus.rule_groups().items():
                    evaluations[group].append(seconds)
            if not cpu and passed > settle / 2:
                cpu, cpu_since = prometheus.own_total("process_cpu_seconds_total"), time.monotonic()
        window = f"{max(int(settle / 2), 1)}s"
        job = f'job="{JOB}"'
        figures = {
            "runs": runs,
            "filled": filled,
            "interval": interval,
            "up": prometheus.number(f"sum(up{{{job}}})"),
            "scraped series per run": prometheus.number(f"avg(scrape_samples_post_metric_relabeling{{{job}}})"),
            "series": prometheus.own_total("prometheus_tsdb_head_series"),
            "series of runs": prometheus.number(f"count({{{job}}})"),
            "scrape, mean": prometheus.number(f"avg(avg_over_time(scrape_duration_seconds{{{job}}}[{window}]))"),
            "scrape, slowest 1 %": prometheus.number(
                f"quantile(0.99, quantile_over_time(0.99, scrape_duration_seconds{{{job}}}[{window}]))"
            ),
            "interval kept": prometheus.number('max(prometheus_target_interval_length_seconds{quantile="0.99"})'),
            "rules": {
                group["name"]: {
                    "interval": group_interval(group, interval),
                    "median": statistics.median(evaluations[group["name"]]),
                    "longest": max(evaluations[group["name"]]),
                }
                for group in groups
            },
            "missed": prometheus.own_total("prometheus_rule_group_iterations_missed_total"),
            "firing": prometheus.number(f'count(ALERTS{{{job}, alertstate="firing"}}) or vector(0)'),
            "others": others.cores(),
            "cores": (prometheus.own_total("process_cpu_seconds_total") - cpu) / (time.monotonic() - cpu_since),
            "memory": prometheus.own_total("process_resident_memory_bytes"),
        }
        check_hour(prometheus, schedule)
        figures["queries"], others = {}, OtherPrograms(process.pid, served.pid)
        for view, (board, chosen) in views(instances[0]).items():
            listed = list(queries(board, time.time(), interval, chosen))
            timings: dict[str, list[float | str]] = {}
            for number, query in enumerate(listed, 1):
                status(f"{view}: query {number} of {len(listed)}, {query.title}")
                seconds = timed(prometheus, query, repeats if view != "run, all chosen" else 1)
                timings.setdefault(f"{query.kind}: {query.title}", []).append(seconds)
            figures["queries"][view] = timings
            if view == "fleet":
                figures["others, queries"] = others.cores()
                figures["fleet at once"] = statistics.median(at_once(prometheus, listed) for _ in range(repeats))
        figures["memory at the end"] = prometheus.own_total("process_resident_memory_bytes")
        return figures


class OtherPrograms:
    """How much of the machine goes to others than these processes and this one, from now on."""

    def __init__(self, *pids: int) -> None:
        self._pids = ("self", *pids)
        self._began, self._before = time.monotonic(), self._seconds()

    def cores(self) -> float:
        return max(0.0, self._seconds() - self._before) / (time.monotonic() - self._began)

    def _seconds(self) -> float:
        """CPU time since the machine started; NaN where the kernel is not Linux."""
        if not Path("/proc/stat").exists():
            return math.nan
        user, nice, system, _, _, *interrupts = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
        ours = (Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13] for pid in self._pids)
        ticks = sum(map(int, (user, nice, system, *interrupts))) - sum(int(each) for times in ours for each in times)
        return ticks / os.sysconf("SC_CLK_TCK")


def at_once(prometheus: Prometheus, listed: Sequence[Query]) -> float:
    """Seconds until a browser has all answers."""
    began = time.perf_counter()
    with ThreadPoolExecutor(BROWSER_CONNECTIONS) as pool:
        list(pool.map(lambda query: prometheus.post(query.path, **query.parameters), listed))
    return time.perf_counter() - began


def check_hour(prometheus: Prometheus, schedule: Schedule) -> None:
    """Every run has an hour of samples, but for the moment at which scrapes took over, and its counters only rise."""
    expected = HOUR / schedule.interval
    for name in (GRADIENT_CV_CEILING.name, CV_RECORD, "up"):
        counts = f'count_over_time({name}{{job="{JOB}"}}[1h])'
        least, of = prometheus.number(f"min({counts})"), prometheus.number(f"count({counts})")
        if of != schedule.runs or not least >= 0.98 * expected:
            raise BenchmarkFailed(
                f"{name}: {of:.0f} of {schedule.runs} runs have data, one of them {least:.0f} of {expected:.0f} samples"
            )
    resets = prometheus.number(f'max(resets({UPDATES.name}{{job="{JOB}"}}[1h]))')
    if resets:
        raise BenchmarkFailed(f"{UPDATES.name} fell {resets:.0f} times: what was written does not fit what is scraped")


def group_interval(group: dict, default: float) -> float:
    """Seconds between evaluations of a rule group."""
    return float(parse_duration(group["interval"])) if "interval" in group else default


def wait_for(process: ChildProcess, is_ready: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not is_ready():
        if process.exit_code is not None or time.monotonic() > deadline:
            raise BenchmarkFailed(f"{process.name} did not start:\n{process.log_tail()}")
        time.sleep(0.1)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


# Tables


def panel_seconds(figures: dict[str, Any], view: str) -> dict[str, float]:
    """Seconds by panel, variable or annotation, its queries one after the other; infinity where one failed."""
    return {
        title: sum(math.inf if isinstance(each, str) else each for each in seconds)
        for title, seconds in figures["queries"][view].items()
    }


def milliseconds(seconds: float | str) -> str:
    if isinstance(seconds, str) or math.isinf(seconds):
        return "fails"
    return f"{seconds * 1000:,.1f} ms" if seconds < 0.1 else f"{seconds * 1000:,.0f} ms"


FIGURES: dict[str, tuple[Callable[[dict[str, Any]], float], Callable[[float], str]]] = {
    "targets up": (lambda f: f["up"], "{:,.0f}".format),
    "scrape interval": (lambda f: f["interval"], "{:g} s".format),
    "time between scrapes, slowest 1 %": (lambda f: f["interval kept"], "{:.2f} s".format),
    "series that a run's endpoint serves": (lambda f: f["scraped series per run"], "{:.0f}".format),
    "series in Prometheus": (lambda f: f["series"], "{:,.0f}".format),
    "series per run, recorded ones and alerts included": (lambda f: f["series of runs"] / f["runs"], "{:.1f}".format),
    "scrape, mean": (lambda f: f["scrape, mean"], milliseconds),
    "scrape, slowest 1 %": (lambda f: f["scrape, slowest 1 %"], milliseconds),
    "alerts firing": (lambda f: f["firing"], "{:,.0f}".format),
    "evaluations missed": (lambda f: f["missed"], "{:.0f}".format),
    "cores busy with scrapes and rules": (lambda f: f["cores"], "{:.2f}".format),
    "cores busy with other programs meanwhile": (lambda f: f["others"], "{:.2f}".format),
    "cores busy with other programs during the fleet's queries": (lambda f: f["others, queries"], "{:.2f}".format),
    "resident memory": (lambda f: f["memory"] / 2**20, "{:,.0f} MiB".format),
    "resident memory after all queries": (lambda f: f["memory at the end"] / 2**20, "{:,.0f} MiB".format),
    "fleet dashboard, all its queries at once": (lambda f: f["fleet at once"], milliseconds),
}
GROWING = (
    "series in Prometheus",
    "scrape, mean",
    "cores busy with scrapes and rules",
    "resident memory",
    "fleet dashboard, all its queries at once",
)


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def report(sizes: Sequence[dict[str, Any]]) -> str:
    """Every table and every goal, as Markdown; `sizes` from few runs to many."""
    header = ["", *(f"{figures['runs']:,} runs" for figures in sizes)]
    rows = [[name, *(show(read(f)) for f in sizes)] for name, (read, show) in FIGURES.items()]
    for group, times in sizes[-1]["rules"].items():
        of_group = [figures["rules"][group] for figures in sizes]
        name = f"rule group {group}, every {times['interval']:g} s"
        rows += [
            [f"{name}: median", *(milliseconds(each["median"]) for each in of_group)],
            [f"{name}: longest", *(milliseconds(each["longest"]) for each in of_group)],
            [
                f"{name}: longest, part of the interval",
                *(f"{each['longest'] / each['interval']:.2%}" for each in of_group),
            ],
        ]
    parts = ["### Prometheus", markdown(header, rows)]
    captions = {
        "fleet": "Fleet dashboard, all runs chosen",
        "one run": "Run dashboard, one run chosen",
        "run, all chosen": "Run dashboard, all runs chosen: the ten slowest",
    }
    for view, caption in captions.items():
        by_size = [panel_seconds(figures, view) for figures in sizes]
        titles = sorted(by_size[-1], key=by_size[-1].__getitem__, reverse=True)
        if view != "fleet":
            titles = titles[:10]
        parts += [f"### {caption}", markdown(header, ([t, *(milliseconds(s[t]) for s in by_size)] for t in titles))]
    return "\n\n".join((*parts, "### Goals", "\n".join(goals(sizes))))


def goals(sizes: Sequence[dict[str, Any]]) -> list[str]:
    most = sizes[-1]
    panels = {t: s for t, s in panel_seconds(most, "fleet").items() if t.startswith("panel")}
    slowest = max(panels, key=panels.__getitem__)
    parts = {group: times["longest"] / times["interval"] for group, times in most["rules"].items()}

    def verdict(is_met: bool, goal: str, found: str) -> str:
        return f"- {'met' if is_met else '**missed**'}: {goal}: {found}"

    lines = [
        verdict(
            panels[slowest] < GOAL_PANEL_SECONDS,
            f"at {most['runs']:,} runs every panel of the fleet dashboard answers in under {GOAL_PANEL_SECONDS:g} s",
            f"the slowest, {slowest.removeprefix('panel: ')}, takes {milliseconds(panels[slowest])}",
        ),
        verdict(
            max(parts.values()) < GOAL_RULES_PART,
            f"every rule group takes under {GOAL_RULES_PART:.0%} of its interval",
            ", ".join(f"{group} {part:.1%} in its longest evaluation" for group, part in parts.items()),
        ),
    ]
    growths = []
    for fewer, more in itertools.pairwise(sizes):
        values = {name: (FIGURES[name][0](fewer), FIGURES[name][0](more)) for name in GROWING}
        before, after = panel_seconds(fewer, "fleet"), panel_seconds(more, "fleet")
        values |= {title: (before[title], after[title]) for title in after}
        for group, times in more["rules"].items():
            values[f"rule group {group}"] = fewer["rules"][group]["median"], times["median"]
        for name, (small, large) in values.items():
            linear = more["runs"] / fewer["runs"]
            growths.append(
                (large / small / linear, f"{name}, {fewer['runs']:,} to {more['runs']:,} runs: x{large / small:.1f}")
            )
    if growths:
        worst = sorted(growths, reverse=True)
        beyond = [text for part, text in worst if part > NOISE]
        found = "; ".join(beyond) or f"the steepest is {worst[0][1]}"
        lines.append(
            verdict(not beyond, "no figure and no panel of the fleet grows faster than the number of runs", found)
        )
    return lines


def prometheus_version(prometheus: Path) -> str:
    answer = subprocess.run([prometheus, "--version"], capture_output=True, text=True, check=True)
    return (answer.stdout or answer.stderr).split(" (")[0].replace(", version", "")


def recorded(path: Path | None, samples: int, progress: Callable[[int], None]) -> Recording:
    """A recorded run, that of `path` where there is one."""
    if path and path.exists():
        return Recording(**json.loads(path.read_text()))
    recording = replay.record(samples, SECONDS_BETWEEN, free_port(), progress)
    if path:
        path.write_text(json.dumps(asdict(recording)))
    return recording


def tell(update: Callable[..., None], runs: int) -> Callable[[str], None]:
    return lambda text: update(description=f"{runs} runs: {text}")


def main() -> int:
    configured = yaml.safe_load((ROOT / "prometheus.yml").read_text())["global"]["scrape_interval"]
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.fleet",
        description=__doc__.split("    .venv")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--runs", nargs="+", type=int, default=[10, 100, 1000], metavar="N", help="how many, each size by itself"
    )
    parser.add_argument(
        "--interval", type=parse_duration, default=configured, metavar="DURATION", help="scrape and evaluation interval"
    )
    parser.add_argument("--settle", type=int, default=120, metavar="SECONDS", help="live scraping before the queries")
    parser.add_argument("--repeats", type=int, default=5, help="times that each query is asked, for the median")
    parser.add_argument(
        "--samples", type=int, default=720, help=f"answers of the recorded run, {SECONDS_BETWEEN:g} s apart"
    )
    parser.add_argument(
        "--results", type=Path, metavar="FILE", help="keeps figures; a size that is in it is not measured again"
    )
    parser.add_argument(
        "--recording", type=Path, metavar="FILE", help="keeps the recorded run; one that is in it is not recorded again"
    )
    options = parser.parse_args()
    if min(options.runs) < 1 or max(options.runs) > 5000 or options.samples < 20 or options.repeats < 1:
        parser.error("--runs must be 1 to 5000, --samples at least 20, --repeats at least 1")
    if options.interval < 1 or options.settle < 4 * options.interval:
        parser.error("--interval must be at least 1s, and --settle four intervals")

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    results = {}
    if options.results and options.results.exists():
        results = {figures["runs"]: figures for figures in json.loads(options.results.read_text())}
    if any(figures["interval"] != options.interval for figures in results.values()):
        parser.error(f"{options.results} has figures at another interval")
    try:
        print(
            f"{machine('numpy')}; {prometheus_version(provide().prometheus)}, the runs and the questions share it\n"
            f"`python -m benchmarks.fleet {' '.join(sys.argv[1:])}`",
            flush=True,
        )
        columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
        with Progress(*columns, console=Console(stderr=True), refresh_per_second=2) as progress:
            missing = sorted(set(options.runs) - results.keys())
            if missing:
                shown = partial(progress.update, progress.add_task("recording a run", total=options.samples))
                recording = recorded(options.recording, options.samples, lambda done: shown(completed=done))
            for runs in missing:
                status = partial(progress.update, progress.add_task(f"{runs} runs", total=None))
                results[runs] = measure(
                    recording, runs, float(options.interval), options.settle, options.repeats, tell(status, runs)
                )
                status(description=f"{runs} runs: done", total=1, completed=1)
                if options.results:
                    options.results.write_text(json.dumps(list(results.values()), indent=1))
        print(f"\n{report([results[runs] for runs in sorted(set(options.runs))])}")
    except (BenchmarkFailed, replay.RecordingFailed, ServersMissing, RuntimeError) as error:
        print(f"python -m benchmarks.fleet: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
