"""Unit tests of the Prometheus rules for `promtool test rules`.

Inputs, times and expected texts are written out, so that a wrong rule cannot make its
own test agree. Only names and addresses come from the declarations.
"""

import math
from collections.abc import Iterable

from exporter.health import HealthLevel
from exporter.metrics import (
    GRADIENT_CV,
    GRADIENT_CV_CEILING,
    GRADIENT_STEPS,
    HEAD_GRADIENT_SHARE,
    LAST_UPDATE_TIMESTAMP,
    NONFINITE_GRADIENTS,
    SKIPPED_GRADIENT_STEPS,
    UPDATES,
    MetricFamily,
)
from mixin.config import MixinConfig
from mixin.promql import quoted

RUN = {"instance": "127.0.0.1:9842", "run": "demo"}
LEVELS = ("healthy", "warning", "critical")


def rule_tests(config: MixinConfig) -> dict:
    """Content of the test file, which lies beside the rules."""
    return {
        "rule_files": ["ppo.rules.yml"],
        "evaluation_interval": "30s",
        "tests": _Tests(config).all(),
    }


class _Tests:
    def __init__(self, config: MixinConfig) -> None:
        self._config = config
        self._run = {"job": config.job, **RUN}

    def all(self) -> list[dict]:
        return [
            *self._cv_boundaries(),
            *self._cv_over_time(),
            *self._critical_steps(),
            *self._nonfinite(),
            *self._starved(),
            *self._down_and_stalled(),
            *self._unreachable(),
        ]

    def _series(self, family: MetricFamily | str, values: str, **labels: str) -> dict:
        name = family if isinstance(family, str) else family.name
        return {"series": _label_text({"__name__": name, **self._run, **labels}), "values": values}

    def _cv(self, *spans: tuple[float, int]) -> list[dict]:
        """The gauge over spans of (CV, samples): each level is a series, which goes stale when the level changes."""
        cvs = [cv for cv, samples in spans for _ in range(samples)]
        current = [HealthLevel.of(cv) for cv in cvs]
        series = []
        for level in HealthLevel:
            values = []
            for step, cv in enumerate(cvs):
                gone = step > 0 and current[step - 1] == level
                values.append(f"{cv}".replace("inf", "Inf") if current[step] == level else "stale" if gone else "_")
            series.append(self._series(GRADIENT_CV, " ".join(values), health=level))
        return series

    def _test(self, name: str, series: list[dict], *expectations: dict) -> dict:
        """A test with one sample of each series every 30 seconds."""
        test: dict = {"name": name, "interval": "30s", "input_series": series}
        for expectation in expectations:
            kind = "promql_expr_test" if "expr" in expectation else "alert_rule_test"
            test.setdefault(kind, []).append(expectation)
        return test

    def _states(self, at: str, alert: str, *expected: dict[str, str]) -> dict:
        """Every alert of this name that is pending or firing `at`: severity and state, and what else it carries."""
        always = {"__name__": "ALERTS", "alertname": alert, "evaluator": "prometheus", **self._run}
        samples = [{**always, "alertstate": "firing", **labels} for labels in expected]
        return {
            "expr": f'ALERTS{{alertname="{alert}"}}',
            "eval_time": at,
            "exp_samples": [{"labels": _label_text(labels), "value": 1} for labels in samples],
        }

    def _text(self, at: str, alert: str, severity: str, summary: str, description: str, **labels: str) -> dict:
        return self._texts(at, alert, [(severity, summary, description, labels)])

    def _texts(self, at: str, alert: str, firing: Iterable[tuple[str, str, str, dict[str, str]]]) -> dict:
        return {
            "alertname": alert,
            "eval_time": at,
            "exp_alerts": [
                {
                    "exp_labels": {"severity": severity, "evaluator": "prometheus", **self._run, **labels},
                    "exp_annotations": {
                        "summary": summary,
                        "description": description,
                        "runbook_url": self._config.runbook_url(alert),
                    },
                }
                for severity, summary, description, labels in firing
            ],
        }

    def _shares(self, length: int = 60, **shares: float) -> list[dict]:
        return [self._series(HEAD_GRADIENT_SHARE, f"{share}x{length}", head=head) for head, share in shares.items()]

    def _cv_boundaries(self) -> list[dict]:
        warning, critical = {"severity": "warning"}, {"severity": "critical"}
        cases = [
            (0.499, []),
            (0.5, [warning]),
            (1.999, [warning]),
            (2.0, [warning, critical]),
            (math.inf, [warning, critical]),
        ]
        return [
            self._test(
                f"a CV of {cv} fires {' and '.join(labels['severity'] for labels in expected) or 'nothing'}",
                self._cv((cv, 40)),
                self._states("10m", "PPOGradientCVHigh", *expected),
            )
            for cv, expected in cases
        ]

    def _cv_over_time(self) -> list[dict]:
        alert = "PPOGradientCVHigh"
        warning, critical = {"severity": "warning"}, {"severity": "critical"}
        pending_warning, pending_critical = ({**severity, "alertstate": "pending"} for severity in (warning, critical))
        awkward = 'it\'s "a {{ run }}" \\ä'
        steep = [*self._cv((2.5, 40)), *self._shares(slot=0.05, blueprint=0.9, op=0.05)]
        return [
            self._test(
                "nothing fires before its time, and the critical alert first",
                self._cv((2.5, 40)),
                self._states("30s", alert, pending_warning, pending_critical),
                self._states("1m", alert, pending_warning, critical),
                self._states("4m30s", alert, pending_warning, critical),
                self._states("5m", alert, warning, critical),
            ),
            self._test(
                "a change of level while the alert is pending does not reset it",
                self._cv((0.2, 2), (0.7, 2), (2.5, 2), (0.7, 1), (2.5, 40)),
                self._states("5m30s", alert, pending_warning, critical),
                self._states("6m", alert, warning, critical),
            ),
            self._test(
                "rising to critical does not resolve the warning; falling back resolves only the critical alert",
                self._cv((0.7, 14), (2.5, 10), (0.7, 40)),
                self._states("6m30s", alert, warning),
                self._states("10m", alert, warning, critical),
                self._states("17m", alert, warning),
            ),
            self._test(
                "flapping around the critical threshold is one alert, which resolves once it is quiet",
                self._cv((2.1, 6), *[(1.9, 1), (2.1, 1)] * 3, (1.9, 2), (2.1, 2), (0.1, 30)),
                *(
                    self._states(f"{30 * step}s", alert, *([pending_warning] if step < 10 else [warning]), critical)
                    for step in range(2, 19)
                ),
                # The warning ends first: left alone it would no longer be inhibited, and notify.
                self._states("9m30s", alert, warning, critical),
                self._states("10m", alert, critical),
                self._states("11m", alert),
            ),
            self._test(
                "CV alerts name value, run and the head that dominates",
                steep,
                self._texts(
                    "6m",
                    alert,
                    [
                        (
                            "warning",
                            "Gradient CV 2.500 is warn in run demo",
                            "The gradient CV of run demo is 2.500 and has been at least 0.5 (warning) for 5m."
                            " Head blueprint dominates with a share of 0.900 of the gradient norms.",
                            {},
                        ),
                        (
                            "critical",
                            "Gradient CV 2.500 is BAD in run demo",
                            "The gradient CV of run demo is 2.500 and has been at least 2.0 (critical) for 1m."
                            " Head blueprint dominates with a share of 0.900 of the gradient norms.",
                            {},
                        ),
                    ],
                ),
            ),
            self._test(
                "a run may have any name",
                [
                    self._series(GRADIENT_CV, "2.5x40", health="critical", run=awkward),
                    self._series(HEAD_GRADIENT_SHARE, "0.9x40", head="op", run=awkward),
                    *self._shares(slot=1.0),
                ],
                self._text(
                    "2m",
                    alert,
                    "critical",
                    f"Gradient CV 2.500 is BAD in run {awkward}",
                    f"The gradient CV of run {awkward} is 2.500 and has been at least 2.0 (critical) for 1m."
                    " Head op dominates with a share of 0.900 of the gradient norms.",
                    run=awkward,
                ),
            ),
            self._test(
                "a CV of +Inf names the head that was not finite",
                [*self._cv((math.inf, 40)), self._series(NONFINITE_GRADIENTS, "0+5x40", head="op")],
                self._texts(
                    "2m",
                    alert,
                    [
                        (
                            "critical",
                            "Gradient CV +Inf is BAD in run demo",
                            "The gradient CV of run demo is +Inf and has been at least 2.0 (critical) for 1m."
                            " A gradient was NaN or infinite, in head op.",
                            {},
                        )
                    ],
                ),
            ),
            self._test(
                "a CV of +Inf without any share is still described",
                self._cv((math.inf, 40)),
                self._texts(
                    "2m",
                    alert,
                    [
                        (
                            "critical",
                            "Gradient CV +Inf is BAD in run demo",
                            "The gradient CV of run demo is +Inf and has been at least 2.0 (critical) for 1m."
                            " A gradient was NaN or infinite.",
                            {},
                        )
                    ],
                ),
            ),
        ]

    def _steps(self, **increments: str) -> list[dict]:
        return [self._series(GRADIENT_STEPS, increments.get(level, "0x60"), health=level) for level in LEVELS]

    def _critical_steps(self) -> list[dict]:
        alert = "PPOCriticalGradientSteps"
        return [
            self._test(
                "a tenth of critical steps warns although no scrape saw a high mean",
                [
                    *self._steps(healthy="0+90x60", critical="0+10x60"),
                    *self._cv((0.3, 60)),
                    *self._shares(slot=0.25, op=0.75),
                ],
                self._states("20m", "PPOGradientCVHigh"),
                self._text(
                    "20m",
                    alert,
                    "warning",
                    "Share 0.100 of the gradient steps of run demo is critical",
                    "In the last 10 minutes a share of 0.100 of the gradient steps of run demo had a gradient CV of at"
                    " least 2.0; the mean of an update may hide such spikes."
                    " Head op dominates with a share of 0.750 of the gradient norms.",
                ),
            ),
            self._test(
                "what the sustained alert has told is not told again when it has resolved",
                [*self._cv((2.5, 10), (0.3, 50)), *self._steps(healthy="0x10 100+100x50", critical="0+100x10 1000x50")],
                self._states(
                    "4m",
                    "PPOGradientCVHigh",
                    {"severity": "critical"},
                    {"severity": "warning", "alertstate": "pending"},
                ),
                *(self._states(at, alert) for at in ("4m", "8m", "10m", "13m", "17m", "20m")),
            ),
            self._test(
                "fewer critical steps, or no steps at all, are silent",
                self._steps(healthy="0+91x30 2730x30", critical="0+9x30 270x30"),
                self._states("14m", alert),
                self._states("29m", alert),
            ),
        ]

    def _nonfinite(self) -> list[dict]:
        alert = "PPONonFiniteGradients"
        return [
            self._test(
                "a non-finite step of one head names that head, and only it",
                [
                    *self._steps(healthy="0+100x60"),
                    self._series(NONFINITE_GRADIENTS, "0x9 3x50", head="op"),
                    self._series(NONFINITE_GRADIENTS, "0x60", head="slot"),
                    self._series(SKIPPED_GRADIENT_STEPS, "0x9 3x50"),
                ],
                self._states("4m", alert),
                self._states("6m", alert, {"severity": "warning", "head": "op"}),
                self._states("25m", alert),
            ),
            self._test(
                "steps skipped with all heads finite point at trunk or value head",
                [
                    *self._steps(healthy="0+100x60"),
                    self._series(NONFINITE_GRADIENTS, "0x60", head="op"),
                    self._series(SKIPPED_GRADIENT_STEPS, "0+1x60"),
                ],
                self._text(
                    "20m",
                    alert,
                    "warning",
                    "Non-finite gradients of the trunk or the value head in run demo",
                    "In about 20 gradient steps of the last 10 minutes a gradient of the trunk or the value head of"
                    " run demo was NaN or infinite.",
                ),
            ),
            self._test(
                "a counter that is above zero at the first scrape counts, for ten minutes",
                [
                    self._series(NONFINITE_GRADIENTS, "4x60", head="op"),
                    self._series("process_start_time_seconds", "0x60"),
                ],
                self._text(
                    "2m",
                    alert,
                    "warning",
                    "Non-finite gradients of head op in run demo",
                    "In about 4 gradient steps of the last 10 minutes a gradient of head op of run demo was NaN"
                    " or infinite.",
                    head="op",
                ),
                self._states("20m", alert),
            ),
            self._test(
                "an old count that comes back after a gap is not news",
                [
                    self._series(NONFINITE_GRADIENTS, "4x40 _x40 4x60", head="op"),
                    self._series("process_start_time_seconds", "0x40 _x40 0x60"),
                ],
                self._states("42m", alert),
                self._states("60m", alert),
            ),
            self._test(
                "half of the steps skipped is critical",
                [
                    *self._steps(critical="0+10x60"),
                    self._series(NONFINITE_GRADIENTS, "0+5x60", head="op"),
                    self._series(SKIPPED_GRADIENT_STEPS, "0+5x60"),
                    *self._shares(slot=0.0, op=1.0),
                ],
                self._texts(
                    "20m",
                    alert,
                    [
                        (
                            "warning",
                            "Non-finite gradients of head op in run demo",
                            "In about 100 gradient steps of the last 10 minutes a gradient of head op of run demo"
                            " was NaN or infinite.",
                            {"head": "op"},
                        ),
                        (
                            "critical",
                            "Share 0.500 of the gradient steps of run demo was skipped",
                            "In the last 5 minutes a share of 0.500 of the gradient steps of run demo did not touch the"
                            " weights because a gradient was NaN or infinite: the run has all but stopped learning."
                            " Head op dominates with a share of 1.000 of the gradient norms.",
                            {},
                        ),
                    ],
                ),
            ),
        ]

    def _starved(self) -> list[dict]:
        alert = "PPOHeadStarved"
        return [
            self._test(
                "a head far below an equal part is named after a quarter of an hour",
                self._shares(slot=0.02, op=0.78, curve=0.2),
                self._states("14m30s", alert, {"severity": "warning", "head": "slot", "alertstate": "pending"}),
                self._text(
                    "15m",
                    alert,
                    "warning",
                    "Head slot of run demo is starved of gradient",
                    "For 15m head slot of run demo has received 0.060 of an equal part of the gradient norms (alert"
                    " below 0.1). Head op dominates with a share of 0.780 of the gradient norms.",
                    head="slot",
                ),
            ),
            self._test(
                "when no head has any gradient all are starved, and none dominates",
                self._shares(slot=0.0, op=0.0),
                self._texts(
                    "20m",
                    alert,
                    [
                        (
                            "warning",
                            f"Head {head} of run demo is starved of gradient",
                            f"For 15m head {head} of run demo has received 0.000 of an equal part of the gradient norms"
                            " (alert below 0.1).",
                            {"head": head},
                        )
                        for head in ("slot", "op")
                    ],
                ),
            ),
            self._test(
                "unequal but learning heads, and a single head, are silent",
                [
                    *self._shares(slot=0.05, op=0.95),
                    self._series(HEAD_GRADIENT_SHARE, "1x60", run="single", head="action"),
                ],
                self._states("25m", alert),
            ),
        ]

    def _down_and_stalled(self) -> list[dict]:
        down, stalled = "PPOTrainerDown", "PPOTrainingStalled"
        return [
            self._test(
                "a trainer that cannot be scraped is down; one that has removed its target is not",
                [self._series("up", "1x9 0x10 stale")],
                self._states("4m30s", down),
                self._text(
                    "6m30s",
                    down,
                    "critical",
                    "Trainer of run demo is down",
                    "Prometheus has not been able to scrape 127.0.0.1:9842 (run demo) for 1m, and the trainer has not"
                    " said goodbye by removing its scrape target.",
                ),
                self._states("15m", down),
            ),
            self._test(
                "other jobs are none of our business",
                [{"series": 'up{job="another", instance="127.0.0.1:1", run="demo"}', "values": "0x60"}],
                self._states("20m", down),
            ),
            self._test(
                "a last update five minutes ago is in time, one longer ago is stalled",
                [self._series(LAST_UPDATE_TIMESTAMP, "60x60"), self._series(UPDATES, "1x60")],
                self._states("6m", stalled),
                self._text(
                    "6m30s",
                    stalled,
                    "warning",
                    "No PPO update in run demo for 5m 30s",
                    "The trainer of run demo answers, but its last PPO update ended 330.000 seconds ago (alert above"
                    " 300).",
                ),
            ),
            self._test(
                "a trainer without a first update is stalled after five minutes",
                [self._series(UPDATES, "0x60")],
                self._states("4m30s", stalled),
                self._text(
                    "5m",
                    stalled,
                    "warning",
                    "No PPO update in run demo since it started",
                    "The trainer of run demo answers, but has not completed its first PPO update in 5m.",
                ),
            ),
            self._test(
                "a trainer that updates is silent",
                [
                    self._series("up", "1x60"),
                    self._series(UPDATES, "0 1+1x60"),
                    self._series(LAST_UPDATE_TIMESTAMP, "_ 20+30x60"),
                ],
                self._states("25m", down),
                self._states("25m", stalled),
            ),
        ]

    def _unreachable(self) -> list[dict]:
        alert = "PPOCriticalThresholdUnreachable"
        return [
            self._test(
                "three heads cannot become critical",
                [self._series(GRADIENT_CV_CEILING, "1.7320508x60")],
                self._text(
                    "6m",
                    alert,
                    "info",
                    "Gradient CV of run demo cannot exceed 1.732",
                    "With the heads that contribute to it, the gradient CV of run demo cannot exceed 1.732: it cannot"
                    " rise above the critical threshold of 2.0, so do not wait for a critical alert.",
                ),
            ),
            self._test(
                "four heads reach it only when three are exactly zero, five can",
                [
                    self._series(GRADIENT_CV_CEILING, "2x60"),
                    self._series(GRADIENT_CV_CEILING, "2.236x60", run="five"),
                ],
                self._states("6m", alert, {"severity": "info"}),
            ),
        ]


def _label_text(labels: dict[str, str]) -> str:
    pairs = ", ".join(f"{key}={quoted(value)}" for key, value in labels.items() if key != "__name__")
    return f"{labels['__name__']}{{{pairs}}}"
