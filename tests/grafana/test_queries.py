"""Every query of the dashboards against a real Prometheus that holds half an hour of real runs, scraped once a minute,
and evaluates the repository's rules over it."""

import json
import math
import subprocess
import time
import urllib.parse
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import yaml
from boards import BOARDS, FLEET, ROOT, RUN, panel, queries, with_values
from conftest import every_servers, fetch, free_ports, wait_until

from exporter.aggregator import RunAggregator
from exporter.collectors import build_registry
from exporter.health import Thresholds
from exporter.telemetry import HEAD_SIGNALS, PPOUpdatePayload

HEADS = ("left", "middle", "right")


@dataclass(frozen=True)
class Run:
    """A run that is scraped once a minute, the last time so many minutes ago."""

    name: str
    cvs: tuple[float, ...] = (0.1, 0.1, 0.1, 0.1)  # of the gradient steps of each update
    norms: tuple[float, ...] = (1.0, 1.0, 1.0)
    thresholds: Thresholds | None = Thresholds()  # None: from before they were told
    ended: int = 0
    anew: int = -1  # so many minutes ago another process of it began, and has made no update

    def samples(self, now: float) -> Iterator[str]:
        """Lines of the text format with a time."""
        aggregator = RunAggregator()
        aggregator.register_run(self.name, HEADS, thresholds=self.thresholds or Thresholds())
        target = {"job": "ppo", "instance": f"{self.name}:9842", "run": self.name}
        for minute in range(30, self.ended - 1, -1):
            if minute == self.anew:
                aggregator = RunAggregator()
                aggregator.register_run(self.name, HEADS, thresholds=self.thresholds or Thresholds())
            update = PPOUpdatePayload(
                run=self.name,
                timestamp_seconds=now - 60 * minute,
                gradient_cv=sum(self.cvs) / len(self.cvs),
                gradient_cv_per_step=self.cvs,
                contributing_heads=3,
                head_gradient_norms=dict(zip(HEADS, self.norms)),
                **{name: dict.fromkeys(HEADS, 0.25) for name in HEAD_SIGNALS},
                gradient_norm=2.0,
                environment_steps=600,
                **dict.fromkeys(("policy_loss", "value_loss", "entropy", "approx_kl", "clip_fraction"), 0.25),
                **dict.fromkeys(("explained_variance", "learning_rate"), 0.25),
                **dict.fromkeys(("episode_return_mean", "episode_length_mean"), 8.0),
                rollout_duration_seconds=45.0,
                update_duration_seconds=10.0,
                rank_rollout_seconds=(44.0, 45.0),
            )
            if minute > self.anew:
                aggregator.handle_ppo_update(update)
            for family in build_registry(aggregator).collect():
                for sample in family.samples:
                    if sample.name != "ppo_gradient_cv_threshold" or self.thresholds:
                        yield line(sample.name, target | sample.labels, sample.value, now - 60 * minute)
            yield line("up", target, 1, now - 60 * minute)


RUNS = (
    Run("steady"),
    Run("own", cvs=(0.1, 0.3, 0.5, 0.9), norms=(0.2, 0.2, 1.6), thresholds=Thresholds(0.2, 0.4)),
    Run("untold", cvs=(1.0, 1.0)),
    Run("nan", cvs=(math.inf, 0.1), norms=(math.nan, math.nan, math.nan)),
    Run("stalled"),
    Run("dead", ended=10),
    Run("ended", ended=10),
    Run("anew", cvs=(2.5, 2.5), anew=8),
)


def line(name: str, labels: dict[str, str], value: float, at: float) -> str:
    return f"{name}{{{','.join(f'{label}={json.dumps(text)}' for label, text in labels.items())}}} {value} {at:.3f}\n"


def history(now: float) -> Iterator[str]:
    for run in RUNS:
        yield from run.samples(now)
    for minute in range(5, -1, -1):
        at = now - 60 * minute
        dead, pod = {"job": "ppo", "instance": "dead:9842", "run": "dead"}, {"job": "pods", "instance": "10.0.0.1:9842"}
        yield line("up", dead, 0, at)
        yield line("up", pod, 0, at)
        yield line("up", {"job": "builds", "instance": "10.0.0.9:80", "run": "not-of-ours"}, 0, at)
        yield line("ppo_run_info", pod | {"run": "of-a-pod"}, 1, at - 600)
        # What outlives its run, and what takes longer than a test.
        ended = {"job": "ppo", "instance": "ended:9842", "run": "ended"}
        yield line("run:ppo_environment_steps:rate5m", ended, 10, at)
        stalled = {"job": "ppo", "instance": "stalled:9842", "run": "stalled"}
        alert = {"alertname": "PPOTrainingStalled", "alertstate": "firing", "severity": "warning"}
        yield line("ALERTS", stalled | alert, 1, at)
    yield "# EOF\n"


