"""The files of checkpoints: their content, writing them safe from crashes, and choosing one to resume from.

A checkpoint is the state between two updates, tensors and plain values only, written by `torch.save`. It is in the
folder of its run, `update-00000120.pt`. Beside it is `totals.json`, written after every update: the values of the run's
counters. So the counters never go back, even if a crash costs the updates since the last checkpoint.
"""

import contextlib
import errno
import fcntl
import io
import json
import os
import pickle
import re
import time
import zipfile
from collections.abc import Callable, Mapping
from importlib.metadata import version
from itertools import count
from pathlib import Path
from typing import Any

import torch

from exporter.snapshot import RunSnapshot

FORMAT, FORMAT_VERSION = "ppo-gradient-exporter checkpoint", 2
TOTALS = "totals.json"
_PARTS = ("config", "updates", "agent", "collector", "torch_generator", "run")


class CheckpointError(Exception):
    """A checkpoint cannot be used; the message names the file and the reason."""


def save(path: Path, state: Mapping[str, Any]) -> None:
    """Write a checkpoint atomically: at every moment `path` is complete, the previous version, or missing.

    Args:
        path: the file, in an existing folder.
        state: `Training.state_dict()`.

    Raises:
        OSError: the file cannot be written; no part of it stays.
    """
    content = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "written_at_seconds": time.time(),
        "torch_version": str(torch.__version__),  # it is a subclass of str
        "exporter_version": version("ppo-gradient-exporter"),
        **state,
        "run": state["run"].plain(),
    }
    serialized = io.BytesIO()
    torch.save(content, serialized)
    with _replacing(path) as file:
        file.write(serialized.getbuffer())
        file.flush()
        os.fsync(file.fileno())
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # so that the new name survives a power cut
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # CIFS and others cannot sync a folder
            raise
    finally:
        os.close(folder)


@contextlib.contextmanager
def _replacing(path: Path):
    unfinished = path.with_name(f".{path.name}.tmp")
    try:
        with unfinished.open("wb") as file:
            yield file
        unfinished.replace(path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def load(path: Path) -> dict[str, Any]:
    """What `save` wrote, on the CPU. Runs no code from the file.

    Raises:
        CheckpointError: the file is missing, damaged, foreign, or of another format version.
    """
    try:
        if path.stat().st_size == 0:
            raise CheckpointError(f"{path}: the file is empty")
        with zipfile.ZipFile(path) as archive:  # torch itself does not check the checksums
            damaged = archive.testzip()
        if damaged:
            raise CheckpointError(f"{path}: the file is damaged: the checksum of its part {damaged} is wrong")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    except zipfile.BadZipFile as error:
        raise CheckpointError(f"{path}: the file is truncated, or no checkpoint at all") from error
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: not loaded: it holds something other than tensors and plain values, which could run code"
        ) from error
    except Exception as error:  # torch has no common error for foreign archives
        raise CheckpointError(f"{path}: not a checkpoint: {(str(error) or repr(error)).splitlines()[0]}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(f"{path}: not a checkpoint of this trainer, though torch can read it")
    if content.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: format version {content.get('format_version')!r}; this program reads {FORMAT_VERSION}"
        )
    missing = [part for part in _PARTS if part not in content]
    if missing or not isinstance(content["config"], dict) or type(content["updates"]) is not int:
        raise CheckpointError(f"{path}: incomplete: {', '.join(missing) or 'settings'}")
    return content


def is_readable(path: Path) -> bool:
    """Whether `load` accepts it."""
    try:
        load(path)
    except CheckpointError:
        return False
    return True


def update_of(path: Path) -> int | None:
    """The update in a checkpoint's name; None for any other name."""
    match = re.fullmatch(r"update-(\d+)\.pt", path.name)
    return int(match[1]) if match else None


def checkpoints_in(folder: Path) -> list[Path]:
    """A run's checkpoints, readable or not, newest first; empty if the folder does not exist."""
    try:
        found = [path for path in folder.iterdir() if update_of(path) is not None]
    except OSError:
        return []
    return sorted(found, key=update_of, reverse=True)


def resolve(path: Path, warn: Callable[[str], None]) -> tuple[Path, dict[str, Any]]:
    """The checkpoint that `path` means, and its content.

    Args:
        path: a checkpoint, or a run's folder, which means its newest readable checkpoint.
        warn: called for each newer checkpoint that is not readable.

    Raises:
        CheckpointError: there is none; if `path` is a file, the message names the one before it.
    """
    if not path.is_dir():
        try:
            return path, load(path)
        except CheckpointError as error:
            number = update_of(path)
            before = [other for other in checkpoints_in(path.parent) if number is None or update_of(other) < number]
            offered = next((other for other in before if is_readable(other)), None)
            raise CheckpointError(f"{error}" + (f"; the one before is {offered}" if offered else "")) from error
    found = checkpoints_in(path)
    for checkpoint in found:
        try:
            return checkpoint, load(checkpoint)
        except CheckpointError as error:
            warn(f"{error}; taking the one before")
    if found:
        raise CheckpointError(f"{path}: none of its {len(found)} checkpoints can be read")
    runs = sorted({str(inner.parent) for inner in path.glob("*/update-*.pt")})
    raise CheckpointError(
        f"{path}: there is no checkpoint in this folder" + (f"; there are in {', '.join(runs)}" if runs else "")
    )


