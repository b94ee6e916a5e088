"""`GradientMonitor`: the metric for an existing trainer, by an optimizer hook."""

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from exporter.aggregator import RunAggregator
from exporter.endpoint import RunEndpoints
from exporter.goodbye import is_crash
from exporter.gradient_cv import unreachable_critical_warning
from exporter.heads import HeadGradientMeter, Heads, named_heads
from exporter.health import STALLED_SECONDS, Thresholds
from exporter.link import DEFAULT_ADDRESS, Registry
from exporter.optimizers import (
    has_closure,
    is_one_of_several,
    unaveraged_warning,
    unknown_scaler_warning,
    unwrapped,
)
from exporter.progress import Progress
from exporter.recording import after_backward, hidden_from_compiler
from exporter.registration import Registration
from exporter.reporter import OnLevel, OnUpdate, RunReporter

DEFAULT_WINDOW_STEPS = 64
WINDOW_SECONDS = 30.0
"""A window of `window_steps` also ends at the first gradient step after this time."""
_CHECK_SECONDS = 0.1
"""The first non-finite gradient is reported at once, the number of them this often within a window. On a device, which
must not be waited for, both use the time below."""
_DEVICE_CHECK_SECONDS = 1.0
_MOST_WINDOW_STEPS = 65536  # for a trainer that forgets update_completed()

_log = logging.getLogger(__name__)


