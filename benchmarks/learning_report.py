"""The report of `benchmarks.learning`: bootstrap intervals, tables and curves."""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, quantiles

import numpy as np

from benchmarks.learning_run import Run
from exporter import HealthLevel

RESAMPLES = 10_000
INTERVAL = (2.5, 97.5)  # percentiles


def _resampled_means(values: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Means [resamples, ...] of `values` [seeds, ...], the seeds drawn with replacement."""
    seeds = len(values)
    times_drawn = rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=RESAMPLES)
    return times_drawn @ values / seeds


def mean_interval(values: Sequence) -> np.ndarray:
    """Ends [2, ...] of the 95 % percentile bootstrap interval of the mean over the seeds, the first axis of `values`.

    Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapter 13.
    """
    return np.percentile(_resampled_means(np.asarray(values, float), np.random.default_rng(0)), INTERVAL, axis=0)


def difference_interval(values: Sequence[float], others: Sequence[float]) -> np.ndarray:
    """The interval of the difference of two means; their seeds are drawn independently."""
    rng = np.random.default_rng(0)
    means, other_means = (_resampled_means(np.asarray(each, float), rng) for each in (values, others))
    return np.percentile(means - other_means, INTERVAL)


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def comparison(runs: dict[str, list[Run]], reference: str) -> str:
    """Returns at the end and over the whole run of all trainers, and their differences to `reference`."""
    parts = []
    for name, title in (("final", "Mean return of the last 100 episodes"), ("overall", "The same, mean over the run")):
        values = {who: [getattr(run, name) for run in of_seeds] for who, of_seeds in runs.items()}
        header = ["", "mean of the seeds", "95 % interval", "worst seed", "best seed"]
        header += [f"less {reference}", "95 % interval", ""]
        rows = []
        for who, of_seeds in values.items():
            row = [who, f"{fmean(of_seeds):.3f}", _shown(mean_interval(of_seeds))]
            row += [f"{min(of_seeds):.3f}", f"{max(of_seeds):.3f}", *([""] * 3)]
            if who != reference:
                low, high = difference_interval(of_seeds, values[reference])
                verdict = "higher" if low > 0 else "LOWER" if high < 0 else "no clear difference"
                row[5:] = [f"{fmean(of_seeds) - fmean(values[reference]):+.3f}", _shown((low, high), "+"), verdict]
            rows.append(row)
        parts += [f"{title}:\n", markdown(header, rows), ""]
    return "\n".join(parts)


def _shown(interval: Sequence[float], sign: str = "") -> str:
    low, high = interval
    return f"{low:{sign}.3f} to {high:{sign}.3f}"


def table_of_seeds(runs: dict[str, list[Run]], seeds: Sequence[int], goal: float | None) -> str:
    """A row for each trained run, with the returns of the others, and the means below."""
    trained, *others = runs
    header = ["seed", *(["steps until the goal"] if goal is not None else []), "return at the end", *others]
    header += ["CV per update: min / median / p95 / max", *(f"{level} steps" for level in HealthLevel)]
    rows = []
    for number, (seed, run) in enumerate(zip(seeds, runs[trained], strict=True)):
        row = [str(seed)]
        if goal is not None:
            reached = run.reached(goal)
            row.append(f"{reached:,}" if reached else "never")
        spread = quantiles(run.cvs, n=20, method="inclusive") if len(run.cvs) > 1 else run.cvs * 19
        cvs = (min(run.cvs), spread[9], spread[-1], max(run.cvs))
        row += [f"{run.final:.3f}", *(f"{runs[who][number].final:.3f}" for who in others)]
        row += [" / ".join(f"{cv:.3f}" for cv in cvs), *(f"{run.shares[level.value]:.2%}" for level in HealthLevel)]
        rows.append(row)
    finals = {who: [run.final for run in of_seeds] for who, of_seeds in runs.items()}
    means = (f"{who} {fmean(values):.3f} [{_shown(mean_interval(values))}]" for who, values in finals.items())
    lines = [markdown(header, rows), f"\nMean over {len(seeds)} seeds and its 95 % interval: {', '.join(means)}."]
    if others:
        lines.append(_clearly_better(finals[trained], {who: finals[who] for who in others}))
    return "\n".join(lines)


def _clearly_better(finals: Sequence[float], others: dict[str, list[float]]) -> str:
    """Clearly better: the worst seed of the trained policy has a higher return than the best seed of all others."""
    best = max(value for values in others.values() for value in values)
    verdict = "Clearly better" if min(finals) > best else "NOT clearly better"
    return (
        f"{verdict} than {' and '.join(others)}: the worst trained seed earns {min(finals):.3f}, the best seed of the "
        f"others {best:.3f}."
    )


def plot(path: Path, title: str, runs: dict[str, list[Run]]) -> None:
    """Draw means over the seeds and their 95 % intervals as PNG; below them the CV, if it varies."""
    from matplotlib.figure import Figure

    with_cv = [who for who, of_seeds in runs.items() if max((cv for run in of_seeds for cv in run.cvs), default=0) > 0]
    panels = {"mean return of 100 episodes": ("returns", list(runs))}
    if with_cv:
        panels["mean gradient CV of an update"] = ("cvs", with_cv)
    figure = Figure(figsize=(8, 3.2 * len(panels) + 0.6), dpi=100, layout="constrained")
    figure.suptitle(f"{title}: mean of {len(next(iter(runs.values())))} seeds and its 95 % interval")
    all_axes = figure.subplots(len(panels), sharex=True, squeeze=False)[:, 0]
    colors = {who: f"C{number}" for number, who in enumerate(runs)}
    for axes, (label, (name, shown)) in zip(all_axes, panels.items()):
        for who in shown:
            steps, values = runs[who][0].steps, np.array([getattr(run, name) for run in runs[who]])
            if len(steps) == 1:  # a fixed policy
                axes.axhline(values.mean(), color=colors[who], linestyle="--", label=who)
                continue
            axes.plot(steps, values.mean(0), color=colors[who], label=who)
            axes.fill_between(steps, *mean_interval(values), color=colors[who], alpha=0.2, linewidth=0)
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    all_axes[-1].set_xlabel("environment steps")
    all_axes[-1].xaxis.set_major_formatter("{x:,.0f}")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")
