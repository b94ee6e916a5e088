"""`GradientMonitor`: the metric for a trainer that somebody has already, by an optimizer hook."""

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
from exporter.optimizers import has_closure, is_one_of_several, unaveraged_warning, unwrapped
from exporter.progress import Progress
from exporter.recording import after_backward, hidden_from_compiler
from exporter.registration import Registration
from exporter.reporter import OnLevel, OnUpdate, RunReporter

DEFAULT_WINDOW_STEPS = 64
WINDOW_SECONDS = 30.0
"""A window of `window_steps` also ends at the first gradient step after this time."""
_CHECK_SECONDS = 0.1
"""The first gradient that is not finite is said at once, and how many there are so often within a window; on a device,
for which nobody waits, all after the time below."""
_DEVICE_CHECK_SECONDS = 1.0
_MOST_WINDOW_STEPS = 65536  # for a trainer that forgets to say that an update is completed

_log = logging.getLogger(__name__)


class GradientMonitor:
    """Observes the gradients of action heads at every `optimizer.step()` and exports their CV.

    It changes neither gradients nor random state, and an error inside it is logged once, counted in
    `ppo_exporter_errors_total`, and never reaches the training loop. On CUDA it adds no synchronization: norms travel
    to pinned memory, and a thread publishes them when they have arrived. Any thread may call its methods.

    A script that ends without `close()` is closed as by its `with` block: an exception that ends it leaves the files of
    `serve()`, a clean end removes them.

    What it sees at a step is clipped where the trainer clips. The CV and the shares do not change under clipping by the
    global norm; norms do. After clipping a NaN in one head is in all of them: `before_clipping` tells which.

    Args:
        heads: head name -> modules, parameters, or `Rows` of a layer that heads share; or a list of them. See also
            `heads_from`, `space_heads` and `row_heads`.
        run: name of the run, its label on `/metrics`.
        window_steps: gradient steps that make a window, or fewer where they take longer than `WINDOW_SECONDS`, until
            `update_completed()` is called for the first time; from then on a window is an update. None waits for it.
        before_clipping: measure at the end of each backward pass that reaches a head, after DistributedDataParallel
            has averaged. Exact norms, the right head for a NaN, and gradients that are not finite count although the
            trainer repairs them or skips the step; for one hook call per parameter and backward pass.
        global_norm: export `ppo_gradient_norm` too, over all parameters; reads every gradient once more.
        grad_scaler: the `torch.amp.GradScaler` in use; `before_clipping` needs it to unscale.
        thresholds: CVs from which the run's level is warning and critical, `Thresholds` or a pair;
            label, status page, rules and dashboards follow them.
        info: labels of `ppo_run_info`, such as environment and seed.
        on_update: called with the run's `RunSnapshot` after every window, for loggers of your own; its `scalars()` has
            CV, shares, norms and signals by name.
        on_level: called with the new `HealthLevel` and the `RunSnapshot` when the run's level has changed. Both are
            called by the training thread, or on CUDA by one of the monitor's; an error in them is logged and counted.
        aggregator: where updates go; by default one that all monitors of the process share.

    Raises:
        TypeError: `thresholds` are neither.
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
        self._may_be_too_early = False

    def attach(self, optimizer: Optimizer | Sequence[Optimizer]) -> "GradientMonitor":
        """Observe every step of `optimizer`, also through Accelerate's and other wrappers.

        Of several optimizers, over which heads are spread, a gradient step is when all of them have stepped.

        Raises:
            RuntimeError: the monitor is attached already.
            TypeError: not an optimizer, or a head that is made of something else than parameters.
            ValueError: the heads cannot be measured (see `HeadGradientMeter`), the optimizer does not own one of their
                parameters (the message names the head), or another monitor measures a run of this name. One whose
                optimizer is gone, or this one, gives way, as does any in an interactive session.
        """
        if self._hooks:
            raise RuntimeError(f"monitor of run {self.run!r} is attached already; detach() it first")
        optimizers = unwrapped(optimizer)
        owned = [parameter for each in optimizers for group in each.param_groups for parameter in group["params"]]
        meter = HeadGradientMeter(self.heads, owned if self._global_norm else ())
        meter.require_owned(owned)
        if self._registration.begin(optimizers, meter.head_names, self._info, self._thresholds):
            self._warn(unreachable_critical_warning(len(meter.head_names), self._thresholds))
        self._may_be_too_early = self._before_clipping and is_one_of_several()
        self._optimizer_count, self._stepped = len(optimizers), set()
        self._meter, self._step_at = meter, time.monotonic()
        self._hooks = [each.register_step_pre_hook(hidden_from_compiler(self._before_step)) for each in optimizers]
        if self._before_clipping:
            self._hooks += after_backward(meter.parameters, self._after_backward)
        return self

    def detach(self) -> None:
        """Stop observing; what was measured is published, and the run's series stay. May be attached again."""
        with self._lock:
            for hook in self._hooks:
                hook.remove()
            self._hooks, self._sees_closures = [], False
            self._close_window(is_last=True)
            self._meter = None
            self._registration.pause()
        self._reporter.wait()

    def close(self) -> None:
        """Detach, leave the endpoint (which closes with its last monitor), and take the run's series off it.

        Nothing happens in a forked child.
        """
        self._leave(crashed=False)

    def _leave(self, crashed: bool) -> None:
        if os.getpid() != self._pid:
            return  # in a forked child: all of it is the parent's
        # What is interrupted is not done again by another call, and does not keep the rest from being done.
        with ExitStack() as last_first:
            last_first.callback(self._registration.end, crashed)
            self._endpoints.leave(last_first, crashed)
            self.detach()

    def __deepcopy__(self, memo: object) -> "GradientMonitor":
        return self  # whoever copies an agent that keeps it has one training still

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
        """Serve `/metrics` from a process of its own; monitors that name the same port share it.

        Called again for the same port, new files take the place of those that it has written before.

        In a torch.distributed group only rank 0 serves; with `every_rank` each one
        does, at `port` + its local rank and with a label `rank`.

        Args:
            port: by default 9842, or a free one where another process has that, or where `targets_dir` tells
                Prometheus the port; monitors of a process that name none share one.
            targets_dir: write a target file for Prometheus' file service discovery there. It is removed by
                `close()`, but stays when the monitor is left by an exception: somebody should be told.
            textfile_dir: keep the run in a file there too, for node_exporter's textfile collector; removed like the
                target file.
            pushgateway: URL of a Pushgateway that gets the run's final state by `close()`.
            web_config_file: TLS and users of the endpoint, see docs/endpoint.md.
            registry: metrics of your own, a prometheus_client registry, served beside these.

        Returns:
            The URL, or None on a rank that does not serve.

        Raises:
            OSError: the address cannot be bound, or a file not written.
            ValueError: `pushgateway` is no such URL, the web configuration file is wrong, or the endpoint is shared
                with a monitor that gave it another one, or another registry.
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
        """Where `/metrics` is served, as `serve()` has returned it last; None where it is not, and after `close()`."""
        return self._endpoints.url

    def record(self, **values: float | Mapping[str, float] | None) -> None:
        """Training signals to be exported with the next window, such as `policy_loss` or `approx_kl`.

        `head_entropy_ratios`, `head_approx_kls`, `head_clip_fractions` and `head_update_ratios` are mappings, head ->
        number, as in `PPOUpdatePayload`.

        Counts (`environment_steps`, `episodes`) are increments and add up; durations
        belong to one window; everything else stays until it is recorded anew.

        Raises:
            TypeError: there is no signal of that name, or the value is no number.
            ValueError: the value is out of its range, a negative count say.
        """
        with self._lock:
            self._progress.record(values)
            if "environment_steps" in values and self._hooks:
                idle = time.monotonic() - self._step_at
                if idle > STALLED_SECONDS:
                    reason = f"no gradient step was seen in {idle:.0f} s, though environments were stepped"
                    self._safely(self._reporter.blind, reason)

    def gradients_ready(self) -> None:
        """Measure the gradients of the next step as they are now, for a trainer that averages them by hand.

        To be called after that and before clipping, with or without `before_clipping`.
        """
        with self._lock:
            self._may_be_too_early = False
            if self._meter is not None:
                self._meter.give_up(does_count=False)  # what was seen before the averaging is the same step
            self._after_backward()

    @contextmanager
    def update(self, **values: float | Mapping[str, float] | None) -> Iterator["GradientMonitor"]:
        """`with monitor.update(environment_steps=2048) as update:` a PPO update, timed; at its end it is completed.

        An update that ends with an exception is none.

        Args:
            values: as for `update_completed()`.

        Raises:
            TypeError, ValueError: as `record()`.
        """
        started = time.monotonic()
        yield self
        self.update_completed(**{"update_duration_seconds": time.monotonic() - started, **values})

    def update_completed(self, **values: float | Mapping[str, float] | None) -> None:
        """A PPO update has ended: publish its window, with `values` as for `record()`.

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
        # A closure runs the backward pass within the step; what it has left behind is measured after it.
        if has_closure(args, kwargs):
            self._observe(optimizer)

    def _observe(self, optimizer: Optimizer) -> None:
        try:
            with self._lock:
                if self._meter is None:
                    return  # another thread has detached it meanwhile
                if self._optimizer_count > 1:
                    self._stepped.add(id(optimizer))
                    if len(self._stepped) < self._optimizer_count:
                        return
                    self._stepped.clear()
                if self._may_be_too_early:
                    self._may_be_too_early = False
                    self._warn(unaveraged_warning(self._meter.parameters))
                scale = getattr(optimizer, "grad_scale", None)
                if self._grad_scaler is not None and self._meter.has_early:
                    scale = self._grad_scaler.scale(torch.ones((), device=self._meter.parameters[0].device))
                # With a fused optimizer GradScaler leaves it to the step to skip what overflowed; with others the
                # step, and so this hook, is not called. Either way such a step is none.
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
                    # What a GradScaler gives up has overflowed, and is no step.
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
            return  # without a gradient step there is nothing to call healthy
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
