"""SIGKILL at random moments: the run resumes, and every update is the same as without."""

import json
import multiprocessing
import os
import random
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
from test_resume import TINY, cvs, trained

from trainer.checkpoint import Checkpoints
from trainer.checkpoint_files import checkpoints_in, resolve
from trainer.parsing import parse_config
from trainer.stop import StopRequest
from trainer.training import Training

ENDLESS = replace(
    TINY,
    num_envs=2,
    rollout_steps=2,
    minibatch_size=2,
    epochs=1,
    total_timesteps=10**9,
    anneal_learning_rate=False,
    checkpoint_every=1,
    keep_checkpoints=2,
)


def train_until_killed(folder: str, log: str, progress) -> None:
    """Starts or resumes the run in `folder`; writes the CV of every update to `log`, and releases `progress` for it."""
    flags = ["--resume", folder] if checkpoints_in(Path(folder)) else []
    config = parse_config(flags)[0] if flags else replace(ENDLESS, checkpoint_dir=str(Path(folder).parent))
    training = Training(config)
    with Checkpoints(training) as checkpoints, open(log, "a") as file:
        while True:
            progress.release()
            training.update(StopRequest())
            checkpoints.updated()
            quality = training.run_snapshot.gradient_quality
            # One write, which a SIGKILL does not cut in two.
            os.write(file.fileno(), f"{training.updates} {quality.gradient_cv!r}\n".encode())


@pytest.mark.parametrize("kills", [12, pytest.param(200, marks=pytest.mark.soak)])
def test_kill_9_at_any_moment_never_leaves_a_run_that_cannot_be_resumed(tmp_path, kills):
    moments = random.Random(0)
    processes = multiprocessing.get_context("fork")
    Training(replace(ENDLESS, checkpoint_every=0))  # imports all that the children then need not import
    folder, log = tmp_path / "host-growth-seed1", tmp_path / "cvs"
    unfinished = 0
    for _ in range(kills):
        progress = processes.Semaphore(0)
        child = processes.Process(target=train_until_killed, args=(str(folder), str(log), progress))
        child.start()
        for _ in range(moments.randrange(4)):  # 0: while it starts or resumes
            assert progress.acquire(timeout=60), f"did not start, resume or train: exit code {child.exitcode}"
        time.sleep(moments.uniform(0.0, 0.02))
        child.kill()
        child.join()
        assert child.exitcode == -signal.SIGKILL
        unfinished += bool(list(folder.glob(".*.tmp")))
        if checkpoints_in(folder):
            path, _ = resolve(folder, lambda text: pytest.fail(text))
    # Every update of every life has the CV that it has in a life that nobody cut short.
    seen = [(int(update), float(cv)) for update, cv in (line.split() for line in log.read_text().splitlines())]
    updates = max(update for update, _ in seen)
    straight = cvs(trained(Training(replace(ENDLESS, checkpoint_every=0)), updates))
    assert all(cv == straight[update - 1] for update, cv in seen)
    assert updates > kills / 4 and len(seen) > kills / 4
    # With so many, some cut a file in two.
    assert unfinished > 0 or kills < 100
    totals = json.loads((folder / "totals.json").read_text())
    assert totals["resumes"] > kills / 4 and totals["updates"] >= updates
