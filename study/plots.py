"""The figures of docs/meaning.md."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from study import signals
from study.faults import FAULTS
from study.report import Study
from study.runs import THREE
from study.table import Run
from study.truth import smoothed
from study.verdicts import key


def draw_all(study: Study, folder: Path) -> None:
    """Write every figure into `folder`, as PNG."""
    for name, draw in {"solved": _solved, "signals": _signals, "leads": _leads, "heads": _heads}.items():
        draw(study, folder / f"meaning-{name}.png")


def _figure(width: float, height: float, rows: int = 1, columns: int = 1):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=100, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def _save(figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")


def _runs(study: Study, task: str, fault: str) -> list[Run]:
    return [run for run in study.runs if (run.task, run.fault) == (task, fault)]


def _mean(runs: Sequence[Run], of: Callable[[Run], np.ndarray]) -> np.ndarray:
    return np.mean([smoothed(of(run)) for run in runs], axis=0)


def _solved(study: Study, path: Path) -> None:
    """A CV that rises with success, beside one that tells a fault."""
    figure, axes = _figure(10, 3.4, 1, 3)
    shown = {
        "healthy": ("contextual", "none"),
        "healthy, six heads solved": ("solved-heads", "none"),
        "healthy, six heads idle": ("idle-heads", "none"),
        "a head detached": ("contextual", "head_detached"),
    }
    panels = {
        "episode return": lambda run: run.column("episode_return"),
        "gradient CV": lambda run: run.column("gradient_cv"),
        # Of the head that has the least of the gradient: starved, or done?
        "entropy of the head with the smallest share": lambda run: np.take_along_axis(
            run.column("head_entropy_ratios"), run.column("head_gradient_norms").argmin(1)[:, None], 1
        )[:, 0],
    }
    for axis, (title, of) in zip(axes[0], panels.items()):
        for label, (task, fault) in shown.items():
            if runs := _runs(study, task, fault):
                axis.plot(range(1, len(runs[0].rows) + 1), _mean(runs, of), label=label)
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("update")
        axis.grid(alpha=0.3)
    axes[0, 1].axhline(0.5, color="gray", linestyle=":")
    axes[0, 0].legend(frameon=False, fontsize=8)
    _save(figure, path)


def _signals(study: Study, path: Path) -> None:
    """Area under the curve of every signal for every fault, while it lasts."""
    areas = [study.areas(half, early=False) for half in (True, False)]
    names = list(signals.SIGNALS)
    rows = {}
    for fault in FAULTS:
        of_fault = [of for half in areas for (name, _), of in half.items() if name == fault]
        if of_fault:
            rows[fault] = [np.nanmean([of[study.directions[name]] for of in of_fault]) for name in names]
    figure, ((axis,),) = _figure(10, 0.32 * len(rows) + 2.2)
    image = axis.imshow(np.array(list(rows.values())), vmin=0, vmax=1, cmap="RdBu", aspect="auto")
    for y, values in enumerate(rows.values()):
        for x, value in enumerate(values):
            color = "white" if abs(value - 0.5) > 0.3 else "black"
            axis.text(x, y, f"{value:.2f}", ha="center", va="center", fontsize=7, color=color)
    axis.set_yticks(range(len(rows)), [FAULTS[fault].title for fault in rows], fontsize=8)
    axis.set_xticks(range(len(names)), names, rotation=45, ha="right", fontsize=8)
    axis.set_title("Area under the ROC curve, runs in trouble against healthy runs of the same task", fontsize=10)
    figure.colorbar(image, ax=axis, shrink=0.6)
    _save(figure, path)


def _leads(study: Study, path: Path) -> None:
    """When the first alert fired, relative to the return."""
    faults = [fault for fault in FAULTS if any(name == fault for _, name, _ in study.troubles)]
    figure, ((axis,),) = _figure(9, 0.3 * len(faults) + 1.3)
    for y, fault in enumerate(faults):
        for task, color in zip(THREE, ("C0", "C1", "C2")):
            runs = [run for run in _runs(study, task, fault) if key(run) in study.troubles]
            leads = [study._told(run).lead for run in runs]
            places = [lead for lead in leads if lead is not None]
            axis.plot(places, [y] * len(places), "o", color=color, alpha=0.6, markersize=5)
            missed = sum(lead is None for lead in leads)
            if missed:
                axis.plot([-100 - 4 * THREE.index(task)], [y], "x", color=color, markersize=5)
    axis.axvline(0, color="gray", linewidth=1)
    axis.set_yticks(range(len(faults)), [FAULTS[fault].title for fault in faults], fontsize=8)
    axis.invert_yaxis()
    axis.set_xlabel("updates from the first alert until the return shows it (crosses: a run that no alert told)")
    for task, color in zip(THREE, ("C0", "C1", "C2")):
        axis.plot([], [], "o", color=color, label=task)
    axis.legend(frameon=False, fontsize=8)
    axis.grid(alpha=0.3)
    _save(figure, path)


def _heads(study: Study, path: Path) -> None:
    """The CV of healthy runs and of one dead head, by the number of heads."""
    figure, ((axis,),) = _figure(6, 3.2)
    tasks = {2: "heads-2", 3: "heads-3", 7: "contextual", 20: "heads-20"}
    for label, fault, color in (("healthy", "none", "C0"), ("one head detached", "head_detached", "C3")):
        spread = [
            np.quantile(np.concatenate([run.column("gradient_cv") for run in runs]), (0.05, 0.5, 0.95))
            for task in tasks.values()
            if (runs := _runs(study, task, fault))
        ]
        if len(spread) == len(tasks):
            low, middle, high = np.array(spread).T
            axis.plot(list(tasks), middle, "o-", color=color, label=label)
            axis.fill_between(list(tasks), low, high, color=color, alpha=0.2, linewidth=0)
    axis.plot(list(tasks), np.sqrt(list(tasks)), "--", color="gray", label="ceiling, sqrt(heads)")
    for threshold in (0.5, 2.0):
        axis.axhline(threshold, color="gray", linestyle=":")
    axis.set_xscale("log")
    axis.set_xticks(list(tasks), [str(heads) for heads in tasks])
    axis.minorticks_off()
    axis.set_xlabel("heads")
    axis.set_ylabel("gradient CV")
    axis.legend(frameon=False, fontsize=8)
    _save(figure, path)
