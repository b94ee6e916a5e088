"""Several processes train one run: the same result as one process, and what happens when one dies."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import fetch, wait_until

from exporter.telemetry import HEAD_SIGNALS
from stack.servers import ROOT
from trainer.checkpoint_files import load
from trainer.config import ConfigError, TrainerConfig
from trainer.distributed import Ranks
from trainer.training import Training

SMALL = ("--num-envs", "8", "--rollout-steps", "16", "--minibatch-size", "64", "--hidden-size", "32")


def command(ranks: int, folder: Path, *flags: str) -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m"]
    places = ["--metrics-port", "0", "--targets-dir", str(folder / "targets"), "--checkpoint-dir", str(folder)]
    return [*launcher, "trainer", *SMALL, *places, "--run-name", "demo", *flags]


@pytest.fixture
def train(cli) -> Callable[..., str]:
    """Trains with so many ranks; what is printed."""

    def train_it(ranks: int, folder: Path, *flags: str) -> str:
        words = command(ranks, folder, *flags)
        if ranks == 1:
            return cli(*words[words.index("trainer") + 1 :])[0]
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return train_it


def updates_of(output: str) -> list[list[float]]:
    """The numbers of every line about an update, but the speed."""
    lines = re.findall(r"^update .*$", re.sub(r"steps/s \d+", "", output), re.MULTILINE)
    return [[float(number) for number in re.findall(r"(?<![\w-])-?\d+(?:\.\d+)?(?:e-?\d+)?", line)] for line in lines]


def test_two_ranks_with_half_of_the_environments_each_train_as_one_with_all_and_any_number_goes_on(train, tmp_path):
    flags = ("--total-timesteps", str(128 * 6), "--log-interval", "1", "--value-clip-range", "0.2")
    # Many a minibatch of four holds samples of one rank only, and updates end early.
    flags += ("--minibatch-size", "4", "--target-kl", "0.01")
    alone, together = train(1, tmp_path / "alone", *flags), train(2, tmp_path / "together", *flags)
    assert len(updates_of(alone)) == 6
    for expected, seen in zip(updates_of(alone), updates_of(together), strict=True):
        assert seen == pytest.approx(expected, rel=1e-3, abs=2e-4)  # what the lines round to
    states = [load(tmp_path / name / "demo" / "update-00000006.pt") for name in ("alone", "together")]
    weights = [state["agent"]["policy"] for state in states]
    for name, expected in weights[0].items():
        torch.testing.assert_close(weights[1][name], expected, rtol=1e-4, atol=1e-5)
    runs = [state["run"] for state in states]
    for total in ("updates", "environment_steps", "episodes"):
        assert runs[0][total] == runs[1][total]
    alone, together = (run["gradient_quality"] for run in runs)
    assert alone["steps_by_level"] == together["steps_by_level"]
    for name in HEAD_SIGNALS:
        assert together[name] == pytest.approx(alone[name], rel=1e-3, abs=1e-6) and len(alone[name]) == 7

    # On from one process' checkpoint with two ranks, and from the two ranks' with one process.
    longer = ("--resume", "--total-timesteps", str(128 * 8), "--log-interval", "1")
    on_together, on_alone = (
        updates_of(train(ranks, tmp_path / name, *longer)) for ranks, name in ((2, "alone"), (1, "together"))
    )
    assert [line[0] for line in on_alone] == [7, 8]
    for expected, seen in zip(on_alone, on_together, strict=True):
        assert seen == pytest.approx(expected, rel=1e-3, abs=2e-4)


UNEVEN = """
import os, time
import gymnasium
from gymnasium.envs.classic_control import CartPoleEnv

class Uneven(CartPoleEnv):
    def step(self, action):
        time.sleep(0.005 * int(os.environ.get("RANK", 0)))
        return super().step(action)

