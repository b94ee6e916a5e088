"""The fleet dashboard: every run in one table, the worst first, and those that are down or stalled.

With many runs it must stay cheap, so it reads what Prometheus has recorded (mixin/alerts.py)
wherever it would otherwise compute over every series.
"""

from exporter import metrics
from exporter.health import HealthLevel
from exporter.metrics import HEAD_LABEL, RUN_LABEL
from mixin.config import MixinConfig, duration
from mixin.dashboards.panels import (
    FLEET_DASHBOARD_UID,
    LEVEL_MEANINGS,
    MATCHERS,
    NEUTRAL,
    RUN_LEGEND,
    Board,
    Query,
    Shape,
    bars_panel,
    colored_by_level,
    cv_thresholds,
    filled,
    override,
    run_link,
    series_panel,
    stat_panel,
    table_panel,
    thresholds,
    words,
)
from mixin.promql import (
    CV_RECORD,
    DOMINATING_HEAD_RECORD,
    ENVIRONMENT_STEPS_RECORD,
    IDENTITY,
    LEVEL_RECORD,
    per_run,
    select,
)

LEVEL = f"{LEVEL_RECORD}{{{MATCHERS}}}"
CV = f"{CV_RECORD}{{{MATCHERS}}}"
UP = per_run("min", f"up{{{MATCHERS}}}")
DOWN = f"{UP} == 0"
# Before its first update a run has no time of the last one; then the start of its process counts.
AGE = (
    f"time() - ({per_run('max', select(metrics.LAST_UPDATE_TIMESTAMP, MATCHERS))}"
    f" or {per_run('max', f'process_start_time_seconds{{{MATCHERS}}}')})"
)
UP_MEANINGS = {1: ("up", HealthLevel.HEALTHY.color), 0: ("DOWN", HealthLevel.CRITICAL.color)}
COLORED_CELL = {"type": "color-background", "mode": "basic"}


def fleet_dashboard(config: MixinConfig) -> dict:
    board = Board(
        "PPO fleet",
        FLEET_DASHBOARD_UID,
        "Which runs need somebody? A click on a run opens its own dashboard.",
        config,
        refresh="30s",
    )
    board.row(1, "Which runs need somebody?")
    _counts(board, config)
    _all_runs(board, config)
    _over_time(board, config)
    return board.document()


def _stalled(config: MixinConfig) -> str:
    return f"{AGE} > {config.stalled_seconds}"


def _counts(board: Board, config: MixinConfig) -> None:
    levels = stat_panel(
        "Runs by level now", "How many of the chosen runs are at each level. Good: all healthy.", "none", 0
    )
    board.add(2, (0, 0, 12, 4), colored_by_level(filled(levels)), *_runs_by_level(Shape.NOW))

    down = stat_panel(
        "Runs down",
        "Trainers that Prometheus cannot scrape and that have not ended cleanly. Good: 0. Bad: any.",
        "none",
        0,
    )
    down.thresholds(thresholds((None, HealthLevel.HEALTHY.color), (1, HealthLevel.CRITICAL.color)))
    board.add(3, (12, 0, 6, 4), filled(down), Query(f"count({DOWN}) or vector(0)", "down", Shape.NOW))

    stalled = stat_panel(
        "Runs stalled",
        f"Runs that answer but have not completed an update in {duration(config.stalled_seconds)}. Good: 0. Bad: any.",
        "none",
        0,
    )
    stalled.thresholds(thresholds((None, HealthLevel.HEALTHY.color), (1, HealthLevel.WARNING.color)))
    board.add(4, (18, 0, 6, 4), filled(stalled), Query(f"count({_stalled(config)}) or vector(0)", "stalled", Shape.NOW))


def _runs_by_level(shape: Shape) -> list[Query]:
    # Much cheaper over time than the sum of a `== bool`, which makes new labels for each run and point.
    return [
        Query(f"count({LEVEL} == {index}) or count({LEVEL}) * 0", str(level), shape)
        for index, level in enumerate(HealthLevel)
    ]


