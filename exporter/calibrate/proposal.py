"""Thresholds that healthy runs seldom reach, from such runs."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from exporter.calibrate.sources import HealthyRun
from exporter.gradient_cv import gradient_cv_ceiling
from exporter.health import Thresholds

DEFAULT_RATE = 0.01
CRITICAL_PART = 0.1
"""Of the updates that may reach the warning threshold, the fraction that may reach the critical one."""
LEAST_RUNS = 2
STEP_SHARE = 0.05
"""The fraction of single gradient steps that may reach the critical threshold: half of the limit of
PPOCriticalGradientSteps, because some windows have more of them than others."""
_DECIMALS = 1000


class NoThresholds(Exception):
    """The runs give no thresholds; the message says why, and what to do."""


@dataclass(frozen=True)
class Proposal:
    """Thresholds, and how often healthy updates reach them.

    Attributes:
        worst: for the warning and for the critical threshold: the largest share (0 to 1) of a run's updates that reach
            the threshold given by the other runs, and the name of that run.
        steps: largest possible share (0 to 1) of single gradient steps at or above the critical threshold; None if the
            runs have no single steps.
    """

    thresholds: Thresholds
    worst: tuple[tuple[float, str], tuple[float, str]]
    steps: float | None


def heads_of(runs: Sequence[HealthyRun], heads: int | None = None) -> tuple[list[HealthyRun], int]:
    """The runs with `heads` heads or an unknown number, and the number; if `heads` is None, the number of all runs.

    Raises:
        NoThresholds: the number is not known, not the same in all runs, or too small.
    """
    counts = sorted({run.heads for run in runs if run.heads is not None})
    if heads is None:
        if not counts:
            raise NoThresholds("the source does not say how many heads the runs have: give --heads N")
        if len(counts) > 1:
            groups = (f"{n}: {_listed([run.name for run in runs if run.heads == n])}" for n in counts)
            raise NoThresholds(
                f"the runs differ in their number of heads, and with it in their thresholds: choose with --heads N "
                f"({'; '.join(groups)})"
            )
        heads = counts[0]
    elif not (runs := [run for run in runs if run.heads in (None, heads)]):
        raise NoThresholds(f"no run has {heads} heads, but {', '.join(map(str, counts))}")
    if heads < 2:
        raise NoThresholds(f"the CV needs two heads and is 0 with {heads}: there is nothing to calibrate")
    return list(runs), heads


def propose(runs: Sequence[HealthyRun], heads: int, rate: float = DEFAULT_RATE) -> Proposal:
    """The lowest thresholds that healthy updates and gradient steps reach no more often than they may.

    Another update of the same kind exceeds the k-th largest CV of n updates with a probability of k/(n + 1). Updates of
    one run resemble each other more than those of another run: `Proposal.worst` shows how much. Single steps spread
    wider than an update's CV, which is their mean, and have their own alert: see `STEP_SHARE`.

    Args:
        rate: share of updates, 0 to 1, that may reach the warning threshold; a tenth of it may reach the critical one.

    Raises:
        NoThresholds: there are too few runs or updates, or healthy updates reach the ceiling.
    """
    runs = [run for run in runs if run.cvs]
    updates = sum(len(run.cvs) for run in runs)
    needed = math.ceil(round(1 / (rate * CRITICAL_PART), 6))
    lacking = []
    if len(runs) < LEAST_RUNS:
        lacking.append(f"{LEAST_RUNS} runs are needed, {LEAST_RUNS - len(runs)} more")
    if updates < needed:
        enough = math.ceil(1e4 / (CRITICAL_PART * updates)) / 1e4 if updates else 1.0
        instead = f", or --false-alarm-rate {enough:g} with these" if enough <= 0.1 else ""
        lacking.append(
            f"a false alarm rate of {rate:g} needs {needed} updates of healthy runs, {needed - updates} more{instead}"
        )
    if lacking:
        have = f"{updates} update{'s' * (updates != 1)} of {len(runs)} run{'s' * (len(runs) != 1)}"
        raise NoThresholds(f"too little data, {have}: {'; '.join(lacking)}")
    thresholds, ceiling = _thresholds(runs, rate), gradient_cv_ceiling(heads)
    if thresholds.critical >= ceiling:
        raise NoThresholds(
            f"the critical threshold of these runs would be {thresholds.critical:.3f}, and {heads} heads reach a CV of "
            f"{ceiling:.3f} at most: the CV does not tell healthy runs of this kind from others. Watch the shares and "
            "norms of heads, or allow a higher --false-alarm-rate"
        )
    judged = []
    for run in runs:
        by_others = _thresholds([other for other in runs if other is not run], rate)
        judged.append([(share(run.cvs, threshold), run.name) for threshold in vars(by_others).values()])
    worst = tuple(max(each) for each in zip(*judged, strict=True))
    return Proposal(thresholds, worst, _reaching(thresholds.critical, runs))


def share(cvs: Sequence[float], threshold: float) -> float:
    """Share of `cvs`, 0 to 1, at or above the threshold."""
    return sum(cv >= threshold for cv in cvs) / len(cvs)


def _thresholds(runs: Sequence[HealthyRun], rate: float) -> Thresholds:
    largest_first = sorted((cv for run in runs for cv in run.cvs), reverse=True)

    def above(part: float) -> float:
        """A threshold with three decimals, just above the largest CV that must stay below it."""
        reached = max(0, math.floor(part * (len(largest_first) + 1) + 1e-9) - 1)
        return math.floor(round(largest_first[reached] * _DECIMALS, 6) + 1) / _DECIMALS

    warning, critical = above(rate), above(rate * CRITICAL_PART)
    above_bound = _steps_above(runs)
    for_steps = min((bound for bound in above_bound if above_bound[bound] <= STEP_SHARE), default=0.0)
    return Thresholds(warning, max(critical, for_steps, warning + 1 / _DECIMALS))


def _steps_above(runs: Sequence[HealthyRun]) -> dict[float, float]:
    """Finite bound of a CV -> share of the known single gradient steps above it."""
    below: Counter[float] = Counter()
    for run in runs:
        below.update(run.steps)
    total = below.pop(math.inf, 0.0)
    return {bound: 1 - count / total for bound, count in below.items()} if total else {}


def _reaching(threshold: float, runs: Sequence[HealthyRun]) -> float | None:
    """An upper bound of the share of single gradient steps; None if the runs have none."""
    return min((part for bound, part in _steps_above(runs).items() if bound <= threshold), default=None)


def _listed(names: Sequence[str], most: int = 5) -> str:
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")
