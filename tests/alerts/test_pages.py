"""Who gets which notification from real servers: pages that were missed, came in storms, or silenced each other.

One Prometheus watches all runs at the same time, with rules thirty times as fast; see site_in_a_hurry.py.
"""

import time
from collections import Counter

import pytest
from conftest import wait_until
from site_in_a_hurry import SEVEN, Run, start_site  # noqa: F401, the fixture

from exporter import Thresholds

CROWD = 100
GRID = tuple(f"x{x}y{y}-{head}" for x in range(16) for y in range(16) for head in SEVEN)


def healthy(run: Run, scrape: int) -> None:
    run.update(0.2)


def critical(run: Run, scrape: int) -> None:
    run.update(2.5, head_gradient_norms={**dict.fromkeys(SEVEN, 0.01), "op": 1.0})


def dips(run: Run, scrape: int) -> None:
    """90 % of the steps are critical, but no minute is without an update at 1.9."""
    for _ in range(9):
        run.update(2.5)
    run.update(1.9 if scrape % 2 else 2.5)


def one_nan_in_a_thousand(run: Run, scrape: int) -> None:
    """Three minutes an update."""
    if scrape % 6 == 1:
        cvs = (0.2,) * 999 + (float("inf"),)
        run.update(float("inf"), gradient_cv_per_step=cvs, nonfinite_gradient_steps={"op": 1})


def poisoned(run: Run, scrape: int) -> None:
    nan = dict.fromkeys(SEVEN, float("nan"))
    run.update(float("inf"), head_gradient_norms=nan, nonfinite_gradient_steps=dict.fromkeys(SEVEN, 10))


def starved(run: Run, scrape: int) -> None:
    run.update(0.45, head_gradient_norms={**dict.fromkeys(SEVEN, 1.0), "op": 0.01})


def dead(run: Run, scrape: int) -> None:
    run.update(0.41, head_gradient_norms={**dict.fromkeys(SEVEN, 1.0), "slot": 0.0})


def grid_with_dead_heads(run: Run, scrape: int) -> None:
    if scrape % 3 == 1:  # so many heads take their time
        run.update(0.3, head_gradient_norms={head: 0.0 if head.endswith("op") else 1.0 for head in GRID})


def vanishing(run: Run, scrape: int) -> None:
    run.update(0.2, head_gradient_norms=dict.fromkeys(SEVEN, 1e-11 if scrape > 20 else 1.0))


def crash_loop(run: Run, scrape: int) -> bool:
    """Up for half a minute, down for two and a half."""
    if up := scrape % 6 == 1:
        run.update()
    return not up


def six_minutes_an_update(run: Run, scrape: int) -> None:
    if scrape % 12 == 1:
        run.update(timestamp_seconds=1e9 + 30.0 * scrape)


def clock_is_ahead(run: Run, scrape: int) -> None:
    run.update(timestamp_seconds=time.time() + 300 + 0.001 * scrape)


def clock_is_ahead_and_stands_still(run: Run, scrape: int) -> None:
    if scrape < 4:
        run.update(timestamp_seconds=time.time() + 86400)


def fails_inside(run: Run, scrape: int) -> None:
    run.update()
    if scrape == 8:
        run.aggregator.count_error(run.name)


def starts_anew(run: Run, scrape: int) -> bool:
    """Critical, down for half a minute, without an update for 15 minutes, then critical again."""
    if scrape == 9:
        run.start()
    elif scrape < 9 or scrape > 39:
        critical(run, scrape)
    return scrape == 9


def crowd(run: Run, scrape: int) -> bool:
    return scrape > 6


def told(site) -> Counter:
    """How many alerts were notified as firing, by run, instance where runs share a name, alert and severity."""
    return Counter(
        (labels.get("run", ""), labels.get("instance", ""), labels["alertname"], labels["severity"])
        for alert in site.notified("firing")
        for labels in [alert["labels"]]
    )


