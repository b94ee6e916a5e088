"""The run dashboard: is it healthy, since when, and which head is it?

It reads raw metrics, so that it works without the recording rules; only alerts need rules.
"""

import math

from exporter import metrics
from exporter.health import HealthLevel
from exporter.metrics import RUN_LABEL
from mixin.config import CRITICAL, WARNING, MixinConfig
from mixin.dashboards.panels import (
    FLEET_DASHBOARD_UID,
    HEAD_LEGEND,
    LEVEL_MEANINGS,
    MATCHERS,
    NEUTRAL,
    RUN_DASHBOARD_UID,
    RUN_LEGEND,
    Board,
    Query,
    Shape,
    bars_panel,
    by_run,
    colored_by_head,
    colored_by_level,
    cv_thresholds,
    filled,
    heatmap_panel,
    increase,
    level_thresholds,
    level_timeline,
    log_scale,
    named_stat,
    override,
    rate,
    series_panel,
    stat_panel,
    table_panel,
    threshold_lines,
    thresholds,
    words,
)
from mixin.promql import IDENTITY, gradient_cv, level_index, select, steps_of_level

CV_PANEL_ID = 10
"""Alerts link to this panel."""


def run_dashboard(config: MixinConfig) -> dict:
    board = Board(
        "PPO gradient health",
        RUN_DASHBOARD_UID,
        "Is the run healthy, since when, and which head is it?",
        config,
        refresh="10s",
    )
    board.link("All runs", f"/d/{FLEET_DASHBOARD_UID}?var-datasource=${{datasource:percentencode}}")
    for severity, color in ((CRITICAL, HealthLevel.CRITICAL.color), (WARNING, HealthLevel.WARNING.color)):
        firing = f'ALERTS{{{MATCHERS}, alertstate="firing", severity="{severity}"}}'
        board.annotate(f"Alerts: {severity}", firing, color, "{{alertname}}", [CV_PANEL_ID])
    _first_screen(board, config)
    _steps(board)
    _signals(board)
    _throughput(board)
    _process(board)
    return board.document()