class GradientMonitor:
    """Observes the gradients of action heads at every `optimizer.step()` and exports their CV.

    It changes neither gradients nor random state. An error inside it is logged once, counted in
    `ppo_exporter_errors_total`, and never reaches the training loop. On CUDA it adds no synchronization: norms are
    copied to pinned memory, and a thread publishes them when they have arrived. Any thread may call its methods.

    If a script ends without `close()`, the monitor closes as at the end of its `with` block: an exception leaves the
    files of `serve()`, a clean end removes them.

    A step hook sees clipped gradients if the trainer clips. Clipping by the global norm leaves the CV and the shares
    unchanged; it changes norms, and spreads a NaN to all heads. `before_clipping` avoids both.

    Args:
        heads: head name -> modules, parameters, or `Rows` of a layer that heads share; or a list of them. See also
            `heads_from`, `space_heads` and `row_heads`.
        run: name of the run, its label on `/metrics`.
        window_steps: gradient steps per window, or fewer if they take longer than `WINDOW_SECONDS`. After the first
            `update_completed()` a window is an update. None: windows are updates from the start.
        before_clipping: measure at the end of each backward pass that reaches a head, after DistributedDataParallel
            has averaged. Gives exact norms and the right head for a NaN, and counts non-finite gradients even if the
            trainer repairs them or skips the step. Costs one hook call per parameter and backward pass.
        global_norm: also export `ppo_gradient_norm`, over all parameters; reads every gradient once more.
        grad_scaler: the `torch.amp.GradScaler` in use; `before_clipping` needs it to unscale.
        thresholds: CVs from which the run's level is warning and critical, `Thresholds` or a pair;
            label, status page, rules and dashboards use them.
        info: labels of `ppo_run_info`, such as environment and seed.
        on_update: called with the run's `RunSnapshot` after every window, for your own loggers; its `scalars()` has CV,
            shares, norms and signals by name.
        on_level: called with the new `HealthLevel` and the `RunSnapshot` when the run's level has changed. The training
            thread calls both, or on CUDA a thread of the monitor; an error in them is logged and counted.
        aggregator: takes the updates; by default one that all monitors of the process share.

    Raises:
        TypeError: `thresholds` is neither `Thresholds` nor a pair.
        ValueError: `window_steps` is below 1, or not 0 < warning < critical.
    """

    def __init__(
        self,
        heads: Heads,
        run: str,
        *,
        window_steps: int | None = DEFAULT_WINDOW_STEPS,
        before_clipping: bool = False,
        global_norm: bool = False,
        grad_scaler: torch.amp.GradScaler | None = None,
        thresholds: Thresholds | Sequence[float] = Thresholds(),
        info: Mapping[str, str] | None = None,
        on_update: OnUpdate | None = None,
        on_level: OnLevel | None = None,
        aggregator: RunAggregator | None = None,
    ) -> None:
        if window_steps is not None and window_steps < 1:
            raise ValueError(f"window_steps must be at least 1 or None, got {window_steps}")
        self.run = run
        self.heads = named_heads(heads)
        self._registration = Registration(aggregator, run, self.detach, self._leave)
        self._aggregator = self._registration.aggregator
        self._window_steps = window_steps
        self._before_clipping = before_clipping
        self._global_norm = global_norm
        self._grad_scaler = grad_scaler if grad_scaler is not None and grad_scaler.is_enabled() else None
        self._meter: HeadGradientMeter | None = None
        self._hooks: list[RemovableHandle] = []
        self._sees_closures = False
        self._progress = Progress()
        self._reporter = RunReporter(run, self._aggregator, global_norm, on_update, on_level, self._give_back)
        self._window_began_at: float | None = None
        self._alive_at = self._step_at = self._check_at = 0.0
        self._idle_steps = 0
        self._optimizer_count = 1
        self._stepped: set[int] = set()
        self._endpoints = RunEndpoints(self._aggregator, run)
        self._lock = threading.RLock()
        self._pid = os.getpid()
        self._thresholds = Thresholds.of(thresholds)
        self._info = info
        self._may_be_too_early = self._may_be_scaled = False

    def attach(self, optimizer: Optimizer | Sequence[Optimizer]) -> "GradientMonitor":
        """Observe every step of `optimizer`, also inside Accelerate's and other wrappers.

        With several optimizers, a gradient step ends when all of them have stepped.

        Raises:
            RuntimeError: the monitor is already attached.
            TypeError: not an optimizer, or a head contains something else than parameters.
            ValueError: the heads cannot be measured (see `HeadGradientMeter`), the optimizer does not own one of their
                parameters (the message names the head), or another monitor measures a run of this name. An earlier
                monitor is replaced if its optimizer is gone or is this one, and always in an interactive session.
        """
        if self._hooks:
            raise RuntimeError(f"monitor of run {self.run!r} is already attached; detach() it first")
        optimizers = unwrapped(optimizer)
        owned = [parameter for each in optimizers for group in each.param_groups for parameter in group["params"]]
        meter = HeadGradientMeter(self.heads, owned if self._global_norm else ())
        meter.require_owned(owned)
        if self._registration.begin(optimizers, meter.head_names, self._info, self._thresholds):
            self._warn(unreachable_critical_warning(len(meter.head_names), self._thresholds))
        self._may_be_too_early = self._before_clipping and is_one_of_several()
        self._may_be_scaled = self._before_clipping and self._grad_scaler is None
        self._optimizer_count, self._stepped = len(optimizers), set()
        self._meter, self._step_at = meter, time.monotonic()
        self._hooks = [each.register_step_pre_hook(hidden_from_compiler(self._before_step)) for each in optimizers]
        if self._before_clipping:
            self._hooks += after_backward(meter.parameters, self._after_backward)
        return self

    def detach(self) -> None:
        """Stop observing and publish the last window; the run's series stay. You may attach again."""
        with self._lock:
            for hook in self._hooks:
                hook.remove()
            self._hooks, self._sees_closures = [], False
            self._close_window(is_last=True)
            self._meter = None
            self._registration.pause()
        self._reporter.wait()

    def close(self) -> None:
        """Detach, leave the endpoint (it closes with its last monitor), and remove the run's series.

        Does nothing in a forked child.
        """
        self._leave(crashed=False)

    def _leave(self, crashed: bool) -> None:
        if os.getpid() != self._pid:
            return  # in a forked child everything belongs to the parent
        # If one step is interrupted, the others still run, and a second call does not repeat it.
        with ExitStack() as last_first:
            last_first.callback(self._registration.end, crashed)
            self._endpoints.leave(last_first, crashed)
            self.detach()

    def __deepcopy__(self, memo: object) -> "GradientMonitor":
        return self  # a copied agent still has only one training

    def __enter__(self) -> "GradientMonitor":
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        self._leave(crashed=is_crash(error))

    def serve(
        self,
        port: int | None = None,
        address: str = DEFAULT_ADDRESS,
        *,
        targets_dir: str | Path | None = None,
        textfile_dir: str | Path | None = None,
        pushgateway: str | None = None,
        web_config_file: str | Path | None = None,
        registry: Registry | None = None,
        every_rank: bool = False,
    ) -> str | None:
        """Serve `/metrics` from a separate process; monitors with the same port share it.

        A second call for the same port replaces the files that the first has written.

        In a torch.distributed group only rank 0 serves; with `every_rank` each rank
        serves, at `port` + its local rank and with a label `rank`.

        Args:
            port: by default 9842, or a free one if another process has that or if `targets_dir` tells Prometheus the
                port; monitors of a process without a port share one.
            targets_dir: folder for a target file for Prometheus' file service discovery. `close()` removes the file;
                it stays if an exception ends the monitor's block, so that an alert fires.
            textfile_dir: folder for a text file for node_exporter's textfile collector; removed like the target file.
            pushgateway: URL of a Pushgateway; `close()` pushes the run's final state to it.
            web_config_file: TLS and users of the endpoint, see docs/endpoint.md.
            registry: a prometheus_client registry with your own metrics, served beside these.

        Returns:
            The URL, or None on a rank that does not serve.

        Raises:
            OSError: the address cannot be bound, or a file cannot be written.
            ValueError: `pushgateway` is not such a URL, the web configuration file is wrong, or a monitor that shares
                the endpoint has given another file or another registry.
        """
        return self._endpoints.serve(
            port,
            address,
            targets_dir=targets_dir,
            textfile_dir=textfile_dir,
            pushgateway=pushgateway,
            web_config_file=web_config_file,
            registry=registry,
            every_rank=every_rank,
        )

    @property
    def url(self) -> str | None:
        """URL of `/metrics`, as last returned by `serve()`; None if nothing is served, and after `close()`."""
        return self._endpoints.url

    def record(self, **values: float | Mapping[str, float] | None) -> None:
        """Record training signals for the next window, such as `policy_loss` or `approx_kl`.

        `head_entropy_ratios`, `head_approx_kls`, `head_clip_fractions` and `head_update_ratios` are mappings, head ->
        number, as in `PPOUpdatePayload`.

        Counts (`environment_steps`, `episodes`) are increments and add up; durations
        belong to one window; everything else stays until it is recorded again.

        Raises:
            TypeError: there is no signal of that name, or the value is not a number.
            ValueError: the value is out of range, such as a negative count.
        """
        with self._lock:
            self._progress.record(values)
            if "environment_steps" in values and self._hooks:
                idle = time.monotonic() - self._step_at
                if idle > STALLED_SECONDS:
                    reason = f"no gradient step was seen in {idle:.0f} s, though environments were stepped"
                    self._safely(self._reporter.blind, reason)

    def gradients_ready(self) -> None:
        """Measure the current gradients for the next step, for a trainer that averages gradients by hand.

        Call it after averaging and before clipping, with or without `before_clipping`.
        """
        with self._lock:
            self._may_be_too_early = False
            if self._meter is not None:
                self._meter.give_up(does_count=False)  # measured before averaging: the same step
            self._after_backward()

    @contextmanager
    def update(self, **values: float | Mapping[str, float] | None) -> Iterator["GradientMonitor"]:
        """`with monitor.update(environment_steps=2048) as update:` measures and completes a PPO update.

        An update that ends with an exception does not count. Its steps and what it recorded go to the next one.

        Args:
            values: as for `update_completed()`.

        Raises:
            TypeError, ValueError: as `record()`.
        """
        started = time.monotonic()
        yield self
        self.update_completed(**{"update_duration_seconds": time.monotonic() - started, **values})

    def update_completed(self, **values: float | Mapping[str, float] | None) -> None:
        """End a PPO update: publish its window, with `values` as for `record()`.

        Raises:
            TypeError, ValueError: as `record()`.
        """
        with self._lock:
            self.record(**values)
            self._window_steps = None
            if self._meter is not None:
                self._meter.give_up(self._grad_scaler is None)  # no step follows
                if not self._meter.recorded:
                    self._safely(self._reporter.idle)
            self._close_window()

    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not has_closure(args, kwargs):
            self._observe(optimizer)
        elif not self._sees_closures:
            self._sees_closures = True
            after = hidden_from_compiler(self._after_step)
            self._hooks += [each.register_step_post_hook(after) for each in self._registration.optimizers]

    def _after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # A closure runs the backward pass inside the step: measure its gradients after the step.
        if has_closure(args, kwargs):
            self._observe(optimizer)

    def _observe(self, optimizer: Optimizer) -> None:
        try:
            with self._lock:
                if self._meter is None:
                    return  # another thread has just detached it
                if self._optimizer_count > 1:
                    self._stepped.add(id(optimizer))
                    if len(self._stepped) < self._optimizer_count:
                        return
                    self._stepped.clear()
                if self._may_be_too_early:
                    self._may_be_too_early = False
                    self._warn(unaveraged_warning(self._meter.parameters))
                if self._may_be_scaled:
                    self._may_be_scaled = False
                    self._warn(unknown_scaler_warning())
                scale = getattr(optimizer, "grad_scale", None)
                if self._grad_scaler is not None and self._meter.has_early:
                    scale = self._grad_scaler.scale(torch.ones((), device=self._meter.parameters[0].device))
                # After an overflow, a fused optimizer skips the step itself; with others GradScaler does not call the
                # step, nor this hook. Neither counts as a step.
                if self._meter.record(scale, getattr(optimizer, "found_inf", None)):
                    self._idle_steps = 0
                    self._step_recorded(self._meter)
                    return
                self._idle_steps += 1
                if self._idle_steps % DEFAULT_WINDOW_STEPS == 0:
                    self._reporter.blind(f"no head had a gradient in {self._idle_steps} gradient steps")
        except Exception as error:
            self._reporter.failed(error)

    def _after_backward(self) -> None:
        try:
            with self._lock:
                if self._meter is not None:
                    # A GradScaler skips a step only after an overflow; that does not count.
                    may_give_up = self._grad_scaler is None
                    if self._meter.take_early(may_give_up=may_give_up):
                        self._step_recorded(self._meter, was_given_up=True)
                    if may_give_up and self._meter.is_finite() is False:
                        self._reporter.foresee(self._meter.early)
        except Exception as error:
            self._reporter.failed(error)

    def _step_recorded(self, meter: HeadGradientMeter, was_given_up: bool = False) -> None:
        recorded = meter.recorded
        if not recorded:
            return
        now = time.monotonic()
        if self._window_began_at is None:
            self._window_began_at = now
        self._step_at = now
        is_long = self._window_steps is not None and now - self._window_began_at >= WINDOW_SECONDS
        if is_long or recorded >= (self._window_steps or _MOST_WINDOW_STEPS):
            return self._close_window()
        is_finite = meter.is_finite()
        if now >= self._check_at and (was_given_up or not is_finite):
            self._check_at = now + (_DEVICE_CHECK_SECONDS if is_finite is None else _CHECK_SECONDS)
            self._reporter.hand_over(meter.unchecked())
        if now - self._alive_at >= WINDOW_SECONDS:
            self._alive_at = now
            self._aggregator.note_progress(self.run, time.time())

    def _close_window(self, is_last: bool = False) -> None:
        if (meter := self._meter) is None:
            return
        if is_last:
            meter.give_up(self._grad_scaler is None)
        if not meter.recorded:
            return  # without a gradient step nothing was measured
        self._window_began_at = None
        self._alive_at = time.monotonic()
        progress = {**self._progress.take(), "timestamp_seconds": time.time()}
        try:
            pending = meter.start_collecting()
            self._reporter.hand_over(pending, progress, meter.trainable_heads, must_wait=is_last)
        except Exception as error:
            self._reporter.failed(error)

    def _warn(self, warning: str | None) -> None:
        if warning is not None:
            _log.warning("run %s: %s", self.run, warning)

    def _give_back(self, progress: Mapping[str, object]) -> None:
        with self._lock:
            self._progress.give_back(progress)

    def _safely(self, call: Callable[..., None], *arguments: object) -> None:
        try:
            call(*arguments)
        except Exception as error:
            self._reporter.failed(error)
