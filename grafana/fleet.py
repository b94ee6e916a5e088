"""The fleet dashboard: which runs need attention? One row per run, the worst first.

To stay cheap with many runs, it reads the series that alerts/ppo.rules.yml records.
"""

from exporter.health import HealthLevel
from grafana import panels
from grafana.panels import BY_LEVEL, GREEN, RED, YELLOW, now_query, override, run_link, table_query, thresholds, words

CHOSEN = 'job=~"$job", run=~"$run", instance=~"$instance"'
LEVEL = f"run:ppo_gradient_level:max{{{CHOSEN}}}"
# Before its first update, a restarted run keeps its earlier CV there, for the alerts.
CV = f"(run:ppo_gradient_cv:max{{{CHOSEN}}} unless run:ppo_gradient_cv:unmeasured{{{CHOSEN}}})"
# Only targets that have served a run, as for PPOTrainerDown: targets of other systems may have a label `run` too.
UP = f"(up{{{CHOSEN}}} and on (job, instance) job_instance:ppo_run_info:last6h)"
# From the alert, which compares counters, not clocks.
STALLED = f'ALERTS{{{CHOSEN}, alertname="PPOTrainingStalled", alertstate="firing"}}'
# Runs without their own target, such as those of a text file, are up while they are served.
STATE = (
    f"max without () ({UP} == 1 and on (job, instance, run) {STALLED})"
    f" or max without () (2 * {UP}) or 2 * group without () ({LEVEL})"
)
STATES = {0: ("DOWN", RED), 1: ("stalled", YELLOW), 2: ("up", GREEN)}
ABSENT = ("–", "transparent")
CELL = dict(custom__cellOptions=dict(type="color-background", mode="basic"), custom__width=80)
RUNS_BY_LEVEL = [
    (f"count({LEVEL} == {index}) or 0 * count({LEVEL})", str(level)) for index, level in enumerate(HealthLevel)
]


def fleet_dashboard() -> dict:
    return panels.dashboard(
        panels.FLEET_DASHBOARD_UID,
        "PPO fleet",
        "Which runs need attention? A click on a run opens its dashboard.",
        [
            panels.variable("job", "Job", "ppo_gradient_cv", ".+"),
            panels.variable("run", "Run", 'ppo_gradient_cv{job=~"$job"}', ".*"),  # .* for targets without it
            panels.variable("instance", "Instance", 'ppo_gradient_cv{job=~"$job", run=~"$run"}', ".+"),
        ],
        panels.row(1, "Which runs need attention?", *_counts(), _all_runs(), *_levels(), collapsed=False),
    )


def _counts() -> list[dict]:
    return [
        panels.stat(
            *(2, (0, 0, 12, 4), "Runs by level now"),
            "How many of the chosen runs are at each level. Good: all healthy.",
            *(now_query(*query) for query in RUNS_BY_LEVEL),
            filled=True,
            text="value_and_name",
            mappings=words({0: ("0", "transparent")}, ABSENT),
            overrides=BY_LEVEL,
        ),
        panels.stat(
            *(3, (12, 0, 6, 4), "Runs down"),
            "Trainers that Prometheus cannot scrape and that did not end cleanly. Good: 0. Bad: any.",
            now_query(f"count({UP} == 0) or vector(0)", "down"),
            filled=True,
            thresholds=thresholds(GREEN, (1, RED)),
        ),
        panels.stat(
            *(4, (18, 0, 6, 4), "Runs stalled"),
            "Runs for which PPOTrainingStalled fires: they answer, but make no updates. Good: 0. Bad: any.",
            now_query(f"count({STALLED}) or vector(0)", "stalled"),
            filled=True,
            thresholds=thresholds(GREEN, (1, YELLOW)),
        ),
    ]


def _all_runs() -> dict:
    # Column of a value: its query, and its display. A rate over minutes outlives its run, hence `and`.
    values = {
        "state": (STATE, dict(mappings=words(STATES, ABSENT), **CELL)),
        "level": (LEVEL, dict(mappings=words(panels.LEVELS, ABSENT), **CELL | dict(custom__width=120))),
        "CV": (CV, dict(decimals=3, custom__width=90)),
        "share": (
            f"run_head:ppo_head_gradient_share:topk1{{{CHOSEN}}} and on (job, instance, run) {LEVEL}",
            dict(unit="percentunit", decimals=1, custom__width=90),
        ),
        "last update": (f"time() - ppo_last_update_timestamp_seconds{{{CHOSEN}}}", dict(unit="s", custom__width=110)),
        "return": (f"ppo_episode_return_mean{{{CHOSEN}}}", dict(decimals=2, custom__width=100)),
        "steps per second": (f"run:ppo_environment_steps:rate5m{{{CHOSEN}}} and {LEVEL}", dict(custom__width=140)),
    }
    fields = {name: f"Value #{chr(ord('A') + index)}" for index, name in enumerate(values)}
    order = ("state", "run", "level", "CV", "head", *list(values)[3:], "instance", "job")
    return panels.table(
        *(10, (0, 4, 24, 11), "All runs"),
        "One row per run, the worst first; a click on a run opens its dashboard. Good: up, stable, a recent update. "
        "Bad: DOWN, stalled or BAD. The age of the last update is by the trainer's clock.",
        *(table_query(query if query is STATE else f"max without () ({query})") for query, _ in values.values()),
        columns={"Value": "state"} | {fields.get(name, name): name for name in order} | {"head": "dominating head"},
        sort_by=[("state", False), ("level", True), ("CV", True)],
        noValue=ABSENT[0],
        thresholds=thresholds("transparent"),
        overrides=[
            *(override(name, **shown) for name, (_, shown) in values.items()),
            override("run", links=run_link("__data.fields"), custom__width=320),
            override("dominating head", custom__width=180),
        ],
    )


def _levels() -> list[dict]:
    over_time = panels.lines(
        *(20, (0, 15, 12, 8), "Runs by level"),
        "How many of the chosen runs were at each level. Good: all healthy. Bad: many change at once, which points "
        "to something that they share: data, code, or a machine.",
        *(panels.range_query(*query) for query in RUNS_BY_LEVEL),
        stacked=True,
        min=0,
        overrides=BY_LEVEL,
    )
    worst_first = list(enumerate(HealthLevel))[::-1]
    worst = panels.bars(
        *(21, (12, 15, 12, 8), "The ten worst runs now"),
        "The ten highest gradient CVs, each in the color of the run's level. Good: all green. A full bar means 3 or "
        "more, up to infinity.",
        *(now_query(f"topk(10, {CV}) and {LEVEL} == {index}", "{{run}}") for index, _ in worst_first),
        decimals=3,
        max=3,
        names="auto",
        displayName="${__field.labels.run}",
        links=run_link("__field.labels"),
        overrides=panels.colored({ref: level.color for ref, (_, level) in zip("ABC", worst_first)}, "byFrameRefID"),
    )
    # Every point counts all runs again: limit the number of points for any time range.
    return [over_time | {"maxDataPoints": 240}, worst]
