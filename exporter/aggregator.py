"""Adds up the updates of a run and publishes the result as a snapshot."""

import math
import re
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any, TypeVar

from exporter.health import Thresholds
from exporter.snapshot import HISTORY_UPDATES, GradientQuality, RunSnapshot, Snapshot
from exporter.telemetry import HEAD_SIGNALS, TRAINING_SIGNALS, PPOUpdatePayload, require_label_value, require_timestamp

_INTERVAL_DECAY = 0.9
"""Factor per update for the longest interval before it: after seven shorter intervals about half remains."""
_Key = TypeVar("_Key")
_TAKEN_LABELS = {"run", "rank", "job", "instance"}


class RunAggregator:
    """Takes updates from training threads; readers take `snapshot`, which never blocks.

    The lock is between writers only. Publishing a snapshot is one assignment, so
    a reader sees either all of an update or nothing of it.
    """

    def __init__(self) -> None:
        self.snapshot = Snapshot()
        self._writers = threading.Lock()
        self._ended: set[str] = set()  # removed or abandoned: late payloads must not restore them
        self._updated_at: dict[str, float] = {}  # monotonic: the system clock may change during a run

    def register_run(
        self,
        run: str,
        heads: Iterable[str],
        info: Mapping[str, str] | None = None,
        thresholds: Thresholds = Thresholds(),
    ) -> None:
        """Register a run before its first update, so that its series exist from the first scrape.

        A removed or abandoned run of that name starts again at zero.

        Args:
            run: name of the run.
            heads: names of its action heads.
            info: labels of `ppo_run_info`, such as environment and seed.
            thresholds: CVs from which the run's level is warning and critical.

        Raises:
            TypeError: the run's or a head's name is not a string, or `thresholds` are not thresholds.
            ValueError: a run of that name is already registered and not abandoned, a name is empty
                or not encodable, or a key of `info` is not a label name or is in use.
        """
        heads = tuple(heads)
        require_label_value("run", run)
        for head in heads:
            require_label_value("the name of a head", head)
        thresholds = Thresholds.of(thresholds)
        info = {key: str(value) for key, value in (info or {}).items()}
        for key, value in info.items():
            if value:
                require_label_value(f"info[{key!r}]", value)
            if not re.fullmatch("[a-zA-Z_][a-zA-Z0-9_]*", key) or key.startswith("__") or key in _TAKEN_LABELS:
                raise ValueError(f"info cannot have the key {key!r}: it must be a label name other than those in use")
        with self._writers:
            if run in self.snapshot.runs and run not in self._ended:
                raise ValueError(f"run {run!r} is registered already; runs of one process need distinct names")
            quality = GradientQuality(
                thresholds=thresholds,
                contributing_heads=len(heads),
                nonfinite_steps=MappingProxyType(dict.fromkeys(heads, 0)),
            )
            self.snapshot = self.snapshot.with_run(
                RunSnapshot(run, info=MappingProxyType(info), gradient_quality=quality)
            )
            self._ended.discard(run)
            self._updated_at.pop(run, None)

    def resume_run(self, run: str, state: Mapping[str, Any]) -> None:
        """Continue a registered run from the state of an earlier process.

        Args:
            run: name of the run.
            state: `RunSnapshot.plain()` of the earlier process.

        Raises:
            KeyError, TypeError, ValueError: `state` is not such a state, or of another version.
        """
        with self._writers:
            self.snapshot = self.snapshot.with_run(self.snapshot.runs[run].resumed(state))

    def handle_ppo_update(self, payload: PPOUpdatePayload) -> None:
        """Add one update to its run. Creates a run that is not registered; ignores updates of one that has ended."""
        with self._writers:
            if payload.run not in self._ended:
                before = self.snapshot.runs.get(payload.run) or RunSnapshot(payload.run)
                now = time.monotonic()
                last = self._updated_at.get(payload.run)
                self._updated_at[payload.run] = now
                self.snapshot = self.snapshot.with_run(
                    _after_update(before, payload, None if last is None else now - last)
                )

    def note_progress(self, run: str, timestamp_seconds: float) -> None:
        """Note a gradient step within a long update: the run is alive.

        Sets the time of the last update; does nothing before the run's first update.

        Args:
            run: name of the run.
            timestamp_seconds: Unix time of the step.

        Raises:
            TypeError, ValueError: `timestamp_seconds` is not a Unix time.
        """
        timestamp_seconds = require_timestamp("timestamp_seconds", timestamp_seconds)
        with self._writers:
            before = self.snapshot.runs.get(run)
            if before is None or run in self._ended:
                return
            last = before.last_update_timestamp_seconds
            if last is not None and timestamp_seconds > last:
                self.snapshot = self.snapshot.with_run(replace(before, last_update_timestamp_seconds=timestamp_seconds))

    def note_nonfinite(self, run: str, steps: Mapping[str, int], timestamp_seconds: float) -> None:
        """Note non-finite gradients in an update that has not ended: the CV is +Inf from now on.

        Args:
            run: name of the run.
            steps: head -> number of steps in which its norm was NaN or infinite; the update must not count them again.
            timestamp_seconds: Unix time.
        """
        self._note_cv(run, math.inf, timestamp_seconds, steps)

    def note_blindness(self, run: str, timestamp_seconds: float | None = None) -> None:
        """Note that training continues but no step is measured: an error, and the CV is NaN, which is never healthy."""
        self._note_cv(run, math.nan, time.time() if timestamp_seconds is None else timestamp_seconds)
        self.count_error(run)

    def _note_cv(self, run: str, cv: float, timestamp_seconds: float, nonfinite: Mapping[str, int] = {}) -> None:
        with self._writers:
            before = self.snapshot.runs.get(run)
            if before is None or run in self._ended:
                return
            quality = before.gradient_quality
            since = before.level_since_timestamp_seconds
            if since is None or quality.health is not quality.thresholds.level(cv):
                since = timestamp_seconds
            counts = _added(quality.nonfinite_steps, nonfinite)
            quality = replace(quality, gradient_cv=cv, nonfinite_steps=counts)
            after = replace(before, gradient_quality=quality, level_since_timestamp_seconds=since)
            self.snapshot = self.snapshot.with_run(after)

    def remove_run(self, run: str) -> None:
        """Remove a run's series and free its name. Does nothing if there is no such run.

        Its later updates and errors are dropped until `register_run` registers it again.
        """
        with self._writers:
            if run in self.snapshot.runs:
                self._ended.add(run)
                self.snapshot = self.snapshot.without_run(run)

    def abandon_run(self, run: str) -> None:
        """Note that the run has crashed and others continue: its series stay until `register_run` replaces them.

        Its later updates and errors are dropped until then. Does nothing if there is no such run.
        """
        with self._writers:
            if run in self.snapshot.runs:
                self._ended.add(run)

    def count_error(self, run: str) -> None:
        """Count an error inside the measurement of `run`. Creates the run if it is not registered."""
        with self._writers:
            if run not in self._ended:
                before = self.snapshot.runs.get(run) or RunSnapshot(run)
                self.snapshot = self.snapshot.with_run(replace(before, exporter_errors=before.exporter_errors + 1))


