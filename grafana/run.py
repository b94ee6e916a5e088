"""The run dashboard: is it healthy, since when, and which head is it?

It reads the run's own metrics, so it works without recording rules; only alerts need rules.
"""

from collections.abc import Callable

from exporter.health import CRITICAL_THRESHOLD, WARNING_THRESHOLD, HealthLevel
from exporter.metrics import METRIC_FAMILIES
from grafana import panels
from grafana.panels import (
    BY_LEVEL,
    NEUTRAL,
    RED,
    YELLOW,
    colored,
    fixed,
    head_lines,
    lines,
    now_query,
    override,
    range_query,
    row,
    stat,
    words,
)

CV_PANEL_ID = 10
"""Alerts link to this panel."""

CHOSEN = 'job=~"$job", run="$run", instance=~"$instance"'


def _of(name: str, **labels: str) -> str:
    """The chosen run's series of a metric, with these labels."""
    matchers = [CHOSEN, *(f'{label}="{value}"' for label, value in labels.items())]
    return f"{name}{{{', '.join(matchers)}}}"


def _rate(name: str) -> str:
    return f"rate({_of(name)}[$__rate_interval])"


def _increase(name: str, window: str = "$__rate_interval", **labels: str) -> str:
    return f"increase({_of(name, **labels)}[{window}])"


def _steps(window: str, **labels: str) -> str:
    return f"sum without (health) ({_increase('ppo_gradient_steps_total', window, **labels)})"


# Before the first update of its process a run exports 0.0 and healthy: nothing is measured yet.
UNMEASURED = (
    f"(max without (health) ({_of('ppo_gradient_cv')} == 0) unless {_of('ppo_gradient_level_since_timestamp_seconds')})"
)
NO_UPDATE_YET = f"{UNMEASURED} - 1"
CV = f"max without (health) ({_of('ppo_gradient_cv')}) unless {UNMEASURED}"
# -1 no update yet, 0 healthy, 1 warning, 2 critical. The label follows the run's own thresholds.
LEVEL = NO_UPDATE_YET + " or max without (health) ({} or {} or {})".format(
    *(f"{index} * group without () ({_of('ppo_gradient_cv', health=of)})" for index, of in enumerate(HealthLevel))
)
# A run that exports no thresholds has the default ones. (count is 1 here.)
WARNING, CRITICAL = (
    f"max without (level) ({_of('ppo_gradient_cv_threshold', level=level)})"
    f" or {usual} * count without (health) ({_of('ppo_gradient_cv')})"
    for level, usual in ((HealthLevel.WARNING, WARNING_THRESHOLD), (HealthLevel.CRITICAL, CRITICAL_THRESHOLD))
)
CEILING, SHARE = _of("ppo_gradient_cv_ceiling"), _of("ppo_head_gradient_share")
SEVERITIES = {"critical": RED, "warning": YELLOW}


def run_dashboard() -> dict:
    marks = [
        dict(
            name=f"Alerts: {severity}",
            datasource=panels.DATASOURCE,
            enable=True,
            iconColor=color,
            filter=dict(exclude=False, ids=[CV_PANEL_ID]),
            expr=_of("ALERTS", alertstate="firing", severity=severity),
            step="15s",
            titleFormat="{{alertname}}",
            tagKeys="severity",
        )
        for severity, color in SEVERITIES.items()
    ]
    all_runs = dict(
        title="All runs",
        type="link",
        icon="apps",
        url=f"/d/{panels.FLEET_DASHBOARD_UID}?var-datasource=${{datasource:percentencode}}",
        keepTime=True,
        **dict(asDropdown=False, includeVars=False, targetBlank=False, tags=[], tooltip=""),
    )
    # The first row is 21 units high: as much as a browser shows on 1080 lines.
    return panels.dashboard(
        panels.RUN_DASHBOARD_UID,
        "PPO gradient health",
        "Is the run healthy, since when, and which head is it?",
        [
            panels.variable("job", "Job", "ppo_gradient_cv", ".+"),
            panels.variable("run", "Run", 'ppo_gradient_cv{job=~"$job"}', None),
            panels.variable("instance", "Instance", 'ppo_gradient_cv{job=~"$job", run="$run"}', ".+"),
        ],
        row(1, "Is it healthy, since when, and which head is it?", *_now(), *_since_when(), *_heads(), collapsed=False),
        row(20, "Every gradient step", *_every_step()),
        row(30, "PPO", *_signals()),
        row(50, "Throughput, and where the time goes", *_throughput()),
        row(60, "Process", *_process()),
        marks=marks,
        links=[all_runs],
    )


