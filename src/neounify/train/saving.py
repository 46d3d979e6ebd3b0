"""Saving of states beside the training: copied to host memory, written by a thread of each rank."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from neounify.distributed.ranks import Ranks
from neounify.train.state import prune_states, save_state

GRACE_SECONDS = 20.0
"""Seconds that a run which ends by an error gives to the state being written."""

Tensors = Mapping[str, Mapping[str, Tensor]]


class StateWriter:
    """Writes the states of a run into a folder and keeps the newest `keep`, one save at a time.

    The threads of the ranks exchange by a separate group. `save` and `wait` are collective.
    """

    def __init__(self, folder: Path, keep: int, ranks: Ranks) -> None:
        self._folder, self._keep, self._ranks = folder, keep, ranks.beside()
        # The host memory is kept for the next state.
        self._stager = DefaultStager(
            StagingOptions(
                use_pinned_memory=torch.cuda.is_available(),
                use_shared_memory=False,
                use_async_staging=False,
                use_non_blocking_copy=False,
            )
        )
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(self, step: int, tensors: Tensors, facts: dict[str, Any]) -> None:
        """Copy a state (see `save_state`) and write it later; the save before is waited for.

        Raises its CheckpointError.
        """
        self.wait()
        copies = self._stager.stage({part: dict(named) for part, named in tensors.items()})
        self._thread = threading.Thread(
            target=self._write, args=(step, copies, facts), name=f"state {step}", daemon=True
        )
        self._thread.start()

    @property
    def failed(self) -> bool:
        """Whether a save failed that was not waited for."""
        return self._error is not None

    def wait(self) -> None:
        """Return when the last save is whole. Raises CheckpointError where it failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def abandon(self) -> None:
        """Give the last save a short time to end, whatever becomes of it; after an error."""
        if self._thread is not None:
            self._thread.join(GRACE_SECONDS)

    def _write(self, step: int, tensors: Tensors, facts: dict[str, Any]) -> None:
        try:
            save_state(self._folder, step, tensors, facts, self._ranks)
            if self._ranks.first:
                prune_states(self._folder, self._keep, step)
        except BaseException as error:  # it is raised where the run waits
            self._error = error
