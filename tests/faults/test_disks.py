"""Full or read-only disks: an unseen run does not start, and a running one continues and ends well."""

import subprocess
import sys
from pathlib import Path

import pytest
from test_faults import TINY

from stack.servers import ROOT


def in_namespace(script: str, *arguments: str | Path) -> list[str | Path]:
    """A command that runs `script` where it may mount what it wants, and nobody else sees it; for a minute at most."""
    return ["timeout", "-k", "5", "60", "unshare", "--map-root-user", "--mount", "sh", "-euc", script, "sh", *arguments]


@pytest.fixture
def mounts() -> None:
    try:
        subprocess.run(in_namespace("mount -t tmpfs none /mnt"), check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this machine does not let its users mount file systems in a namespace of their own")


@pytest.mark.parametrize(
    ("mount", "reason"),
    [
        ('mount -t tmpfs -o size=4k none "$1"; head -c 4096 /dev/zero > "$1/full"', "No space left on device"),
        ('mount -t tmpfs -o ro none "$1"', "Read-only file system"),
    ],
    ids=["full", "read-only"],
)
def test_a_run_does_not_start_unseen_where_its_target_file_cannot_be_written(mounts, tmp_path, mount, reason):
    targets = tmp_path / "targets"
    targets.mkdir()
    command = [sys.executable, "-m", "trainer", *TINY, "--metrics-port", "0", "--checkpoint-every", "0"]
    script = f'{mount}; shift; exec "$@"'
    done = subprocess.run(
        [*in_namespace(script, targets), *command, "--targets-dir", targets],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr == f"python -m trainer: error: cannot write a target file to {targets}: {reason}\n"


@pytest.mark.parametrize(
    ("breakdown", "reason", "left"),
    [
        ('mount -o remount,ro "$1"', "Read-only file system", {".json", ".prom"}),
        ('{ head -c 9999999 /dev/zero > "$1/big.dat" 2>&1 || true; }', "No space left on device", {".dat"}),
    ],
    ids=["read-only", "full"],
)
def test_a_run_goes_on_and_ends_well_when_its_folders_break_down(mounts, tmp_path, breakdown, reason, left):
    targets, checkpoints = tmp_path / "targets", tmp_path / "checkpoints"
    targets.mkdir()
    trainer = [sys.executable, "-m", "trainer", *TINY, "--metrics-port", "0", "--run", "r", "--log-interval", "1000"]
    trainer += ["--targets-dir", targets, "--textfile-dir", targets, "--textfile-interval", "0.1"]
    trainer += ["--checkpoint-dir", checkpoints]
    script = (
        'mount -t tmpfs -o size=256k none "$1"; targets=$1; shift; "$@" & trainer=$!\n'
        "trap 'kill -KILL $trainer 2>/dev/null || true' EXIT\n"
        'while ! [ -e "$targets/ppo-r.prom" ]; do sleep 0.1; done; set -- "$targets"\n'
        f"until {breakdown}; do sleep 0.01; done; sleep 1.5\n"
        "kill -TERM $trainer; wait $trainer && code=0 || code=$?\n"
        'ls "$targets"; exit $code'
    )
    done = subprocess.run(
        [*in_namespace(script, targets), *trainer],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=90,
    )
    assert done.returncode == 143, (done.stdout, done.stderr)
    output, files = done.stdout.split("checkpoint ")
    assert "stopped by SIGTERM" in output and list(checkpoints.glob("r/*.pt"))
    assert {Path(name).suffix for name in files.splitlines()[1:]} == left
    assert done.stderr.count("ppo-r.prom is out of date: ") == 1 and reason in done.stderr
    # A full disk still lets one delete.
    assert (f"still names run r, which will look down: {reason}" in done.stderr) == (".json" in left)


def test_a_run_whose_log_lies_on_the_full_disk_too_goes_on_and_ends_well(mounts, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    folders = [f"--{kind}-dir={disk}" for kind in ("targets", "textfile", "checkpoint")]
    trainer = [sys.executable, "-m", "trainer", *TINY, "--metrics-port", "0", "--run", "r", "--log-interval", "1"]
    trainer += [*folders, "--textfile-interval", "0.1", "--checkpoint-every", "5"]
    script = (
        'mount -t tmpfs -o size=4m none "$1"; disk=$1; shift; "$@" > "$disk/log" 2>&1 & trainer=$!\n'
        "trap 'kill -KILL $trainer 2>/dev/null || true' EXIT\n"
        'while ! ls "$disk"/r/*.pt; do sleep 0.1; done\n'
        'head -c 99999999 /dev/zero > "$disk/big.dat" 2>&1 || true; sleep 3\n'
        'rm "$disk/big.dat"; kill -TERM $trainer; wait $trainer && code=0 || code=$?\n'
        'ls -R "$disk"; exit $code'
    )
    done = subprocess.run(
        [*in_namespace(script, disk), *trainer], cwd=ROOT, capture_output=True, text=True, check=False, timeout=90
    )
    assert done.returncode == 143, (done.stdout, done.stderr)
    listing = done.stdout.split(":\n", 1)[1]
    assert ".pt" in listing and "127.0.0.1" not in listing and ".prom" not in listing