def _after_update(before: RunSnapshot, payload: PPOUpdatePayload, interval_seconds: float | None) -> RunSnapshot:
    quality = before.gradient_quality
    level = quality.thresholds.level
    steps = quality.thresholds.steps_by_level(payload.gradient_cv_per_step)
    since = before.level_since_timestamp_seconds
    if since is None or level(payload.gradient_cv) is not quality.health:
        since = payload.timestamp_seconds
    if interval_seconds is not None:
        interval_seconds = max(interval_seconds, _INTERVAL_DECAY * (before.update_interval_seconds or 0.0))
    signals = {name: getattr(payload, name) for name in TRAINING_SIGNALS}
    return replace(
        before,
        gradient_quality=GradientQuality(
            gradient_cv=payload.gradient_cv,
            thresholds=quality.thresholds,
            contributing_heads=payload.contributing_heads,
            gradient_norm=payload.gradient_norm,
            head_norms=payload.head_gradient_norms,
            steps_by_level=_added(quality.steps_by_level, steps),
            cv_per_step=quality.cv_per_step.observe(payload.gradient_cv_per_step),
            nonfinite_steps=_added(quality.nonfinite_steps, payload.nonfinite_gradient_steps),
            skipped_steps=quality.skipped_steps + payload.skipped_gradient_steps,
            **{name: getattr(payload, name) for name in HEAD_SIGNALS},
        ),
        recent_gradient_cvs=(*before.recent_gradient_cvs, payload.gradient_cv)[-HISTORY_UPDATES:],
        updates=before.updates + 1,
        environment_steps=before.environment_steps + payload.environment_steps,
        episodes=before.episodes + payload.episodes,
        signals=MappingProxyType({name: value for name, value in signals.items() if value is not None}),
        other_signals=payload.signals,
        update_duration_seconds=before.update_duration_seconds.observe(_known(payload.update_duration_seconds)),
        rollout_duration_seconds=before.rollout_duration_seconds.observe(_known(payload.rollout_duration_seconds)),
        rank_rollout_seconds=payload.rank_rollout_seconds,
        last_update_timestamp_seconds=payload.timestamp_seconds,
        level_since_timestamp_seconds=since,
        update_interval_seconds=interval_seconds,
    )


def _added(totals: Mapping[_Key, int], increments: Mapping[_Key, int]) -> Mapping[_Key, int]:
    return MappingProxyType({key: totals.get(key, 0) + increments.get(key, 0) for key in {**totals, **increments}})


def _known(value: float | None) -> tuple[float, ...]:
    return () if value is None else (value,)
