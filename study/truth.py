"""When a run is in trouble: defined by its return and those of healthy runs alone."""

from collections.abc import Iterable

import numpy as np

from study.table import Run

WINDOW = 10
"""Updates over which a return is averaged, the newest last."""
QUANTILE = 0.05
AT_LEAST = 10
"""Updates that a run has to stay below the band, until its end."""


def smoothed(values: np.ndarray, window: int = WINDOW) -> np.ndarray:
    """Mean of the last `window` values along the first axis, of fewer at the beginning; NaN is left out."""
    seen = ~np.isnan(values)
    sums, counts = np.cumsum(np.where(seen, values, 0), axis=0), np.cumsum(seen, axis=0)
    sums[window:], counts[window:] = sums[window:] - sums[:-window], counts[window:] - counts[:-window]
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


def band(healthy: Iterable[Run]) -> np.ndarray:
    """[updates] lower edge of the band: the 5 % quantile of the smoothed returns of healthy runs of one task."""
    return np.quantile([smoothed(run.column("episode_return")) for run in healthy], QUANTILE, axis=0)


def trouble(run: Run, lower_edge: np.ndarray) -> int | None:
    """The update from which the smoothed return is below the band until the end; None if it never is.

    It is below for at least `AT_LEAST` updates, and not before the fault.
    """
    below = smoothed(run.column("episode_return")) < lower_edge
    inside = np.flatnonzero(~below)
    first = max(int(inside[-1]) + 2 if len(inside) else 1, run.onset)
    return first if first <= len(below) - AT_LEAST + 1 else None
