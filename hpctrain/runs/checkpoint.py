"""Checkpoints written in the background, agreed on without a single message of their own.

The state machine, equal on all ranks because it moves on reduced numbers only:

    idle --save()--> writing --all done--> committing --rank 0 done--> idle   (Outcome ok)
                        |                      |
                        +-- failed on any rank +--> discarding --> idle       (Outcome not ok)

save() copies this rank's tensors to host memory (the stall) and starts a thread that writes its
files into a temporary folder. Committing is rank 0's thread: manifest, rename, prune. Discarding is
rank 0's thread too: the temporary folder goes, older checkpoints were never touched. Threads touch
no MPI: `numbers()` says how far this rank is, the loop puts that into its control all-reduce (a
maximum, any number of steps late) and hands the result to `advance()`.
"""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from hpctrain.clock import Every
from hpctrain.errors import WriteError
from hpctrain.runs import manifest
from hpctrain.runs.jobs import Jobs
from hpctrain.runs.snapshot import HostCopy, Snapshot, write_files
from hpctrain.state import State
from hpctrain.table import DurationS, Table

log = logging.getLogger(__name__)

Phase = Literal["idle", "writing", "committing", "discarding"]

N_NUMBERS = 3
"""Length of `Checkpointer.numbers()`."""

_VISIBLE_WITHIN_S = 60.0


class CheckpointConfig(Table):
    """The table [checkpoint]: when to save, how many to keep."""

    every_steps: int | None = Field(default=None, ge=1)
    """Save after every so many steps."""
    every_s: DurationS | None = Field(default=None, gt=0)
    """Save when so much time has passed since the last save: seconds, or "30m"."""
    at_end: bool = True
    """Save when training is complete. A run that is stopped early saves in any case."""
    keep: int = Field(default=2, ge=1)
    """How many checkpoints to keep; older ones are deleted after a new one is complete."""
    on_error: Literal["continue", "stop"] = "continue"
    """A save that fails (full disk) leaves the previous checkpoint as it is; the run then goes on
    ("continue") or ends with exit code 73 ("stop")."""


@dataclass(frozen=True)
class Outcome:
    """How a save ended; equal on all ranks but for the times and bytes, which are this rank's."""

    step: int
    ok: bool
    stall_s: float
    """How long training stood still for the copy to host memory."""
    save_s: float
    """From the copy to the moment all ranks knew that the checkpoint was complete."""
    bytes_written: int
    reason: str = ""
    """Why it failed, e.g. "rank 3: No space left on device"."""