def _all_runs(board: Board, config: MixinConfig) -> None:
    table = table_panel(
        "All runs",
        "One row per run, the worst first; a click on a run opens its dashboard. Good: stable, an update age of "
        f"seconds. Bad: BAD, DOWN, or no update in {duration(config.stalled_seconds)}. The last update's age counts "
        "from the start of the process before there was one.",
        {
            RUN_LABEL: RUN_LABEL,
            "Value #A": "level",
            "Value #B": "CV",
            HEAD_LABEL: "dominating head",
            "Value #C": "share",
            "Value #D": "last update",
            "Value #E": "return",
            "Value #F": "steps per second",
            "Value #G": "up",
            "instance": "instance",
            "job": "job",
            # Its name where this query alone has a result: every run is down.
            "Value": "up",
        },
        sort_by=[("level", True), ("CV", True)],
        decimals=2,
    )
    table.override_by_name(RUN_LABEL, override(links=run_link("__data.fields")))
    table.override_by_name(
        "level", override(mappings=words(LEVEL_MEANINGS), custom__cellOptions=COLORED_CELL, custom__width=90)
    )
    table.override_by_name(
        "CV",
        override(decimals=3, thresholds=cv_thresholds(config).build(), custom__cellOptions={"type": "color-text"}),
    )
    table.override_by_name("share", override(unit="percentunit", decimals=1))
    table.override_by_name(
        "last update",
        override(
            unit="s",
            decimals=0,
            thresholds=thresholds(
                (None, HealthLevel.HEALTHY.color), (config.stalled_seconds, HealthLevel.WARNING.color)
            ).build(),
            custom__cellOptions={"type": "color-text"},
        ),
    )
    table.override_by_name("steps per second", override(decimals=0))
    table.override_by_name(
        "up", override(mappings=words(UP_MEANINGS), custom__cellOptions={"type": "color-text"}, custom__width=80)
    )
    board.add(
        10,
        (0, 4, 24, 10),
        table,
        *(
            Query(expression, shape=Shape.TABLE)
            for expression in (
                per_run("max", LEVEL),
                per_run("max", CV),
                f"max by ({IDENTITY}, {HEAD_LABEL}) ({DOMINATING_HEAD_RECORD}{{{MATCHERS}}})",
                AGE,
                per_run("max", select(metrics.EPISODE_RETURN_MEAN, MATCHERS)),
                per_run("max", f"{ENVIRONMENT_STEPS_RECORD}{{{MATCHERS}}}"),
                UP,
            )
        ),
    )


def _over_time(board: Board, config: MixinConfig) -> None:
    counts = series_panel(
        "Runs by level",
        "How many of the chosen runs were at each level. Good: all healthy. Bad: many changing at once, which points "
        "at what they share: data, code, or a machine.",
        "none",
        0,
        stacked=True,
    )
    # Every point counts all runs anew: as many points as can be told apart, and no more in a longer range.
    counts.min(0).max_data_points(240)
    board.add(20, (0, 14, 10, 8), colored_by_level(counts), *_runs_by_level(Shape.SERIES))

    worst = bars_panel(
        "The ten worst runs now",
        "The ten highest gradient CVs. Good: all green. A bar that fills its line is at one and a half times the "
        "critical threshold or beyond, up to infinity.",
        "none",
        3,
    )
    worst.max(1.5 * config.critical_threshold).thresholds(cv_thresholds(config))
    worst.override_by_regexp(".*", override(links=run_link("__field.labels")))
    board.add(
        21,
        (10, 14, 7, 8),
        worst,
        Query(f"topk(10, {per_run('max', CV)})", RUN_LEGEND, Shape.NOW),
    )

    # One query: of two, one without a result would change the name of the other's column.
    silent = table_panel(
        "Down or stalled",
        "Runs that cannot be scraped, and runs that answer but have not completed an update in "
        f"{duration(config.stalled_seconds)}, with the age of the last one. Good: an empty table. Bad: any row; a "
        "click opens the run's dashboard.",
        {RUN_LABEL: RUN_LABEL, "problem": "problem", "Value": "last update", "instance": "instance", "job": "job"},
        unit="s",
        no_value="none",
    )
    silent.override_by_name(RUN_LABEL, override(links=run_link("__data.fields")))
    silent.override_by_name("last update", override(mappings=words({0: ("unknown", NEUTRAL)})))
    problems = " or ".join(
        f'label_replace({expression}, "problem", "{problem}", "", "")'
        for problem, expression in (("down", DOWN), ("stalled", _stalled(config)))
    )
    board.add(22, (17, 14, 7, 8), silent, Query(problems, shape=Shape.TABLE))
