"""Unit tests of the Prometheus rules for `promtool test rules`.

Inputs, expected values and texts are written out, so that a wrong rule cannot make its own test agree.
Only names, addresses, thresholds and times come from the configuration; what a time means stands here a
second time, in `_course`.
"""

import math
from collections.abc import Iterable, Sequence
from urllib.parse import quote_plus

from exporter.health import HealthLevel
from exporter.metrics import (
    ENVIRONMENT_STEPS,
    GRADIENT_CV,
    GRADIENT_CV_CEILING,
    GRADIENT_CV_PER_STEP,
    GRADIENT_STEPS,
    HEAD_GRADIENT_SHARE,
    LAST_UPDATE_TIMESTAMP,
    NONFINITE_GRADIENTS,
    RESUMES,
    SKIPPED_GRADIENT_STEPS,
    UPDATES,
    MetricFamily,
)
from mixin.alerts import PROMPT_GROUP, SLOW_GROUP, alerts
from mixin.config import (
    CRITICAL_STEPS,
    CV_CRITICAL,
    CV_WARNING,
    DOWN,
    NONFINITE,
    SKIPPED,
    STALLED,
    STARVED,
    UNREACHABLE,
    AlertKey,
    MixinConfig,
    Timing,
    duration,
)
from mixin.promql import (
    CRITICAL_STEPS_RECORD,
    CV_RECORD,
    DOMINATING_HEAD_RECORD,
    ENVIRONMENT_STEPS_RECORD,
    LEVEL_RECORD,
    NONFINITE_RECORD,
    quoted,
)

RUN = {"instance": "127.0.0.1:9842", "run": "demo"}
STEP = 30  # seconds between samples, and between evaluations
IN_VIEW = {CV_WARNING, CV_CRITICAL, CRITICAL_STEPS, UNREACHABLE}  # their links open the panel of the CV


def rule_tests(config: MixinConfig) -> dict:
    """Content of the test file, which lies beside the rules."""
    return {
        "rule_files": ["ppo.rules.yml"],
        "evaluation_interval": duration(STEP),
        "group_eval_order": [PROMPT_GROUP, SLOW_GROUP],
        "tests": _Tests(config).all(),
    }


def _steps(seconds: int) -> int:
    """Number of the first sample that is not before `seconds`."""
    return math.ceil(seconds / STEP)


def _course(met: Sequence[bool], timing: Timing) -> list[str | None]:
    """State of an alert at every evaluation, given where its condition is met: None, pending or firing."""
    states: list[str | None] = []
    since = quiet_since = None
    for now, is_met in enumerate(met):
        was = states[-1] if states else None
        if is_met:
            since, quiet_since = (now if was is None else since), None
            states.append("firing" if was == "firing" or (now - since) * STEP >= timing.hold else "pending")
        else:
            quiet_since = now if quiet_since is None else quiet_since
            states.append("firing" if was == "firing" and (now - quiet_since) * STEP < timing.keep else None)
    return states


