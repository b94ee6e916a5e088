"""The formula, its levels and its ceiling."""

import math
import random
import statistics
import subprocess
import sys
from fractions import Fraction

import pytest

import exporter
from exporter import HealthLevel, Thresholds, cv_text, gradient_cv, gradient_cv_ceiling, unreachable_critical_warning


def exact_cv(norms: list[float]) -> float:
    """Rational arithmetic up to the last square root."""
    exact = [Fraction(norm) for norm in norms]
    mean = sum(exact) / len(exact)
    variance = sum((norm - mean) ** 2 for norm in exact) / (len(exact) - 1)
    return math.sqrt(variance / max(abs(mean), Fraction(1e-8)) ** 2)


def test_agrees_with_exact_arithmetic_over_24_orders_of_magnitude():
    rng = random.Random(0)
    for _ in range(2000):
        low, high = sorted((rng.uniform(-12, 12), rng.uniform(-12, 12)))
        norms = [10 ** rng.uniform(low, high) for _ in range(rng.randint(2, 64))]
        assert gradient_cv(norms) == pytest.approx(exact_cv(norms), rel=1e-9)


def test_agrees_with_the_textbook_formula():
    norms = [0.3, 0.7, 1.1, 0.2, 0.9, 0.4, 0.6]
    assert gradient_cv(norms) == pytest.approx(statistics.stdev(norms) / statistics.mean(norms), rel=1e-12)


@pytest.mark.parametrize("norms", [[], [3.0], [0.0, 0.0], [0.0] * 7])
def test_is_zero_with_nothing_to_compare(norms):
    assert gradient_cv(norms) == 0.0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("others", [[], [1.0], [0.0, 0.0], [1.0] * 6])
def test_a_nonfinite_norm_is_critical_whatever_stands_beside_it(bad, others):
    for norms in ([bad, *others], [*others, bad]):
        assert gradient_cv(norms) == math.inf
        assert Thresholds().level(gradient_cv(norms)) is HealthLevel.CRITICAL


def test_the_mean_is_floored():
    assert gradient_cv([0.0, 1e-12]) == pytest.approx(statistics.stdev([0.0, 1e-12]) / 1e-8, rel=1e-9)


@pytest.mark.parametrize("scale", [1e-300, 1e-160, 1e160, 1e300])
def test_squares_neither_overflow_nor_underflow(scale):
    expected = gradient_cv([1.0, 2.0, 3.0]) * min(1.0, 2.0 * scale / 1e-8)
    assert gradient_cv([scale, 2 * scale, 3 * scale]) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("cv", "level"),
    [
        (0.0, HealthLevel.HEALTHY),
        (math.nextafter(0.5, 0), HealthLevel.HEALTHY),
        (0.5, HealthLevel.WARNING),
        (math.nextafter(2.0, 0), HealthLevel.WARNING),
        (2.0, HealthLevel.CRITICAL),
        (math.inf, HealthLevel.CRITICAL),
        (math.nan, HealthLevel.CRITICAL),
    ],
)
def test_levels_are_half_open_and_exact(cv, level):
    assert Thresholds().level(cv) is level


def test_the_operator_reads_three_decimals_and_a_word():
    assert [cv_text(cv) for cv in (0.3124, 0.5, 2.0, math.inf)] == [
        "CV:0.312 stable",
        "CV:0.500 warn",
        "CV:2.000 BAD",
        "CV:inf BAD",
    ]
    assert [level.color for level in HealthLevel] == ["green", "yellow", "red"]


@pytest.mark.parametrize("heads", range(2, 12))
def test_one_head_that_carries_everything_reaches_the_ceiling(heads):
    assert gradient_cv([1.0] + [0.0] * (heads - 1)) == pytest.approx(gradient_cv_ceiling(heads))


def test_five_dead_heads_of_seven_stay_below_critical():
    assert gradient_cv([1.0, 1.0] + [0.0] * 5) == pytest.approx(1.708, abs=1e-3)


def test_says_when_critical_cannot_be_reached():
    assert unreachable_critical_warning(3) == ("3 heads: CV cannot exceed 1.732; critical at 2.0 can never be reached")
    assert "only when 3 of them have a gradient of exactly zero" in unreachable_critical_warning(4)
    assert "stays 0.000" in unreachable_critical_warning(1)
    assert unreachable_critical_warning(5) is None
    assert unreachable_critical_warning(3, Thresholds(critical=1.5)) is None
    assert "critical at 0.8 can never be reached" in unreachable_critical_warning(1, Thresholds(critical=0.8))
    assert "warning at 1.8 and critical at 2.0 can never be" in unreachable_critical_warning(3, Thresholds(warning=1.8))
    assert "critical at 2.7 can never be reached" in unreachable_critical_warning(7, Thresholds(critical=2.7))


@pytest.mark.parametrize("name", exporter.__all__)
def test_every_public_name_is_there(name):
    assert getattr(exporter, name) is not None


def test_reading_and_serving_does_not_take_torch():
    probe = (
        "import sys; from exporter import gradient_cv, HealthLevel, MetricsServer, RunAggregator, emit_ppo_update;"
        "import exporter.__main__; gradient_cv([1, 2]); assert not {'torch', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", probe], check=True)
