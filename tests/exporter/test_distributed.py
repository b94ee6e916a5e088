"""Monitors in a torch.distributed group: what each rank measures, and who serves."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

RANK = Path(__file__).with_name("distributed_rank.py")


def run_ranks(tmp_path: Path, *flags: str) -> list[dict]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    processes = [
        subprocess.Popen(
            [sys.executable, RANK, str(tmp_path / f"{rank}.json"), *flags],
            env={
                **os.environ,
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": "2",
                "PYTHONPATH": str(RANK.parents[2]),
            },
        )
        for rank in range(2)
    ]
    assert [process.wait(90) for process in processes] == [0, 0]
    return [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]


def test_every_rank_measures_the_reduced_gradient_rank_0_serves_and_shards_are_refused(tmp_path):
    first, second = run_ranks(tmp_path)
    assert first["cv"] == second["cv"] > 0
    assert first["cv"] == pytest.approx(first["expected_cv"], rel=1e-5)
    assert first["labels"] == {"run": "pair", "health": "warning"} and second["labels"] is None
    assert all("sharded over processes" in rank["sharded"] for rank in (first, second))


def test_every_rank_serves_at_its_own_port_with_its_label(tmp_path):
    ranks = run_ranks(tmp_path, "--every-rank")
    assert [rank["labels"]["rank"] for rank in ranks] == ["0", "1"]
    assert ranks[1]["port"] == ranks[0]["port"] + 1
