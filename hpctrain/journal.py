"""What a run tells: its record, its status file, its display. Rank 0 writes; the others hold none.

Seconds and bytes reach a line one step late: they travel with the next step's control message, so
that telling them costs no message of their own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

from hpctrain.batch.policy import Decision
from hpctrain.clock import Clock, Every
from hpctrain.control import Sums
from hpctrain.errors import EXIT_COMPLETE, EXIT_STOPPED
from hpctrain.runs.checkpoint import Outcome
from hpctrain.runs.folder import RunFolder
from hpctrain.runs.manifest import Found
from hpctrain.runs.plan import Plan
from hpctrain.runs.progress import Progress, Summary
from hpctrain.runs.record import Kind, Recorder
from hpctrain.runs.tensorboard import TensorBoard
from hpctrain.transport.communicator import BytesSource


class Journal:
    """Tells a run's steps, evaluations, checkpoints and end. All methods are local.

    Args:
        progress: Shows; nothing on ranks other than 0.
        size: Number of ranks.
        every_steps: Steps between two recorded lines.
        run_folder: None on a dry run.
        recorder: On rank 0; None on others and on a dry run.
        plan: Likewise.
        tensorboard: On rank 0 where asked for.
    """

    def __init__(
        self,
        progress: Progress,
        size: int,
        every_steps: int,
        run_folder: RunFolder | None = None,
        recorder: Recorder | None = None,
        plan: Plan | None = None,
        tensorboard: TensorBoard | None = None,
    ) -> None:
        self._progress = progress
        self._size = size
        self._due = Every(every_steps)
        self._run_folder = run_folder
        self._recorder = recorder
        self._plan = plan
        self._tensorboard = tensorboard
        self._told = Sums()
        """As of the last step line."""
        self._steps = 0
        self._samples = 0

    @property
    def folder(self) -> Path | None:
        """The run folder; None on a dry run."""
        return self._run_folder.path if self._run_folder else None

    def start(self, clock: Clock, checkpoint: Found | None) -> None:
        """The run begins, or continues from `checkpoint`."""
        if checkpoint is not None:
            for refusal in checkpoint.refused:
                self.note(clock, f"checkpoint {refusal.name} is not used: {refusal.reason}")
            self.note(
                clock,
                f"continues after step {clock.step} from {checkpoint.path.name}, "
                f"written by {checkpoint.size} rank(s)",
            )

    def step(
        self,
        clock: Clock,
        sums: Sums | None,
        batch_global: int,
        passes: int,
        lr: float,
        source: BytesSource,
        exchange: dict[str, float],
        sync: dict[str, float],
        regulariser: dict[str, float],
        noise: Callable[[], Mapping[str, float | None]],
    ) -> None:
        """A step is done.

        Args:
            clock: With the step counted.
            sums: What all ranks said since the last time, seconds and bytes up to the step before;
                None where nothing new was heard.
            batch_global: Samples of the step over all ranks.
            passes: Micro-batches of this rank.
            lr: Its step size.
            source: Of the bytes.
            exchange: The exchange's own numbers.
            sync: The rules' own numbers.
            regulariser: The regularisers' own numbers.
            noise: Gives those of the gradient noise; asked for a line that is written.
        """
        if sums is not None:
            due = self._due.due(clock.step) or self._steps == 0 or clock.done
            if self._recorder and due and sums.samples:
                self._write(
                    "step",
                    clock,
                    loss=sums.loss / sums.samples,
                    accuracy=None if math.isnan(sums.correct) else sums.correct / sums.samples,
                    lr=lr,
                    batch_global=batch_global,
                    passes=passes,
                    bytes_source=source,
                    sync=sync or None,
                    regulariser=regulariser or None,
                    **exchange,
                    **noise(),
                    **self._rates(sums),
                )
        self._steps += 1
        self._samples += batch_global
        self._progress.tick(clock.step, clock.progress)
        self._tell_running(clock)

    def decision(self, clock: Clock, decision: Decision, *, tell: bool) -> None:
        """The batch policy decided on the next step. With `tell` the display says so too."""
        if self._plan:
            self._plan.write(
                step=clock.step,
                samples=clock.samples,
                batch_global=decision.batch_global,
                lr_gain=decision.gain,
                reason=decision.reason,
                facts=decision.facts,
            )
        if tell:
            self.note(clock, f"batch: {decision.reason}")

    def evaluation(self, clock: Clock, results: dict[str, float], eval_s: float) -> None:
        """An evaluation is done."""
        self._write("eval", clock, **results, eval_s=eval_s)

    def checkpoint(self, clock: Clock, outcome: Outcome | None) -> None:
        """A save ended, if `outcome` is not None."""
        if outcome is not None:
            self._write(
                "checkpoint",
                clock,
                ok=outcome.ok,
                saved_step=outcome.step,
                stall_s=outcome.stall_s,
                save_s=outcome.save_s,
                bytes_written=outcome.bytes_written,
                reason=outcome.reason or None,
            )

    def note(self, clock: Clock, text: str) -> None:
        """A remark for the record and the display."""
        self._write("note", clock, text=text)

    def say(self, lines: Sequence[str]) -> None:
        """Show lines that are not recorded, the header for one."""
        self._progress.say(lines)

    def summary(
        self, results: dict[str, float], totals: Sums, source: BytesSource, following: Sequence[str]
    ) -> None:
        """The closing table. `totals` are of the whole attempt, summed over ranks."""
        self._progress.summary(
            Summary(
                results=results,
                steps=self._steps,
                samples=self._samples,
                duration_s=totals.step_s / self._size,
                compute_s=totals.compute_s / self._size,
                exchange_s=totals.exchange_s / self._size,
                sync_s=totals.sync_s / self._size,
                input_s=totals.input_s / self._size,
                bytes_sent_intra=int(totals.bytes_sent_intra),
                bytes_sent_inter=int(totals.bytes_sent_inter),
                bytes_source=source,
                folder=str(self.folder),
                following=following,
            )
        )

    def end(self, clock: Clock, reason: str | None, exit_code: int) -> None:
        """The run is over: complete, stopped for a reason, or failed with an exit code."""
        if self._recorder and self._run_folder:
            ended: Literal["stopped", "complete"] = "stopped" if reason else "complete"
            state = ended if exit_code in (EXIT_COMPLETE, EXIT_STOPPED) else "failed"
            self._run_folder.end(state, clock.step, clock.samples, clock.epoch, exit_code)

    def _rates(self, sums: Sums) -> dict[str, float | None]:
        """Means per step since the last line, of what `sums` covers."""
        told, self._told = self._told, sums
        steps = (sums.steps_timed - told.steps_timed) / self._size
        if steps == 0:
            return {}
        names = ("step_s", "compute_s", "exchange_s", "sync_s", "input_s")
        seconds = {n: (getattr(sums, n) - getattr(told, n)) / steps for n in names}
        means: dict[str, float | None] = {n: s / self._size for n, s in seconds.items()}
        for name in ("bytes_sent_intra", "bytes_sent_inter"):
            means[name] = round((getattr(sums, name) - getattr(told, name)) / steps)
        step_s = means["step_s"]
        samples = (sums.samples_timed - told.samples_timed) / steps
        means["samples_per_s"] = samples / step_s if step_s else None
        return means

    def _write(self, kind: Kind, clock: Clock, **values: object) -> None:
        if self._recorder is None:
            return
        line = self._recorder.write(
            kind, clock.step, samples=clock.samples, epoch=clock.epoch, **values
        )
        self._progress.show(line)
        if self._tensorboard:
            self._tensorboard.show(line)

    def _tell_running(self, clock: Clock) -> None:
        if self._recorder and self._run_folder:
            self._run_folder.running(clock.step, clock.samples, clock.epoch)
