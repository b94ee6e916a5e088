"""Monitors in a torch.distributed group: what each rank measures, and who serves."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

RANK = Path(__file__).with_name("distributed_rank.py")


def test_every_rank_measures_the_reduced_gradient_and_rank_0_serves_or_each_at_its_port(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    group = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": "2",
        "PYTHONPATH": str(RANK.parents[2]),
    }
    processes = [
        subprocess.Popen(
            [sys.executable, RANK, tmp_path / f"{rank}.json"],
            env={**os.environ, **group, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=90)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    # An averaging by hand comes after what is measured before clipping, unless the trainer says when.
    for text in errors:
        assert text.count("run unready: several processes train together") == text.count("train together") == 1
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first["cv"] == second["cv"] > 0
    assert first["cv"] == pytest.approx(first["expected_cv"], rel=1e-5)
    # Before clipping, and yet after the gradients have been averaged.
    for rank in (first, second):
        assert rank["norms_before_clipping"] == pytest.approx(rank["expected_norms"], rel=1e-5)
        assert rank["norms_when_ready"] == pytest.approx(rank["expected_norms"], rel=1e-5)
    labels = {"run": "pair", "health": "warning"}
    assert first["labels"] == labels and second["labels"] is None
    assert [rank["labels_of_rank"] for rank in (first, second)] == [{**labels, "rank": "0"}, {**labels, "rank": "1"}]
    assert second["port_of_rank"] == first["port_of_rank"] + 1
    assert all("sharded over processes" in rank["sharded"] for rank in (first, second))