def _now() -> list[dict]:
    extreme = "topk(6, {0} == ignoring (head) group_left () {1} without (head) ({0}))"  # at most six that tie
    return [
        stat(
            *(2, (0, 0, 4, 4), "Level now"),
            "Health level of the last update's gradient CV, by the run's own thresholds. Good: stable. Bad: BAD, at or "
            "above the critical threshold or with a NaN or infinite gradient. At first a run has no update yet.",
            now_query(LEVEL, "{{instance}}"),
            filled=True,
            mappings=words(panels.LEVELS, ("no data", "transparent")),
        ),
        stat(
            *(3, (4, 0, 3, 4), "Gradient CV now"),
            "Spread of the heads' gradient norms in the last update, in the color of its level: standard deviation "
            "over mean. Good: near 0, all heads get a similar gradient. Bad: one head gets most of it.",
            now_query(f"{_of('ppo_gradient_cv')} unless ignoring (health) {UNMEASURED}", "{{health}}"),
            now_query(NO_UPDATE_YET, "no update yet"),
            decimals=3,
            text="value",
            mappings=words({panels.NO_UPDATE_YET: ("no update yet", NEUTRAL)}),
            overrides=BY_LEVEL,
        ),
        stat(
            *(4, (7, 0, 3, 4), "CV ceiling"),
            "The largest CV that the contributing heads can reach, when one has the whole gradient. Good: above the "
            "critical threshold. Bad: at or below it, in yellow: the run hardly ever becomes critical, however starved "
            "its heads. Set thresholds for this run.",
            now_query(f"{CEILING} > ({CRITICAL})", "above critical"),
            now_query(f"{CEILING} <= ({CRITICAL})", "never critical"),
            decimals=3,
            text="value_and_name",
            overrides=colored({"never critical": YELLOW}),
        ),
        stat(
            *(5, (10, 0, 4, 4), "At this level for"),
            "Time since the level last changed, or since the process began to measure. Good: long at a healthy level. "
            "Bad: long at another.",
            now_query(f"time() - {_of('ppo_gradient_level_since_timestamp_seconds')}", "{{instance}}"),
            unit="s",
            decimals=1,
        ),
        stat(
            *(6, (14, 0, 5, 4), "Dominating head"),
            "The head with the largest share of the gradient norms in the last update; all of them if several tie. "
            "Good: near an equal share. Bad: near 100 %, the others learn nothing.",
            now_query(extreme.format(SHARE, "max"), "{{head}}"),
            unit="percentunit",
            decimals=1,
            text="value_and_name",
        ),
        stat(
            *(7, (19, 0, 5, 4), "Most starved head"),
            "The head with the smallest share of the gradient norms in the last update; all of them if several tie. "
            "Good: near an equal share. Bad: near 0 %, it does not learn.",
            now_query(extreme.format(SHARE, "min"), "{{head}}"),
            unit="percentunit",
            decimals=1,
            text="value_and_name",
        ),
    ]