def _first_screen(board: Board, config: MixinConfig) -> None:
    """21 units high: what a browser shows of 1080 lines."""
    warning, critical = config.warning_threshold, config.critical_threshold
    cv, level = gradient_cv(MATCHERS), level_index(MATCHERS, config)
    share = select(metrics.HEAD_GRADIENT_SHARE, MATCHERS)
    board.row(1, "Is it healthy, since when, and which head is it?")

    now = stat_panel(
        "Level now",
        f"Health level of the last update's gradient CV. Good: {HealthLevel.HEALTHY.word}, below {warning}. "
        f"Bad: {HealthLevel.CRITICAL.word}, from {critical} or with a gradient that is NaN or infinite.",
        "none",
        0,
    )
    now.mappings(words(LEVEL_MEANINGS)).thresholds(level_thresholds(1, 2))
    board.add(2, (0, 0, 4, 4), filled(now), by_run(level, Shape.NOW))

    value = stat_panel(
        "Gradient CV now",
        "Spread of the heads' gradient norms in the last update: standard deviation over mean. Good: near 0, all heads "
        f"learn alike. Bad: from {critical}, one head takes most of the gradient.",
        "none",
        3,
    )
    board.add(3, (4, 0, 3, 4), value.thresholds(cv_thresholds(config)), by_run(cv, Shape.NOW))

    ceiling = stat_panel(
        "CV ceiling",
        "The largest CV that the contributing heads can reach: one has the whole gradient. A CV near it is as bad as "
        f"it gets. Good: well above {critical}. Bad: at or below it, in yellow: the run hardly ever becomes critical, "
        "however starved its heads are.",
        "none",
        3,
    )
    # As PPOCriticalThresholdUnreachable has it: a ceiling equal to the threshold is too low.
    ceiling.thresholds(thresholds((None, HealthLevel.WARNING.color), (math.nextafter(critical, math.inf), NEUTRAL)))
    board.add(4, (7, 0, 3, 4), ceiling, by_run(select(metrics.GRADIENT_CV_CEILING, MATCHERS), Shape.NOW))

    since = stat_panel(
        "At this level for",
        "Time since the level last changed, to the resolution of the chosen time range; the whole range, or the run's "
        "time within it, where it never changed. Good: long at a healthy level. Bad: long at any other.",
        "s",
        1,
    )
    board.add(5, (10, 0, 4, 4), since.max_data_points(1000), by_run(_time_at_level(level), Shape.NOW))

    for panel_id, x, title, aggregation, judgement in (
        (6, 14, "Dominating head", "topk", "largest share of the gradient norms in the last update. Good: near an "
         "equal part. Bad: near 100 %, the others learn nothing."),
        (7, 19, "Most starved head", "bottomk", "smallest share of the gradient norms in the last update. Good: near "
         "an equal part. Bad: near 0 %, it does not learn."),
    ):  # fmt: skip
        head = named_stat(title, f"The head with the {judgement}", "percentunit", 1)
        query = Query(f"{aggregation} by ({IDENTITY}) (1, {share})", HEAD_LEGEND, Shape.NOW)
        board.add(panel_id, (x, 0, 5, 4), head, query)

    chart = series_panel(
        "Gradient CV",
        f"Gradient CV of each update, in the colour of its level, with the thresholds as lines: warning at {warning}, "
        f"critical at {critical}. Good: below both. The dashed ceiling is what the heads can reach. A CV of +Inf, "
        "after a NaN or infinite gradient, has no place on the axis: see the level over time.",
        "none",
        3,
    )
    chart.axis_soft_min(0).axis_soft_max(critical).override_by_regexp(
        "/^ceiling/",
        override(color={"mode": "fixed", "fixedColor": NEUTRAL}, custom__lineStyle={"fill": "dash", "dash": [10, 10]}),
    )
    board.add(
        CV_PANEL_ID,
        (0, 4, 14, 9),
        threshold_lines(chart, cv_thresholds(config)),
        by_run(cv),
        Query(select(metrics.GRADIENT_CV_CEILING, MATCHERS), f"ceiling · {RUN_LEGEND}"),
    )

    timeline = level_timeline(
        "Level over time",
        f"When the run was {', '.join(level.word for level in HealthLevel)}. Good: {HealthLevel.HEALTHY.color} "
        f"throughout. Bad: {HealthLevel.CRITICAL.color}; gaps are times without a scrape.",
    )
    board.add(11, (14, 4, 10, 4), timeline, by_run(level))

    times = bars_panel(
        "Time in each level",
        "How long the chosen runs were at each level within the time range, added up over runs. Good: all of it "
        f"{HealthLevel.HEALTHY}.",
        "s",
        1,
    )
    board.add(
        12,
        (14, 8, 4, 5),
        colored_by_level(times).max_data_points(1000),
        *(
            Query(
                f"sum(sum_over_time((({level}) == bool {index})[$__range:$__interval])) * $__interval_ms / 1000",
                str(of),
                Shape.NOW,
            )
            for index, of in enumerate(HealthLevel)
        ),
    )

    firing = table_panel(
        "Firing alerts",
        "Alerts of the chosen runs that fire now in Prometheus. Good: none. Bad: any critical one.",
        {"alertname": "alert", "severity": "severity", RUN_LABEL: RUN_LABEL},
        excluded=("Time", "Value"),
        sort_by=[("severity", False)],
        no_value="none firing",
    )
    colors = {CRITICAL: HealthLevel.CRITICAL.color, WARNING: HealthLevel.WARNING.color}
    firing.override_by_name(
        "severity",
        override(
            custom__cellOptions={"type": "color-text"},
            mappings=[{"type": "value", "options": {key: {"color": color} for key, color in colors.items()}}],
        ),
    )
    alerts = f'max by (alertname, severity, {RUN_LABEL}) (ALERTS{{{MATCHERS}, alertstate="firing"}})'
    board.add(13, (18, 8, 6, 5), firing, Query(alerts, shape=Shape.TABLE))

    levels = series_panel(
        "Share of gradient steps by level",
        "Every gradient step counts by its own CV, so spikes are seen that the mean of an update hides. Good: all "
        f"{HealthLevel.HEALTHY.color}. Bad: a growing band of {HealthLevel.CRITICAL.color}.",
        "percentunit",
        1,
        stacked=True,
    )
    board.add(
        14,
        (0, 13, 8, 7),
        colored_by_level(levels.min(0).max(1)),
        *(
            Query(
                f"sum({steps_of_level(of, MATCHERS, '$__rate_interval', config)})"
                f" / sum({increase(metrics.GRADIENT_STEPS)})",
                str(of),
            )
            for of in HealthLevel
        ),
    )

    norms = series_panel(
        "Gradient norm per head",
        "Mean L2 norm of each head's gradient in the last update, before clipping. Norms of heads that differ in depth "
        "or size are not comparable as such. Good: lines keep their distance. Bad: they drift apart, or one ends: a "
        "norm of zero has no place on the logarithmic axis.",
        "short",
        3,
    )
    norm = select(metrics.HEAD_GRADIENT_NORM, MATCHERS)
    board.add(15, (8, 13, 8, 7), colored_by_head(log_scale(norms)), Query(norm, HEAD_LEGEND))

    shares = series_panel(
        "Share of the gradient per head",
        "Each head's part of the sum of norms. Good: near equal bands. Bad: one band swallows the others, or one "
        "vanishes.",
        "percentunit",
        1,
        stacked=True,
    )
    board.add(16, (16, 13, 8, 7), colored_by_head(shares.min(0)), Query(share, HEAD_LEGEND))


