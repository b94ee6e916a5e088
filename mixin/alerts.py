"""Recording rules and alerts, declared once for both evaluators: Prometheus' own rules and Grafana-managed ones."""

from dataclasses import dataclass

from exporter.health import HealthLevel
from exporter.metrics import (
    ENVIRONMENT_STEPS,
    GRADIENT_CV,
    GRADIENT_CV_CEILING,
    GRADIENT_STEPS,
    HEAD_GRADIENT_SHARE,
    HEAD_LABEL,
    LAST_UPDATE_TIMESTAMP,
    NONFINITE_GRADIENTS,
    RESUMES,
    RUN_LABEL,
    SKIPPED_GRADIENT_STEPS,
    UPDATES,
    MetricFamily,
)
from mixin.config import (
    CRITICAL_STEPS,
    CV_CRITICAL,
    CV_WARNING,
    DOWN,
    NONFINITE,
    SKIPPED,
    STALLED,
    STARVED,
    TIMINGS,
    UNREACHABLE,
    AlertKey,
    MixinConfig,
    duration,
)
from mixin.dashboards import CV_PANEL_ID, DASHBOARD_UID
from mixin.promql import (
    CRITICAL_STEPS_RECORD,
    CV_RECORD,
    DOMINATING_HEAD_RECORD,
    ENVIRONMENT_STEPS_RECORD,
    IDENTITY,
    LEVEL_RECORD,
    NONFINITE_RECORD,
    level_of,
    per_run,
    quoted,
    select,
    steps_of_level,
)

PROMETHEUS, GRAFANA = "prometheus", "grafana"
"""Values of the label `evaluator`, by which Alertmanager tells which of two equal alerts to keep quiet."""

PROMPT_GROUP, SLOW_GROUP = "ppo", "ppo-slow"
SLOW_INTERVAL = 30
"""Seconds between evaluations of the slow group; the other has Prometheus' own evaluation interval."""


@dataclass(frozen=True)
class Alert:
    """One condition at one depth.

    Attributes:
        key: name (that of the runbook too, the same at every severity) and severity.
        value: PromQL of what is measured, one sample per run (and head), from series that Prometheus records.
        raw_value: the same from what is scraped alone, for Grafana. Neither carries a metric's name, which
            Grafana would take for a label.
        condition: comparison that `value` must meet, such as `>= 0.5`.
        hold, keep: see `mixin.config.Timing`; seconds.
        summary, description: annotation templates of Prometheus; `grafana_template` translates them.
        context: end of the description that only Prometheus can look up.
        panel: the panel of the run dashboard that shows it; None stands for the whole dashboard.
    """

    key: AlertKey
    value: str
    raw_value: str
    condition: str
    hold: int
    keep: int
    summary: str
    description: str
    context: str = ""
    panel: int | None = None

    @property
    def name(self) -> str:
        return self.key.name

    @property
    def severity(self) -> str:
        return self.key.severity

    @property
    def expression(self) -> str:
        return f"{self.value} {self.condition}"

    def dashboard_url(self, config: MixinConfig) -> str:
        """Address of the run's dashboard, as an annotation template of Prometheus."""
        view = f"viewPanel={self.panel}&" if self.panel else ""
        labels = "&".join(f"var-{label}={{{{ $labels.{label} | urlquery }}}}" for label in ("job", "instance", "run"))
        return f"{config.grafana_url.rstrip('/')}/d/{DASHBOARD_UID}?{view}{labels}"


def grafana_template(text: str) -> str:
    """A template of Prometheus as one of Grafana. No dollar sign is left: Grafana expands those while it provisions."""
    return text.replace("$labels", ".Labels").replace("$value", ".Values.B.Value")


_VALUE = '{{ printf "%.3f" $value }}'
_RUN = f"run {{{{ $labels.{RUN_LABEL} }}}}"