class _Tests:
    def __init__(self, config: MixinConfig) -> None:
        self._config = config
        self._run = {"job": config.job, **RUN}
        self._warning, self._critical = config.warning_threshold, config.critical_threshold
        self._between = round((self._warning + self._critical) / 2, 3)
        self._above = round(self._critical + 0.5, 3)
        self._below = round(self._warning / 2, 3)

    def all(self) -> list[dict]:
        return [
            *self._records(),
            *self._cv_boundaries(),
            *self._cv_over_time(),
            *self._cv_texts(),
            *self._critical_steps(),
            *self._nonfinite(),
            *self._skipped(),
            *self._starved(),
            *self._down(),
            *self._stalled(),
            *self._unreachable(),
        ]

    def _hold(self, key: AlertKey) -> int:
        return _steps(self._config.timing(key).hold)

    def _keep(self, key: AlertKey) -> int:
        return _steps(self._config.timing(key).keep)

    def _hold_text(self, key: AlertKey) -> str:
        return duration(self._config.timing(key).hold)

    def _series(self, family: MetricFamily | str, values: str, **labels: str) -> dict:
        name = family if isinstance(family, str) else family.name
        return {"series": _label_text({"__name__": name, **self._run, **labels}), "values": values}

    def _cv(self, *spans: tuple[float, int], **labels: str) -> list[dict]:
        """The gauge over spans of (CV, samples): each level is a series, which goes stale when the level changes."""
        cvs = _flat(spans)
        current = [HealthLevel.of(cv) for cv in cvs]
        series = []
        for level in sorted(set(current)):
            values = []
            for step, cv in enumerate(cvs):
                gone = step > 0 and current[step - 1] == level
                values.append(f"{cv}".replace("inf", "Inf") if current[step] == level else "stale" if gone else "_")
            series.append(self._series(GRADIENT_CV, " ".join(values), health=level, **labels))
        return series

    def _test(self, name: str, series: list[dict], *expectations: dict) -> dict:
        """A test with one sample of each series a step."""
        test: dict = {"name": name, "interval": duration(STEP), "input_series": series}
        for expectation in expectations:
            kind = "promql_expr_test" if "expr" in expectation else "alert_rule_test"
            test.setdefault(kind, []).append(expectation)
        return test

    def _result(self, step: int, expression: str, *samples: tuple[dict[str, str], float]) -> dict:
        return {
            "expr": expression,
            "eval_time": duration(step * STEP),
            "exp_samples": [{"labels": _label_text({**self._run, **more}), "value": value} for more, value in samples],
        }

    def _states(self, step: int, alert: str, *expected: dict[str, str]) -> dict:
        """Every alert of this name that is pending or firing: severity and state, and what else it carries."""
        always = {"__name__": "ALERTS", "alertname": alert, "evaluator": "prometheus", "alertstate": "firing"}
        return self._result(step, f'ALERTS{{alertname="{alert}"}}', *(({**always, **labels}, 1) for labels in expected))

    def _state(self, step: int, key: AlertKey, state: str | None = "firing", **labels: str) -> dict:
        """State of an alert of which no other severity is active."""
        return self._states(
            step, key.name, *([{"severity": key.severity, "alertstate": state, **labels}] if state else [])
        )

    def _courses(self, met: dict[AlertKey, Sequence[bool]], **labels: str) -> list[dict]:
        """At each change, and before it, the states of all these alerts, which share a name."""
        states = {key: _course(flags, self._config.timing(key)) for key, flags in met.items()}
        (name,) = {key.name for key in met}
        count = len(next(iter(states.values())))
        changes = {step for course in states.values() for step in range(1, count) if course[step] != course[step - 1]}
        return [
            self._states(
                step,
                name,
                *(
                    {"severity": key.severity, "alertstate": course[step], **labels}
                    for key, course in states.items()
                    if course[step]
                ),
            )
            for step in sorted({0, *changes, *(step - 1 for step in changes), count - 1})
        ]

    def _text(self, step: int, key: AlertKey, summary: str, description: str, **labels: str) -> dict:
        return self._texts(step, [(key, summary, description, labels)])

    def _texts(self, step: int, firing: Iterable[tuple[AlertKey, str, str, dict[str, str]]]) -> dict:
        return {
            "alertname": next(iter(firing))[0].name,
            "eval_time": duration(step * STEP),
            "exp_alerts": [
                {
                    "exp_labels": {"severity": key.severity, "evaluator": "prometheus", **self._run, **labels},
                    "exp_annotations": {
                        "summary": summary,
                        "description": description,
                        "dashboard_url": self._dashboard_url(key, labels),
                        "runbook_url": self._config.runbook_url(key.name),
                    },
                }
                for key, summary, description, labels in firing
            ],
        }

    def _dashboard_url(self, key: AlertKey, labels: dict[str, str]) -> str:
        values = {**self._run, **labels}
        variables = "&".join(f"var-{name}={quote_plus(values[name])}" for name in ("job", "instance", "run"))
        view = "viewPanel=10&" if key in IN_VIEW else ""
        return f"{self._config.grafana_url.rstrip('/')}/d/ppo-gradient-health?{view}{variables}"

    def _shares(self, length: int, **shares: float) -> list[dict]:
        return [self._series(HEAD_GRADIENT_SHARE, f"{share}x{length}", head=head) for head, share in shares.items()]

    def _gradient_steps(self, **spans: Sequence[tuple[int, int]]) -> list[dict]:
        """Counters of gradient steps over spans of (steps of that level in each interval, intervals)."""
        length = max(sum(count for _, count in each) for each in spans.values())
        per_level = [_flat(spans.get(level, [(0, length)])) for level in HealthLevel]
        if self._config.uses_exporter_levels:
            return [
                self._series(GRADIENT_STEPS, _counter(increments), health=level)
                for level, increments in zip(HealthLevel, per_level, strict=True)
            ]
        # The exporter's own levels are others: only the buckets tell.
        up_to = [per_level[0], list(map(sum, zip(*per_level[:2], strict=True)))]
        up_to.append(list(map(sum, zip(*per_level, strict=True))))
        bounds = (f"{self._warning}", f"{self._critical}", "+Inf")
        return [
            self._series(GRADIENT_STEPS, _counter(up_to[-1]), health="healthy"),
            *(
                self._series(f"{GRADIENT_CV_PER_STEP.name}_bucket", _counter(increments), le=bound)
                for bound, increments in zip(bounds, up_to, strict=True)
            ),
        ]

    def _records(self) -> list[dict]:
        heads = self._shares(60, slot=0.25, op=0.75) + self._shares(60, curve=0.0)
        return [
            self._test(
                "recorded series are there before the alerts, without the level's label",
                [
                    *self._cv((self._below, 10), (self._between, 10), (self._critical, 41)),
                    *heads,
                    *self._gradient_steps(healthy=[(75, 60)], critical=[(25, 60)]),
                    self._series(ENVIRONMENT_STEPS, "0+300x60"),
                    self._series(NONFINITE_GRADIENTS, "0x40 2x20", head="op"),
                ],
                self._result(5, CV_RECORD, ({"__name__": CV_RECORD}, self._below)),
                *(
                    self._result(step, LEVEL_RECORD, ({"__name__": LEVEL_RECORD}, level))
                    for step, level in ((5, 0), (15, 1), (25, 2))
                ),
                self._result(30, DOMINATING_HEAD_RECORD, ({"__name__": DOMINATING_HEAD_RECORD, "head": "op"}, 0.75)),
                self._result(30, f"round({CRITICAL_STEPS_RECORD}, 0.001)", ({}, 0.25)),
                self._result(30, NONFINITE_RECORD),
                self._result(45, NONFINITE_RECORD, ({"__name__": NONFINITE_RECORD, "head": "op"}, 2)),
                self._result(30, ENVIRONMENT_STEPS_RECORD, ({"__name__": ENVIRONMENT_STEPS_RECORD}, 10)),
            ),
            self._test(
                "no head dominates where none has a gradient",
                self._shares(10, slot=0.0, op=0.0),
                self._result(5, DOMINATING_HEAD_RECORD),
            ),
        ]

    def _cv_boundaries(self) -> list[dict]:
        step = max(self._hold(CV_WARNING), self._hold(CV_CRITICAL)) + 1
        warning, critical = {"severity": "warning"}, {"severity": "critical"}
        cases = [
            (round(self._warning - 0.001, 3), []),
            (self._warning, [warning]),
            (round(self._critical - 0.001, 3), [warning]),
            (self._critical, [warning, critical]),
            (math.inf, [warning, critical]),
        ]
        return [
            self._test(
                f"a CV of {cv} fires {' and '.join(labels['severity'] for labels in expected) or 'nothing'}",
                self._cv((cv, step + 1)),
                self._states(step, CV_WARNING.name, *expected),
            )
            for cv, expected in cases
        ]

    def _cv_course(self, name: str, *spans: tuple[float, int]) -> dict:
        cvs = _flat(spans)
        met = {
            CV_WARNING: [cv >= self._warning for cv in cvs],
            CV_CRITICAL: [cv >= self._critical for cv in cvs],
        }
        return self._test(name, self._cv(*spans), *self._courses(met))

    def _cv_over_time(self) -> list[dict]:
        low, middle, high = self._below, self._between, self._above
        hold, keep = max(self._hold(CV_WARNING), self._hold(CV_CRITICAL)), self._keep(CV_CRITICAL)
        flapping = [(middle, 1), (high, 1)] * 3 + [(low, 1), (high, 1)] * 2
        return [
            self._cv_course("nothing fires before its time", (high, hold + 10)),
            self._cv_course(
                "a change of level while the alert is pending does not reset it",
                *((low, 2), (middle, 2), (high, 2), (middle, 1), (high, hold + 10)),
            ),
            self._cv_course(
                "rising to critical does not resolve the warning; falling back resolves only the critical alert",
                *((middle, hold + 4), (high, hold + 10), (middle, keep + 10)),
            ),
            self._cv_course(
                # The warning ends first: left alone it would no longer be inhibited, and notify.
                "flapping around the thresholds is one alert of each severity, which resolve once it is quiet",
                *((high, hold + 4), *flapping, (low, keep + 10)),
            ),
        ]

    def _cv_alerts(self, value: str, context: str, **labels: str) -> list[tuple[AlertKey, str, str, dict[str, str]]]:
        run = labels.get("run", "demo")
        return [
            (
                key,
                f"Gradient CV {value} is {word} in run {run}",
                (
                    f"The gradient CV of run {run} is {value} and has been at least {threshold} ({key.severity}) for "
                    f"{self._hold_text(key)}.{context}"
                ),
                labels,
            )
            for key, word, threshold in (
                (CV_WARNING, "warn", self._warning),
                (CV_CRITICAL, "BAD", self._critical),
            )
        ]

    def _cv_texts(self) -> list[dict]:
        step = max(self._hold(CV_WARNING), self._hold(CV_CRITICAL)) + 1
        awkward = 'it\'s "a {{ run }}" \\ä & b'
        value = f"{self._above:.3f}"
        return [
            self._test(
                "CV alerts name value, run and the head that dominates",
                [*self._cv((self._above, step + 1)), *self._shares(step, slot=0.05, blueprint=0.9, op=0.05)],
                self._texts(
                    step,
                    self._cv_alerts(value, " Head blueprint dominates with a share of 0.900 of the gradient norms."),
                ),
            ),
            self._test(
                "a run may have any name",
                [
                    *self._cv((self._above, step + 1), run=awkward),
                    self._series(HEAD_GRADIENT_SHARE, f"0.9x{step}", head="op", run=awkward),
                    *self._shares(step, slot=1.0),
                ],
                self._texts(
                    step,
                    self._cv_alerts(
                        value, " Head op dominates with a share of 0.900 of the gradient norms.", run=awkward
                    ),
                ),
            ),
            self._test(
                "a CV of +Inf names the head that was not finite",
                [*self._cv((math.inf, step + 1)), self._series(NONFINITE_GRADIENTS, f"0+5x{step}", head="op")],
                self._texts(step, self._cv_alerts("+Inf", " A gradient was NaN or infinite, in head op.")),
            ),
            self._test(
                "a CV of +Inf without any share is still described",
                self._cv((math.inf, step + 1)),
                self._texts(step, self._cv_alerts("+Inf", " A gradient was NaN or infinite.")),
            ),
        ]

    def _critical_steps(self) -> list[dict]:
        share = self._config.critical_step_share
        enough, few = min(1000, round(1000 * share) + 1), max(0, round(1000 * share) - 1)
        step = _steps(600) + self._hold(CRITICAL_STEPS) + 2
        sustained, quiet = self._hold(CV_CRITICAL) + 6, self._keep(CV_CRITICAL) + 2 * _steps(600)
        from_critical = "of at least" if self._config.uses_exporter_levels else "above"
        raw = next(alert.raw_value for alert in alerts(self._config) if alert.key == CRITICAL_STEPS)
        return [
            self._test(
                "critical steps warn although no scrape saw a high mean",
                [
                    *self._gradient_steps(healthy=[(1000 - enough, step)], critical=[(enough, step)]),
                    *self._cv((self._below, step + 1)),
                    *self._shares(step, slot=0.25, op=0.75),
                ],
                self._states(step, CV_WARNING.name),
                self._text(
                    step,
                    CRITICAL_STEPS,
                    f"Share {enough / 1000:.3f} of the gradient steps of run demo is critical",
                    f"In the last 10 minutes a share of {enough / 1000:.3f} of the gradient steps of run demo had a "
                    f"gradient CV {from_critical} {self._critical}; the mean of an update may hide such spikes."
                    f" Gradient CV {self._below:.3f} stable."
                    " Head op dominates with a share of 0.750 of the gradient norms.",
                ),
                # What Grafana evaluates sees the same.
                self._result(step, f"round({raw}, 0.001)", ({}, enough / 1000)),
            ),
            self._test(
                "what the sustained alert has told is not told again when it has resolved",
                [
                    *self._cv((self._above, sustained), (self._below, quiet)),
                    *self._gradient_steps(
                        healthy=[(0, sustained), (100, quiet)], critical=[(100, sustained), (0, quiet)]
                    ),
                ],
                self._states(
                    sustained,
                    CV_WARNING.name,
                    *(
                        {"severity": key.severity, "alertstate": "firing"}
                        for key in (CV_WARNING, CV_CRITICAL)
                        if self._hold(key) <= sustained - 1
                    ),
                ),
                *(self._state(at, CRITICAL_STEPS, None) for at in range(sustained, sustained + quiet, 4)),
            ),
            self._test(
                "fewer critical steps, or no steps at all, are silent",
                self._gradient_steps(healthy=[(1000 - few, step), (0, step)], critical=[(few, step), (0, step)]),
                self._state(step - 1, CRITICAL_STEPS, None),
                self._state(2 * step - 1, CRITICAL_STEPS, None),
            ),
        ]

    def _nonfinite(self) -> list[dict]:
        hold, keep, window = self._hold(NONFINITE), self._keep(NONFINITE), _steps(600)
        long = 2 * window + keep
        once, twice = [False] * 10 + [True] * window, [False] * 10 + [True] * (window + 12)
        text = "gradient steps of the last 10 minutes a gradient"
        # In each interval, so that a few skipped ones are no critical share of them.
        steps = math.ceil(10 / self._config.skipped_step_share)
        return [
            self._test(
                "a non-finite step of one head names that head, and only it",
                [
                    *self._gradient_steps(healthy=[(steps, long)]),
                    self._series(NONFINITE_GRADIENTS, f"0x9 3x{long}", head="op"),
                    self._series(NONFINITE_GRADIENTS, f"0x{long}", head="slot"),
                    self._series(SKIPPED_GRADIENT_STEPS, f"0x9 3x{long}"),
                ],
                *self._courses({NONFINITE: [*once, *[False] * (keep + 4)]}, head="op"),
            ),
            self._test(
                "one now and then is one alert",
                [self._series(NONFINITE_GRADIENTS, f"0x9 1x11 2x{long}", head="op")],
                *self._courses({NONFINITE: [*twice, *[False] * (keep + 4)]}, head="op"),
            ),
            self._test(
                "steps skipped with all heads finite point at trunk or value head",
                [
                    *self._gradient_steps(healthy=[(steps, 60)]),
                    *self._cv((self._between, 61)),
                    self._series(NONFINITE_GRADIENTS, "0x60", head="op"),
                    self._series(SKIPPED_GRADIENT_STEPS, "0+1x60"),
                ],
                self._text(
                    40,
                    NONFINITE,
                    "Non-finite gradients of the trunk or the value head in run demo",
                    f"In about 20 {text} of the trunk or the value head of run demo was NaN or infinite. Gradient CV "
                    f"{self._between:.3f} warn.",
                ),
            ),
            self._test(
                "a counter that is above zero at the first scrape counts, for ten minutes",
                [
                    self._series(NONFINITE_GRADIENTS, f"4x{long}", head="op"),
                    self._series("process_start_time_seconds", f"0x{long}"),
                ],
                self._text(
                    hold + 1,
                    NONFINITE,
                    "Non-finite gradients of head op in run demo",
                    f"In about 4 {text} of head op of run demo was NaN or infinite.",
                    head="op",
                ),
                self._state(window + keep + 1, NONFINITE, None),
            ),
            self._test(
                "a run that is continued from a checkpoint brings an old count along",
                [
                    self._series(NONFINITE_GRADIENTS, f"4x{window} 5x{long}", head="op"),
                    self._series(SKIPPED_GRADIENT_STEPS, f"4x{window} 5x{long}"),
                    self._series(RESUMES, f"1x{window + long}"),
                    self._series("process_start_time_seconds", f"0x{window + long}"),
                ],
                *(self._state(at, NONFINITE, None) for at in range(0, window, 2)),
                self._state(window + hold + 2, NONFINITE, head="op"),
            ),
            self._test(
                "an old count that comes back after a gap is not news",
                [
                    self._series(NONFINITE_GRADIENTS, f"4x{long} _x40 4x{long}", head="op"),
                    self._series("process_start_time_seconds", f"0x{long} _x40 0x{long}"),
                ],
                *(self._state(step, NONFINITE, None) for step in range(long, 2 * long + 40, 4)),
            ),
        ]

    def _skipped(self) -> list[dict]:
        share = self._config.skipped_step_share
        enough, few = min(1000, round(1000 * share) + 1), max(0, round(1000 * share) - 1)
        step = _steps(600) + max(self._hold(SKIPPED), self._hold(NONFINITE)) + 2

        def series(skipped: int) -> list[dict]:
            return [
                *self._gradient_steps(critical=[(1000, step)]),
                self._series(NONFINITE_GRADIENTS, f"0+{skipped}x{step}", head="op"),
                self._series(SKIPPED_GRADIENT_STEPS, f"0+{skipped}x{step}"),
            ]

        return [
            self._test(
                "so many steps skipped are critical",
                [*series(enough), *self._cv((math.inf, step + 1)), *self._shares(step, slot=0.0, op=1.0)],
                self._texts(
                    step,
                    [
                        (
                            NONFINITE,
                            "Non-finite gradients of head op in run demo",
                            (
                                f"In about {20 * enough} gradient steps of the last 10 minutes a gradient of head op "
                                "of run demo was NaN or infinite. Gradient CV +Inf BAD."
                            ),
                            {"head": "op"},
                        ),
                        (
                            SKIPPED,
                            f"Share {enough / 1000:.3f} of the gradient steps of run demo was skipped",
                            (
                                f"In the last 5 minutes a share of {enough / 1000:.3f} of the gradient steps of run "
                                "demo did not touch the weights because a gradient was NaN or infinite: the run has all "
                                "but stopped learning. Gradient CV +Inf BAD. Head op dominates with a share of 1.000 of "
                                "the gradient norms."
                            ),
                            {},
                        ),
                    ],
                ),
            ),
            self._test(
                "fewer are a warning",
                series(few),
                self._state(step, NONFINITE, "firing" if few else None, head="op"),
            ),
        ]

    def _starved(self) -> list[dict]:
        part, hold, keep = self._config.starved_part, self._hold(STARVED), self._keep(STARVED)
        small = round(0.2 * part, 6)
        op = round((1 - small) / 2 + 0.01, 6)
        shares = {"slot": small, "op": op, "curve": round(1 - small - op, 6)}
        low, high = f"{small}x{hold + 1}", round(0.51 * part, 6)
        flapping = [True] * (hold + 2) + [False, True] * 3 + [False] * (keep + 4)
        return [
            self._test(
                "a head far below an equal part is named after its time",
                [*self._shares(hold + 1, **shares), *self._cv((self._between, hold + 2))],
                *([self._state(hold - 1, STARVED, "pending", head="slot")] if hold else []),
                self._text(
                    hold,
                    STARVED,
                    "Head slot of run demo is starved of gradient",
                    f"For {self._hold_text(STARVED)} head slot of run demo has received {3 * small:.3f} of an equal "
                    f"part of the gradient norms (alert below {part}). Gradient CV {self._between:.3f} warn. Head op "
                    f"dominates with a share of {shares['op']:.3f} of the gradient norms.",
                    head="slot",
                ),
            ),
            self._test(
                "when no head has any gradient all are starved, and none dominates",
                self._shares(hold + 1, slot=0.0, op=0.0),
                self._texts(
                    hold,
                    [
                        (
                            STARVED,
                            f"Head {head} of run demo is starved of gradient",
                            (
                                f"For {self._hold_text(STARVED)} head {head} of run demo has received 0.000 of an "
                                f"equal part of the gradient norms (alert below {part})."
                            ),
                            {"head": head},
                        )
                        for head in ("slot", "op")
                    ],
                ),
            ),
            self._test(
                "recovering for a moment does not end it",
                [
                    self._series(
                        HEAD_GRADIENT_SHARE,
                        f"{low} {' '.join([str(high), str(small)] * 3)} {high}x{keep + 4}",
                        head="slot",
                    ),
                    *self._shares(len(flapping), op=0.9),
                ],
                *self._courses({STARVED: flapping}, head="slot"),
            ),
            self._test(
                "a head exactly at the limit, and a single head, are silent",
                [
                    *self._shares(hold + 4, slot=part / 2, op=1 - part / 2),
                    self._series(HEAD_GRADIENT_SHARE, f"1x{hold + 4}", run="single", head="action"),
                ],
                self._state(hold + 3, STARVED, None),
            ),
        ]

    def _down(self) -> list[dict]:
        hold, keep = self._hold(DOWN), self._keep(DOWN)
        crashed = [False] * 10 + [True] * (hold + 4) + [False] * (keep + 4)
        looping = [False] * 4 + [True] * (hold + 2) + [False, True, True] * 3 + [False] * (keep + 4)
        return [
            self._test(
                "a trainer that cannot be scraped is down; one that has removed its target is not",
                [self._series("up", f"1x9 0x{hold + 3} stale")],
                *self._courses({DOWN: crashed}),
                self._text(
                    10 + hold,
                    DOWN,
                    "Trainer of run demo is down",
                    f"Prometheus has not been able to scrape 127.0.0.1:9842 (run demo) for {self._hold_text(DOWN)}, "
                    "and the trainer has not said goodbye by removing its scrape target.",
                ),
            ),
            self._test(
                "a crash loop is one alert",
                [self._series("up", " ".join("0" if down else "1" for down in looping))],
                *self._courses({DOWN: looping}),
            ),
            self._test(
                "a trainer that is up, and other jobs, are none of its business",
                [
                    self._series("up", f"1x{hold + 9}"),
                    {
                        "series": _label_text({"__name__": "up", "job": f"not {self._config.job}", "run": "x"}),
                        "values": f"0x{hold + 9}",
                    },
                ],
                self._state(hold + 8, DOWN, None),
            ),
        ]

    def _stalled(self) -> list[dict]:
        limit, hold, keep = self._config.stalled_seconds, self._hold(STALLED), self._keep(STALLED)
        late = (60 + limit) // STEP + 1  # the first sample at which an update at 60 s is older than the limit
        age = (late + hold) * STEP - 60
        never = _steps(limit)
        # Each update comes a little later than the limit allows.
        pause = _steps(limit) + 2
        updated = [step // pause * pause * STEP for step in range(4 * pause)]
        updated += [step * STEP for step in range(4 * pause, 4 * pause + keep + 4)]
        slow = [step * STEP - at > limit for step, at in enumerate(updated)]
        return [
            self._test(
                "a last update within the limit is in time, one longer ago is stalled",
                [self._series(LAST_UPDATE_TIMESTAMP, f"60x{late + hold}"), self._series(UPDATES, f"1x{late + hold}")],
                self._state(late - 1, STALLED, None),
                self._text(
                    late + hold,
                    STALLED,
                    f"No PPO update in run demo for {_spoken(age)}",
                    f"Run demo ended its last PPO update {age}.000 seconds ago (alert above"
                    f" {limit}).",
                ),
            ),
            self._test(
                "a trainer without a first update is stalled after the same time",
                [self._series(UPDATES, f"0x{never + hold}")],
                self._state(never - 1, STALLED, None),
                self._text(
                    never + hold,
                    STALLED,
                    "No PPO update in run demo since it started",
                    "Run demo has not completed any PPO update since it started, more than "
                    f"{duration(limit)} ago.",
                ),
            ),
            self._test(
                "a trainer that was continued from a checkpoint counts from then on",
                [
                    self._series(UPDATES, f"361x{4 + never + hold}"),
                    self._series(LAST_UPDATE_TIMESTAMP, f"0 {STEP} {2 * STEP} stale"),
                ],
                self._state(2 + never, STALLED, None),
                self._text(
                    3 + never + hold,
                    STALLED,
                    "No PPO update in run demo since it started",
                    "Run demo has not completed any PPO update since it started, more than "
                    f"{duration(limit)} ago.",
                ),
            ),
            self._test(
                "a run whose every update takes too long is one alert, not one an update",
                [
                    self._series(LAST_UPDATE_TIMESTAMP, " ".join(map(str, updated))),
                    self._series(UPDATES, f"1x{len(updated)}"),
                ],
                *self._courses({STALLED: slow}),
            ),
            self._test(
                "a trainer that updates is silent",
                [
                    self._series(UPDATES, f"0 1+1x{never + hold + 9}"),
                    self._series(LAST_UPDATE_TIMESTAMP, f"_ 20+30x{never + hold + 9}"),
                ],
                self._state(never + hold + 8, STALLED, None),
            ),
        ]

    def _unreachable(self) -> list[dict]:
        step = self._hold(UNREACHABLE) + 1
        low = round(self._critical - 0.25, 3)
        return [
            self._test(
                "too few heads cannot become critical",
                [self._series(GRADIENT_CV_CEILING, f"{low}x{step}")],
                self._text(
                    step,
                    UNREACHABLE,
                    f"Gradient CV of run demo cannot exceed {low:.3f}",
                    f"With the heads that contribute to it, the gradient CV of run demo cannot exceed {low:.3f}: it "
                    f"cannot rise above the critical threshold of {self._critical}, so do not wait for a critical "
                    "alert.",
                ),
            ),
            self._test(
                "a ceiling at the threshold is reached only when all but one head are exactly zero",
                [self._series(GRADIENT_CV_CEILING, f"{self._critical}x{step}")],
                self._state(step, UNREACHABLE),
            ),
            self._test(
                "a higher ceiling is silent",
                [self._series(GRADIENT_CV_CEILING, f"{self._critical + 0.25}x{step}")],
                self._state(step, UNREACHABLE, None),
            ),
        ]


def _flat(spans: Iterable[tuple[float, int]]) -> list[float]:
    return [value for value, count in spans for _ in range(count)]


def _counter(increments: Sequence[float]) -> str:
    """A counter that starts at 0 and grows by each of `increments`, in promtool's notation."""
    if len(set(increments)) == 1:
        return f"0+{increments[0]}x{len(increments)}"
    values, total = ["0"], 0
    for increment in increments:
        total += increment
        values.append(str(total))
    return " ".join(values)


def _spoken(seconds: int) -> str:
    """As Prometheus' humanizeDuration says it: 5m 30s."""
    parts = [(seconds // 86400, "d"), (seconds // 3600 % 24, "h"), (seconds // 60 % 60, "m"), (seconds % 60, "s")]
    first = next((position for position, (number, _) in enumerate(parts) if number), 3)
    return " ".join(f"{number}{unit}" for number, unit in parts[first:])


def _label_text(labels: dict[str, str]) -> str:
    pairs = ", ".join(f"{key}={quoted(value)}" for key, value in labels.items() if key != "__name__")
    return f"{labels.get('__name__', '')}{{{pairs}}}"
