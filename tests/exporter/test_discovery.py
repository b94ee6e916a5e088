"""The target file in a folder that Prometheus watches."""

import json

from exporter import TargetFile


def test_a_target_file_is_whole_labeled_and_removed(tmp_path):
    directory = tmp_path / "targets"
    with TargetFile(directory, "walker/17", "127.0.0.1:9842") as file:
        assert file.path.parent == directory
        assert json.loads(file.path.read_text()) == [{"targets": ["127.0.0.1:9842"], "labels": {"run": "walker/17"}}]
        assert list(directory.iterdir()) == [file.path]
    assert list(directory.iterdir()) == []


def test_removing_twice_is_harmless(tmp_path):
    file = TargetFile(tmp_path, "r", "[::1]:9842")
    file.remove()
    file.remove()