class Checkpointer:
    """Saves the states of a run's parts; see the module's docstring for the protocol.

    Args:
        folder: the `checkpoints` folder of the run.
        attempt: of the run folder, equal on all ranks.
        saved_step: the step just resumed from (already on disk), None for a fresh run.
        refused: names of the checkpoints that `manifest.latest` passed over (rank 0).
    """

    def __init__(
        self,
        folder: Path,
        config: CheckpointConfig,
        *,
        rank: int,
        size: int,
        attempt: int,
        saved_step: int | None = None,
        refused: Sequence[str] = (),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.folder = folder
        self.config = config
        self.rank = rank
        self.size = size
        self.attempt = attempt
        self.phase: Phase = "idle"
        self.saved_step = saved_step
        """Step of the newest checkpoint known to be good."""
        self.save_s = 0.0
        """Longest save so far, from copy to commit, for the deadline's budget; 0 before any."""
        self.last: Outcome | None = None
        self._refused = frozenset(refused)
        self._clock = clock
        self._host = HostCopy(rank, size)
        self._jobs = Jobs(rank)
        self._saves = 0
        self._overdue = False
        self._by_step = Every(config.every_steps)
        self._by_step.due(saved_step or 0)
        self._last_save_s = clock()
        self._wanted = 0.0
        self._failure = ""
        self._step = 0
        self._started_s = 0.0
        self._stall_s = 0.0
        self._bytes = 0

    def reserve(self, parts: dict[str, State]) -> None:
        """Allocate the host memory for `parts` now, or the first save stalls longer. Local."""
        self._host.take(0, parts)

    def numbers(self) -> list[float]:
        """This rank's progress, N_NUMBERS float64 to be max-reduced over the ranks. Local."""
        every_s = self.config.every_s
        due = self.rank == 0 and every_s and self._clock() - self._last_save_s >= every_s
        return [*self._jobs.numbers(), float(self._saves + 1) if due else 0.0]

    def advance(self, reduced: Sequence[float]) -> Outcome | None:
        """Move on by the reduced numbers. Local; the same result on all ranks in the same step.

        Returns:
            How a save ended, in the step in which all ranks learn it; else None.

        Raises:
            WriteError: on all ranks alike, when a save failed and `on_error` is "stop".
        """
        outcome = self._advance(reduced)
        if outcome and not outcome.ok and self.config.on_error == "stop":
            raise self._error(outcome)
        return outcome

    def due(self, step: int) -> bool:
        """Whether to save after `step`. Local; the same on all ranks. Ask once per step.

        A save that comes due while the previous one is under way is made as soon as that has ended.
        """
        if self._by_step.due(step) or self._wanted == self._saves + 1:
            if self.phase != "idle" and not self._overdue:
                log.info("checkpoint of step %d waits: step %d is under way", step, self._step)
            self._overdue = True
        return self._overdue and self.phase == "idle"

    def save(self, step: int, parts: dict[str, State]) -> float:
        """Copy `parts` and start writing; returns the stall in seconds. Local, on all ranks alike.

        Raises:
            ValueError: a tensor or counter that cannot be stored (a defect of its component).
        """
        assert self.phase == "idle", f"save at step {step} while {self.phase} step {self._step}"
        self._started_s = self._clock()
        snapshot = self._host.take(step, parts)
        self._step, self._bytes = step, snapshot.nbytes
        self._saves += 1
        self._overdue = False
        self._last_save_s = self._started_s
        self._failure = ""
        self._begin("writing", lambda: self._write(snapshot))
        self._stall_s = self._clock() - self._started_s
        return self._stall_s

    def drain(self, reduce_max: Callable[[np.ndarray], None]) -> Outcome | None:
        """Collective. Wait for the save under way, if any; its outcome. Never raises for a failure.

        Args:
            reduce_max: in-place blocking maximum over the ranks of a float64 vector.
        """
        outcome = None
        while self.phase != "idle":
            self._jobs.join()
            vector = np.array(self.numbers())
            reduce_max(vector)
            outcome = self._advance(vector.tolist())
        return outcome

    def finish(
        self,
        step: int,
        parts: dict[str, State],
        reduce_max: Callable[[np.ndarray], None],
        *,
        stopped: bool,
    ) -> Outcome | None:
        """Collective. The end of a run after `step`: wait, save unless `step` is saved, wait.

        Saves if the run was `stopped` early or `at_end` is set. Returns how the last save ended,
        None when nothing was left to save.

        Raises:
            WriteError: on all ranks alike, when that save failed and the run was stopped (its exit
                code would promise a good checkpoint) or `on_error` is "stop".
        """
        outcome = self.drain(reduce_max)
        if (stopped or self.config.at_end) and self.saved_step != step:
            self.save(step, parts)
            outcome = self.drain(reduce_max)
        if outcome and not outcome.ok and (stopped or self.config.on_error == "stop"):
            raise self._error(outcome)
        return outcome

    def _advance(self, reduced: Sequence[float]) -> Outcome | None:
        progress, failed, self._wanted = reduced
        if self.phase == "idle" or not self._jobs.ended(progress):
            return None
        if self.phase == "discarding":
            return self._end(ok=False)
        self._failure = self._jobs.failure(failed)
        if self._failure:
            self._begin("discarding", self._discard if self.rank == 0 else None)
            return None
        if self.phase == "writing":
            self._begin("committing", self._commit if self.rank == 0 else None)
            return None
        return self._end(ok=True)

    def _begin(self, phase: Phase, work: Callable[[], None] | None) -> None:
        self.phase = phase
        self._jobs.begin(f"{phase} the checkpoint of step {self._step}", work)

    def _end(self, ok: bool) -> Outcome:
        self.phase = "idle"
        save_s = self._clock() - self._started_s
        self.save_s = max(self.save_s, save_s)
        if ok:
            self.saved_step = self._step
        outcome = Outcome(self._step, ok, self._stall_s, save_s, self._bytes, self._failure)
        self.last = outcome
        return outcome

    @property
    def _temporary(self) -> Path:
        return self.folder / f"{manifest.folder_name(self._step)}.tmp-{self.attempt}"

    def _write(self, snapshot: Snapshot) -> None:
        write_files(snapshot, self._temporary)

    def _commit(self) -> None:
        files: dict[str, Any] = {}
        for rank in range(self.size):
            path = self._temporary / f"{manifest.rank_name(rank)}.json"
            _wait_until_visible(path)
            files |= json.loads(path.read_bytes())["files"]
            files[path.name] = manifest.fingerprint(path)
        for name, stated in files.items():
            found_bytes = (self._temporary / name).stat().st_size
            if found_bytes != stated["bytes"]:
                raise OSError(f"{name} has {found_bytes} bytes; {stated['bytes']} were written")
        manifest.write_manifest(self._temporary, self._step, self.size, files)
        manifest.publish(self._temporary, self._step, self.attempt)
        try:
            manifest.prune(self.folder, self.config.keep, self.attempt, self._refused)
        except OSError as error:
            # The new checkpoint is complete; too many old ones are no reason to call it failed.
            log.warning("an old checkpoint could not be deleted: %s", error)

    def _discard(self) -> None:
        shutil.rmtree(self._temporary, ignore_errors=True)

    def _error(self, outcome: Outcome) -> WriteError:
        kept = "no checkpoint" if self.saved_step is None else f"that of step {self.saved_step}"
        return WriteError(
            f"the checkpoint of step {outcome.step} could not be written to {self.folder}: "
            f"{outcome.reason}. Good on disk: {kept}. Free space or correct the permissions, then "
            "run the same command again with --resume auto"
        )


def _wait_until_visible(path: Path) -> None:
    # Another node's file is on disk before its rank says so, but NFS may show it seconds later.
    until = time.monotonic() + _VISIBLE_WITHIN_S
    while not path.exists() and time.monotonic() < until:
        time.sleep(0.2)
