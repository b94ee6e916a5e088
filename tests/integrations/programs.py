"""Runs other people's programs to their end and scrapes them meanwhile."""

import os
import subprocess
import time
from http.client import HTTPException
from pathlib import Path

from conftest import fetch

from stack.servers import ROOT


def last_scrape(command: list[object], folder: Path, port: int, **environment: str) -> str:
    """The last metrics with norms of heads that a program served at `port`; fails the test if the program fails."""
    log = folder / "log"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    scraped = ""
    with (
        log.open("w") as output,
        subprocess.Popen(command, cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT) as process,
    ):
        while process.poll() is None:
            try:
                text = fetch(f"http://127.0.0.1:{port}/metrics")[1]
                if "ppo_head_gradient_norm{" in text:  # not before the first update, nor after the goodbye
                    scraped = text
            except (OSError, HTTPException):  # not yet there, or just gone
                pass
            time.sleep(0.01)
    assert process.returncode == 0, log.read_text()
    return scraped
