"""Checkpoint files: a damaged one is always refused; and the two commands that read them."""

import errno
import fcntl
import os
import pickle
import re
import resource
import stat
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from exporter.snapshot import RunSnapshot
from trainer.checkpoint_files import (
    CheckpointError,
    RunFolder,
    checkpoints_in,
    latest_folder,
    load,
    resolve,
    save,
    totals,
)
from trainer.config import TrainerConfig
from trainer.stop import StopRequest
from trainer.training import Training

TINY = {
    "run": "run",
    "num_envs": 4,
    "rollout_steps": 8,
    "minibatch_size": 16,
    "hidden_size": 8,
    "total_timesteps": 32 * 6,
}


@pytest.fixture(scope="module")
def trained() -> Training:
    training = Training(TrainerConfig(**TINY))
    training.update(StopRequest())
    return training


@pytest.fixture
def checkpoint(tmp_path, trained) -> Path:
    """The newer of two in a run's folder."""
    for update in (1, 2):
        save(tmp_path / f"run/update-{update:08d}.pt", {**trained.state_dict(), "updates": update})
    return tmp_path / "run/update-00000002.pt"


@pytest.fixture(autouse=True)
def folder(tmp_path):
    (tmp_path / "run").mkdir()


def truncated(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def emptied(path: Path) -> None:
    os.truncate(path, 0)


def bent(path: Path) -> None:
    """One bit of a weight, which `torch.load` does not notice."""
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda part: part.file_size)
    content = bytearray(path.read_bytes())
    content[largest.header_offset + 1000] ^= 1
    path.write_bytes(content)


def foreign(path: Path) -> None:
    torch.save({"weights": torch.ones(3)}, path)


def text(path: Path) -> None:
    path.write_text("update 2\n")


def archive_of_something_else(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/b.txt", "c")


def from_the_future(path: Path) -> None:
    content = torch.load(path, weights_only=True)
    torch.save({**content, "format_version": 99}, path)


def incomplete(path: Path) -> None:
    content = torch.load(path, weights_only=True)
    del content["agent"]
    torch.save(content, path)


DAMAGES = {
    truncated: "truncated, or no checkpoint",
    emptied: "the file is empty",
    bent: "checksum of its part",
    foreign: "not a checkpoint of this trainer",
    text: "truncated, or no checkpoint",
    archive_of_something_else: "not a checkpoint",
    from_the_future: "format version 99; this program reads 2",
    incomplete: "incomplete: agent",
    Path.unlink: "No such file",
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_what_is_no_whole_checkpoint_is_refused_by_name_and_reason_and_the_one_before_is_offered(checkpoint, damage):
    before = checkpoint.with_name("update-00000001.pt")
    damage(checkpoint)
    with pytest.raises(CheckpointError) as error:
        resolve(checkpoint, pytest.fail)
    assert str(error.value).startswith(f"{checkpoint}: ") and DAMAGES[damage] in str(error.value)
    assert str(error.value).endswith(f"; the one before is {before}")
    # The folder means the newest that can be read, and says what it left out.
    warnings: list[str] = []
    path, content = resolve(checkpoint.parent, warnings.append)
    assert path == before and content["updates"] == 1
    assert len(warnings) == (damage is not Path.unlink) and all(DAMAGES[damage] in warning for warning in warnings)


def test_every_single_flipped_bit_is_refused_or_harmless(checkpoint):
    whole, raw = load(checkpoint), checkpoint.read_bytes()
    generator = torch.Generator().manual_seed(0)
    refused = 0
    for position in torch.randint(len(raw), (40,), generator=generator).tolist():
        content = bytearray(raw)
        content[position] ^= 1 << position % 8
        checkpoint.write_bytes(content)
        try:
            assert_equal(load(checkpoint), whole)
        except CheckpointError:
            refused += 1
    assert refused > 20


def assert_equal(left: object, right: object) -> None:
    assert type(left) is type(right)
    if isinstance(left, torch.Tensor):
        assert left.dtype == right.dtype and torch.equal(left, right)
    elif isinstance(left, dict):
        assert left.keys() == right.keys()
        for key in left:
            assert_equal(left[key], right[key])
    else:
        assert left == right or left != left


class Payload:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("command", ["inspect", "evaluate", "--resume"])
def test_a_strangers_checkpoint_cannot_run_code(cli, checkpoint, tmp_path, command):
    proof = tmp_path / "proof"
    content = torch.load(checkpoint, weights_only=True)
    torch.save({**content, "payload": Payload(proof)}, checkpoint)
    _, err = cli(command, checkpoint, code=2 if command == "--resume" else 1)
    assert "something other than tensors and plain values" in err and "Traceback" not in err
    assert not proof.exists()
    # The attack is real.
    torch.load(checkpoint, weights_only=False)
    assert proof.exists()
    proof.unlink()
    checkpoint.write_bytes(pickle.dumps(Payload(proof)))
    with pytest.raises(CheckpointError):
        load(checkpoint)
    assert not proof.exists()


def test_weights_of_another_network_are_refused_by_evaluate(cli, checkpoint):
    content = torch.load(checkpoint, weights_only=True)
    content["config"]["hidden_size"] += 1
    torch.save(content, checkpoint)
    _, err = cli("evaluate", checkpoint, code=1)
    assert "its weights do not fit host-growth" in err and "Traceback" not in err


def test_a_full_disk_leaves_the_checkpoint_before_and_nothing_half_written(checkpoint, trained):
    before = checkpoint.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))  # Python ignores the signal and sees an error
    try:
        with pytest.raises(OSError):
            save(checkpoint, trained.state_dict())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert checkpoint.read_bytes() == before
    assert sorted(path.name for path in checkpoint.parent.iterdir()) == ["update-00000001.pt", "update-00000002.pt"]


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EIO])
def test_where_a_folder_cannot_be_forced_to_the_disk_checkpoints_are_written_all_the_same(
    tmp_path, trained, monkeypatch, number
):
    """As on CIFS; a disk that fails is another matter."""
    fsync = os.fsync

    def fsync_of_files(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync_of_files)
    with RunFolder(tmp_path / "run", keep=1) as folder:
        if number == errno.EIO:
            with pytest.raises(OSError, match=os.strerror(number)):
                folder.write(trained.state_dict())
            return
        for update in (1, 2):
            path = folder.write({**trained.state_dict(), "updates": update})
        assert checkpoints_in(folder.path) == [path] and load(path)["updates"] == 2


