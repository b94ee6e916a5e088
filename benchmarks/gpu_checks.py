"""The checks of `benchmarks.gpu`: each prints its figures as Markdown and returns whether it holds."""

import os
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from statistics import median, quantiles

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from exporter import GradientMonitor, HeadGradientMeter, RunAggregator
from trainer.config import TrainerConfig
from trainer.distributed import Ranks
from trainer.environments.host_growth import ACTION_HEADS, HostGrowthVectorEnv
from trainer.policy import ActorCritic
from trainer.stop import StopRequest
from trainer.training import Training

ROOT = Path(__file__).resolve().parent.parent
SIZES = (64, 1024, 4096)  # environments
STEPS, MINIBATCHES, EPOCHS = 64, 8, 4
WINDOW = 32  # gradient steps
MOST_COST = 0.01  # largest cost of monitoring, as a fraction of a gradient step
NEVER = StopRequest()


def settings(num_envs: int, device: torch.device, threads: int = 1, **others: object) -> TrainerConfig:
    """The default environment and the trainer's defaults, with the same number of minibatches for all sizes."""
    return TrainerConfig(
        device=str(device),
        threads=threads,
        num_envs=num_envs,
        rollout_steps=STEPS,
        epochs=EPOCHS,
        minibatch_size=num_envs * STEPS // MINIBATCHES,
        total_timesteps=10**9,
        **others,
    )


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(device: torch.device, action: Callable[[], object], times: int) -> float:
    """Mean seconds of `action` over `times` calls, with the device's work."""
    wait(device)
    started = time.perf_counter()
    for _ in range(times):
        action()
    wait(device)
    return (time.perf_counter() - started) / times


def for_seconds(device: torch.device, action: Callable[[], object], seconds: float) -> float:
    """The same over as many calls as fit into `seconds`, at least one."""
    times, started = 0, time.perf_counter()
    while not times or time.perf_counter() - started < seconds:
        action()
        wait(device)
        times += 1
    return (time.perf_counter() - started) / times


@contextmanager
def synchronizations(device: torch.device) -> Iterator[Counter[str]]:
    """Count synchronizations by place in the code; the counts are complete at the end of the context."""
    places: Counter[str] = Counter()
    if device.type != "cuda":
        yield places
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield places
        finally:
            torch.cuda.set_sync_debug_mode("default")
    places.update(f"{each.filename}:{each.lineno}" for each in caught if "synchronizing CUDA" in str(each.message))


def table(header: list[str], rows: list[list[str]], end: str = "\n") -> None:
    for each in (header, ["---"] + ["---:"] * (len(header) - 1), *rows):
        row(each)
    print(end=end)


def row(cells: list[str]) -> None:
    print(f"| {' | '.join(cells)} |", flush=True)


def check_synchronizations(device: torch.device, seconds: float) -> bool:
    """Synchronizations of a rollout, an update, and gradient steps with a monitor attached"""
    training = Training(settings(1024, device))
    for _ in range(2):
        training.update(NEVER)
    wait(device)
    counts: dict[str, tuple[int, Counter[str]]] = {}
    with synchronizations(device) as places:
        rollout = training.collector.collect(NEVER)
    counts[f"a rollout of {STEPS} steps, 1,024 environments"] = 1, places
    with synchronizations(device) as places:
        training.agent.update(rollout, learning_rate=1e-3)
    counts[f"an update of {EPOCHS * MINIBATCHES} gradient steps"] = 1, places
    step, heads, optimizer = workload(device, 128, 512)
    with attached(heads, optimizer):
        for _ in range(WINDOW):
            step()
        wait(device)
        with synchronizations(device) as places:
            for _ in range(3 * WINDOW):
                step()
    counts[f"{3 * WINDOW} attached gradient steps, 3 windows"] = 0, places
    table(
        ["", "synchronizations", "at most"],
        [[name, str(sum(places.values())), str(most)] for name, (most, places) in counts.items()],
    )
    for name, (_, places) in counts.items():
        for place, count in places.most_common(20):
            print(f"- {name}: {count} at {place.removeprefix(f'{ROOT}/')}")
    if device.type != "cuda":
        print("Not counted: this is not a CUDA device.")
    return all(sum(places.values()) <= most for most, places in counts.values())


