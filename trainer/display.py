"""What a person sees while a run trains: a live display in a terminal, plain lines elsewhere."""

import contextlib
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from exporter.health import HealthLevel, cv_text
from exporter.snapshot import GradientQuality, RunSnapshot

ReadRun = Callable[[], RunSnapshot]
REFRESHES_PER_SECOND = 4


def say(text: str, *, to_stderr: bool = False) -> None:
    """Print a line. A full disk or a closed terminal does not end training."""
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr if to_stderr else sys.stdout, flush=True)


class Display(Protocol):
    """Shown while training; `updated()` is called after every update, with its number in the run."""

    def __enter__(self) -> "Display": ...
    def __exit__(self, *exc_info: object) -> None: ...
    def updated(self, update: int) -> None: ...


def open_display(
    read_run: ReadRun, updates: int, total_updates: int, log_interval: int, follow: Path | None
) -> Display:
    """The live display if standard output is a terminal that can show it, plain lines otherwise.

    `updates` of the run's `total_updates` are complete already.
    """
    console = Console()
    if console.is_terminal and not console.is_dumb_terminal:
        return LiveDisplay(read_run, updates, total_updates, console, follow)
    return PlainDisplay(read_run, total_updates, log_interval)


class StepsPerSecond:
    """Environment steps per wall second since the display started."""

    def __init__(self, run: RunSnapshot) -> None:
        self._started = time.monotonic()
        self._steps_before = run.environment_steps

    def of(self, run: RunSnapshot) -> float:
        return (run.environment_steps - self._steps_before) / max(time.monotonic() - self._started, 1e-9)


class PlainDisplay:
    """One line per `log_interval` updates, and one for the last update."""

    def __init__(self, read_run: ReadRun, total_updates: int, log_interval: int) -> None:
        self._read_run = read_run
        self._total_updates = total_updates
        self._log_interval = log_interval
        self._speed = StepsPerSecond(read_run())

    def __enter__(self) -> "PlainDisplay":
        return self

    def __exit__(self, *exc_info: object) -> None:
        pass

    def updated(self, update: int) -> None:
        run = self._read_run()
        quality = run.gradient_quality
        if update % self._log_interval == 0 or update == self._total_updates:
            signals = " ".join(f"{name} {value}" for name, value in _signals(run))
            say(
                f"update {update}/{self._total_updates} steps {run.environment_steps} "
                f"steps/s {self._speed.of(run):.0f} {signals} {cv_text(quality.gradient_cv, quality.thresholds)}"
            )


class LiveDisplay:
    """Progress, training signals and the heads panel, redrawn in place from the current snapshot.

    Args:
        follow: a file; lines appended to it are printed above the display.
    """

    def __init__(
        self, read_run: ReadRun, updates: int, total_updates: int, console: Console, follow: Path | None
    ) -> None:
        self._read_run = read_run
        self._console = console
        self._speed = StepsPerSecond(read_run())
        self._progress = Progress(
            TextColumn("update"),
            MofNCompleteColumn(),
            BarColumn(bar_width=None),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            expand=True,
        )
        self._task = self._progress.add_task("update", total=total_updates, completed=updates)
        self._followed = follow.open(encoding="utf-8", errors="replace") if follow else None
        if self._followed:
            self._followed.seek(0, 2)
        self._live = Live(
            get_renderable=self._render,
            console=console,
            refresh_per_second=REFRESHES_PER_SECOND,
            redirect_stderr=sys.stderr.isatty(),
        )

    def __enter__(self) -> "LiveDisplay":
        self._live.__enter__()
        return self

    def __exit__(self, *exc_info: object) -> None:
        with contextlib.suppress(OSError):  # the terminal is closed
            self._print_followed()
            self._live.__exit__(*exc_info)
        if self._followed:
            self._followed.close()

    def updated(self, update: int) -> None:
        self._progress.update(self._task, completed=update)
        with contextlib.suppress(OSError):
            self._print_followed()

    def _print_followed(self) -> None:
        if self._followed:
            for line in self._followed.read().splitlines():
                self._console.print(Text.from_ansi(line))

    def _render(self) -> Group:
        run = self._read_run()
        signals = Table.grid(padding=(0, 2))
        shown = [("steps", f"{run.environment_steps:,}"), ("steps/s", f"{self._speed.of(run):,.0f}"), *_signals(run)]
        for start in range(0, len(shown), 4):
            signals.add_row(*(Text.assemble((name, "dim"), " ", value) for name, value in shown[start : start + 4]))
        return Group(
            Panel(heads_panel(run.gradient_quality), title=run.run, title_align="left"), signals, self._progress
        )


def heads_panel(quality: GradientQuality) -> Group:
    """A bar for every head's norm, relative to the largest, and the CV in its level's color."""
    heads = Table.grid(padding=(0, 1), expand=True)
    heads.add_column(no_wrap=True)
    heads.add_column(ratio=1)
    heads.add_column(justify="right", no_wrap=True)
    heads.add_column(justify="right", no_wrap=True)
    shares = quality.head_shares
    largest = max(shares.values(), default=0.0) or 1.0
    for head, norm in quality.head_norms.items():
        bar = ProgressBar(total=largest, completed=shares[head], complete_style="cyan", finished_style="cyan")
        heads.add_row(head, bar, f"{norm:.3e}", f"{shares[head]:.0%}")
    return Group(heads, flow_line(quality)) if quality.head_norms else Group(flow_line(quality))


def flow_line(quality: GradientQuality) -> Text:
    """`Flow: CV:0.312 stable` in its level's color, then non-finite and skipped steps."""
    line = Text.assemble("Flow: ", (cv_text(quality.gradient_cv, quality.thresholds), f"bold {quality.health.color}"))
    nonfinite = [f"{head} {count}" for head, count in quality.nonfinite_steps.items() if count]
    if nonfinite:
        line.append(f"  non-finite steps: {', '.join(nonfinite)}", style=HealthLevel.CRITICAL.color)
    if quality.skipped_steps:
        line.append(f"  skipped steps: {quality.skipped_steps}", style=HealthLevel.CRITICAL.color)
    return line


def _signals(run: RunSnapshot) -> list[tuple[str, str]]:
    formats = {
        "episode_return_mean": ("return", ".3f"),
        "episode_length_mean": ("length", ".1f"),
        "policy_loss": ("policy_loss", ".4f"),
        "value_loss": ("value_loss", ".4f"),
        "entropy": ("entropy", ".3f"),
        "approx_kl": ("approx_kl", ".5f"),
        "clip_fraction": ("clip_fraction", ".3f"),
        "explained_variance": ("explained_variance", ".3f"),
        "learning_rate": ("learning_rate", ".2e"),
    }
    return [(label, format(run.signals[name], spec)) for name, (label, spec) in formats.items() if name in run.signals]
