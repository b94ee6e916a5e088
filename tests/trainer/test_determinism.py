"""The same seed gives the same run to the last bit, whoever watches it, in whichever process."""

import os
import subprocess
import sys
import time
import urllib.request
from dataclasses import replace
from http.client import HTTPException
from pathlib import Path

import pytest
import torch
from test_resume import REPOSITORY, TINY, cvs, tensors, trained

from exporter import GradientMonitor, RunAggregator
from exporter.heads import Rows
from trainer.checkpoint_files import checkpoints_in, load
from trainer.training import Training


def rows_of_flat_parameter(training: Training) -> dict[str, list[Rows]]:
    """The action heads in the one parameter that the trainer's optimizer has."""
    (flat,) = training.agent._optimizer.param_groups[0]["params"]
    heads = {}
    for head, parts in training.agent.policy.head_rows.items():
        starts = [part.parameter.storage_offset() + part.start * part.parameter[0].numel() for part in parts]
        sizes = [(part.stop - part.start) * part.parameter[0].numel() for part in parts]
        heads[head] = [Rows(flat, start, start + size) for start, size in zip(starts, sizes)]
    return heads


@pytest.mark.parametrize("env", ["host-growth", "CartPole-v1"])
def test_the_cv_series_is_the_same_with_and_without_a_monitor(env):
    config = replace(TINY, env=env)
    plain, watched = Training(config), Training(config)
    aggregator, runs, seen = RunAggregator(), [], []
    with GradientMonitor(rows_of_flat_parameter(watched), "watched", aggregator=aggregator) as monitor:
        monitor.attach(watched.agent._optimizer)
        for _ in range(6):
            runs += trained(watched, 1)
            monitor.update_completed()
            seen.append(aggregator.snapshot.runs["watched"].gradient_quality.gradient_cv)
    expected = trained(plain, 6)
    assert [run.plain()["gradient_quality"] for run in runs] == [run.plain()["gradient_quality"] for run in expected]
    for ours, theirs in zip(tensors(watched.state_dict()), tensors(plain.state_dict()), strict=True):
        assert torch.equal(ours, theirs)
    assert seen == pytest.approx(cvs(expected))  # it did watch


def end_of_run(folder: Path, *, watch: bool, hash_seed: str) -> dict:
    """The last checkpoint of a run in a process of its own, which is scraped as fast as it answers if `watch`."""
    command = [sys.executable, "-m", "trainer", "--seed", "5", "--num-envs", "8", "--rollout-steps", "16"]
    command += ["--minibatch-size", "32", "--hidden-size", "32", "--total-timesteps", str(128 * 12), "--run", "same"]
    command += ["--metrics-port", "0", "--targets-dir", folder / "targets", "--checkpoint-dir", folder]
    command += ["--checkpoint-every", "1" if watch else "1000"]
    environment = os.environ | {"PYTHONHASHSEED": hash_seed, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY, env=environment) as process:
        url = process.stdout.readline().split()[-1]
        scrapes = 0
        while watch and process.poll() is None:
            try:
                urllib.request.urlopen(url, timeout=10).read()
                scrapes += 1
            except (OSError, HTTPException):
                time.sleep(0.05)  # it has ended, or is about to
        process.communicate(timeout=60)
    assert process.returncode == 0 and (scrapes > 0 or not watch)
    return load(checkpoints_in(folder / "same")[0])


def test_two_processes_train_the_same_weights_with_the_same_cv_watched_or_not(tmp_path):
    watched = end_of_run(tmp_path / "watched", watch=True, hash_seed="1")
    alone = end_of_run(tmp_path / "alone", watch=False, hash_seed="2")
    assert watched["updates"] == 12
    # Number, sum and levels of the CV over all gradient steps, and the last update's own.
    assert watched["run"]["gradient_quality"] == alone["run"]["gradient_quality"]
    for name in ("agent", "collector", "torch_generator"):
        left, right = tensors(watched[name]), tensors(alone[name])
        assert left and all(torch.equal(a, b) for a, b in zip(left, right, strict=True))