def _since_when() -> list[dict]:
    window, dashed = "$__rate_interval", dict(fill="dash", dash=[10, 10])
    return [
        lines(
            *(CV_PANEL_ID, (0, 4, 14, 9), "Gradient CV"),
            "Gradient CV of each update, with the run's own thresholds in yellow and red. Good: below both. The dashed "
            "ceiling is what the heads can reach. A CV of +Inf, after a NaN or infinite gradient, is not on the axis: "
            "see the level over time.",
            range_query(CV, "CV"),
            range_query(CEILING, "ceiling"),
            range_query(WARNING, "warning"),
            range_query(CRITICAL, "critical"),
            decimals=3,
            legend="list",
            custom=dict(axisSoftMin=0),
            color=fixed("blue"),
            overrides=[
                override("warning", color=fixed(YELLOW), custom__showPoints="never"),
                override("critical", color=fixed(RED), custom__showPoints="never"),
                override("ceiling", color=fixed(NEUTRAL), custom__showPoints="never", custom__lineStyle=dashed),
            ],
        ),
        panels.level_timeline(
            *(11, (14, 4, 10, 4), "Level over time"),
            "When the run was stable (green), warn (yellow) or BAD (red). Good: always green. Bad: red. Gaps are times "
            "without a scrape.",
            range_query(LEVEL, "{{instance}}"),
        ),
        panels.bars(
            *(12, (14, 8, 4, 5), "Gradient steps by level"),
            "How many gradient steps of the time range had a CV at each level. Good: all healthy. Bad: many critical.",
            *(now_query(_steps("$__range", health=level), str(level)) for level in HealthLevel),
            unit="short",
            names="top",
            overrides=BY_LEVEL,
        ),
        panels.table(
            *(13, (18, 8, 6, 5), "Firing alerts"),
            "Alerts of the run that fire now in Prometheus. Good: none. Bad: any critical one.",
            panels.table_query(f"max by (alertname, severity) ({_of('ALERTS', alertstate='firing')})"),
            columns={"alertname": "alert", "severity": "severity"},
            excluded=("Time", "Value"),
            sort_by=[("severity", False)],
            noValue="none firing",
            overrides=[
                override("alert", custom__minWidth=250),
                override(
                    "severity",
                    custom__width=90,
                    custom__cellOptions=dict(type="color-text"),
                    mappings=[dict(type="value", options={name: dict(color=of) for name, of in SEVERITIES.items()})],
                ),
            ],
        ),
        lines(
            *(14, (0, 13, 6, 7), "Share of gradient steps by level"),
            "Every gradient step counts by its own CV, so it shows spikes that the mean of an update hides. Good: all "
            "green. Bad: a growing band of red.",
            *(range_query(f"{_steps(window, health=of)} / {_steps(window)}", str(of)) for of in HealthLevel),
            unit="percentunit",
            decimals=1,
            stacked=True,
            legend="list",
            min=0,
            max=1,
            overrides=BY_LEVEL,
        ),
    ]


def _heads() -> list[dict]:
    return [
        head_lines(
            *(15, (6, 13, 6, 7), "Gradient norm per head"),
            "Mean L2 norm of each head's gradient in the last update, before clipping. Do not compare norms of "
            "heads of different depth or size. Good: lines run in parallel. Bad: they drift apart, or one ends: a norm "
            "of zero is not on the logarithmic axis.",
            range_query(_of("ppo_head_gradient_norm"), "{{head}}"),
            unit="short",
            decimals=3,
            legend="list",
            custom=panels.LOG_SCALE,
        ),
        head_lines(
            *(17, (12, 13, 6, 7), "Entropy per head"),
            "Each head's entropy as a fraction of the largest that its choices allow. Good: falling slowly from 1. "
            "Bad: near 0 early, or at 1 for long. A head with little gradient has converged if this is near 0 and the "
            "return holds; it is starved if this is near 1. Only discrete heads have it.",
            range_query(_of("ppo_head_entropy_ratio"), "{{head}}"),
            unit="percentunit",
            decimals=1,
            legend="list",
            min=0,
            max=1,
        ),
        head_lines(
            *(16, (18, 13, 6, 7), "Share of the gradient per head"),
            "Each head's part of the sum of norms. Good: nearly equal bands. Bad: one band takes all, or one vanishes.",
            range_query(SHARE, "{{head}}"),
            unit="percentunit",
            decimals=1,
            stacked=True,
            legend="list",
            min=0,
            max=1,
        ),
    ]


