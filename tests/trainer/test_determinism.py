"""The same seed gives the same run to the last bit, whoever watches it, in whichever process."""

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