gymnasium.register("Uneven-v0", Uneven)
"""


def test_a_dead_rank_ends_the_job_names_itself_and_leaves_a_target_and_a_checkpoint(train, tmp_path, monkeypatch):
    (tmp_path / "uneven.py").write_text(UNEVEN)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(tmp_path)
    flags = ("--env", "uneven:Uneven-v0", "--total-timesteps", "10000000", "--checkpoint-every", "2")
    with (tmp_path / "log").open("w") as log:
        job = subprocess.Popen(command(2, tmp_path, *flags), cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
        try:
            output = tmp_path / "log"
            url = wait_until(lambda: re.search(r"metrics at (\S+)", output.read_text()), "the endpoint")[1]
            wait_until(lambda: (tmp_path / "demo" / "update-00000002.pt").exists(), "a checkpoint")
            text = fetch(url)[1]
            seconds = re.findall(r'^ppo_rank_rollout_seconds{rank="(\d)",run="demo"} (\S+)', text, re.MULTILINE)
            assert [rank for rank, _ in seconds] == ["0", "1"]
            assert float(seconds[0][1]) < float(seconds[1][1]) / 2  # rank 0 waits, and that is not its own time
            assert len(re.findall(r"^ppo_gradient_cv{", text, re.MULTILINE)) == 1
            os.kill(ranks_in(tmp_path)[1], signal.SIGKILL)
            assert job.wait(60) != 0
        finally:
            job.terminate()
            job.wait(60)
    said = output.read_text()
    assert "rank 0 cannot continue without the others" in said
    assert re.search(r"rank +: 1 .*\n +exitcode +: -9", said)  # torchrun's report
    assert re.search(r"^demo: failed after update \d+", said, re.MULTILINE)
    assert [json.loads(path.read_text())[0]["labels"]["run"] for path in (tmp_path / "targets").glob("*.json")] == [
        "demo"
    ]
    last = max(int(path.stem.split("-")[1]) for path in (tmp_path / "demo").glob("update-*.pt"))
    (seen,) = updates_of(
        train(1, tmp_path, "--resume", "--env", "uneven:Uneven-v0", "--total-timesteps", str(128 * (last + 1)))
    )
    assert seen[0] == last + 1


def ranks_in(folder: Path) -> dict[int, int]:
    """Process ids of the ranks that use `folder`, by rank."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if str(folder).encode() in (process / "cmdline").read_bytes():
                rank = re.search(rb"\0RANK=(\d+)\0", (process / "environ").read_bytes())
                if rank and process.name != str(os.getpid()):
                    found[int(rank[1])] = int(process.name)
        except OSError:
            pass  # it has ended
    return found


def test_ranks_whose_torchrun_was_killed_end_with_a_checkpoint_and_leave_the_target(tmp_path):
    flags = ("--total-timesteps", "10000000", "--checkpoint-every", "1000000")
    output = tmp_path / "log"
    with output.open("w") as log:
        job = subprocess.Popen(command(2, tmp_path, *flags), cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
        try:
            wait_until(lambda: re.search(r"^update ", output.read_text(), re.MULTILINE), "an update")
            assert len(ranks_in(tmp_path)) == 2
        finally:
            job.kill()
            job.wait(60)
    wait_until(lambda: not ranks_in(tmp_path), "the end of the ranks")
    assert "torchrun has died, so its ranks stop" in output.read_text()
    last = int(re.search(r"^demo: failed after update (\d+)", output.read_text(), re.MULTILINE)[1])
    assert (tmp_path / "demo" / f"update-{last:08}.pt").exists()
    assert len(list((tmp_path / "targets").glob("*.json"))) == 1


def test_a_rank_that_stays_silent_is_given_up_after_the_timeout(tmp_path):
    flags = ("--total-timesteps", "10000000", "--rank-timeout", "5")
    output = tmp_path / "log"
    with output.open("w") as log:
        job = subprocess.Popen(command(2, tmp_path, *flags), cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
        silent = None
        try:
            wait_until(lambda: re.search(r"^update ", output.read_text(), re.MULTILINE), "an update")
            silent = ranks_in(tmp_path)[1]
            os.kill(silent, signal.SIGSTOP)
            wait_until(lambda: "rank 0 cannot continue without the others" in output.read_text(), "an error", 40)
        finally:
            if silent is not None:
                os.kill(silent, signal.SIGKILL)
            job.terminate()
            job.wait(60)


def test_environments_that_ranks_cannot_share_evenly_are_refused():
    with pytest.raises(ConfigError, match="num-envs must be a multiple of the 3 ranks, got 8"):
        Training(TrainerConfig(num_envs=8), Ranks(0, 3))
