"""The cost of measuring the gradients of action heads, compared with other ways.

One process, one model at a time. In every round each way trains the same model for some steps, in an order that changes
from round to round. It is compared with the unobserved loop of the same round, in CPU time of the process; the table
has medians over the rounds. "alone" repeats clipping, observation and optimizer step without the passes through the
model; "in training" includes them. The unobserved loop is in the table twice: its second row shows the noise. If the
package rl-insight is installed (0.3.0 was tried), its client is measured too.

    .venv/bin/python -m benchmarks.monitor_overhead --help
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from prometheus_client import CollectorRegistry, Gauge
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from torch.distributions import Categorical

from benchmarks.machine import machine
from exporter import GradientMonitor, HeadGradientMeter, RunAggregator, emit_ppo_update, gradient_cv
from trainer.environments.host_growth import ACTION_HEADS

STEPS_PER_UPDATE = 32
MAX_GRAD_NORM = 0.5


@dataclass
class Workload:
    """A policy with separate layers as heads, and random experience for a PPO loss."""

    name: str
    trunk: nn.Module
    heads: nn.ModuleDict
    batch: int
    inputs: int

    def __post_init__(self) -> None:
        sizes = [head.out_features for head in self.heads.values()]
        self.model = nn.ModuleList([self.trunk, self.heads])
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-5, eps=1e-5, fused=True)
        self.observations = torch.randn(self.batch, self.inputs)
        self.actions = torch.stack([torch.randint(size, (self.batch,)) for size in sizes], 1)
        self.advantages = torch.randn(self.batch)
        with torch.no_grad():
            self.old_log_probs, _ = self._evaluate()

    def _evaluate(self) -> tuple[Tensor, Tensor]:
        features = self.trunk(self.observations)
        by_head = zip(self.actions.unbind(1), (Categorical(logits=head(features)) for head in self.heads.values()))
        log_probs, entropies = zip(*((of_head.log_prob(taken), of_head.entropy()) for taken, of_head in by_head))
        return sum(log_probs), sum(entropies)

    def backward(self) -> None:
        log_probs, entropies = self._evaluate()
        ratio = (log_probs - self.old_log_probs).exp()
        clipped = ratio.clamp(0.8, 1.2) * self.advantages
        loss = -torch.min(ratio * self.advantages, clipped).mean() - 0.01 * entropies.mean()
        self.optimizer.zero_grad()
        loss.backward()

    def clip(self) -> None:
        nn.utils.clip_grad_norm_(self.model.parameters(), MAX_GRAD_NORM)


def small() -> Workload:
    heads = nn.ModuleDict({name: nn.Linear(128, size) for name, size in ACTION_HEADS.items()})
    trunk = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 128), nn.Tanh())
    return Workload("7 heads, 128x128 trunk, minibatch 512", trunk, heads, 512, 64)


def large() -> Workload:
    heads = nn.ModuleDict({f"head_{index}": nn.Linear(4096, 60) for index in range(50)})
    trunk = nn.Sequential(
        *(nn.Linear(1024, 4096), nn.Tanh(), nn.Linear(4096, 4096), nn.Tanh(), nn.Linear(4096, 4096), nn.Tanh())
    )
    workload = Workload("50 heads", trunk, heads, 64, 1024)
    millions = sum(parameter.numel() for parameter in workload.model.parameters()) / 1e6
    workload.name += f", {millions:.1f} million parameters, minibatch 64"
    return workload


Way = Callable[[Workload], Iterator[Callable[[], None]]]
"""A context that observes the workload; its value is what a training step does after backward."""


@contextmanager
def unobserved(workload: Workload) -> Iterator[Callable[[], None]]:
    def step() -> None:
        workload.clip()
        workload.optimizer.step()

    yield step


@contextmanager
def attached(workload: Workload, **options: bool) -> Iterator[Callable[[], None]]:
    with GradientMonitor(
        dict(workload.heads.items()), "r", window_steps=STEPS_PER_UPDATE, aggregator=RunAggregator(), **options
    ) as monitor:
        monitor.attach(workload.optimizer)
        with unobserved(workload) as step:
            yield step


@contextmanager
def attached_before_clipping(workload: Workload) -> Iterator[Callable[[], None]]:
    with attached(workload, before_clipping=True) as step:
        yield step


@contextmanager
def in_our_trainer(workload: Workload) -> Iterator[Callable[[], None]]:
    """As in `trainer/agent.py`: clipping by fused Adam's grad_scale, from the norms of the metric."""
    meter = HeadGradientMeter(dict(workload.heads.items()), workload.model.parameters())
    aggregator = RunAggregator()
    optimizer = workload.optimizer
    done = 0

    def step() -> None:
        nonlocal done
        global_norm = meter.measure()
        optimizer.grad_scale = (global_norm / MAX_GRAD_NORM).clamp(min=1.0)
        optimizer.found_inf = (~torch.isfinite(global_norm)).float()
        optimizer.step()
        done += 1
        if done % STEPS_PER_UPDATE == 0:
            emit_ppo_update(meter.start_collecting().summary(), run="r", handler=aggregator)

    yield step
    del optimizer.grad_scale, optimizer.found_inf


