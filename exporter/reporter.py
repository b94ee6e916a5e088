"""What a monitor says of its run: to the aggregator, in the log, and to callbacks."""

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
    """Publishes the windows of a run, and what must neither wait for a window nor go unnoticed.

    Args:
        run: name of the run.
        aggregator: where updates go.
        has_norm: whether the steps' global norm is one of all parameters.
        on_update: called with the run's snapshot after every window.
        on_level: called with a new level and the run's snapshot.
        give_back: gets the progress of a window that was none.
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
        self._idle_updates = 0
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
        """Publish a window, as soon as it has come from the device; without `progress`, say what is not finite in it.

        Args:
            pending: its steps.
            progress: what the trainer says of it.
            trainable_heads: those that should have a gradient.
            must_wait: publish it before this returns, unless others have to be published before.
        """
        if self._publisher is None and (must_wait or pending.is_ready):
            return self._publish(pending, progress, trainable_heads)
        # Training must not wait for the device, nor a window for the next gradient step.
        if self._publisher is None:
            self._publisher = threading.Thread(target=self._publish_arriving, name="ppo-monitor", daemon=True)
            self._publisher.start()
        self._arriving.put((pending, progress, trainable_heads))

    def foresee(self, step: Callable[[], PendingGradientSteps]) -> None:
        """Say that gradients are not finite before their step, which may never come; counted they are with it."""
        if not self._is_nonfinite and (pending := step()).nonfinite_steps:
            self._aggregator.note_nonfinite(self._run, {}, time.time())
            self._say_nonfinite(pending)
            self._tell_level()

    def wait(self) -> None:
        """Until all is published that was handed over."""
        publisher, self._publisher = self._publisher, None
        if publisher is not None:
            self._arriving.put(None)
            publisher.join()

    def idle(self) -> None:
        """An update has ended without a step that is measured."""
        self._idle_updates += 1
        if self._idle_updates >= _IDLE_UPDATES:
            self.blind(f"no gradient step was seen in {self._idle_updates} updates")

    def blind(self, reason: str) -> None:
        """Training goes on, and nothing of it is measured: count it, and say it once."""
        self._aggregator.note_blindness(self._run)
        if not self._is_blind:
            self._is_blind = True
            _log.error(
                "run %s: %s. Have the optimizer or the heads been replaced since attach(), or does something else "
                "take the steps? The CV is NaN until a step is measured",
                self._run,
                reason,
            )
        self._tell_level()

    def failed(self, error: Exception) -> None:
        """Something went wrong inside: count it, and say it once."""
        self._aggregator.count_error(self._run)
        if not self._has_failed:
            self._has_failed = True
            _log.error(
                "run %s: the measurement or a callback of it failed; training goes on, further errors are only counted",
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
        if not metrics["gradient_cv_per_step"]:  # all overflowed or given up: what they counted goes to the next one
            self._give_back(progress)
            return self.idle()
        noted, self._noted = self._noted, Counter()
        self._idle_updates, self._is_blind = 0, False
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
        if self._on_update is not None and (run := self._aggregator.snapshot.runs.get(self._run)) is not None:
            self._on_update(run)
        self._tell_level()

    def _look_into(self, pending: PendingGradientSteps) -> None:
        """Say which of these steps, whose window has not ended, are not finite."""
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
        where = f"head{'s' * (len(heads) > 1)} {', '.join(heads)}" if heads else "what belongs to no head"
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
                    "run %s: head %s has had no gradient in %d windows, and is left out of the CV. Has it been "
                    "replaced since attach(), or does nothing use it?",
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
