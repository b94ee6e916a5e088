"""The target file in a folder that Prometheus watches."""

import json
from pathlib import Path

from exporter import TargetFile


def content(file: TargetFile) -> list[dict]:
    return json.loads(file.path.read_text())


def test_a_target_file_is_whole_labeled_and_gone_with_its_last_run(tmp_path: Path):
    directory = tmp_path / "targets"
    file = TargetFile(directory, "127.0.0.1:9842", "walker/17")
    assert content(file) == [{"targets": ["127.0.0.1:9842"], "labels": {"run": "walker/17"}}]
    assert list(directory.iterdir()) == [file.path]
    file.add("b", "b", "walker/17")
    file.discard("walker/17")
    assert content(file)[0]["labels"] == {"run": "b"}
    file.discard("b")
    file.discard("b")
    assert list(directory.iterdir()) == []


def test_the_next_run_at_an_address_replaces_the_file_that_a_crash_left(tmp_path: Path):
    TargetFile(tmp_path, "[::1]:9842", "crashed")
    file = TargetFile(tmp_path, "[::1]:9842", "next")
    assert list(tmp_path.iterdir()) == [file.path]
    assert content(file)[0]["labels"] == {"run": "next"}