def check_same_weights(device: torch.device, seconds: float) -> bool:
    """One update on the device gives the CPU's weights"""
    cpu = torch.device("cpu")
    trainings = []
    for place in (cpu, device):
        # One minibatch per epoch is the same for any shuffling.
        config = replace(settings(64, place), minibatch_size=64 * STEPS)
        trainings.append(Training(config))
    ours, theirs = trainings
    theirs.agent.policy.load_state_dict(ours.agent.policy.state_dict())
    rollout = ours.collector.collect(NEVER)
    moved = {name: part.to(device) for name, part in vars(rollout).items() if isinstance(part, Tensor)}
    there = replace(rollout, **moved | {"valid": rollout.valid})
    metrics = [t.agent.update(r, learning_rate=1e-3) for t, r in ((ours, rollout), (theirs, there))]
    error = float((ours.agent.policy.flat - theirs.agent.policy.flat.cpu()).abs().max())
    cvs = [each["gradient_cv"] for each in metrics]
    table(["", "largest difference", "at most"], [
        ["a weight", f"{error:.1e}", "1.0e-04"],
        ["gradient CV", f"{abs(cvs[0] - cvs[1]):.1e}", "1.0e-04"],
    ])  # fmt: skip
    return error <= 1e-4 and abs(cvs[0] - cvs[1]) <= 1e-4


def check_norms(device: torch.device, seconds: float) -> bool:
    """Head norms on every device, the current one or not"""
    devices = [torch.device("cuda", n) for n in range(torch.cuda.device_count())] if device.type == "cuda" else [device]
    rows, worst = [], 0.0
    for place in devices:
        step, heads, optimizer = workload(place, 128, 512)
        aggregator = RunAggregator()
        with attached(heads, optimizer, aggregator) as monitor:
            step()
            monitor.detach()
            measured = aggregator.snapshot.runs["watched"].gradient_quality.head_norms
        gradients = {name: [p.grad.cpu().double().flatten() for p in head.parameters()] for name, head in heads.items()}
        errors = [abs(measured[name] / float(torch.cat(parts).norm()) - 1) for name, parts in gradients.items()]
        worst = max(worst, *errors)
        rows.append([str(place), f"{max(errors):.1e}", "1.0e-05"])
    table(["device", "largest relative error of a norm", "at most"], rows)
    if device.type == "cuda":
        print(f"The current device is cuda:{torch.cuda.current_device()}; there are {len(devices)}.")
    return worst <= 1e-5


def check_speed(device: torch.device, seconds: float) -> bool:
    """Environment steps per second of the whole trainer, on the default environment"""
    cores, cpu = os.cpu_count() or 1, torch.device("cpu")
    ways = [(device, 1), (cpu, 1), *([(cpu, cores)] if cores > 1 else [])]
    # Print each row at once: many environments take long on a CPU.
    table(["environments", "device", "steps/s", "ms, rollout", "ms, update", f"{device} to it"], [], end="")
    for num_envs in SIZES:
        speeds = []
        for place, threads in ways:
            training = Training(settings(num_envs, place, threads))
            training.update(NEVER)
            parts: list[tuple[float, float]] = []
            began = time.perf_counter()
            while not parts or time.perf_counter() - began < seconds:
                started = time.perf_counter()
                rollout = training.collector.collect(NEVER)
                wait(place)
                collected = time.perf_counter()
                training.agent.update(rollout, learning_rate=1e-3)
                wait(place)
                parts.append((collected - started, time.perf_counter() - collected))
            collecting, learning = (median(each) for each in zip(*parts))
            speeds.append(num_envs * STEPS / (collecting + learning))
            name = f"cpu, {threads} thread{'s' * (threads > 1)}" if place.type == "cpu" else str(place)
            ratio = f"{speeds[0] / speeds[-1]:.2f}" if len(speeds) > 1 else ""
            row(
                [
                    f"{num_envs:,}",
                    name,
                    f"{speeds[-1]:,.0f}",
                    f"{collecting * 1e3:,.0f}",
                    f"{learning * 1e3:,.0f}",
                    ratio,
                ]
            )
    print(f"\n{STEPS} steps, {EPOCHS} epochs of {MINIBATCHES} minibatches; medians.")
    return True


