"""The alerts, declared once for both evaluators: Prometheus' own rules and Grafana-managed ones."""

from dataclasses import dataclass

from exporter.health import CRITICAL_THRESHOLD, WARNING_THRESHOLD, HealthLevel
from exporter.metrics import (
    GRADIENT_CV_CEILING,
    GRADIENT_STEPS,
    HEAD_GRADIENT_SHARE,
    HEAD_LABEL,
    HEALTH_LABEL,
    LAST_UPDATE_TIMESTAMP,
    NONFINITE_GRADIENTS,
    RUN_LABEL,
    SKIPPED_GRADIENT_STEPS,
    UPDATES,
)
from mixin.config import MixinConfig
from mixin.promql import IDENTITY, gradient_cv, per_run, quoted, select

CV_ALERT = "PPOGradientCVHigh"
WARNING, CRITICAL, INFO = "warning", "critical", "info"

CRITICAL_STEP_SHARE = 0.1  # of the gradient steps in the window
SKIPPED_STEP_SHARE = 0.5  # from here on training has in effect ended
STARVED_PART = 0.1  # of an equal part of the gradient
STALLED_SECONDS = 300


@dataclass(frozen=True)
class Alert:
    """One condition at one depth. Durations are in seconds.

    Attributes:
        name: name of the alert, and of its runbook; the same at every severity.
        severity: warning, critical or info.
        value: PromQL of what is measured, one sample per run (and head).
        condition: comparison that `value` must meet, such as `>= 0.5`.
        hold: for how long it must be met before the alert fires (Prometheus' `for`).
        keep: for how long it keeps firing afterwards, so that flapping is one alert (`keep_firing_for`).
        summary, description: annotation templates of Prometheus.
        grafana_summary: the summary as a template of Grafana, for alerts that Grafana evaluates as
            well. It holds no dollar sign: Grafana expands those while it provisions.
    """

    name: str
    severity: str
    value: str
    condition: str
    hold: int
    keep: int
    summary: str
    description: str
    grafana_summary: str | None = None

    @property
    def expression(self) -> str:
        return f"{self.value} {self.condition}"


def duration(seconds: int) -> str:
    """`seconds` as Prometheus writes a duration: 90 -> 90s, 300 -> 5m."""
    return f"{seconds // 60}m" if seconds % 60 == 0 else f"{seconds}s"


_VALUE = '{{ printf "%.3f" $value }}'
_RUN = f"run {{{{ $labels.{RUN_LABEL} }}}}"
_NONFINITE = (
    '{{ if eq (printf "%.3f" $value) "+Inf" }} A gradient was NaN or infinite'
    f"{{{{ range printf `topk(1, increase({NONFINITE_GRADIENTS.name}"
    f"{{job=%q, instance=%q, {RUN_LABEL}=%q}}[10m]) > 0)` $labels.job $labels.instance $labels.{RUN_LABEL} | query }}}}"
    f", in head {{{{ .Labels.{HEAD_LABEL} }}}}{{{{ end }}}}"
    ".{{ end }}"
)
# Looked up when the alert is evaluated. Without a result, or when every share is zero, it says nothing.
_DOMINATING_HEAD = (
    f"{{{{ range printf `topk(1, {HEAD_GRADIENT_SHARE.name}{{job=%q, instance=%q, {RUN_LABEL}=%q}})` "
    f"$labels.job $labels.instance $labels.{RUN_LABEL} | query }}}}"
    f"{{{{ if gt (value .) 0.0 }}}} Head {{{{ .Labels.{HEAD_LABEL} }}}} dominates with a share of "
    '{{ printf "%.3f" (value .) }} of the gradient norms.{{ end }}{{ end }}'
)