def _every_step() -> list[dict]:
    return [
        panels.heatmap(
            *(21, (0, 0, 12, 14), "CV per gradient step"),  # high enough for the labels of all buckets
            "How many gradient steps had a CV in each bucket; the top bucket has everything above. Non-finite "
            "steps are in none. Good: a dark band at the bottom. Bad: a second band far above it, which means spikes.",
            range_query(f"sum by (le) ({_increase('ppo_gradient_cv_per_step_bucket')})", "{{le}}", format="heatmap"),
            axis_decimals=2,
        ),
        head_lines(
            *(22, (12, 0, 12, 7), "Non-finite and skipped gradient steps"),
            "Gradient steps in which a head's gradient was NaN or infinite, and steps skipped because of any such "
            "gradient, in the two minutes (more if the time range is long) before each point. Good: zero. Bad: "
            "anything else.",
            range_query(_increase("ppo_nonfinite_gradients_total"), "{{head}}"),
            range_query(_increase("ppo_skipped_gradient_steps_total"), "skipped"),
            unit="short",
            min=0,
        ),
        _line(23, (12, 7, 12, 7), "Global gradient norm", "ppo_gradient_norm",
              "Good: steady. Bad: growing without end, or near 0.", "short", 3, custom=panels.LOG_SCALE),
    ]  # fmt: skip


def _line(
    panel_id: int,
    at: tuple,
    title: str,
    metric: str,
    judgement: str,
    unit: str,
    decimals: int,
    *,
    draw: Callable[..., dict] = lines,
    legend_format: str = "{{instance}}",
    **more,
) -> dict:
    """A panel with one metric of ours; its HELP text is the description."""
    documentation = next(family.documentation for family in METRIC_FAMILIES if family.name == metric)
    query = range_query(more.pop("expr", _of(metric)), legend_format)
    return draw(panel_id, at, title, f"{documentation} {judgement}", query, unit=unit, decimals=decimals, **more)


