"""The benchmarks that train: they leave nothing behind, continue after an interruption, and compute right intervals."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.learning_report import difference_interval, mean_interval
from stack.servers import ROOT


@pytest.fixture
def benchmark(tmp_path: Path):
    """Runs one to its end, with a folder of its own for temporary files."""
    (folder := tmp_path / "temporary").mkdir()

    def run(name: str, *options: object) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", f"benchmarks.{name}", *map(str, options)]
        environment = {**os.environ, "TMPDIR": str(folder), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor")}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=180)
        assert not list(folder.iterdir())
        return done

    return run


@pytest.mark.soak
def test_throughput_compares_trainers_and_cleans_up_after_them(benchmark):
    pytest.importorskip("torchrl")
    trainers = ("--trainers", "ours", "sb3", "torchrl_ppo")
    done = benchmark(
        "throughput", "--settings", "cartpole", *trainers, "--threads", 1, "--rounds", 1, "--seconds", 0.01
    )
    assert done.returncode == 0, done.stderr
    assert "leaked" not in done.stderr  # semaphores
    for start in ("| ours |", "| Stable-Baselines3 |", "| TorchRL |", "| cartpole | 1 | 1.5 |"):
        assert start in done.stdout


@pytest.mark.soak
def test_runs_that_were_kept_are_not_trained_again(benchmark, tmp_path):
    command = (
        "learning",
        "cartpole-example",
        "--seeds",
        2,
        "--keep",
        tmp_path / "keep",
        "--",
        "--total-timesteps",
        1024,
    )
    first = benchmark(*command)
    assert first.returncode == 0, first.stderr
    kept, of_other_settings = sorted((tmp_path / "keep").glob("*/*.json"))
    for path, changes in ((kept, {}), (of_other_settings, {"flags": ["--seed", "3"]})):
        content = json.loads(path.read_text()) | changes
        content["run"]["returns"][-1] = 123.25
        path.write_text(json.dumps(content))
    again = benchmark(*command).stdout
    assert "| 1000 | never | 123.250 |" in again
    assert "| 2000 | never | " in again and "| 2000 | never | 123.250 |" not in again


def test_intervals_of_means_and_differences():
    # The mean of ten draws from zeros and ones is binomial: 2.1 % of it lie below 0.2, 2.1 % above 0.8.
    assert mean_interval([0.0] * 5 + [1.0] * 5).tolist() == [0.2, 0.8]
    curves = mean_interval([[1.0, np.nan], [1.0, 2.0]])
    assert curves[:, 0].tolist() == [1.0, 1.0] and np.isnan(curves[:, 1]).all()
    assert difference_interval([3.0, 3.0], [1.0, 1.0]).tolist() == [2.0, 2.0]
    # Drawn independently, for seeds of two trainers are no pairs.
    assert difference_interval([0.0, 1.0], [0.0, 1.0]).tolist() == [-1.0, 1.0]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_nothing_is_measured(benchmark):
    done = benchmark("gpu")
    assert (done.returncode, done.stdout) == (2, "") and "no CUDA device" in done.stderr


@pytest.mark.soak
def test_a_check_on_the_cpu(benchmark):
    done = benchmark("gpu", "--device", "cpu", "--checks", "norms")
    assert done.returncode == 0 and "| norms | holds |" in done.stdout, done.stdout + done.stderr
