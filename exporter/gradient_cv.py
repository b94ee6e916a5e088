"""The formula: coefficient of variation of the action heads' gradient norms."""

import math
from collections.abc import Iterable

from exporter.health import Thresholds

MEAN_FLOOR = 1e-8


def gradient_cv(norms: Iterable[float]) -> float:
    """Coefficient of variation of `norms`: sample standard deviation over |mean|.

    Args:
        norms: one L2 gradient norm (>= 0, any unit) per action head that has a
            gradient; a head whose gradient is zero contributes 0.0.

    Returns:
        `stdev(norms) / max(|mean(norms)|, 1e-8)` with n - 1 degrees of freedom,
        dimensionless, between 0 and sqrt(n). 0.0 for fewer than two norms or
        when all are zero. +Inf if any norm is NaN or infinite, so that
        every `cv >= threshold` is true.
    """
    values = list(map(float, norms))
    if not all(map(math.isfinite, values)):
        return math.inf
    count = len(values)
    if count < 2:
        return 0.0
    if (largest := max(values)) > 1e300:  # avoid an overflow of the sum
        values = [value / largest for value in values]
    mean = math.fsum(values) / count
    # dist() avoids overflow and underflow of its squares.
    return math.dist(values, [mean] * count) / (math.sqrt(count - 1) * max(abs(mean), MEAN_FLOOR))


def gradient_cv_ceiling(heads: int) -> float:
    """Upper bound of the CV of `heads` contributing heads: sqrt(heads).

    It is reached when one head has the whole gradient and the others are
    exactly zero. (By definition the CV of fewer than two heads is 0.0.)

    Raises:
        ValueError: `heads` is negative.
    """
    return math.sqrt(heads)


def unreachable_critical_warning(heads: int, thresholds: Thresholds = Thresholds()) -> str | None:
    """Why the CV of `heads` heads cannot rise above the critical threshold, or not even reach the warning threshold;
    None if it can rise above both."""
    ceiling = gradient_cv_ceiling(heads)
    critical = f"critical at {thresholds.critical}"
    if heads < 2:
        return f"{heads} head{'s' * (heads != 1)}: CV needs two heads and stays 0.000; {critical} can never be reached"
    if ceiling > thresholds.critical:
        return None
    if ceiling == thresholds.critical:
        return (
            f"{heads} heads: CV cannot exceed {ceiling:.3f}; {critical} is reached only when "
            f"{heads - 1} of them have a gradient of exactly zero"
        )
    if ceiling < thresholds.warning:
        critical = f"warning at {thresholds.warning} and {critical}"
    return f"{heads} heads: CV cannot exceed {ceiling:.3f}; {critical} can never be reached"