def _looked_up(selector: str, template: str) -> str:
    """`template` for each sample of the alert's own run; `%s` in `selector` stands for the run's labels."""
    matchers = ", ".join(f"{label}=%q" for label in ("job", "instance", RUN_LABEL))
    values = " ".join(f"$labels.{label}" for label in ("job", "instance", RUN_LABEL))
    return (
        f"{{{{ range printf `{selector.replace('%s', f'{{{matchers}}}')}` {values} | query }}}}{template}{{{{ end }}}}"
    )


# Without a result they say nothing.
_DOMINATING_HEAD = _looked_up(
    f"{DOMINATING_HEAD_RECORD}%s",
    f" Head {{{{ .Labels.{HEAD_LABEL} }}}} dominates with a share of "
    '{{ printf "%.3f" (value .) }} of the gradient norms.',
)
_NONFINITE_HEAD = (
    '{{ if eq (printf "%.3f" $value) "+Inf" }} A gradient was NaN or infinite'
    + _looked_up(
        f"topk(1, increase({NONFINITE_GRADIENTS.name}%s[10m]) > 0)", f", in head {{{{ .Labels.{HEAD_LABEL} }}}}"
    )
    + ".{{ end }}"
)


def _gradient_cv(config: MixinConfig) -> str:
    """The run's CV with its level, in words."""
    healthy, warning, critical = (level.word for level in HealthLevel)
    return _looked_up(
        f"{CV_RECORD}%s",
        f' Gradient CV {{{{ printf "%.3f" (value .) }}}} {{{{ if lt (value .) {config.warning_threshold} }}}}{healthy}'
        f"{{{{ else if lt (value .) {config.critical_threshold} }}}}{warning}{{{{ else }}}}{critical}{{{{ end }}}}.",
    )


def _new_steps(family: MetricFamily, matchers: str) -> str:
    """Increase in ten minutes; a young process' counter that is above zero when it is first seen counts whole.

    Unless the run was resumed: then the counter begins with what was told long ago.
    """
    counter = select(family, matchers)
    young = f"time() - process_start_time_seconds{{{matchers}}} < 600"
    return (
        f"(increase({counter}[10m]) > 0 or ({counter} unless {counter} offset 10m) and on (job, instance) ({young}) "
        f"unless on ({IDENTITY}) {select(RESUMES, matchers)} > 0)"
    )


def recordings(config: MixinConfig) -> dict[str, str]:
    """Recorded series and their expressions, in the order in which they build upon each other."""
    job = f"job={quoted(config.job)}"
    all_steps = per_run("sum", f"increase({select(GRADIENT_STEPS, job)}[10m])")
    return {
        CV_RECORD: per_run("max", select(GRADIENT_CV, job)),
        LEVEL_RECORD: level_of(f"{CV_RECORD}{{{job}}}", config),
        DOMINATING_HEAD_RECORD: f"topk by ({IDENTITY}) (1, {select(HEAD_GRADIENT_SHARE, job)} > 0)",
        CRITICAL_STEPS_RECORD: f"{steps_of_level(HealthLevel.CRITICAL, job, '10m', config)} / {all_steps}",
        NONFINITE_RECORD: f"max by ({IDENTITY}, {HEAD_LABEL}) ({_new_steps(NONFINITE_GRADIENTS, job)})",
        ENVIRONMENT_STEPS_RECORD: per_run("sum", f"rate({select(ENVIRONMENT_STEPS, job)}[5m])"),
    }