def _time_at_level(level: str) -> str:
    """Seconds since the level was last another one than at the end of the range, for runs that are there now.

    A run that never changed counts from when it is first seen in the range.
    """
    at_the_end = f"last_over_time(({level})[$__interval:$__interval] @ end())"
    another = f"max_over_time(timestamp(({level}) != {at_the_end})[$__range:$__interval])"
    first = f"min_over_time(timestamp({level})[$__range:$__interval])"
    return f"time() - ({another} or {first}) and ({level})"


def _steps(board: Board) -> None:
    board.row(20, "Every gradient step")
    heatmap = heatmap_panel(
        "CV per gradient step",
        "How many gradient steps had a CV in each bucket; the topmost one holds everything beyond. Non-finite steps "
        "are in none. Good: a dark band at the bottom. Bad: a second band high above it, which means spikes.",
        "short",
        0,
        axis_decimals=3,
    )
    buckets = increase(metrics.GRADIENT_CV_PER_STEP, "_bucket")
    board.add(21, (0, 0, 12, 8), heatmap, Query(f"sum by (le) ({buckets})", "{{le}}", Shape.BUCKETS))

    nonfinite = series_panel(
        "Non-finite and skipped gradient steps",
        "Gradient steps in which a head's gradient was NaN or infinite, and steps that were skipped for any such "
        "gradient. Good: zero throughout. Bad: anything else.",
        "short",
        0,
        no_value="no gradient step yet",
    )
    board.add(
        22,
        (12, 0, 6, 8),
        colored_by_head(nonfinite),
        Query(increase(metrics.NONFINITE_GRADIENTS), HEAD_LEGEND),
        Query(increase(metrics.SKIPPED_GRADIENT_STEPS), f"skipped · {RUN_LEGEND}"),
    )

    norm = series_panel(
        "Global gradient norm",
        f"{metrics.GRADIENT_NORM.documentation} Good: of steady size. Bad: growing without end, or near zero.",
        "short",
        3,
    )
    board.add(23, (18, 0, 6, 8), log_scale(norm), by_run(select(metrics.GRADIENT_NORM, MATCHERS)))


