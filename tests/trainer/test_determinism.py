"""The same seed gives the same run bit for bit, with or without a monitor, in any process."""

import os
import subprocess
import sys
import time
import urllib.request
from http.client import HTTPException
from pathlib import Path

import torch
from test_resume import REPOSITORY, tensors

from trainer.checkpoint_files import checkpoints_in, load


def arguments(folder: Path, checkpoint_every: int) -> list[str]:
    sizes = ["--num-envs", "8", "--rollout-steps", "16", "--minibatch-size", "32", "--hidden-size", "32"]
    places = ["--metrics-port", "0", "--targets-dir", str(folder / "targets"), "--checkpoint-dir", str(folder)]
    length = ["--total-timesteps", str(128 * 12), "--checkpoint-every", str(checkpoint_every)]
    return [*sizes, *places, *length, "--seed", "5", "--run", "same"]


def train_watched(folder: Path) -> None:
    """A run in a process of its own, which is scraped as fast as it answers."""
    command = [sys.executable, "-m", "trainer", *arguments(folder, checkpoint_every=1)]
    environment = os.environ | {"PYTHONHASHSEED": "1", "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY, env=environment) as process:
        url = process.stdout.readline().split()[-1]
        scrapes = 0
        while process.poll() is None:
            try:
                urllib.request.urlopen(url, timeout=10).read()
                scrapes += 1
            except (OSError, HTTPException):
                time.sleep(0.05)  # it has ended, or is about to
        process.communicate(timeout=60)
    assert process.returncode == 0 and scrapes > 0


def test_two_processes_train_the_same_weights_with_the_same_cv_watched_or_not(cli, tmp_path):
    train_watched(tmp_path / "watched")
    cli(*arguments(tmp_path / "alone", checkpoint_every=1000))
    watched, alone = (load(checkpoints_in(tmp_path / name / "same")[0]) for name in ("watched", "alone"))
    assert watched["updates"] == 12
    # Number, sum and levels of the CV over all gradient steps, and the last update's own.
    assert watched["run"]["gradient_quality"] == alone["run"]["gradient_quality"]
    for name in ("agent", "collector", "torch_generator"):
        left, right = tensors(watched[name]), tensors(alone[name])
        assert left and all(torch.equal(a, b) for a, b in zip(left, right, strict=True))