def alerts(config: MixinConfig) -> list[Alert]:
    """Every alert, in the order of `TIMINGS`."""
    job = f"job={quoted(config.job)}"
    raw = recordings(config)
    recorded = {name: f"{name}{{{job}}}" for name in raw}

    def increase(family: MetricFamily, minutes: int) -> str:
        return f"increase({select(family, job)}[{minutes}m])"

    def nonfinite(in_heads: str) -> str:
        skipped = f"{_new_steps(SKIPPED_GRADIENT_STEPS, job)} unless on ({IDENTITY}) {in_heads} > 0"
        return f"max by ({IDENTITY}, {HEAD_LABEL}) ({in_heads} > 0 or ({skipped}))"

    def alert(key: AlertKey, value: str, condition: str, *, raw_value: str = "", **texts: str | int) -> Alert:
        timing = config.timing(key)
        return Alert(key, value, raw_value or value, condition, timing.hold, timing.keep, **texts)

    def cv_high(key: AlertKey, level: HealthLevel, threshold: float) -> Alert:
        """No upper bound on the warning: rising to critical must not resolve it."""
        return alert(
            key,
            recorded[CV_RECORD],
            f">= {threshold}",
            raw_value=raw[CV_RECORD],
            summary=f"Gradient CV {_VALUE} is {level.word} in {_RUN}",
            description=f"The gradient CV of {_RUN} is {_VALUE} and has been at least {threshold} ({level}) for "
            f"{duration(config.timing(key).hold)}.",
            context=_NONFINITE_HEAD + _DOMINATING_HEAD,
            panel=CV_PANEL_ID,
        )

    # What the sustained alert has told already is not told again when it resolves. Grafana has no series
    # of its alerts and looks whether the condition has been met for as long.
    hold = duration(max(config.timing(CV_CRITICAL).hold, 30))
    told = f'max_over_time(ALERTS{{alertname="{CV_CRITICAL.name}", severity="{CV_CRITICAL.severity}", '
    told += f'alertstate="firing", {job}}}[10m])'
    met = f"max_over_time(min_over_time(({raw[CV_RECORD]})[{hold}:30s])[10m:30s]) >= {config.critical_threshold}"
    share = select(HEAD_GRADIENT_SHARE, job)
    # A counter alone does not tell: a resumed run's goes on from where it was.
    updates, last_update = select(UPDATES, job), select(LAST_UPDATE_TIMESTAMP, job)
    head = f"$labels.{HEAD_LABEL}"
    where = f"{{{{ if {head} }}}}of head {{{{ {head} }}}}{{{{ else }}}}of the trunk or the value head{{{{ end }}}}"
    stalled = duration(config.stalled_seconds)
    from_critical = f"{'of at least' if config.uses_exporter_levels else 'above'} {config.critical_threshold}"
    times = {key: duration(config.timing(key).hold) for key in TIMINGS}

    return [
        cv_high(CV_WARNING, HealthLevel.WARNING, config.warning_threshold),
        cv_high(CV_CRITICAL, HealthLevel.CRITICAL, config.critical_threshold),
        alert(
            CRITICAL_STEPS,
            f"({recorded[CRITICAL_STEPS_RECORD]} unless on ({IDENTITY}) {told})",
            f">= {config.critical_step_share}",
            raw_value=f"{raw[CRITICAL_STEPS_RECORD]} unless on ({IDENTITY}) {met}",
            summary=f"Share {_VALUE} of the gradient steps of {_RUN} is critical",
            description=f"In the last 10 minutes a share of {_VALUE} of the gradient steps of {_RUN} had a gradient "
            f"CV {from_critical}; the mean of an update may hide such spikes.",
            context=_gradient_cv(config) + _DOMINATING_HEAD,
            panel=CV_PANEL_ID,
        ),
        alert(
            NONFINITE,
            # Per head, and once for the run when steps were skipped although every head was finite.
            nonfinite(recorded[NONFINITE_RECORD]),
            "> 0",
            raw_value=nonfinite(raw[NONFINITE_RECORD]),
            summary=f"Non-finite gradients {where} in {_RUN}",
            description=f'In about {{{{ printf "%.0f" $value }}}} gradient steps of the last 10 minutes a gradient '
            f"{where} of {_RUN} was NaN or infinite.",
            context=_gradient_cv(config),
        ),
        alert(
            SKIPPED,
            f"{per_run('sum', increase(SKIPPED_GRADIENT_STEPS, 5))} / {per_run('sum', increase(GRADIENT_STEPS, 5))}",
            f">= {config.skipped_step_share}",
            summary=f"Share {_VALUE} of the gradient steps of {_RUN} was skipped",
            description=f"In the last 5 minutes a share of {_VALUE} of the gradient steps of {_RUN} did not touch the "
            "weights because a gradient was NaN or infinite: the run has all but stopped learning.",
            context=_gradient_cv(config) + _DOMINATING_HEAD,
        ),
        alert(
            STARVED,
            f"{share} * on ({IDENTITY}) group_left () {per_run('count', share)}",
            f"< {config.starved_part}",
            summary=f"Head {{{{ {head} }}}} of {_RUN} is starved of gradient",
            description=f"For {times[STARVED]} head {{{{ {head} }}}} of {_RUN} has received {_VALUE} of an equal part "
            f"of the gradient norms (alert below {config.starved_part}).",
            context=_gradient_cv(config) + _DOMINATING_HEAD,
        ),
        alert(
            DOWN,
            per_run("min", f"up{{{job}}}"),
            "== 0",
            summary=f"Trainer of {_RUN} is down",
            description=f"Prometheus has not been able to scrape {{{{ $labels.instance }}}} ({_RUN}) for "
            f"{times[DOWN]}, and the trainer has not said goodbye by removing its scrape target.",
        ),
        alert(
            STALLED,
            # Before a process' first update there is no time of the last one; such a run has the value 0.
            per_run(
                "max",
                f"time() - {last_update} > {config.stalled_seconds} or "
                f"0 * ({updates} unless {last_update} and ({updates} offset {stalled} unless {last_update} offset "
                f"{stalled}))",
            ),
            ">= 0",
            summary=f"No PPO update in {_RUN} {{{{ if $value }}}}for {{{{ humanizeDuration $value }}}}{{{{ else }}}}"
            "since it started{{ end }}",
            description=f"Run {{{{ $labels.{RUN_LABEL} }}}} {{{{ if $value }}}}ended its last PPO update {_VALUE} "
            f"seconds ago (alert above {config.stalled_seconds}){{{{ else }}}}has not completed any PPO update "
            f"since it started, more than {stalled} ago{{{{ end }}}}.",
        ),
        alert(
            UNREACHABLE,
            per_run("max", select(GRADIENT_CV_CEILING, job)),
            f"<= {config.critical_threshold}",
            summary=f"Gradient CV of {_RUN} cannot exceed {_VALUE}",
            description=f"With the heads that contribute to it, the gradient CV of {_RUN} cannot exceed {_VALUE}: it "
            f"cannot rise above the critical threshold of {config.critical_threshold}, so do not wait for a critical "
            "alert.",
            panel=CV_PANEL_ID,
        ),
    ]


