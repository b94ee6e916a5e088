"""A monitor's reports about its run: to the aggregator, the log, and callbacks."""

import logging
import math
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping

from exporter.aggregator import RunAggregator
from exporter.health import HealthLevel
from exporter.pending import PendingGradientSteps
from exporter.snapshot import RunSnapshot
from exporter.telemetry import emit_ppo_update

OnUpdate = Callable[[RunSnapshot], object]
OnLevel = Callable[[HealthLevel, RunSnapshot], object]

_Window = tuple[PendingGradientSteps, Mapping[str, object] | None, Callable[[], Collection[str]]]
_ABSENT_WINDOWS = _IDLE_UPDATES = 3
_log = logging.getLogger(__name__)


class RunReporter:
    """Publishes the windows of a run, and reports problems without waiting for a window.

    Args:
        run: name of the run.
        aggregator: takes the updates.
        has_norm: whether the steps' global norm covers all parameters.
        on_update: called with the run's snapshot after every window.
        on_level: called with a new level and the run's snapshot.
        give_back: called with the progress of a window that was not published.
    """

    def __init__(
        self,
        run: str,
        aggregator: RunAggregator,
        has_norm: bool,
        on_update: OnUpdate | None,
        on_level: OnLevel | None,
        give_back: Callable[[Mapping[str, object]], None],
    ) -> None:
        self._run = run
        self._aggregator = aggregator
        self._has_norm = has_norm
        self._on_update = on_update
        self._on_level = on_level
        self._give_back = give_back
        self._level = HealthLevel.HEALTHY
        self._noted: Counter[str] = Counter()
        self._absent: Counter[str] = Counter()
        self._has_failed = self._is_nonfinite = self._is_blind = False
        self._idle_updates = self._zero_windows = 0
        self._arriving: queue.SimpleQueue[_Window | None] = queue.SimpleQueue()
        self._publisher: threading.Thread | None = None

    def hand_over(
        self,
        pending: PendingGradientSteps,
        progress: Mapping[str, object] | None = None,
        trainable_heads: Callable[[], Collection[str]] = tuple,
        *,
        must_wait: bool = False,
    ) -> None:
        """Publish a window when it has arrived from the device. Without `progress`, only report non-finite gradients.

        Args:
            pending: the window's steps.
            progress: the trainer's signals and counts for it.
            trainable_heads: heads that should have a gradient.
            must_wait: publish it before this returns, unless earlier windows are still waiting.
        """
        if self._publisher is None and (must_wait or pending.is_ready):
            return self._publish(pending, progress, trainable_heads)
        # Training must not wait for the device, and a window must not wait for the next gradient step.
        if self._publisher is None:
            self._publisher = threading.Thread(target=self._publish_arriving, name="ppo-monitor", daemon=True)
            self._publisher.start()
        self._arriving.put((pending, progress, trainable_heads))

    def foresee(self, step: Callable[[], PendingGradientSteps]) -> None:
        """Report non-finite gradients before their step, which may never come; the step counts them."""
        if not self._is_nonfinite and (pending := step()).nonfinite_steps:
            self._aggregator.note_nonfinite(self._run, {}, time.time())
            self._say_nonfinite(pending)
            self._tell_level()

    def wait(self) -> None:
        """Wait until everything is published."""
        publisher, self._publisher = self._publisher, None
        if publisher is not None:
            self._arriving.put(None)
            publisher.join()

    def idle(self) -> None:
        """Note that an update has ended without a measured step."""
        self._idle_updates += 1
        if self._idle_updates >= _IDLE_UPDATES:
            self.blind(f"no gradient step was seen in {self._idle_updates} updates")

    def blind(self, reason: str) -> None:
        """Count that training continues without being measured, and log it once."""
        self._aggregator.note_blindness(self._run)
        if not self._is_blind:
            self._is_blind = True
            _log.error(
                "run %s: %s. Were the optimizer or the heads replaced after attach(), or does something else take the "
                "steps? The CV is NaN until a gradient is measured",
                self._run,
                reason,
            )
        self._tell_level()

    def failed(self, error: Exception) -> None:
        """Count an error inside the measurement, and log it once."""
        self._aggregator.count_error(self._run)
        if not self._has_failed:
            self._has_failed = True
            _log.error(
                "run %s: the measurement or a callback of it failed; training continues, later errors are only counted",
                self._run,
                exc_info=error,
            )

    def _publish_arriving(self) -> None:
        while (window := self._arriving.get()) is not None:
            try:
                self._publish(*window)
            except Exception as error:
                self.failed(error)

    def _publish(
        self,
        pending: PendingGradientSteps,
        progress: Mapping[str, object] | None,
        trainable_heads: Callable[[], Collection[str]],
    ) -> None:
        if progress is None:
            return self._look_into(pending)
        metrics = pending.summary()
        if not metrics["gradient_cv_per_step"]:  # no step counts: keep the counts for the next window
            self._give_back(progress)
            return self.idle()
        noted, self._noted = self._noted, Counter()
        self._zero_windows = 0 if any(metrics["head_gradient_norms"].values()) else self._zero_windows + 1
        is_silent = self._zero_windows >= _ABSENT_WINDOWS  # by the formula it is healthy
        self._idle_updates, self._is_blind = 0, self._is_blind and is_silent
        if math.isfinite(metrics["gradient_cv"]):
            self._is_nonfinite = False
        else:
            self._say_nonfinite(pending)
        counts = metrics["nonfinite_gradient_steps"]
        metrics["nonfinite_gradient_steps"] = {head: max(count - noted[head], 0) for head, count in counts.items()}
        if not self._has_norm:
            metrics["gradient_norm"] = None
        skipped = pending.given_up_steps
        emit_ppo_update(metrics, run=self._run, handler=self._aggregator, skipped_gradient_steps=skipped, **progress)
        self._look_for_absent(pending, trainable_heads)
        if is_silent:
            self.blind(f"the gradient of every head was exactly zero in {self._zero_windows} windows")
        if self._on_update is not None and (run := self._aggregator.snapshot.runs.get(self._run)) is not None:
            self._on_update(run)
        self._tell_level()

    def _look_into(self, pending: PendingGradientSteps) -> None:
        """Report which of these steps are not finite, before their window has ended."""
        if not pending.nonfinite_steps:
            return
        counts = Counter(
            head for step in pending.result() for head, norm in step.head_norms.items() if not math.isfinite(norm)
        )
        self._noted += counts
        self._aggregator.note_nonfinite(self._run, counts, time.time())
        self._say_nonfinite(pending)
        self._tell_level()

    def _say_nonfinite(self, pending: PendingGradientSteps) -> None:
        if self._is_nonfinite:
            return
        self._is_nonfinite = True
        steps = pending.result()
        index = next(index for index, step in enumerate(steps) if not math.isfinite(step.cv))
        heads = [head for head, norm in steps[index].head_norms.items() if not math.isfinite(norm)]
        where = f"head{'s' * (len(heads) > 1)} {', '.join(heads)}" if heads else "parameters of no head"
        number = pending.first_step + index + 1
        _log.error("run %s: the gradient of %s is NaN or infinite at gradient step %d", self._run, where, number)

    def _look_for_absent(self, pending: PendingGradientSteps, trainable_heads: Callable[[], Collection[str]]) -> None:
        absent = pending.absent_heads
        absent = [head for head in trainable_heads() if head in absent] if absent else []
        self._absent = Counter({head: self._absent[head] + 1 for head in absent})
        for head in absent:
            if self._absent[head] == _ABSENT_WINDOWS:
                self._aggregator.count_error(self._run)
                _log.error(
                    "run %s: head %s has had no gradient in %d windows and is left out of the CV. Was it replaced "
                    "after attach(), or is it unused?",
                    self._run,
                    head,
                    _ABSENT_WINDOWS,
                )

    def _tell_level(self) -> None:
        run = self._aggregator.snapshot.runs.get(self._run)
        if run is not None and (level := run.gradient_quality.health) is not self._level:
            self._level = level
            if self._on_level is not None:
                self._on_level(level, run)
