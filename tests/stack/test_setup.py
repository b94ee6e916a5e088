import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from stack.servers import ROOT, ServersMissing, provide


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    for name in ("Makefile", "pyproject.toml", "constraints.txt", "stack/servers.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def make_setup(checkout: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["make", "setup", f"PYTHON={sys.executable}"], cwd=checkout, capture_output=True, text=True, timeout=300
    )


def test_a_set_up_that_failed_is_tried_again(checkout: Path):
    (checkout / "pyproject.toml").write_text("this is no project [")
    python = checkout / ".venv/bin/python"  # making one would take the most time
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    for _ in range(2):
        done = make_setup(checkout)
        assert done.returncode == 2
        assert "at line 1" in done.stderr  # what is wrong with pyproject.toml
        assert not (checkout / ".venv/.complete").exists()


def test_nothing_is_done_when_nothing_changed(checkout: Path):
    for name in (".venv/.complete", ".servers/.complete"):
        (checkout / name).parent.mkdir()
        (checkout / name).touch()
    done = make_setup(checkout)
    assert done.returncode == 0 and "Nothing to be done" in done.stdout

    later = (checkout / ".venv/.complete").stat().st_mtime + 10
    for name, what in (("constraints.txt", "pip install"), ("stack/servers.py", "stack.servers")):
        os.utime(checkout / name, (later, later))
        planned = subprocess.run(["make", "-n", "setup"], cwd=checkout, capture_output=True, text=True, check=True)
        assert what in planned.stdout


def test_without_servers_and_packages_the_way_out_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ServersMissing, match="no apt-get.*install prometheus with its tools and put them on PATH"):
        provide(tmp_path / "servers")
    with pytest.raises(ServersMissing, match="no apt-get"):
        provide(tmp_path / "servers", newest=True)
