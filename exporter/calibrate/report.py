"""The printed proposal: a histogram, a table, lines to paste, and a picture."""

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from exporter.calibrate.proposal import Proposal, share
from exporter.calibrate.sources import HealthyRun
from exporter.gradient_cv import gradient_cv_ceiling, unreachable_critical_warning
from exporter.health import CRITICAL_THRESHOLD, WARNING_THRESHOLD

_WIDTH = 50
_MOST_BARS = 25


def data_lines(runs: Sequence[HealthyRun], heads: int) -> Iterator[str]:
    """The data: runs, updates, and left out updates."""
    counts = [len(run.cvs) for run in runs]
    yield f"{len(runs)} runs of {heads} heads, {sum(counts)} updates; the shortest run has {min(counts)}"
    if nonfinite := sum(run.nonfinite for run in runs):
        yield f"left out: {nonfinite} updates whose gradient was not finite"
    if len(own := {run.judged_by for run in runs if run.judged_by}) > 1:
        pairs = ", ".join(" and ".join(f"{value:g}" for value in each) for each in sorted(own))
        yield f"these runs were judged by different thresholds ({pairs}); their CVs are not changed by that"


def histogram_lines(cvs: Sequence[float], marks: dict[str, float]) -> Iterator[str]:
    """Bars of equal width in CV; `marks` (name -> CV) are shown beside their bars."""
    low, high = min(cvs), max(*cvs, *marks.values())
    width = next(w for e in range(-3, 9) for w in (10**e, 2 * 10**e, 5 * 10**e) if (high - low) / w < _MOST_BARS - 1)

    def bar_of(cv: float) -> int:
        return int(cv / width + 1e-9)  # a CV of 0.3 belongs to the bar from 0.3, despite rounding

    counts = Counter(map(bar_of, cvs))
    most = max(counts.values())
    yield "  gradient CV   updates"
    for index in range(bar_of(low), bar_of(high) + 1):
        bar = "#" * -(-counts[index] * _WIDTH // most)  # rounded up, so that a single update shows
        beside = "".join(f" <- {name} {value:.3f}" for name, value in marks.items() if bar_of(value) == index)
        yield f"{index * width:13.3f} {counts[index]:9d} {bar}{beside}".rstrip()


def proposal_lines(cvs: Sequence[float], heads: int, proposal: Proposal) -> Iterator[str]:
    """The proposed and the default thresholds and the ceiling, then the lines to paste."""
    warning, critical = vars(proposal.thresholds).values()
    yield f"{'':18} {'CV':>8}   healthy updates that reach it; in the worst run, by thresholds of the others"
    for name, value, worst in (
        ("proposed warning", warning, proposal.worst[0]),
        ("proposed critical", critical, proposal.worst[1]),
        ("usual warning", WARNING_THRESHOLD, None),
        ("usual critical", CRITICAL_THRESHOLD, None),
    ):
        in_worst = f"; {worst[0]:.2%} ({worst[1]})" if worst and worst[0] else ""
        yield f"{name:18} {value:8.3f}   {share(cvs, value):7.2%}{in_worst}"
    yield f"{'ceiling':18} {gradient_cv_ceiling(heads):8.3f}   the largest CV of {heads} heads"
    if proposal.steps is None:
        yield "single gradient steps: not known here; they reach critical more often, see PPOCriticalGradientSteps"
    else:
        yield f"single gradient steps: at most {proposal.steps:.1%} reach the proposed critical"
    if unreachable := unreachable_critical_warning(heads):
        yield unreachable
    yield ""
    yield f"Python:   thresholds=({warning:.3f}, {critical:.3f})"
    yield f"trainer:  --warning-threshold {warning:.3f} --critical-threshold {critical:.3f}"


def write_plot(path: Path, runs: Sequence[HealthyRun], heads: int, proposal: Proposal) -> None:
    """A histogram with all thresholds, in the format of the file's name: .svg, .png, .pdf.

    Raises:
        ImportError: Matplotlib is not installed.
        OSError, ValueError: the file cannot be written, or its format is not known.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    axes.hist([cv for run in runs for cv in run.cvs], bins=60, color="tab:gray")
    lines = {
        "proposed warning": (proposal.thresholds.warning, "gold", "-"),
        "proposed critical": (proposal.thresholds.critical, "red", "-"),
        "usual warning": (WARNING_THRESHOLD, "gold", ":"),
        "usual critical": (CRITICAL_THRESHOLD, "red", ":"),
        "ceiling": (gradient_cv_ceiling(heads), "black", "--"),
    }
    for name, (cv, color, style) in lines.items():
        axes.axvline(cv, color=color, linestyle=style, label=f"{name} {cv:.3f}")
    axes.set(xlabel="gradient CV", ylabel="healthy updates", yscale="log", xlim=(0, None))
    axes.set_title(f"{len(runs)} healthy runs of {heads} heads")
    axes.legend()
    figure.savefig(path)