def _signals(board: Board) -> None:
    board.row(30, "PPO")
    signals = [
        (metrics.EPISODE_RETURN_MEAN, "Episode return", "Good: rising, or at its plateau. Bad: falling.", "short", 2),
        (metrics.EPISODE_LENGTH_MEAN, "Episode length", "Good: as the task has it. Bad: a sudden change.", "short", 0),
        (metrics.LEARNING_RATE, "Learning rate", "Good: as the schedule has it. Bad: zero before the end.", "sci", 2),
        (metrics.POLICY_LOSS, "Policy loss", "Good: small and around zero. Bad: spikes.", "short", 4),
        (metrics.VALUE_LOSS, "Value loss", "Good: falling. Bad: growing by orders of magnitude.", "short", 3),
        (metrics.ENTROPY, "Entropy", "Good: falling slowly. Bad: near zero early, the policy explores no more.",
         "short", 3),
        (metrics.APPROX_KL, "Approximate KL", "Good: about 0.003 to 0.03. Bad: spikes above.", "short", 4),
        (metrics.CLIP_FRACTION, "Clip fraction", "Good: below about 30 %. Bad: above, updates are too large.",
         "percentunit", 1),
        (metrics.EXPLAINED_VARIANCE, "Explained variance", "Good: towards 1. Bad: at or below 0.", "none", 3),
    ]  # fmt: skip
    for position, (family, title, judgement, unit, decimals) in enumerate(signals):
        panel = series_panel(title, f"{family.documentation} {judgement}", unit, decimals)
        at = (position % 3 * 8, position // 3 * 7, 8, 7)
        board.add(31 + position, at, panel, by_run(select(family, MATCHERS)))


def _throughput(board: Board) -> None:
    board.row(50, "Throughput, and where the time goes")
    throughput = series_panel(
        "Environment steps per second",
        "Throughput of the run. Good: steady. Bad: falling, or zero while it should be training.",
        "short",
        0,
    )
    board.add(51, (0, 0, 6, 7), throughput, by_run(rate(metrics.ENVIRONMENT_STEPS)))

    update, rollout = (f"avg({rate(family, '_sum')})" for family in (metrics.UPDATE_DURATION, metrics.ROLLOUT_DURATION))
    parts = series_panel(
        "Where the time goes",
        "Parts of wall time, averaged over the chosen runs: collecting rollouts, updating the policy, and the rest "
        "(evaluation, checkpoints, waiting). Good: little rest. Bad: a rest that grows. Updates that take longer than "
        "a few scrapes make the bands jump, because a duration is counted when it ends.",
        "percentunit",
        1,
        stacked=True,
    )
    board.add(
        52,
        (6, 0, 6, 7),
        parts.min(0).max(1),
        Query(rollout, "rollout"),
        Query(update, "update"),
        Query(f"clamp_min(1 - {rollout} - {update}, 0)", "rest"),
    )

    durations = series_panel(
        "Duration of rollout and update",
        "Mean wall time of one rollout and of one update over the interval. Good: steady. Bad: drifting upwards.",
        "s",
        3,
    )
    board.add(
        53,
        (12, 0, 6, 7),
        durations,
        *(
            Query(f"{rate(family, '_sum')} / {rate(family, '_count')}", f"{name} · {RUN_LEGEND}")
            for name, family in (("rollout", metrics.ROLLOUT_DURATION), ("update", metrics.UPDATE_DURATION))
        ),
    )

    age = series_panel(
        "Age of the last update",
        "Time since the last PPO update ended. Good: a low saw-tooth. Bad: growing.",
        "s",
        0,
    )
    board.add(54, (18, 0, 6, 7), age, by_run(f"time() - {select(metrics.LAST_UPDATE_TIMESTAMP, MATCHERS)}"))

    ranks = series_panel(
        "Rollout of each rank",
        "Wall time that each process of the run took for its part of the last rollout. Good: lines together. Bad: one "
        "above the others, for which all of them wait.",
        "s",
        3,
    )
    of_ranks = Query(select(metrics.RANK_ROLLOUT, MATCHERS), f"rank {{{{{metrics.RANK_LABEL}}}}} · {RUN_LEGEND}")
    board.add(55, (0, 7, 24, 6), ranks, of_ranks)


def _process(board: Board) -> None:
    board.row(60, "Process")
    memory = series_panel(
        "Memory", "Resident memory of the training process. Good: a plateau. Bad: growing without end.", "bytes", 1
    )
    board.add(61, (0, 0, 6, 7), memory, by_run(f"process_resident_memory_bytes{{{MATCHERS}}}"))

    cpu = series_panel(
        "CPU",
        "Cores that the training process keeps busy. Good: as many as it has threads. Bad: near zero while it should "
        "be training.",
        "short",
        2,
    )
    board.add(62, (6, 0, 6, 7), cpu, by_run(f"rate(process_cpu_seconds_total{{{MATCHERS}}}[$__rate_interval])"))

    up = series_panel(
        "Trainer up", "Good: 1, Prometheus can scrape the trainer. Bad: 0, its process has gone.", "none", 0
    )
    board.add(63, (12, 0, 6, 7), up.min(0).max(1), by_run(f"up{{{MATCHERS}}}"))

    errors = series_panel(
        "Errors of the measurement",
        f"{metrics.EXPORTER_ERRORS.documentation} Good: zero. Bad: anything else; the trainer's log says what.",
        "short",
        0,
    )
    board.add(64, (18, 0, 6, 7), errors, by_run(increase(metrics.EXPORTER_ERRORS)))