@pytest.mark.parametrize("servers", ["at hand", pytest.param("newest", marks=pytest.mark.soak)], indirect=True)
def test_people_are_told_what_happens_once_and_nothing_else(start_site):  # noqa: F811
    three = {"heads": ("a", "b", "c"), "register": {"thresholds": Thresholds(0.5, 1.5)}}
    runs = [
        Run("well", healthy),
        Run("dips", dips),
        Run("shared", critical, "anna:1"),
        Run("shared", starved, "bert:1"),
        Run("one-nan", one_nan_in_a_thousand),
        Run("poisoned", poisoned),
        Run("dead", dead),
        Run("vanishing", vanishing),
        Run("loop", crash_loop),
        Run("slow", six_minutes_an_update),
        Run("ahead", clock_is_ahead),
        Run("ahead-stands", clock_is_ahead_and_stands_still),
        Run("three-heads", healthy, **{**three, "register": {}}),
        Run("three-heads-own", lambda run, scrape: run.update(1.6), **three),
        Run("errors", fails_inside),
        Run("anew", starts_anew),
        *(Run(f"grid-{number}", grid_with_dead_heads, heads=GRID) for number in range(2)),
        *(Run(f"crowd-{number}", crowd) for number in range(CROWD)),
    ]
    site = start_site(runs)
    (site.targets / "broken.json").write_text("[{")
    pages = {
        ("dips", "dips:9842", "PPOGradientCVHigh", "critical"),
        ("shared", "anna:1", "PPOGradientCVHigh", "critical"),
        ("three-heads-own", "three-heads-own:9842", "PPOGradientCVHigh", "critical"),
        ("anew", "anew:9842", "PPOGradientCVHigh", "critical"),
        ("poisoned", "poisoned:9842", "PPONonFiniteGradients", "critical"),
        ("loop", "loop:9842", "PPOTrainerDown", "critical"),
        *((f"crowd-{number}", f"crowd-{number}:9842", "PPOTrainerDown", "critical") for number in range(CROWD)),
    }
    warnings = {
        ("shared", "bert:1", "PPOHeadStarved", "warning"),
        ("one-nan", "one-nan:9842", "PPONonFiniteGradients", "warning"),
        ("dead", "dead:9842", "PPOHeadDead", "warning"),
        *((f"grid-{number}", f"grid-{number}:9842", "PPOHeadDead", "warning") for number in range(2)),
        ("vanishing", "vanishing:9842", "PPOGradientsVanishing", "warning"),
        ("ahead-stands", "ahead-stands:9842", "PPOTrainingStalled", "warning"),
        ("errors", "errors:9842", "PPOMeasurementFailing", "warning"),
        ("", f"127.0.0.1:{site.ports.prometheus}", "PPOTargetsLost", "warning"),
    }
    deadline = time.monotonic() + 90
    while (missing := (pages | warnings) - told(site).keys()) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert not missing
    # A warning that comes before its critical alert may be told.
    early = {("poisoned", "poisoned:9842", "PPONonFiniteGradients", "warning")}
    assert told(site).keys() - early == pages | warnings
    # What a run says before its first update ends no alert.
    (anew,) = (run for run in runs if run.name == "anew")
    wait_until(lambda: anew.scrapes > 45, "the run has updates again", 60)
    assert not site.notified("resolved", run="anew")

    # Trainers that go down together come together, but for those that a busy machine scrapes late.
    down = [n for n in site.notifications() if n["groupLabels"]["alertname"] == "PPOTrainerDown"]
    assert len(down) <= 5 and len(down[-1]["alerts"]) >= CROWD
    printed = site.processes["receiver"].log.read_text()
    assert f"... {len(down[-1]['alerts'])} alerts in this notification" in printed

    said = {
        (alert["labels"].get("run"), alert["labels"]["alertname"]): alert["annotations"]["description"]
        for alert in site.notified("firing")
    }
    # A critical alert holds the warning of its run back.
    (held_back,) = (a for a in site.alerts() if a["labels"].get("run") == "poisoned" and a["status"]["inhibitedBy"])
    assert held_back["annotations"]["description"].startswith("All heads of run poisoned")
    assert said["one-nan", "PPONonFiniteGradients"].startswith("1 head (op) of run one-nan")
    assert said["dead", "PPOHeadDead"].startswith("1 head (slot) of run dead")
    assert "Head op has" in said["shared", "PPOGradientCVHigh"]
    of_grid = said["grid-0", "PPOHeadDead"]
    assert of_grid.startswith("256 heads (") and " and others) of run grid-0" in of_grid and len(of_grid) < 400

    for path in site.targets.glob("*.json"):
        path.unlink()
    lost = {"alertname": "PPOTargetsLost", "job": "ppo"}
    (alert,) = wait_until(lambda: site.notified("firing", **lost), "all targets are lost")
    assert alert["annotations"]["summary"] == "Prometheus has lost all trainers of job ppo"