@pytest.fixture
def ask(tmp_path, servers, start_prometheus) -> Callable[[str], list[dict]]:
    """Asks a Prometheus with that history, as of now."""
    text = tmp_path / "history.txt"
    text.write_text("".join(history(time.time() - 1)))
    create = ["tsdb", "create-blocks-from", "openmetrics", text, tmp_path / "prometheus"]
    subprocess.run([servers.promtool, *create], check=True, capture_output=True)
    rules = yaml.safe_load((ROOT / "alerts/ppo.rules.yml").read_text())
    for group in rules["groups"]:
        group["interval"] = "1s"
    (tmp_path / "ppo.rules.yml").write_text(yaml.safe_dump(rules))
    port = free_ports().prometheus
    start_prometheus(port, {"rule_files": [str(tmp_path / "ppo.rules.yml")]})

    def query(expression: str) -> list[dict]:
        parameters = urllib.parse.urlencode({"query": expression}).encode()
        answer = json.loads(fetch(f"http://127.0.0.1:{port}/api/v1/query", parameters)[1])
        assert answer["status"] == "success", (expression, answer)
        return answer["data"]["result"]

    for record in ("run:ppo_gradient_level:max", "run_head:ppo_head_gradient_share:topk1"):
        wait_until(lambda: query(record), f"a result of {record}", 10)
    wait_until(lambda: query('run:ppo_environment_steps:rate5m{run="steady"}'), "a rate", 10)
    return query


@every_servers
def test_every_query_tells_what_the_runs_told(ask: Callable[[str], list[dict]]):
    def values(of: dict, title: str, label: str = "run", **chosen: str) -> list[dict[str, float]]:
        """For each of the panel's queries the values by label."""
        return [
            {
                sample["metric"].get(label, ""): float(sample["value"][1])
                for sample in ask(with_values(target, **chosen))
            }
            for target in panel(of, title)["targets"]
        ]

    for board in BOARDS.values():
        for title, target in queries(board):
            result = ask(with_values(target, run="steady" if board is RUN else ".*"))
            empty = {"Firing alerts", "Alerts: critical", "Alerts: warning", "CV ceiling", "Gradient CV now"}
            assert result or title in empty, f"{title}: no result of {target['expr']}"

    state, level, cv, share, age, returns, speed = values(FLEET, "All runs")
    alive = {"steady": 2, "own": 2, "untold": 2, "nan": 2, "anew": 2, "stalled": 1}
    assert state == alive | {"dead": 0, "": 0}, "a run that has ended is in no column"
    assert level == {"steady": 0, "own": 2, "untold": 1, "nan": 2, "anew": -1, "stalled": 0}
    assert cv == pytest.approx({"steady": 0.1, "own": 0.45, "untold": 1.0, "nan": math.inf, "stalled": 0.1})
    assert (
        share.keys() == age.keys() == returns.keys() == cv.keys() == speed.keys() - {"anew"} == alive.keys() - {"anew"}
    )
    assert (
        share["own"] == 0.8 and speed["own"] == pytest.approx(10, rel=0.3) and returns["own"] == 8 and age["own"] < 60
    )
    assert values(FLEET, "Runs by level now") == [{"": 2}, {"": 1}, {"": 2}]
    assert values(FLEET, "Runs down") == [{"": 2}] and values(FLEET, "Runs stalled") == [{"": 1}]
    critical, warning, healthy = values(FLEET, "The ten worst runs now")
    assert (critical.keys(), warning.keys(), healthy.keys()) == ({"own", "nan"}, {"untold"}, {"steady", "stalled"})

    def shown(title: str, label: str = "run", run: str = "own") -> list[dict[str, float]]:
        return values(RUN, title, label, run=run)

    assert shown("Level now") == [{"own": 2}] and shown("Level now", run="nan") == [{"nan": 2}]
    assert shown("Level now", run="anew") == [{"anew": -1}]
    assert shown("Gradient CV now", "health") == [{"critical": pytest.approx(0.45)}, {}]
    assert shown("Gradient CV now", run="anew") == [{}, {"anew": -1}]
    assert shown("Gradient CV", run="anew")[0] == {} and shown("Gradient CV", run="steady")[0] == {"steady": 0.1}
    assert shown("Gradient CV")[2:] == [{"own": 0.2}, {"own": 0.4}]
    assert shown("Gradient CV", run="untold")[2:] == [{"untold": 0.5}, {"untold": 2.0}]
    assert shown("CV ceiling") == [{"own": pytest.approx(3**0.5)}, {}]
    assert shown("CV ceiling", run="untold") == [{}, {"untold": pytest.approx(3**0.5)}]
    assert 1740 <= shown("At this level for")[0]["own"] < 1900
    assert shown("Dominating head", "head") == [{"right": 0.8}]
    assert shown("Most starved head", "head") == [{"left": 0.1, "middle": 0.1}]
    assert shown("Dominating head", "head", "nan")[0].keys() == set(HEADS), "none of those that tie is singled out"
    assert [sum(each.values()) for each in shown("Share of gradient steps by level")] == [0.25, 0.25, 0.5]
    steps = [sum(each.values()) for each in shown("Gradient steps by level")]
    assert steps == pytest.approx([10, 10, 20], rel=0.15)
    assert shown("Where the time goes") == [{"own": pytest.approx(each)} for each in (0.75, 10 / 60, 1 - 55 / 60)]
    assert ask(with_values(panel(RUN, "Firing alerts")["targets"][0], run="stalled"))

    rules = yaml.safe_load((ROOT / "grafana/provisioning/alerting/ppo.yml").read_text())["groups"][0]["rules"]
    for rule, beyond in zip(rules, ({"own", "untold", "nan"}, {"own", "nan"}), strict=True):
        assert {sample["metric"]["run"] for sample in ask(rule["data"][0]["model"]["expr"])} == beyond
