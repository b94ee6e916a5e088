"""The study in small: a fault and the control, interrupted and resumed, to the end of its report."""

import math
from dataclasses import astuple

import pytest

from study.__main__ import collect, report
from study.faults import FAULTS
from study.runs import NO_FAULT, Job, do_all, train
from study.table import Run, read
from study.truth import band, trouble

UPDATES = 4


@pytest.fixture(scope="module")
def healthy():
    return {task: train(Job(task, NO_FAULT, 1, UPDATES)) for task in ("contextual", "drone")}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_changes_what_is_measured_once_it_has_begun(name, healthy):
    task = (*FAULTS[name].tasks, "contextual")[0]
    rows = train(Job(task, name, 1, UPDATES))
    assert rows[0].onset == (UPDATES // 2 + 1 if FAULTS[name].in_the_middle else 1)
    # From the update on; repr(): NaN is what it was.
    same = [repr(astuple(row)[5:]) == repr(astuple(control)[5:]) for row, control in zip(rows, healthy[task])]
    assert all(same[: rows[0].onset - 1]) and not same[-1]


def test_a_study_goes_on_where_it_stopped_and_reports(tmp_path):
    jobs = [Job("contextual", fault, seed, 24) for fault in (NO_FAULT, "head_detached") for seed in (1, 2)]
    do_all(jobs[:2], tmp_path, workers=1)
    first = (tmp_path / jobs[0].file).stat().st_mtime_ns
    do_all(jobs, tmp_path, workers=1)
    assert (tmp_path / jobs[0].file).stat().st_mtime_ns == first
    collect(jobs, tmp_path, tmp_path / "updates.csv.xz")
    runs = read(tmp_path / "updates.csv.xz")
    assert [(run.fault, run.seed, len(run.rows)) for run in runs] == [(job.fault, job.seed, 24) for job in jobs]

    page = tmp_path / "meaning.md"
    names = ("truth", "told", "goal", "false alarms", "areas", "areas by fault", "heads", "peers")
    page.write_text("".join(f"<!-- {name} -->\n<!-- end -->\n" for name in names))
    study = report(tmp_path / "updates.csv.xz", tmp_path, 1, page, tmp_path)
    alerts = {key: {firing.alert for firing in found} for key, found in study.alerts.items()}
    assert alerts["contextual", NO_FAULT, 1] == set()
    assert "PPOHeadDead" in alerts["contextual", "head_detached", 1]
    assert "| head's output detached |" in page.read_text()
    assert (tmp_path / "meaning-signals.png").stat().st_size > 0


def made(returns, onset=1):
    (row, *_) = train(Job("contextual", NO_FAULT, 1, 1))
    fields = row.__slots__
    values = dict(zip(fields, astuple(row)))
    return Run("contextual", "x", 1, [type(row)(**values | {"episode_return": r, "onset": onset}) for r in returns])


def test_trouble_begins_where_the_return_leaves_the_band_for_good():
    lower = band([made([float(n) for n in range(60)]), made([n + 1.0 for n in range(60)])])
    fine, fallen = [n + 0.5 for n in range(60)], [n + 0.5 if n < 30 else 0.0 for n in range(60)]
    dipped = [0.0 if n == 20 else n + 0.5 for n in range(60)]
    assert trouble(made(fine), lower) is None and trouble(made(dipped), lower) is None
    assert trouble(made(fallen), lower) == 31
    assert trouble(made(fallen, onset=40), lower) == 40  # not before its cause
    late = [n + 0.5 if n < 55 else 0.0 for n in range(60)]
    assert trouble(made(late), lower) is None  # too late to say
    assert not math.isnan(lower[0])