def _signals() -> list[dict]:
    signals = [
        ("Episode return", "ppo_episode_return_mean", "Good: rising, or at its plateau. Bad: falling.", "short", 2),
        ("Episode length", "ppo_episode_length_mean", "Good: as the task expects. Bad: a sudden change.", "short", 0),
        ("Learning rate", "ppo_learning_rate", "Good: as scheduled. Bad: zero before the end.", "sci", 2),
        ("Policy loss", "ppo_policy_loss", "Good: small and around zero. Bad: spikes.", "short", 4),
        ("Value loss", "ppo_value_loss", "Good: falling. Bad: growing by orders of magnitude.", "short", 3),
        ("Entropy", "ppo_entropy", "Good: falling slowly. Bad: near zero early: no more exploration.", "short", 3),
        ("Approximate KL", "ppo_approx_kl", "Good: about 0.003 to 0.03. Bad: spikes above.", "short", 4),
        ("Clip fraction", "ppo_clip_fraction", "Good: below about 30 %. Bad: above.", "percentunit", 1),
        ("Explained variance", "ppo_explained_variance", "Good: towards 1. Bad: at or below 0.", "none", 3),
    ]
    of_heads = [
        ("KL per head", "ppo_head_approx_kl", "Good: of one size. Bad: one head far above the others.", "short", 4),
        ("Clip fraction per head", "ppo_head_clip_fraction", "Good: below about 30 %. Bad: above.", "percentunit", 1),
        ("Update per head", "ppo_head_update_ratio", "Good: about 0.001 to 0.01. Bad: 0, or near 1.", "sci", 2),
    ]
    return [_line(31 + nth, (nth % 3 * 8, nth // 3 * 7, 8, 7), *signal) for nth, signal in enumerate(signals)] + [
        _line(40 + nth, (nth * 8, 21, 8, 7), *signal, draw=head_lines, legend_format="{{head}}")
        for nth, signal in enumerate(of_heads)
    ]


def _throughput() -> list[dict]:
    spent = {part: f"ppo_{part}_duration_seconds" for part in ("rollout", "update")}
    parts = {part: _rate(f"{metric}_sum") for part, metric in spent.items()}
    rest = f"clamp_min(1 - {parts['rollout']} - {parts['update']}, 0)"
    colors = {"rollout": "blue", "update": "purple", "rest": NEUTRAL}
    return [
        lines(
            *(51, (0, 0, 6, 7), "Environment steps per second"),
            "Throughput of the run. Good: steady. Bad: falling, or zero while it should be training.",
            range_query(_rate("ppo_environment_steps_total"), "{{instance}}"),
            unit="short",
        ),
        lines(
            *(52, (6, 0, 6, 7), "Where the time goes"),
            "Parts of wall time: collecting rollouts, updating the policy, and the rest (evaluation, checkpoints, "
            "waiting). Good: little rest. Bad: a growing rest. If updates take longer than a few scrapes, the bands "
            "jump, because a duration is counted when it ends.",
            *(range_query(expr, part) for part, expr in (parts | {"rest": rest}).items()),
            unit="percentunit",
            decimals=1,
            stacked=True,
            min=0,
            max=1,
            overrides=colored(colors),
        ),
        lines(
            *(53, (12, 0, 6, 7), "Duration of rollout and update"),
            "Mean wall time of one rollout and of one update. Good: steady. Bad: drifting upwards.",
            *(range_query(f"{parts[part]} / {_rate(f'{metric}_count')}", part) for part, metric in spent.items()),
            unit="s",
            decimals=3,
            overrides=colored(colors),
        ),
        lines(
            *(54, (18, 0, 6, 7), "Age of the last update"),
            "Time since the last PPO update ended, by the trainer's clock, beside the recent maximum of the time "
            "between two updates. Good: a low saw-tooth. Bad: far above the time between two.",
            range_query(f"time() - {_of('ppo_last_update_timestamp_seconds')}", "age"),
            range_query(_of("ppo_update_interval_seconds"), "between two"),
            unit="s",
            overrides=colored({"age": "blue", "between two": NEUTRAL}),
        ),
        lines(
            *(55, (0, 7, 24, 6), "Rollout of each rank"),
            "Wall time of each process of the run for its part of the last rollout. Good: lines together. Bad: one "
            "above the others, which all of them wait for.",
            range_query(_of("ppo_rank_rollout_seconds"), "rank {{rank}}"),
            unit="s",
            decimals=3,
            color=panels.BY_NAME,
        ),
    ]


def _process() -> list[dict]:
    return [
        lines(
            *(61, (0, 0, 6, 7), "Memory"),
            "Resident memory of the training process. Good: a plateau. Bad: growing without end.",
            range_query(_of("process_resident_memory_bytes"), "{{instance}}"),
            unit="bytes",
            decimals=1,
        ),
        lines(
            *(62, (6, 0, 6, 7), "CPU"),
            "Cores that the training process uses. Good: as many as it has threads. Bad: near zero while it should be "
            "training.",
            range_query(_rate("process_cpu_seconds_total"), "{{instance}}"),
            unit="short",
            decimals=2,
        ),
        lines(
            *(63, (12, 0, 6, 7), "Trainer up"),
            "Good: 1, Prometheus can scrape the trainer. Bad: 0, its process is gone.",
            range_query(_of("up"), "{{instance}}"),
            min=0,
            max=1,
        ),
        _line(
            *(64, (18, 0, 6, 7), "Errors of the measurement", "ppo_exporter_errors_total"),
            *("Good: zero. Bad: anything else; see the trainer's log.", "short", 0),
            expr=_increase("ppo_exporter_errors_total"),
            min=0,
        ),
    ]