def latest_folder(directory: Path, run: str, warn: Callable[[str], None]) -> Path:
    """The folder in `directory` with the newest readable checkpoint of a run of this name.

    Args:
        warn: called for a newer folder that may be the run's, but is not readable.

    Raises:
        CheckpointError: there is none.
    """
    name = _folder_name(run)
    folders = [path for path in directory.glob("*") if re.fullmatch(rf"{re.escape(name)}(\.\d+)?", path.name)]
    newest = [found[0] for folder in folders if (found := checkpoints_in(folder))]
    unreadable = None
    for path in sorted(newest, key=lambda path: path.stat().st_mtime, reverse=True):
        try:
            _, content = resolve(path.parent, lambda text: None)
        except CheckpointError as error:
            unreadable = unreadable or error
            continue
        # The fifth folder of the run `a` and the first of the run `a.5` have the same name.
        if content["config"].get("run") == run:
            if unreadable:
                warn(f"{unreadable}; taking {path.parent}")
            return path.parent
    raise unreadable or CheckpointError(f"{directory / name}: there is no checkpoint of the run {run!r} yet")


def totals(path: Path, content: Mapping[str, Any]) -> Mapping[str, Any]:
    """The counters of a checkpoint's run when it ended: from totals.json if that is newer, else from the checkpoint."""
    saved = content["run"]
    try:
        noted = json.loads((path.parent / TOTALS).read_text())
        if noted["run"] != saved["run"] or noted["updates"] < saved["updates"]:
            return saved
        return {**saved, **noted, "gradient_quality": {**saved["gradient_quality"], **noted["gradient_quality"]}}
    except (OSError, ValueError, TypeError, KeyError):
        return saved  # totals.json is not synced: a power cut may damage it


def _counters(run: RunSnapshot) -> dict[str, Any]:
    """The counters of a run, in the form of `RunSnapshot.plain()`."""
    quality = run.gradient_quality
    return {
        "run": run.run,
        "updates": run.updates,
        "environment_steps": run.environment_steps,
        "episodes": run.episodes,
        "exporter_errors": run.exporter_errors,
        "resumes": run.resumes,
        "update_duration_seconds": vars(run.update_duration_seconds),
        "rollout_duration_seconds": vars(run.rollout_duration_seconds),
        "gradient_quality": {
            "steps_by_level": dict(quality.steps_by_level),
            "cv_per_step": vars(quality.cv_per_step),
            "nonfinite_steps": dict(quality.nonfinite_steps),
            "skipped_steps": quality.skipped_steps,
        },
    }


class RunFolder:
    """The folder with the checkpoints of one run, locked by one process until `close()`.

    Args:
        path: the folder; created if missing.
        keep: number of newest checkpoints to keep.

    Raises:
        OSError: the folder is not writable, or (BlockingIOError) another process has locked it.
    """

    def __init__(self, path: Path, keep: int) -> None:
        self.path = path
        self._keep = keep
        self._totals: int | None = None
        path.mkdir(parents=True, exist_ok=True)
        self._held = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(self._held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for unfinished in path.glob(".*.tmp"):  # of a process that was killed
                unfinished.unlink()
            if not os.access(path, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        except BaseException:
            os.close(self._held)
            raise

    @classmethod
    def of_new_run(cls, directory: Path, run: str, keep: int) -> "RunFolder":
        """DIRECTORY/RUN; if an earlier run of that name has left checkpoints, RUN.2, RUN.3 and so on."""
        for number in count(1):
            path = directory / (_folder_name(run) + (f".{number}" if number > 1 else ""))
            if not checkpoints_in(path):
                with contextlib.suppress(BlockingIOError):
                    folder = cls(path, keep)
                    if not checkpoints_in(path):  # another process may have written one just before
                        return folder
                    folder.close()
        raise AssertionError("unreachable")

    @classmethod
    def of_resumed_run(cls, checkpoint: Path, run: str, keep: int) -> "RunFolder":
        """The checkpoint's folder; a new one beside it if it holds newer checkpoints or those of another run."""
        is_newer = True
        for other in checkpoints_in(checkpoint.parent):
            if other.name == checkpoint.name:
                is_newer = False
                continue
            with contextlib.suppress(CheckpointError):
                if load(other)["config"].get("run") != run or is_newer:
                    return cls.of_new_run(checkpoint.parent.parent, run, keep)
        return cls(checkpoint.parent, keep)

    def write(self, state: Mapping[str, Any]) -> Path:
        """Save `state`, which holds `updates`, and delete the oldest checkpoints.

        Raises:
            OSError: the file cannot be written; the other checkpoints stay.
        """
        path = self.path / f"update-{state['updates']:08d}.pt"
        save(path, state)
        for old in checkpoints_in(self.path)[self._keep :]:
            if old != path:
                old.unlink(missing_ok=True)
        return path

    def note_totals(self, run: RunSnapshot) -> None:
        """Write the counters to totals.json.

        Raises:
            OSError: the file cannot be written.
        """
        if self._totals is None:
            self._totals = os.open(self.path / TOTALS, os.O_WRONLY | os.O_CREAT, 0o666)
        # Write in place: a rename costs more and makes ext4 write to the disk at once. A kill cannot split a page
        # (4 KiB). Spaces overwrite the end of a longer earlier text.
        text = json.dumps(_counters(run)).encode()
        os.pwrite(self._totals, text.ljust(os.fstat(self._totals).st_size), 0)

    def close(self) -> None:
        """Release the folder, and remove it if it holds no checkpoint."""
        if self._totals is not None:
            with contextlib.suppress(OSError):
                os.close(self._totals)
        if not checkpoints_in(self.path):
            (self.path / TOTALS).unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                self.path.rmdir()
        os.close(self._held)

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def _folder_name(run: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", run).lstrip(".") or "run"
