"""The tables of docs/meaning.md, from the study's table."""

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import median

import numpy as np

from study import signals
from study.alerts import SECONDS, Firing
from study.faults import FAULTS
from study.runs import BENIGN, BY_HEADS, THREE
from study.table import Run
from study.truth import AT_LEAST, band, trouble
from study.verdicts import Key, Told, episodes, key, told

OBVIOUS = ("sensor_nan",)
"""Every signal is NaN then: nothing to compare."""


def is_tuned_on(run: Run) -> bool:
    """Alerts and directions were chosen on odd seeds, and are reported on even ones."""
    return run.seed % 2 == 1


@dataclass
class Study:
    """Runs, their truth and their verdicts."""

    runs: list[Run]
    alerts: dict[Key, list[Firing]] = field(default_factory=dict)

    @cached_property
    def troubles(self) -> dict[Key, int]:
        """Update from which each run with a fault is in trouble, of those that are."""
        bands = {task: band(runs) for task, runs in self._healthy.items()}
        found = {key(run): trouble(run, bands[run.task]) for run in self.runs if not run.is_healthy}
        return {run: update for run, update in found.items() if update is not None}

    @cached_property
    def _healthy(self) -> dict[str, list[Run]]:
        by_task: dict[str, list[Run]] = defaultdict(list)
        for run in self.runs:
            if run.is_healthy:
                by_task[run.task].append(run)
        return dict(by_task)

    @cached_property
    def groups(self) -> dict[tuple[str, str], list[Run]]:
        """Runs with a fault, by fault and task."""
        by_fault: dict[tuple[str, str], list[Run]] = defaultdict(list)
        for run in self.runs:
            if not run.is_healthy:
                by_fault[run.fault, run.task].append(run)
        return by_fault

    def hurts(self, fault: str, task: str) -> bool:
        """Whether the fault brings most of its runs into trouble there."""
        runs = self.groups.get((fault, task), [])
        return sum(key(run) in self.troubles for run in runs) * 2 > len(runs)

    # Tables

    def truth_table(self) -> str:
        lines = []
        for fault, about in FAULTS.items():
            cells = []
            for task in THREE:
                runs = self.groups.get((fault, task), [])
                updates = [self.troubles[key(run)] for run in runs if key(run) in self.troubles]
                shown = f"{len(updates)} of {len(runs)}" + (f", {median(updates):.0f}" if updates else "")
                cells.append(shown if runs else "-")
            lines.append([about.title, "middle" if about.in_the_middle else "start", *cells])
        return table(["fault", "begins at", *THREE], lines)

    def told_table(self) -> str:
        lines = []
        for fault, about in FAULTS.items():
            verdicts = [(run, self._told(run)) for task in THREE for run in self.groups.get((fault, task), [])]
            hurt = [(run, verdict) for run, verdict in verdicts if key(run) in self.troubles]
            if not hurt:
                continue
            leads = [verdict.lead for _, verdict in hurt if verdict.lead is not None]
            names = Counter(verdict.alert for _, verdict in hurt if verdict.alert)
            first = ", ".join(f"{name} {count}" for name, count in names.most_common(3)) or "none"
            spread = f"{median(leads):+.0f} ({min(leads):+d} to {max(leads):+d})" if leads else ""
            lines.append([about.title, f"{len(leads)} of {len(hurt)}", spread, first])
        return table(["fault", "told", "updates before the return", "first alert"], lines)

    def goal_table(self) -> str:
        """Faults that hurt, told and with which lead, on each half of the seeds."""
        lines = []
        for name, half in (("odd, tuned on", True), ("even, reported", False)):
            hurt = [
                (run, self._told(run))
                for (fault, task), runs in self.groups.items()
                if task in THREE and self.hurts(fault, task)
                for run in runs
                if key(run) in self.troubles and is_tuned_on(run) is half
            ]
            leads = [verdict.lead for _, verdict in hurt if verdict.lead is not None]
            # A run that no alert told counts as told after everything.
            all_leads = sorted([*leads, *[-999] * (len(hurt) - len(leads))])
            by_fault = defaultdict(list)
            for run, verdict in hurt:
                by_fault[run.fault].append(verdict.lead)
            kinds = sum(sum(lead is not None for lead in of) * 2 > len(of) for of in by_fault.values())
            early = sum(lead > 0 for lead in leads)
            lines.append(
                [
                    name,
                    f"{len(leads)} of {len(hurt)} ({len(leads) / max(1, len(hurt)):.0%})",
                    f"{kinds} of {len(by_fault)} ({kinds / max(1, len(by_fault)):.0%})",
                    f"{early} ({early / max(1, len(hurt)):.0%})",
                    *(
                        f"{all_leads[len(all_leads) // 2] + later:+d}" if all_leads else ""
                        for later in (0, AT_LEAST - 1)
                    ),
                    *self.false_alarms(half),
                ]
            )
        header = [
            "seeds",
            "runs in trouble told",
            "faults told",
            "before the return",
            "median lead, updates",
            "if the return takes 10 to be sure",
        ]
        return table([*header, "healthy hours", "pages", "warnings"], lines)

    def false_alarms(self, half: bool) -> list[str]:
        hours, begun = 0.0, Counter()
        for run in self.runs:
            if is_tuned_on(run) is not half:
                continue
            if run.is_healthy:
                hours += len(run.rows) * SECONDS / 3600
                begun += episodes(self.alerts.get(key(run), []))
        by = {s: sum(n for (_, severity), n in begun.items() if severity == s) for s in ("critical", "warning")}
        return [f"{hours:.1f}", *(str(by[severity]) for severity in ("critical", "warning"))]

    def false_alarm_table(self) -> str:
        """Of all healthy runs: which alert, on which task."""
        tasks = (*THREE, *BENIGN, *BY_HEADS)
        counts: dict[tuple[str, str], Counter] = defaultdict(Counter)
        hours: Counter = Counter()
        for run in self.runs:
            if run.is_healthy:
                hours[run.task] += len(run.rows) * SECONDS / 3600
                for name, number in episodes(self.alerts.get(key(run), [])).items():
                    counts[name][run.task] += number
        lines = [["healthy hours", "", *(f"{hours[task]:.1f}" for task in tasks)]]
        lines += [[*name, *(str(of[task]) for task in tasks)] for name, of in sorted(counts.items())]
        return table(["alert", "severity", *tasks], lines)

    def _told(self, run: Run) -> Told:
        return told(run, self.alerts.get(key(run), []), self.troubles.get(key(run), len(run.rows) + 1))

    # Areas under the curve

    @cached_property
    def _ranks(self) -> dict[str, signals.Ranks]:
        return {
            task: signals.Ranks(tuned)
            for task, runs in self._healthy.items()
            if (tuned := [run for run in runs if is_tuned_on(run)])
        }

    def _scored(self, runs: Sequence[Run], early: bool) -> signals.Scored:
        """Scores of runs: the updates with the fault, or only those before the return shows it."""
        spans = []
        for run in runs:
            stop = self.troubles[key(run)] - 1 if early and not run.is_healthy else len(run.rows)
            start = max(run.onset - 1, 0)
            if stop > start:
                spans.append((self._scores(run), slice(start, stop)))
        return spans

    def _scores(self, run: Run) -> dict:
        known = self.__dict__.setdefault("_known_scores", {})
        if key(run) not in known:
            known[key(run)] = self._ranks[run.task].scores(run)
        return known[key(run)]

    def areas(self, half: bool, early: bool, tasks: Sequence[str] = THREE, of=None) -> dict[tuple[str, str], dict]:
        """Areas by fault and task, of runs in trouble; of every signal and direction, or of pairs with `of`."""
        result = {}
        healthy = {
            task: self._scored([run for run in self._healthy[task] if is_tuned_on(run) is half], False)
            for task in tasks
            if task in self._ranks
        }
        for (fault, task), runs in self.groups.items():
            if task not in healthy or fault in OBVIOUS:
                continue
            hurt = [run for run in runs if key(run) in self.troubles and is_tuned_on(run) is half]
            faulty = self._scored(hurt, early)
            if not faulty or not healthy[task]:
                continue
            good = healthy[task]
            if of is not None:
                faulty, good = signals.pairs(faulty, of), signals.pairs(good, of)
            result[fault, task] = signals.areas(faulty, good, list(faulty[0][0]))
        return result

    @cached_property
    def directions(self) -> dict[str, tuple[str, str]]:
        tuned = mean_area(self.areas(True, early=False))
        return signals.best_directions(tuned) if tuned else {name: (name, "either") for name in signals.SIGNALS}

    def area_table(self) -> str:
        of = self.directions

        def both(of_pairs=None) -> tuple[dict, dict]:
            return tuple(mean_area(self.areas(False, early=is_early, of=of_pairs)) for is_early in (True, False))

        early, whole = both()
        if not whole:
            return "No run of an even seed is in trouble."
        lines = [[name, of[name][1], *_shown(of[name], early, whole)] for name in of]
        lines.sort(key=lambda line: line[-1], reverse=True)
        tuned = mean_area(self.areas(True, early=False, of=of))
        early, whole = both(of)
        best = max(tuned, key=tuned.get, default=None)
        with_cv = max((pair for pair in tuned if "gradient CV" in pair), key=tuned.get, default=None)
        for title, pair in {"best pair": best, "best pair with the CV": with_cv}.items():
            if pair is not None:
                lines.append([f"{title}: {pair[0]}, {pair[1]}", "", *_shown(pair, early, whole)])
        return table(["signal", "side", "before the return shows it", "while the fault lasts"], lines)

    SHOWN = (
        "gradient CV",
        "smallest share",
        "heads' part of the norm",
        "approx KL",
        "entropy",
        "explained variance",
        "highest head entropy",
        "lowest update ratio",
    )

    def fault_area_table(self) -> str:
        """By fault, on all seeds, early where there is an early part: directions are the tuned ones."""
        by_fault: dict[str, list[dict]] = defaultdict(list)
        for half in (True, False):
            for (fault, _), of in self.areas(half, early=False).items():
                by_fault[fault].append(of)
        lines = []
        for fault, about in FAULTS.items():
            if fault in by_fault:
                cells = [np.nanmean([of[self.directions[name]] for of in by_fault[fault]]) for name in self.SHOWN]
                best = max(cells)
                shown = [f"**{cell:.2f}**" if cell >= best - 0.005 else f"{cell:.2f}" for cell in cells]
                lines.append([about.title, *shown])
        return table(["fault", *self.SHOWN], lines)

    def heads_table(self) -> str:
        lines = []
        tasks = {"2": "heads-2", "3": "heads-3", "7": "contextual", "20": "heads-20"}
        faults = [fault for fault in FAULTS if (fault, "heads-20") in self.groups]
        for heads, task in tasks.items():
            if task not in self._healthy:
                continue
            healthy = [run.column("gradient_cv") for run in self._healthy[task]]
            areas = [self.areas(half, early=False, tasks=(task,)) for half in (True, False)]
            cells = []
            for fault in faults:
                found = [of[fault, task][self.directions["gradient CV"]] for of in areas if (fault, task) in of]
                runs = self.groups.get((fault, task), [])
                cv = np.median([np.median(run.column("gradient_cv")[50:]) for run in runs]) if runs else np.nan
                cells.append(f"{cv:.2f}" + (f" ({np.mean(found):.2f})" if found else " (no harm)"))
            all_healthy = np.concatenate(healthy)
            healthy_cv = f"{np.median(all_healthy):.2f}, {np.quantile(all_healthy, 0.99):.2f}"
            lines.append([heads, f"{int(heads) ** 0.5:.2f}", healthy_cv, *cells])
        header = ["heads", "ceiling", "healthy CV: median, 99 %", *(FAULTS[fault].title for fault in faults)]
        return table(header, lines)

    def peers_table(self, rows: Sequence[dict[str, str]]) -> str:
        """What `study.peers` has found, beside the alerts of the same runs."""
        healthy = [row for row in rows if row["fault"] == "none"]
        counts = []
        for peer in PEERS:
            alarmed = sum(bool(row[f"{peer}_first"]) for row in healthy)
            counts.append([peer, f"{alarmed} of {len(healthy)}", *self._peer_cells(rows, peer)])
        alarmed = sum(bool(self.alerts.get((row["task"], "none", int(row["seed"])))) for row in healthy)
        told_by_us = [row for row in rows if self._hurt(row) and self._first(row) is not None]
        hurt = [row for row in rows if self._hurt(row)]
        leads = [self.troubles[_key(row)] - self._first(row) for row in told_by_us]
        ours = ["alerts of this project", f"{alarmed} of {len(healthy)}", f"{len(told_by_us)} of {len(hurt)}"]
        counts.append([*ours, f"{median(leads):+.0f}" if leads else ""])
        return table(["", "healthy runs with a warning", "runs in trouble told", "median lead, updates"], counts)

    def _peer_cells(self, rows: Sequence[dict[str, str]], peer: str) -> list[str]:
        hurt = [row for row in rows if self._hurt(row)]
        firsts = [(row, int(row[f"{peer}_first"])) for row in hurt if row[f"{peer}_first"]]
        leads = [self.troubles[_key(row)] - first for row, first in firsts]
        return [f"{len(leads)} of {len(hurt)}", f"{median(leads):+.0f}" if leads else ""]

    def _hurt(self, row: dict[str, str]) -> bool:
        return _key(row) in self.troubles

    def _first(self, row: dict[str, str]) -> int | None:
        (run,) = (run for run in self.runs if key(run) == _key(row))
        return self._told(run).update


PEERS = ("trainpulse", "traintools", "torchdiag")


def _key(row: dict[str, str]) -> Key:
    return row["task"], row["fault"], int(row["seed"])


def _shown(key: tuple[str, str], *areas: dict) -> list[str]:
    return [f"{of[key]:.2f}" if key in of else "" for of in areas]


def mean_area(areas: dict[tuple[str, str], dict]) -> dict:
    """Over faults and tasks, each counting once."""
    keys = next(iter(areas.values())) if areas else {}
    return {key: float(np.nanmean([of[key] for of in areas.values()])) for key in keys}


def table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [header, ["---", *["---:"] * (len(header) - 1)], *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def put_into(path: Path, tables: dict[str, str]) -> None:
    """Replace what stands between `<!-- NAME -->` and `<!-- end -->` by each table."""
    text = path.read_text()
    for name, content in tables.items():
        pattern = rf"(<!-- {name} -->\n).*?(<!-- end -->)"
        text, found = re.subn(
            pattern, lambda match, content=content: f"{match[1]}{content}\n{match[2]}", text, flags=re.DOTALL
        )
        if not found:
            raise ValueError(f"{path} has no place for {name}: <!-- {name} --> and <!-- end -->")
    path.write_text(text)