def check_environment(device: torch.device, seconds: float) -> bool:
    """The default environment alone, tensors in and out, random actions"""
    rows, counted = [], 0
    for num_envs in SIZES:
        for place in (torch.device("cpu"), device):
            env = HostGrowthVectorEnv(num_envs, device=place, as_tensors=True)
            env.reset(seed=1)
            actions = torch.stack([torch.randint(n, (num_envs,), device=place) for n in ACTION_HEADS.values()], 1)
            for _ in range(70):  # past the end of the first episodes
                observations, rewards, *_ = env.step(actions)
            if not (observations.device == rewards.device == actions.device):
                raise AssertionError(f"tensors on {observations.device}, actions on {actions.device}")
            per_step = for_seconds(place, lambda env=env, a=actions: [env.step(a) for _ in range(8)], seconds / 4) / 8
            with synchronizations(place) as places:
                for _ in range(STEPS):
                    env.step(actions)
            counted += sum(places.values())
            shown = str(sum(places.values())) if place.type == "cuda" else ""
            rows.append([f"{num_envs:,}", str(place), f"{num_envs / per_step:,.0f}", f"{per_step * 1e6:,.0f}", shown])
    table(["environments", "device", "steps/s", "us a step of all", f"synchronizations in {STEPS} steps"], rows)
    return not counted