def _set_gauges(workload: Workload, norms_of: Callable[[nn.Module], float]) -> Callable[[], None]:
    registry = CollectorRegistry()
    norm_gauge = Gauge("head_norm", "norm", ["head"], registry=registry)
    cv_gauge = Gauge("cv", "cv", registry=registry)

    def observe() -> None:
        norms = {name: norms_of(head) for name, head in workload.heads.items()}
        for name, norm in norms.items():
            norm_gauge.labels(name).set(norm)
        cv_gauge.set(gradient_cv(norms.values()))

    return observe


@contextmanager
def item_loop(workload: Workload) -> Iterator[Callable[[], None]]:
    """The simple way: `.item()` for every parameter, gauges set at every step."""
    observe = _set_gauges(
        workload, lambda head: sum(parameter.grad.norm().item() ** 2 for parameter in head.parameters()) ** 0.5
    )

    def step() -> None:
        workload.clip()
        observe()
        workload.optimizer.step()

    yield step


@contextmanager
def stacked(workload: Workload) -> Iterator[Callable[[], None]]:
    """One norm per parameter, stacked, one transfer per step, gauges set at every step."""
    norms: dict[nn.Module, Tensor] = {}
    set_gauges = _set_gauges(workload, lambda head: norms[head])

    def step() -> None:
        workload.clip()
        per_head = [
            torch.linalg.vector_norm(torch.stack([p.grad.norm() for p in head.parameters()]))
            for head in workload.heads.values()
        ]
        norms.update(zip(workload.heads.values(), torch.stack(per_head).tolist()))
        set_gauges()
        workload.optimizer.step()

    yield step


@contextmanager
def remote_calls(workload: Workload) -> Iterator[Callable[[], None]]:
    """RL-Insight's client: norms as in the simple way, and one remote call per metric to a Ray actor."""
    import ray
    import rl_insight

    if not ray.is_initialized():
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
        ray.init(
            address="local", num_cpus=1, include_dashboard=False, _node_ip_address="127.0.0.1", log_to_driver=False
        )
        # No server: only sending the metrics is measured.
        rl_insight.init(config={"server": {"url": "http://127.0.0.1:9"}})

    def step() -> None:
        workload.clip()
        norms = {
            name: sum(parameter.grad.norm().item() ** 2 for parameter in head.parameters()) ** 0.5
            for name, head in workload.heads.items()
        }
        for name, norm in norms.items():
            rl_insight.metric_gauge("head_gradient_norm", norm, head=name)
        rl_insight.metric_gauge("gradient_cv", gradient_cv(norms.values()))
        workload.optimizer.step()

    yield step


UNOBSERVED = "unobserved"
WAYS: dict[str, Way] = {
    UNOBSERVED: unobserved,
    "unobserved, again": unobserved,
    "ours, in our trainer": in_our_trainer,
    "ours, attached": attached,
    "ours, attached, before clipping": attached_before_clipping,
    "`.item()` for every parameter": item_loop,
    "stacked norms, one transfer a step": stacked,
}
if find_spec("rl_insight") is not None:
    WAYS["RL-Insight's client, one remote call a metric"] = remote_calls


def cpu_seconds(workload: Workload, way: Way, steps: int) -> tuple[float, float]:
    """CPU seconds per training step, and per repetition of only the part after backward."""
    with way(workload) as step:
        workload.backward()
        step()
        started = time.process_time()
        for _ in range(steps):
            workload.backward()
            step()
        in_training, started = time.process_time() - started, time.process_time()
        for _ in range(steps):
            step()
        return in_training / steps, (time.process_time() - started) / steps


def measure(workload: Workload, rounds: int, steps: int) -> tuple[float, list[list[str]]]:
    """Median microseconds of an unobserved step, and the rows of the table."""
    rows: dict[str, list[tuple[float, float, float]]] = {name: [] for name in WAYS}
    unobserved_steps = []
    names = list(WAYS)
    for number in track(range(rounds), workload.name, console=Console(stderr=True), transient=True):
        order = names[number % len(names) :] + names[: number % len(names)]
        seconds = {name: cpu_seconds(workload, WAYS[name], steps) for name in order}
        base, base_alone = seconds[UNOBSERVED]
        unobserved_steps.append(base * 1e6)
        for name, (in_training, alone) in seconds.items():
            rows[name].append(((alone - base_alone) * 1e6, (in_training - base) * 1e6, in_training / base - 1))
    medians = {name: [statistics.median(column) for column in zip(*values)] for name, values in rows.items()}
    return statistics.median(unobserved_steps), [
        [name, f"{alone:+.1f}", f"{in_training:+.1f}", f"{ratio:+.2%}"]
        for name, (alone, in_training, ratio) in medians.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.monitor_overhead",
        description=__doc__.split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--rounds", type=int, default=60, help="rounds with the small model")
    parser.add_argument("--steps", type=int, default=64, help="steps per way and round with the small model")
    parser.add_argument("--large-rounds", type=int, default=12, help="rounds of 4 steps with the large model; 0: none")
    parser.add_argument("--threads", type=int, default=1, help="torch's CPU threads")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    print(f"{machine('torch')}; {options.threads} thread(s)")
    for build, rounds, steps in ((small, options.rounds, options.steps), (large, options.large_rounds, 4)):
        if not rounds:
            continue
        workload = build()
        unobserved_step, rows = measure(workload, rounds, steps)
        print(f"\n{workload.name}: {unobserved_step:,.0f} us a step unobserved; {rounds} rounds of {steps} steps\n")
        print("| way | us a step, alone | us a step, in training | of the step |\n|---|---|---|---|")
        for row in rows:
            print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    main()