def prometheus_rules(config: MixinConfig) -> dict:
    """Content of the rules file. A group's rules are evaluated in their order, each on what stands before it.

    What looks at minutes or at every head is slow for many runs and seldom needed to the second: it has a group and
    an interval of its own (docs/fleet.md).
    """
    rules = {name: {"record": name, "expr": expression} for name, expression in recordings(config).items()}
    rules |= {alert.key: _prometheus_rule(alert, config) for alert in alerts(config)}
    prompt = (CV_RECORD, LEVEL_RECORD, CV_WARNING, CV_CRITICAL, DOWN)
    slow = [rule for key, rule in rules.items() if key not in prompt]
    return {
        "groups": [
            {"name": PROMPT_GROUP, "rules": [rules[key] for key in prompt]},
            {"name": SLOW_GROUP, "interval": duration(SLOW_INTERVAL), "rules": slow},
        ]
    }


def _prometheus_rule(alert: Alert, config: MixinConfig) -> dict:
    rule: dict = {"alert": alert.name, "expr": alert.expression}
    if alert.hold:
        rule["for"] = duration(alert.hold)
    rule["keep_firing_for"] = duration(alert.keep)
    rule["labels"] = {"severity": alert.severity, "evaluator": PROMETHEUS}
    rule["annotations"] = {
        "summary": alert.summary,
        "description": alert.description + alert.context,
        "dashboard_url": alert.dashboard_url(config),
        "runbook_url": config.runbook_url(alert.name),
    }
    return rule
