"""How well each signal tells a run with a fault from a healthy one: areas under the ROC curve.

An update's signals are averaged over the last ten. Numbers of a task are compared with the task's own healthy runs, at
any update; so an area says what a threshold that a site has calibrated for its task can reach.
"""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from study.table import Run
from study.truth import smoothed


def _of_heads(name: str, reduce: Callable) -> Callable[[Run], np.ndarray]:
    return lambda run: reduce(run.column(name), axis=1)


def _head_part(run: Run) -> np.ndarray:
    """Norm of all heads together in the global norm."""
    heads = np.sqrt(np.square(run.column("head_gradient_norms")).sum(1))
    return heads / run.column("gradient_norm")


SIGNALS: dict[str, Callable[[Run], np.ndarray]] = {
    "gradient CV": lambda run: run.column("gradient_cv"),
    "CV / sqrt(heads)": lambda run: run.column("gradient_cv") / np.sqrt(run.rows[0].heads),
    "smallest share": lambda run: run.column("smallest_share") * run.rows[0].heads,
    "global norm": lambda run: run.column("gradient_norm"),
    "heads' part of the norm": _head_part,
    "approx KL": lambda run: run.column("approx_kl"),
    "clip fraction": lambda run: run.column("clip_fraction"),
    "entropy": lambda run: run.column("entropy"),
    "explained variance": lambda run: run.column("explained_variance"),
    "lowest head entropy": _of_heads("head_entropy_ratios", np.min),
    "highest head entropy": _of_heads("head_entropy_ratios", np.max),
    "lowest head KL": _of_heads("head_approx_kls", np.min),
    "highest head KL": _of_heads("head_approx_kls", np.max),
    "lowest update ratio": _of_heads("head_update_ratios", np.min),
    "highest update ratio": _of_heads("head_update_ratios", np.max),
}
"""By name: one number an update."""
DIRECTIONS = ("high", "low", "either")


def auc(positives: np.ndarray, negatives: np.ndarray) -> float:
    """Probability that a positive is above a negative, ties counting half: the rank sum of Mann and Whitney (1947)."""
    if not len(positives) or not len(negatives):
        return float("nan")
    below = np.sort(negatives)
    ranks = np.searchsorted(below, positives, "left") + np.searchsorted(below, positives, "right")
    return float(ranks.mean() / 2 / len(negatives))


def series(run: Run) -> dict[str, np.ndarray]:
    """[updates] of each signal, averaged over ten updates; what is not finite stays so."""
    with np.errstate(all="ignore"):
        return {name: smoothed(np.asarray(of(run), float)) for name, of in SIGNALS.items()}


class Ranks:
    """Where a value stands among those of healthy runs of its task, 0 to 1, by signal."""

    def __init__(self, healthy: Iterable[Run]) -> None:
        runs = [series(run) for run in healthy]
        self._sorted = {name: np.sort(np.concatenate([run[name] for run in runs])) for name in SIGNALS}

    def scores(self, run: Run) -> dict[tuple[str, str], np.ndarray]:
        """[updates] how unusual each signal is in each of `DIRECTIONS`; a value that is not finite is so entirely."""
        scores = {}
        for name, values in series(run).items():
            known = self._sorted[name]
            rank = (np.searchsorted(known, values, "left") + np.searchsorted(known, values, "right")) / 2 / len(known)
            # Beyond all healthy values, further is still more unusual.
            spread = np.subtract(*np.quantile(known, (0.75, 0.25))) + 1e-12
            rank = rank + np.clip((values - known[-1]) / spread, 0, 1e6) - np.clip((known[0] - values) / spread, 0, 1e6)
            broken = ~np.isfinite(values)
            for direction, score in zip(DIRECTIONS, (rank, 1 - rank, 2 * np.abs(rank - 0.5))):
                scores[name, direction] = np.where(broken, 1e9, score)
        return scores


Scored = list[tuple[dict[tuple[str, str], np.ndarray], slice]]
"""Scores of runs, and which of their updates count."""


def areas(faulty: Scored, healthy: Scored, keys: Sequence[tuple[str, str]]) -> dict[tuple[str, str], float]:
    def gather(runs: Scored, key: tuple[str, str]) -> np.ndarray:
        return np.concatenate([scores[key][span] for scores, span in runs]) if runs else np.empty(0)

    return {key: auc(gather(faulty, key), gather(healthy, key)) for key in keys}


def best_directions(tuned: Mapping[tuple[str, str], float]) -> dict[str, tuple[str, str]]:
    """For each signal the direction with the largest area."""
    return {name: max(((name, direction) for direction in DIRECTIONS), key=lambda key: tuned[key]) for name in SIGNALS}


def pairs(runs: Scored, of: Mapping[str, tuple[str, str]]) -> Scored:
    """The same with the larger of two scores, for every two signals."""
    return [
        ({(a, b): np.maximum(scores[of[a]], scores[of[b]]) for a, b in itertools.combinations(of, 2)}, span)
        for scores, span in runs
    ]
