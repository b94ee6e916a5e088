"""Decides when to write checkpoints, and keeps what they hold: the state after the last completed update."""

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from trainer.checkpoint_files import RunFolder
from trainer.config import StartError
from trainer.display import say

if TYPE_CHECKING:
    from trainer.training import Training


class Checkpoints:
    """Keeps the state after the last completed update. Writes it every few updates and at the end.

    Does nothing if the settings turn checkpoints off. If a checkpoint cannot be written, it warns and training
    continues. The first rank writes; all ranks must call `updated` and `finish`.

    Attributes:
        last: the last checkpoint written, or the one from which the run resumed.

    Raises:
        StartError: the folder cannot be used.
    """

    def __init__(self, training: "Training") -> None:
        self._training = training
        self._every = training.config.checkpoint_every
        self._state: dict[str, Any] | None = None
        self._spare: dict[str, Any] | None = None
        self._written: dict[str, Any] | None = None
        self.last: Path | None = Path(training.config.resume) if training.config.resume else None
        self._folder = self._open_folder() if self._every and training.ranks.is_first else None

    def _open_folder(self) -> RunFolder:
        config = self._training.config
        try:
            if self.last is not None:
                return RunFolder.of_resumed_run(self.last, config.run_name, config.keep_checkpoints)
            return RunFolder.of_new_run(Path(config.checkpoint_dir), config.run_name, config.keep_checkpoints)
        except BlockingIOError as error:
            raise StartError(f"another process is writing the checkpoints in {self.last.parent}") from error
        except OSError as error:
            where = self.last.parent if self.last else config.checkpoint_dir
            raise StartError(
                f"cannot write checkpoints to {where}: {error.strerror}; --checkpoint-dir chooses another folder, "
                "--checkpoint-every 0 writes none"
            ) from error

    def updated(self) -> None:
        """An update is complete."""
        if not self._every:
            return
        is_due = self._training.updates % self._every == 0
        # A signal or an error may end the next update in its middle, so keep this state. Several ranks never stop
        # there, and collecting their states takes time.
        if is_due or self._training.ranks.size == 1:
            self._keep(self._training.state_dict())
        if self._folder is not None:
            self._note_totals()
            if is_due:
                self._write()

    def finish(self) -> None:
        """The run has ended after a completed update, on every rank."""
        if self._every and self._training.ranks.size > 1 and self._training.updates % self._every:
            self._keep(self._training.state_dict())

    def close(self) -> None:
        """Write the last completed update and release the folder; does nothing the second time."""
        if self._folder is None:
            return
        try:
            if self._training.run_snapshot.updates:
                self._note_totals()
            if self._state is not self._written:
                self._write()
        finally:
            self._folder.close()
            self._folder = None

    def _keep(self, state: Mapping[str, Any]) -> None:
        # New memory would cost more than the copy. Two copies alternate, so that an interrupt leaves one intact.
        self._state, self._spare = copied(state, self._spare), self._state

    def _note_totals(self) -> None:
        # If this fails, the next checkpoint fails too and warns.
        with contextlib.suppress(OSError):
            self._folder.note_totals(self._training.run_snapshot)

    def _write(self) -> None:
        try:
            self.last = self._folder.write(self._state)
            self._written = self._state
        except OSError as error:
            say(
                f"warning: no checkpoint of update {self._training.updates} in {self._folder.path}: "
                f"{error.strerror or error}; training continues",
                to_stderr=True,
            )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def copied(state: Any, earlier: Any = None) -> Any:
    """`state` with a copy of every tensor in its dicts, on the tensor's device.

    Reuses the tensors of `earlier`, an unused copy, where shape, dtype and device match.
    """
    if isinstance(state, Tensor):
        if isinstance(earlier, Tensor) and (earlier.shape, earlier.dtype, earlier.device) == (
            state.shape,
            state.dtype,
            state.device,
        ):
            return earlier.copy_(state.detach())
        return state.detach().clone()
    if isinstance(state, Mapping):
        before = earlier if isinstance(earlier, Mapping) else {}
        return {key: copied(value, before.get(key)) for key, value in state.items()}
    return state
