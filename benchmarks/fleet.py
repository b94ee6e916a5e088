"""What rules and dashboards cost a Prometheus that watches many runs.

A real Prometheus scrapes synthetic runs (`benchmarks.replay`) with the repository's prometheus.yml and rules. First it
gets an hour of samples and recorded series, and a longer past where rules need it. Then it scrapes and evaluates live.
Every query of both dashboards is timed as Grafana would send it for one hour.

    .venv/bin/python -m benchmarks.fleet --help
"""

import argparse
import json
import os
import re
import signal
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from benchmarks.machine import machine
from benchmarks.prometheus import HOUR, BenchmarkFailed, History, Prometheus, prometheus_command, seconds
from benchmarks.replay import JOB, KINDS, Runs
from stack.configuration import Ports, prometheus_configuration, write_yaml
from stack.processes import ChildProcess
from stack.servers import ROOT, ServersMissing, provide

GOAL_PANEL_SECONDS = 1.0
GOAL_RULES_PART = 0.1
SCREEN_WIDTH = 1920
BROWSER_CONNECTIONS = 6
GRAFANA_MIN_STEP = 15.0
"""Seconds: Grafana's scrape interval if the data source sets none."""


# Queries as Grafana sends them


@dataclass(frozen=True)
class Query:
    """One request to Prometheus, for the panel, annotation or variable `title`."""

    title: str
    path: str
    parameters: dict[str, Any]