def test_the_last_k_are_kept_and_leftovers_of_a_killed_process_go(tmp_path, trained):
    (tmp_path / "run/.update-00000007.pt.tmp").touch()
    with RunFolder(tmp_path / "run", keep=2) as folder:
        for update in range(1, 6):
            folder.write({**trained.state_dict(), "updates": update})
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["update-00000004.pt", "update-00000005.pt"]


def state_of(run: str, trained: Training, updates: int = 1) -> dict:
    state = trained.state_dict()
    return {**state, "config": {**state["config"], "run": run}, "updates": updates}


def written(at: float, path: Path, state: dict) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save(path, state)
    os.utime(path, (at, at))
    return path


def test_a_new_run_of_the_same_name_never_touches_the_earlier_one(tmp_path, trained):
    paths, state = [], state_of("../a run", trained)
    for _ in range(3):
        with RunFolder.of_new_run(tmp_path / "all", "../a run", keep=1) as folder:
            # While somebody writes, a second process goes elsewhere too.
            with RunFolder.of_new_run(tmp_path / "all", "../a run", keep=1) as other:
                assert other.path != folder.path
            paths.append(folder.write(state))
    assert [str(path.parent.relative_to(tmp_path / "all")) for path in paths] == ["-a-run", "-a-run.2", "-a-run.3"]
    assert all(path.exists() for path in paths)
    os.utime(paths[1], (2e9, 2e9))
    assert latest_folder(tmp_path / "all", "../a run", pytest.fail) == paths[1].parent


@pytest.mark.parametrize(
    ("run", "other"), [("CartPole-v1-seed1", "CartPole-v1-seed1.5"), ("gamma-0", "gamma-0.99"), ("a-b", "a b")]
)
def test_the_folder_of_another_run_is_not_taken_whatever_it_is_called(tmp_path, trained, run, other):
    name = other.replace(" ", "-")
    written(2e9, tmp_path / name / "update-00000009.pt", state_of(other, trained, 9))
    with pytest.raises(CheckpointError, match=re.escape(f"there is no checkpoint of the run {run!r} yet")):
        latest_folder(tmp_path, run, pytest.fail)
    own = written(1e9, tmp_path / f"{run}.2/update-00000001.pt", state_of(run, trained))
    assert latest_folder(tmp_path, run, pytest.fail) == own.parent
    assert latest_folder(tmp_path, other, pytest.fail) == tmp_path / name


def test_a_folder_of_which_nothing_can_be_read_is_said_and_left_out(tmp_path, trained):
    own = written(1e9, tmp_path / "all/r/update-00000001.pt", state_of("r", trained))
    broken = written(2e9, tmp_path / "all/r.2/update-00000001.pt", state_of("r", trained))
    emptied(broken)
    warnings: list[str] = []
    assert latest_folder(tmp_path / "all", "r", warnings.append) == own.parent
    (warning,) = warnings
    assert warning == f"{broken.parent}: none of its 1 checkpoints can be read; taking {own.parent}"
    own.unlink()
    with pytest.raises(CheckpointError, match="r.2: none of its 1 checkpoints can be read"):
        latest_folder(tmp_path / "all", "r", pytest.fail)


def test_a_run_that_goes_on_deletes_no_checkpoint_of_another_run(tmp_path, trained):
    """In a folder where somebody collects the best of several runs."""
    other = written(1e9, tmp_path / "best/update-00000001.pt", state_of("other", trained, 1))
    best = written(2e9, tmp_path / "best/update-00000002.pt", state_of("run", trained, 2))
    with RunFolder.of_resumed_run(best, "run", keep=1) as folder:
        folder.write(state_of("run", trained, 3))
    assert folder.path == tmp_path / "run"
    assert checkpoints_in(other.parent) == [best, other]