def alerts(config: MixinConfig) -> list[Alert]:
    """Every alert, in the order in which the rules file lists them."""
    job = f"job={quoted(config.job)}"
    cv = gradient_cv(job)

    def increase(family, minutes: int, matchers: str = job) -> str:
        return f"increase({select(family, matchers)}[{minutes}m])"

    def new_steps(family) -> str:
        """Increase in ten minutes; a young process' counter that is above zero when it is first seen counts whole."""
        counter = select(family, job)
        young = f"time() - process_start_time_seconds{{{job}}} < 600"
        return (
            f"({increase(family, 10)} > 0 or ({counter} unless {counter} offset 10m) and on (job, instance) ({young}))"
        )

    critical_steps = increase(GRADIENT_STEPS, 10, f"{job}, {HEALTH_LABEL}={quoted(HealthLevel.CRITICAL)}")
    all_steps = per_run("sum", increase(GRADIENT_STEPS, 10))
    share = select(HEAD_GRADIENT_SHARE, job)
    updates = select(UPDATES, job)
    head = f"$labels.{HEAD_LABEL}"
    where = f"{{{{ if {head} }}}}of head {{{{ {head} }}}}{{{{ else }}}}of the trunk or the value head{{{{ end }}}}"

    return [
        # The warning keeps firing for less long: outliving its critical alert, it would be let go by the
        # inhibition and notify after everything is well again.
        _cv_high(cv, HealthLevel.WARNING, WARNING, WARNING_THRESHOLD, hold=300, keep=120),
        _cv_high(cv, HealthLevel.CRITICAL, CRITICAL, CRITICAL_THRESHOLD, hold=60, keep=180),
        Alert(
            "PPOCriticalGradientSteps",
            WARNING,
            # What the sustained alert has told already is not told again when it resolves.
            f"({per_run('sum', critical_steps)} / {all_steps} unless on ({IDENTITY}) "
            f'max_over_time(ALERTS{{alertname="{CV_ALERT}", severity="{CRITICAL}", alertstate="firing", {job}}}[10m]))',
            f">= {CRITICAL_STEP_SHARE}",
            hold=120,
            keep=120,
            summary=f"Share {_VALUE} of the gradient steps of {_RUN} is critical",
            description=f"In the last 10 minutes a share of {_VALUE} of the gradient steps of {_RUN} had a gradient "
            f"CV of at least {CRITICAL_THRESHOLD}; the mean of an update may hide such spikes.{_DOMINATING_HEAD}",
        ),
        Alert(
            "PPONonFiniteGradients",
            WARNING,
            # Per head, and once for the run when steps were skipped although every head was finite.
            f"({new_steps(NONFINITE_GRADIENTS)} > 0 or "
            f"({new_steps(SKIPPED_GRADIENT_STEPS)} unless on ({IDENTITY}) {new_steps(NONFINITE_GRADIENTS)} > 0))",
            "> 0",
            hold=0,
            keep=300,
            summary=f"Non-finite gradients {where} in {_RUN}",
            description=f'In about {{{{ printf "%.0f" $value }}}} gradient steps of the last 10 minutes a gradient '
            f"{where} of {_RUN} was NaN or infinite.",
        ),
        Alert(
            "PPONonFiniteGradients",
            CRITICAL,
            f"{per_run('sum', increase(SKIPPED_GRADIENT_STEPS, 5))} / {per_run('sum', increase(GRADIENT_STEPS, 5))}",
            f">= {SKIPPED_STEP_SHARE}",
            hold=60,
            keep=120,
            summary=f"Share {_VALUE} of the gradient steps of {_RUN} was skipped",
            description=f"In the last 5 minutes a share of {_VALUE} of the gradient steps of {_RUN} did not touch the "
            f"weights because a gradient was NaN or infinite: the run has all but stopped learning.{_DOMINATING_HEAD}",
        ),
        Alert(
            "PPOHeadStarved",
            WARNING,
            f"{share} * on ({IDENTITY}) group_left () {per_run('count', share)}",
            f"< {STARVED_PART}",
            hold=900,
            keep=120,
            summary=f"Head {{{{ {head} }}}} of {_RUN} is starved of gradient",
            description=f"For {duration(900)} head {{{{ {head} }}}} of {_RUN} has received {_VALUE} of an equal part "
            f"of the gradient norms (alert below {STARVED_PART}).{_DOMINATING_HEAD}",
        ),
        Alert(
            "PPOTrainerDown",
            CRITICAL,
            f"up{{{job}}}",
            "== 0",
            hold=60,
            keep=0,
            summary=f"Trainer of {_RUN} is down",
            description=f"Prometheus has not been able to scrape {{{{ $labels.instance }}}} ({_RUN}) for "
            f"{duration(60)}, and the trainer has not said goodbye by removing its scrape target.",
        ),
        Alert(
            "PPOTrainingStalled",
            WARNING,
            # Before the first update there is no time of the last one; such a run has the value 0.
            f"(time() - {select(LAST_UPDATE_TIMESTAMP, job)} > {STALLED_SECONDS} or "
            f"{updates} == 0 and {updates} offset {duration(STALLED_SECONDS)} == 0)",
            ">= 0",
            hold=0,
            keep=0,
            summary=f"No PPO update in {_RUN} {{{{ if $value }}}}for {{{{ humanizeDuration $value }}}}{{{{ else }}}}"
            "since it started{{ end }}",
            description=f"The trainer of {_RUN} answers, but {{{{ if $value }}}}its last PPO update ended {_VALUE} "
            f"seconds ago (alert above {STALLED_SECONDS}){{{{ else }}}}has not completed its first PPO update in "
            f"{duration(STALLED_SECONDS)}{{{{ end }}}}.",
        ),
        Alert(
            "PPOCriticalThresholdUnreachable",
            INFO,
            select(GRADIENT_CV_CEILING, job),
            f"<= {CRITICAL_THRESHOLD}",
            hold=300,
            keep=0,
            summary=f"Gradient CV of {_RUN} cannot exceed {_VALUE}",
            description=f"With the heads that contribute to it, the gradient CV of {_RUN} cannot exceed {_VALUE}: it "
            f"cannot rise above the critical threshold of {CRITICAL_THRESHOLD}, so do not wait for a critical alert.",
        ),
    ]