def queries(board: dict, now: float, chosen: dict[str, str]) -> Iterator[Query]:
    """Every query of a dashboard over the hour before `now`, on a screen 1920 pixels wide, collapsed rows unfolded.

    Args:
        chosen: values of the variables, as regular expressions.
    """

    def at(expression: str, step: float, least: float) -> str:
        values = {"__rate_interval": f"{max(step + least, 4 * least):g}s", "__range": f"{HOUR}s", **chosen}
        return re.sub(r"\$(\w+)", lambda found: values[found[1]], expression)

    def over(title: str, expression: str, step: float, least: float) -> Query:
        moments = {"start": (now - HOUR) // step * step, "end": now // step * step, "step": step}
        return Query(title, "/api/v1/query_range", {"query": at(expression, step, least)} | moments)

    for variable in board["templating"]["list"]:
        if variable["type"] == "query":
            selector = at(re.fullmatch(r"label_values\((.+), \w+\)", variable["query"])[1], 0, 0)
            parameters = {"match[]": selector, "start": now - HOUR, "end": now}
            yield Query(f"variable: {variable['name']}", "/api/v1/series", parameters)
    for annotation in board["annotations"]["list"]:
        step = seconds(annotation["step"])
        yield over(f"annotation: {annotation['name']}", annotation["expr"], step, step)
    for panel in (panel for each in board["panels"] for panel in (each, *each.get("panels", []))):
        points = panel.get("maxDataPoints") or panel["gridPos"]["w"] * SCREEN_WIDTH // 24
        for target in panel.get("targets", []):
            least = seconds(target["interval"]) if target.get("interval") else GRAFANA_MIN_STEP
            step = max(HOUR / points, least)
            if target.get("instant"):
                yield Query(panel["title"], "/api/v1/query", {"query": at(target["expr"], step, least), "time": now})
            else:
                yield over(panel["title"], target["expr"], step, least)


def views() -> dict[str, tuple[dict, dict[str, str]]]:
    """Caption -> dashboard, and the values of its variables."""
    boards = {path.stem: json.loads(path.read_text()) for path in (ROOT / "grafana/dashboards").glob("*.json")}
    every = {"job": ".+", "run": ".*", "instance": ".+"}
    return {
        "Fleet dashboard, all runs": (boards["ppo-fleet"], every),
        "Run dashboard, one run": (boards["ppo-gradient-health"], every | {"run": Runs.name(0)}),
    }


def timed(prometheus: Prometheus, query: Query, repeats: int) -> float:
    """Median seconds until the complete answer has arrived."""
    took: list[float] = []
    while len(took) < repeats and sum(took) < 20:
        began = time.perf_counter()
        prometheus.raw(query.path, **query.parameters)
        took.append(time.perf_counter() - began)
    return statistics.median(took)


def at_once(prometheus: Prometheus, listed: Sequence[Query]) -> float:
    """Seconds until a browser would have all answers."""
    began = time.perf_counter()
    with ThreadPoolExecutor(BROWSER_CONNECTIONS) as pool:
        list(pool.map(lambda query: prometheus.raw(query.path, **query.parameters), listed))
    return time.perf_counter() - began


# One case


@dataclass
class Figures:
    """Figures of one case: seconds of each evaluation by rule group and rule, and by view and panel; others as text."""

    rows: dict[str, str] = field(default_factory=dict)
    groups: dict[str, list[float]] = field(default_factory=dict)
    rules: dict[str, list[float]] = field(default_factory=dict)
    views: dict[str, dict[str, float]] = field(default_factory=dict)


def measure(kind: str, number: int, options: argparse.Namespace, groups: Sequence[dict]) -> Figures:
    """Figures of a Prometheus that scrapes `number` runs of a kind.

    Raises:
        BenchmarkFailed: a server does not start, or the hour of data is missing.
    """
    runs = Runs(kind, number, (time.time() - 24 * HOUR) // options.interval * options.interval, options.interval)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ppo-fleet-")))
        servers, port, ports = provide(), free_port(), Ports(prometheus=free_port())
        arguments = (kind, number, runs.start, runs.interval, port)
        command = [sys.executable, "-m", "benchmarks.replay", *map(str, arguments)]
        served = ChildProcess("runs", command, f"http://127.0.0.1:{port}/0", folder / "runs.log", directory=ROOT)
        stack.callback(served.stop)
        content = prometheus_configuration(ports, folder / "targets")
        del content["alerting"]  # send alerts to nobody
        content["rule_files"] = [str(options.rules.resolve())]
        content["scrape_configs"] = [job for job in content["scrape_configs"] if job["job_name"] != "alertmanager"]
        for each in (content["global"], *content["scrape_configs"]):
            each["scrape_interval"] = each["scrape_timeout"] = f"{options.interval:g}s"
        config = write_yaml(folder / "prometheus.yml", {"global": content["global"]}, "prometheus.yml")
        command = prometheus_command(servers, config, ports.prometheus)
        url = ports.url("prometheus")
        process = ChildProcess("prometheus", command, f"{url}/-/ready", folder / "prometheus.log")
        stack.callback(process.stop)
        prometheus = Prometheus(url)
        log(f"{number} {kind}: making the runs, writing their past")
        wait_for(process)
        History(prometheus, runs, groups).write(time.time)
        wait_for(served)

        entries = [
            {
                "targets": [f"127.0.0.1:{port}"],
                "labels": {"run": runs.name(run), "instance": runs.instance(run), "__metrics_path__": f"/{run}"},
            }
            for run in range(number)
        ]
        (targets := folder / "targets").mkdir()
        (targets / "ppo.json").write_text(json.dumps(entries))
        write_yaml(config, content, "prometheus.yml")
        process.send(signal.SIGHUP)
        log(f"scraping live for {options.settle} s")
        figures, busy = Figures(), CPU(process.pid, served.pid)
        watch_rules(prometheus, figures, options.settle, min(seconds(group["interval"]) for group in groups))
        check(prometheus, runs)
        figures.rows |= describe(prometheus, runs, min(options.settle, 120))
        figures.rows["cores busy with other programs meanwhile"] = f"{busy.others():.2f}"
        log("asking the dashboards' queries")
        busy = CPU(process.pid, served.pid)
        for view, (board, chosen) in views().items():
            listed = list(queries(board, time.time(), chosen))
            of_view = figures.views.setdefault(view, {})
            for query in listed:
                of_view[query.title] = of_view.get(query.title, 0.0) + timed(prometheus, query, options.repeats)
            together = statistics.median(at_once(prometheus, listed) for _ in range(options.repeats))
            of_view["**all queries at once, as a browser asks**"] = together
        figures.rows["cores busy with other programs during the queries"] = f"{busy.others():.2f}"
        return figures


def watch_rules(prometheus: Prometheus, figures: Figures, settle: float, shortest: float) -> None:
    """Record the duration of each evaluation of each group and rule; `shortest` is the shortest interval in seconds."""
    until, seen = time.monotonic() + settle, {}
    while time.monotonic() < until:
        time.sleep(shortest / 3)  # not more often: thousands of alerts take megabytes
        for group in prometheus.ask("/api/v1/rules")["groups"]:
            if seen.get(group["name"]) == group["lastEvaluation"] or group["lastEvaluation"].startswith("0001"):
                continue
            seen[group["name"]] = group["lastEvaluation"]
            figures.groups.setdefault(group["name"], []).append(group["evaluationTime"])
            for rule in group["rules"]:
                if rule["health"] == "err":
                    raise BenchmarkFailed(f"rule {rule['name']}: {rule['lastError']}")
                name = " ".join((rule["name"], rule.get("labels", {}).get("severity", ""))).strip()
                figures.rules.setdefault(name, []).append(rule["evaluationTime"])


def describe(prometheus: Prometheus, runs: Runs, window: float) -> dict[str, str]:
    """Prometheus' own figures, now and over the last `window` seconds, as text."""

    def of_runs(expression: str) -> float:
        return prometheus.number(expression.replace("[]", f'{{job="{JOB}"}}[{window:g}s]'))

    def own(expression: str) -> float:
        return prometheus.number(expression.replace("[]", f'{{job="prometheus"}}[{window:g}s]'))

    alerts = [each for each in prometheus.ask("/api/v1/alerts")["alerts"] if "run" in each["labels"]]
    firing = sum(alert["state"] == "firing" for alert in alerts)
    return {
        "series that a run's endpoint serves": f"{len(runs.series):,}",
        "series in Prometheus": f"{own('max_over_time(prometheus_tsdb_head_series[])'):,.0f}",
        "scrape, mean": show(of_runs("avg(avg_over_time(scrape_duration_seconds[]))")),
        "scrape, slowest 1 %": show(of_runs("quantile(0.99, quantile_over_time(0.99, scrape_duration_seconds[]))")),
        "alerts firing": f"{firing:,}",
        "alerts pending": f"{len(alerts) - firing:,}",
        "largest alert": f"{max((len(json.dumps(alert)) for alert in alerts), default=0):,} bytes",
        "rule evaluations missed": f"{own('sum(increase(prometheus_rule_group_iterations_missed_total[]))'):.0f}",
        "cores busy with scrapes and rules": f"{own('rate(process_cpu_seconds_total[])'):.2f}",
        "resident memory": f"{own('max_over_time(process_resident_memory_bytes[])') / 2**20:,.0f} MiB",
    }


def check(prometheus: Prometheus, runs: Runs) -> None:
    """Check that every run is up and has an hour of samples, and that its counters only rise."""
    up, least, falls = (
        prometheus.number(expression)
        for expression in (
            f'count(up{{job="{JOB}"}} == 1)',
            f'min(count_over_time(ppo_gradient_cv_ceiling{{job="{JOB}"}}[1h]))',
            f'max(resets(ppo_updates_total{{job="{JOB}"}}[1h]))',
        )
    )
    if up != runs.number or not least > 0.95 * HOUR / runs.interval or falls:
        raise BenchmarkFailed(
            f"{up:.0f} of {runs.number} runs are up, one has {least:.0f} of {HOUR / runs.interval:.0f} samples, "
            f"counters fell {falls:.0f} times"
        )


class CPU:
    """CPU time of other processes than these and this one, from now on."""

    def __init__(self, *pids: int) -> None:
        self._pids = ("self", *pids)
        self._began, self._before = time.monotonic(), self._seconds()

    def others(self) -> float:
        """Cores, on average."""
        return max(0.0, self._seconds() - self._before) / (time.monotonic() - self._began)

    def _seconds(self) -> float:
        user, nice, system, _, _, *interrupts = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
        ours = (Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13] for pid in self._pids)
        ticks = sum(map(int, (user, nice, system, *interrupts))) - sum(int(each) for times in ours for each in times)
        return ticks / os.sysconf("SC_CLK_TCK")


def log(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def wait_for(process: ChildProcess) -> None:
    deadline = time.monotonic() + 300
    while not process.is_ready:
        if process.exit_code is not None or time.monotonic() > deadline:
            raise BenchmarkFailed(f"{process.name} did not start:\n{process.log_tail()}")
        time.sleep(0.1)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


# Tables


def show(seconds: float) -> str:
    return f"{seconds * 1000:,.1f} ms" if seconds < 0.1 else f"{seconds * 1000:,.0f} ms"


def markdown(title: str, header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [["", *header], ["---"] + ["---:"] * len(header), *rows]
    return f"### {title}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines)


def report(cases: dict[str, Figures], groups: Sequence[dict]) -> str:
    """Every table and every goal, as Markdown."""

    def slowest(values: dict[str, dict[str, float]], number: int | None = None) -> list[list[str]]:
        names = sorted(
            {n for of in values.values() for n in of}, key=lambda n: -max(v.get(n, 0) for v in values.values())
        )
        return [[name, *(show(of[name]) if name in of else "" for of in values.values())] for name in names[:number]]

    intervals = {group["name"]: seconds(group["interval"]) for group in groups}
    rows = [[name, *(figures.rows[name] for figures in cases.values())] for name in next(iter(cases.values())).rows]
    of_groups = [
        [
            f"{group}, every {interval:g} s",
            *(f"{show(statistics.median(t))}, {show(max(t))}, {max(t) / interval:.1%}" for t in times),
        ]
        for group, interval in intervals.items()
        if all(times := [figures.groups.get(group) for figures in cases.values()])
    ]
    rules = {case: {n: statistics.median(t) for n, t in figures.rules.items()} for case, figures in cases.items()}
    parts = [
        markdown("Prometheus", list(cases), rows),
        markdown("Rule groups: median, longest, the longest's part of the interval", list(cases), of_groups),
        markdown("Rules: median of the ten slowest", list(cases), slowest(rules, 10)),
    ]
    for view in next(iter(cases.values())).views:
        parts.append(markdown(view, list(cases), slowest({c: figures.views[view] for c, figures in cases.items()}, 12)))
    return "\n\n".join((*parts, "### Goals", "\n".join(goals(cases, intervals))))


def goals(cases: dict[str, Figures], intervals: dict[str, float]) -> Iterator[str]:
    def verdict(is_met: bool, goal: str, found: str) -> str:
        return f"- {'met' if is_met else '**missed**'}: {goal}: {found}"

    panels = [
        (took, f"{title} at {case} {show(took)}")
        for case, figures in cases.items()
        for title, took in next(iter(figures.views.values())).items()
        if not title.startswith("**")
    ]
    yield verdict(
        max(panels)[0] < GOAL_PANEL_SECONDS,
        f"every panel of the fleet dashboard answers in under {GOAL_PANEL_SECONDS:g} s",
        max(panels)[1],
    )
    parts = [
        (max(times) / intervals[group], f"{group} at {case} {max(times) / intervals[group]:.1%}")
        for case, figures in cases.items()
        for group, times in figures.groups.items()
    ]
    yield verdict(
        max(parts)[0] < GOAL_RULES_PART,
        f"the longest evaluation of every rule group takes under {GOAL_RULES_PART:.0%} of its interval",
        max(parts)[1],
    )


def case_of(text: str) -> tuple[str, int]:
    kind, _, number = text.partition(":")
    if kind not in KINDS or not number.isdigit() or not 1 <= int(number) <= 5000:
        raise argparse.ArgumentTypeError(f"{text!r}: KIND:RUNS, KIND one of {', '.join(KINDS)}, RUNS 1 to 5000")
    return kind, int(number)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.fleet",
        description=__doc__.split("    .venv")[0],
        epilog="; ".join(f"{kind}: {what}" for kind, what in KINDS.items()),
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("cases", nargs="+", type=case_of, metavar="KIND:RUNS", help="measured in turn, such as fleet:1000")
    add("--rules", type=Path, default=ROOT / "alerts/ppo.rules.yml", help="file of rules")
    add("--interval", type=float, default=5.0, help="seconds between two scrapes")
    add("--settle", type=int, default=180, help="seconds of live scraping")
    add("--repeats", type=int, default=5, help="times that each query is asked, for the median")
    options = parser.parse_args()
    groups = yaml.safe_load(options.rules.read_text())["groups"]

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    results = {}
    try:
        servers = provide()
        print(
            f"{machine('numpy')}; {servers.versions()}\n`python -m benchmarks.fleet {' '.join(sys.argv[1:])}`",
            flush=True,
        )
        for kind, number in options.cases:
            results[f"{number:,} {kind}"] = measure(kind, number, options, groups)
        print(f"\n{report(results, groups)}")
    except (BenchmarkFailed, ServersMissing, RuntimeError) as error:
        print(f"python -m benchmarks.fleet: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