def test_a_new_run_leaves_alone_what_another_process_writes_just_before_it_has_the_folder(
    tmp_path, trained, monkeypatch
):
    flock, theirs = fcntl.flock, tmp_path / "all/r/update-00000001.pt"

    def late(*arguments: int) -> None:
        if not theirs.exists():
            save(theirs, state_of("r", trained))
        flock(*arguments)

    monkeypatch.setattr(fcntl, "flock", late)
    with RunFolder.of_new_run(tmp_path / "all", "r", keep=1) as folder:
        assert folder.path == tmp_path / "all/r.2"
    assert theirs.exists()


def test_a_run_that_goes_on_from_an_older_checkpoint_leaves_the_newer_ones_alone(checkpoint):
    older = checkpoint.with_name("update-00000001.pt")
    with RunFolder.of_resumed_run(checkpoint, "run", keep=3) as folder:
        assert folder.path == checkpoint.parent
        with pytest.raises(BlockingIOError):
            RunFolder(checkpoint.parent, keep=3)
    with RunFolder.of_resumed_run(older, "run", keep=3) as folder:
        assert folder.path == checkpoint.parent.with_name("run.2")
    truncated(checkpoint)
    with RunFolder.of_resumed_run(older, "run", keep=3) as folder:
        assert folder.path == checkpoint.parent


def test_a_run_without_an_update_leaves_no_folder(tmp_path):
    with RunFolder.of_new_run(tmp_path / "all", "r", keep=1):
        pass
    assert not list((tmp_path / "all").iterdir())


def test_the_newest_totals_count_however_long_those_before_were(checkpoint):
    content = load(checkpoint)
    run = content["run"]
    with RunFolder(checkpoint.parent, keep=2) as folder:
        for updates in (10**9, 7):
            folder.note_totals(replace(RunSnapshot.from_plain(run), updates=updates))
            assert totals(checkpoint, content) == {**run, "updates": updates}
        folder.note_totals(replace(RunSnapshot.from_plain(run), run="other"))
        assert totals(checkpoint, content) == run


def test_inspect_says_what_is_inside_and_a_broken_one_in_one_line(cli, checkpoint):
    out, err = cli("inspect", checkpoint.parent)
    assert out.startswith(f"{checkpoint}: {checkpoint.stat().st_size:,} bytes, format version 2\n") and err == ""
    for expected in (
        r"run on host-growth, update 2 of 6",
        r"32 environment steps, 0 episodes, 1 updates, 0 resumes",
        r"\* num_envs: 4\n",
        r"  epochs: 4\n",
        r"agent\.policy\.hidden_weight float32 \[1, 8, 8\]",
        r"collector\.environment\.host float32 \[4, 49\]",
        r"beside it +update-00000001\.pt",
    ):
        assert re.search(expected, out), expected
    truncated(checkpoint)
    out, err = cli("inspect", checkpoint, code=1)
    assert out == "" and err.startswith(f"python -m trainer: error: {checkpoint}: the file is truncated")


def test_evaluate_plays_exactly_the_episodes_that_are_asked_for(cli, checkpoint):
    played = [cli("evaluate", checkpoint, "--episodes", "6", *flags)[0] for flags in ([], [], ["--deterministic"])]
    for out in played:
        assert re.search(r"return mean -?\d+\.\d{3}, standard deviation \d+\.\d{3}, .* 6 episodes\n", out), out
        assert "length mean 64.0 environment steps" in out
    line = [out.splitlines()[1] for out in played]
    assert line[0] == line[1] != line[2]
    assert "deterministic actions, seed 1000000" in played[2]


def test_evaluate_steps_environments_as_training_did(cli, tmp_path):
    env = {"env": "benchmarks.synthetic:SevenHeads-v0", "vectorization": "vector_entry_point"}  # it has no other way
    state = Training(TrainerConfig(**TINY | env)).state_dict()
    save(tmp_path / "run/update-00000000.pt", state)
    out, _ = cli("evaluate", tmp_path / "run", "--episodes", "5")
    assert "5 episodes\n" in out and "length mean 8.0 environment steps" in out


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["evaluate"], 2, "required: CHECKPOINT"),
        (["evaluate", "x.pt", "--episodes", "0"], 2, "--episodes: must be at least 1, got 0"),
        (["evaluate", "x.pt", "--episode", "1"], 2, "did you mean --episodes?"),
        (["inspect", "x.pt"], 1, "x.pt: cannot be read: No such file or directory"),
        (["inspect", "trainer"], 1, "trainer: there is no checkpoint in this folder"),
    ],
)
def test_the_commands_refuse_in_one_line(cli, arguments, code, message):
    _, err = cli(*arguments, code=code)
    assert message in err and "Traceback" not in err


def test_checkpoints_are_counted_as_numbers_not_as_text(tmp_path):
    for update in (99_999_999, 100_000_000):
        (tmp_path / f"run/update-{update:08d}.pt").touch()
    assert [path.name for path in checkpoints_in(tmp_path / "run")] == ["update-100000000.pt", "update-99999999.pt"]