def _cv_high(cv: str, level: HealthLevel, severity: str, threshold: float, *, hold: int, keep: int) -> Alert:
    """No upper bound on the warning: rising to critical must not resolve it."""
    return Alert(
        CV_ALERT,
        severity,
        cv,
        f">= {threshold}",
        hold=hold,
        keep=keep,
        summary=f"Gradient CV {_VALUE} is {level.word} in {_RUN}",
        description=f"The gradient CV of {_RUN} is {_VALUE} and has been at least {threshold} ({level}) for "
        f"{duration(hold)}.{_NONFINITE}{_DOMINATING_HEAD}",
        grafana_summary=f'Gradient CV {{{{ printf "%.3f" .Values.B.Value }}}} is {level.word} in run '
        f"{{{{ .Labels.{RUN_LABEL} }}}}",
    )


def prometheus_rules(config: MixinConfig) -> dict:
    """Content of the rules file."""
    return {"groups": [{"name": "ppo", "rules": [_prometheus_rule(alert, config) for alert in alerts(config)]}]}


def _prometheus_rule(alert: Alert, config: MixinConfig) -> dict:
    rule: dict = {"alert": alert.name, "expr": alert.expression}
    if alert.hold:
        rule["for"] = duration(alert.hold)
    if alert.keep:
        rule["keep_firing_for"] = duration(alert.keep)
    # Alertmanager tells by `evaluator` which of two equal alerts to keep quiet.
    rule["labels"] = {"severity": alert.severity, "evaluator": "prometheus"}
    rule["annotations"] = {
        "summary": alert.summary,
        "description": alert.description,
        "runbook_url": config.runbook_url(alert.name),
    }
    return rule
