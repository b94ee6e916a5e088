"""Which alert told which run, and when; kept, for promtool takes a second a run."""

import hashlib
import json
import multiprocessing
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import yaml

from study.alerts import RULES, SECONDS, Firing, firings, in_batches
from study.table import Run

Key = tuple[str, str, int]


def key(run: Run) -> Key:
    return run.task, run.fault, run.seed


def verdicts(runs: Sequence[Run], folder: Path, workers: int, seconds: int = SECONDS) -> dict[Key, list[Firing]]:
    """The alerts of every run, by task, fault and seed; from `folder` where these rules were asked before."""
    rules = hashlib.sha256(repr((_meaning(RULES), seconds)).encode()).hexdigest()[:12]
    path = folder / f"alerts-{rules}.json"
    known = {tuple(k): [Firing(*f) for f in fs] for k, fs in json.loads(path.read_text())} if path.exists() else {}
    batches = in_batches([run for run in runs if key(run) not in known])
    if len(batches) == 1:
        known |= zip(map(key, batches[0]), firings(batches[0], RULES, seconds), strict=True)
    elif batches:
        with multiprocessing.get_context("spawn").Pool(workers) as pool:
            jobs = [(batch, pool.apply_async(firings, (batch, RULES, seconds))) for batch in batches]
            for batch, job in jobs:
                known |= zip(map(key, batch), job.get(), strict=True)
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(list(known.items())))
    return {key(run): known[key(run)] for run in runs}


def _meaning(rules: Path) -> list[list]:
    """What decides whether an alert fires: texts do not."""
    groups = yaml.safe_load(rules.read_text())["groups"]
    return [[{**rule, "annotations": None} for rule in group["rules"]] for group in groups]


class Told(NamedTuple):
    """What the alerts said of a run in trouble.

    Attributes:
        update: at which the first alert fired that stayed or came after the fault began; None: none did.
        alert: its name.
        lead: updates from it until the return shows the trouble; below 0 where the return was first.
    """

    update: int | None
    alert: str | None
    lead: int | None


def told(run: Run, found: Sequence[Firing], trouble: int) -> Told:
    after = [firing for firing in found if firing.update >= run.onset]
    if not after:
        return Told(None, None, None)
    first = min(after)
    return Told(first.update, first.alert, trouble - first.update)


def episodes(found: Sequence[Firing], severity: str | None = None) -> Counter:
    """How often each alert began to fire; a gap of one update does not end it."""
    begun: Counter = Counter()
    last: dict[tuple[str, str], int] = {}
    for firing in sorted(found):
        if severity is None or firing.severity == severity:
            name = (firing.alert, firing.severity)
            begun[name] += firing.update > last.get(name, -9) + 2
            last[name] = firing.update
    return begun