def check_cost(device: torch.device, seconds: float) -> bool:
    """Cost of monitoring, as a fraction of a gradient step"""
    rows, shares = [], []
    for width, batch in ((128, 512), (128, 8192), (2048, 8192)) if device.type == "cuda" else ((128, 512),):
        step, heads, optimizer = workload(device, width, batch)
        times = max(WINDOW, int(seconds / 6 / timed(device, step, 8)) // WINDOW * WINDOW)
        pairs = []
        for number in range(7):
            for is_watched in (False, True) if number % 2 else (True, False):
                with attached(heads, optimizer) if is_watched else nullcontext():
                    timed(device, step, WINDOW)
                    duration = timed(device, step, times)
                if is_watched:
                    watched = duration
                else:
                    plain = duration
            pairs.append((plain, watched))
        ratios = [watched / plain - 1 for plain, watched in pairs]
        lower, middle, upper = quantiles(ratios, n=4, method="inclusive")
        name = f"monitor attached, width {width}, minibatch {batch:,}"
        added = median(watched - plain for plain, watched in pairs)
        plain = median(plain for plain, _ in pairs)
        rows.append(
            [name, f"{plain * 1e6:,.0f}", f"{added * 1e6:+.1f}", f"{middle:+.2%}", f"{lower:+.2%} to {upper:+.2%}"]
        )
        shares.append(middle)
    table(["", "us a gradient step", "us for monitoring", "of the step", "quartiles of 7 pairs"], rows)
    print(
        f"Compared with the same loop of the same round without it; windows of {WINDOW} steps. At most {MOST_COST:.0%}."
    )
    return max(shares) <= MOST_COST


def check_cost_in_trainer(device: torch.device, seconds: float) -> bool:
    """Cost of measuring in the trainer, as a fraction of a gradient step"""
    training = Training(settings(1024, device))
    training.update(NEVER)
    rollout = training.collector.collect(NEVER)
    update = timed(device, lambda: training.agent.update(rollout, learning_rate=1e-3), 3)
    added, step = meter_seconds(device), update / (EPOCHS * MINIBATCHES)
    share = f"{added / step:+.2%}"
    sizes = f"1,024 environments, minibatch {1024 * STEPS // MINIBATCHES:,}"
    table(
        ["", "us a gradient step", "us for measuring", "of the step"],
        [[sizes, f"{step * 1e6:,.0f}", f"{added * 1e6:+.1f}", share]],
    )
    print("The meter and closing its window, minus the norm of all gradients, which clipping needs anyway.", end=" ")
    print(f"At most {MOST_COST:.0%}.")
    return added / step <= MOST_COST


def meter_seconds(device: torch.device) -> float:
    """Seconds per gradient step of measuring in the trainer, with its share of a window, without the global norm."""
    policy = ActorCritic(64, ACTION_HEADS, 128, device=device)
    policy.flat.grad.normal_()
    meter = HeadGradientMeter(policy.head_rows, flat=policy.flat)

    def window() -> None:
        for _ in range(WINDOW):
            meter.measure()
        meter.start_collecting().summary()

    def norms() -> None:
        for _ in range(WINDOW):
            torch.linalg.vector_norm(policy.flat.grad)

    return (timed(device, window, 20) - timed(device, norms, 20)) / WINDOW


def check_ranks(device: torch.device, seconds: float) -> bool:
    """torch.distributed: NCCL with one rank per device"""
    count = torch.cuda.device_count() if device.type == "cuda" else 1
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    command = [sys.executable, *launcher, "-m", "benchmarks.gpu", "--device", device.type, "--as-rank"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    print(done.stdout.strip() or f"```\n{done.stderr[-3000:]}\n```")
    return done.returncode == 0


def as_rank(device: torch.device) -> int:
    """One rank of `check_ranks`: the trainer's use of torch.distributed, then two updates and a monitored step."""
    import torch.distributed as dist

    ranks = Ranks.of_torchrun()
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    mine = torch.full((3,), float(ranks.rank + 1), device=device)
    total, parts, objects = mine.clone(), [torch.empty_like(mine) for _ in range(ranks.size)], [None] * ranks.size
    dist.all_reduce(total)
    dist.all_gather(parts, mine)
    dist.all_gather_object(objects, ranks.rank)
    expected = float(sum(range(1, ranks.size + 1)))
    is_right = bool((total == expected).all()) and float(torch.stack(parts)[:, 0].sum()) == expected
    is_right = is_right and objects == list(range(ranks.size))
    training = Training(settings(64 * ranks.size, torch.device(device.type)), ranks)
    for _ in range(2):
        training.update(NEVER)
    step, heads, optimizer = workload(device, 128, 512)
    with attached(heads, optimizer):
        step()
    if ranks.is_first:
        version = f"NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}" if device.type == "cuda" else "gloo"
        verdict = "right" if is_right else "WRONG"
        print(f"{version}, {ranks.size} rank(s): sums and gathers {verdict}; two updates trained, a step monitored.")
    ranks.close()
    return 0 if is_right else 1


def workload(
    device: torch.device, width: int, batch: int
) -> tuple[Callable[[], None], dict[str, nn.Module], torch.optim.Optimizer]:
    """A plain PPO gradient step with seven heads and `clip_grad_norm_`, on random experience."""
    torch.manual_seed(0)
    trunk = nn.Sequential(nn.Linear(64, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh())
    heads = nn.ModuleDict({name: nn.Linear(width, size) for name, size in ACTION_HEADS.items()})
    model = nn.ModuleList([trunk, heads]).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-5, fused=True)
    observations, advantages = torch.randn(batch, 64, device=device), torch.randn(batch, device=device)
    actions = {name: torch.randint(size, (batch,), device=device) for name, size in ACTION_HEADS.items()}

    def step() -> None:
        features = trunk(observations)
        log_prob = -sum(F.cross_entropy(head(features), actions[n], reduction="none") for n, head in heads.items())
        ratio = (log_prob - log_prob.detach()).exp()
        loss = -torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()

    return step, dict(heads.items()), optimizer


@contextmanager
def attached(
    heads: dict[str, nn.Module], optimizer: torch.optim.Optimizer, aggregator: RunAggregator | None = None
) -> Iterator[GradientMonitor]:
    with GradientMonitor(heads, "watched", window_steps=WINDOW, aggregator=aggregator or RunAggregator()) as monitor:
        monitor.attach(optimizer)
        yield monitor


CHECKS: dict[str, Callable[[torch.device, float], bool]] = {
    "synchronizations": check_synchronizations,
    "weights": check_same_weights,
    "norms": check_norms,
    "cost": check_cost,
    "cost-in-trainer": check_cost_in_trainer,
    "ranks": check_ranks,
    "environment": check_environment,
    "speed": check_speed,
}
