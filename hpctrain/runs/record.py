"""metrics.jsonl: a JSON line per logged step, evaluation, checkpoint and note; units in `FIELDS`.

Lines are complete or absent, in step order, each step once: on resume the lines of steps after the
checkpoint are cut off. Unknown is null. A number that is inf or NaN is null too, since JSON has no
such numbers, and its text stands under `non_finite`.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from hpctrain.runs.lines import JsonLines, Line
from hpctrain.table import DurationS, Table

Kind = Literal["step", "eval", "checkpoint", "note"]

_ALWAYS = {
    "kind": ("", "step, eval, checkpoint or note"),
    "time_s": ("s", "when the line was written, since the epoch of 1970"),
    "attempt": ("", "which start of the run wrote it, from 1"),
    "step": ("steps", "optimiser steps done"),
    "samples": ("samples", "training samples taken over all ranks"),
    "epoch": ("epochs", "passes over the training set, with fraction"),
}
_PER_STEP = "mean per step since the previous step line"
FIELDS: dict[Kind, dict[str, tuple[str, str]]] = {
    "step": {
        **_ALWAYS,
        "loss": (
            "",
            "mean training loss of this step's global batch, before its update; with "
            "[[sync]] over the steps since the previous line, each replica at its own",
        ),
        "accuracy": ("", "fraction of this step's global batch that was classified correctly"),
        "lr": ("", "step size of this step"),
        "batch_global": ("samples", "samples of this step over all ranks"),
        "passes": ("", "micro-batches of rank 0 in this step"),
        "step_s": ("s", f"duration, {_PER_STEP}"),
        "compute_s": ("s", f"forward, backward and update, mean over ranks, {_PER_STEP}"),
        "exchange_s": ("s", f"waiting for the exchange, mean over ranks, {_PER_STEP}"),
        "sync_s": ("s", f"reconciling parameters ([[sync]]), mean over ranks, {_PER_STEP}"),
        "input_s": ("s", f"waiting for data, mean over ranks, {_PER_STEP}"),
        "bytes_sent_intra": ("bytes", f"sent inside nodes, sum over ranks, {_PER_STEP}"),
        "bytes_sent_inter": ("bytes", f"sent between nodes, sum over ranks, {_PER_STEP}"),
        "bytes_source": ("", "counted, formula or link: where the byte counts come from"),
        "density": ("", "fraction of the gradient's entries that each node (or rank) sent"),
        "residual_norm": ("", "Euclidean norm of all residuals before this step, every 10 steps"),
        "xi": ("", "of Alistarh et al. 2018, assumption 1, on the steps where it is measured"),
        "retry_share": ("", "share of the time spent trying the slower form (exchange auto)"),
        "bytes_formula": ("bytes", "that a node sends per step by the exchange's formula"),
        "sync": ("", "numbers of each [[sync]] rule's last meeting, RULE.NAME (docs/sync.md)"),
        "regulariser": ("", "numbers of each [[regulariser]], KIND.NAME (docs/regularisers.md)"),
        "samples_per_s": ("samples/s", "over all ranks, since the previous step line"),
        "bs_bound": (
            "samples",
            "gradient noise as a batch size, 1 + s2 / mu2; null: not resolved",
        ),
        "bs_low": ("samples", "lower end of its 90 % interval, or the 95 % bound alone"),
        "bs_high": ("samples", "upper end of its 90 % interval"),
        "noise_s2": ("", "trace of the covariance of one sample's gradient"),
        "noise_mu2": ("", "squared length of the gradient without noise"),
        "data_skew": ("", "noise between ranks over noise inside them"),
        "measure_share": ("", "share of the time of steps that measuring the noise takes"),
        "measure_every": ("steps", "from one measured step to the next"),
    },
    "eval": {
        **_ALWAYS,
        "loss": ("", "mean loss over the held-out set, at the average of all replicas"),
        "accuracy": ("", "fraction of it that was classified correctly, at that average"),
        **{
            f"replica_{what}_{which}": ("", f"{which} over replicas, each at its own parameters")
            for what in ("loss", "accuracy")
            for which in ("min", "mean", "max")
        },
        "leader_loss": ("", "of the replica that leads"),
        "leader_accuracy": ("", "of the replica that leads"),
        "eval_s": ("s", "duration of the evaluation"),
    },
    "checkpoint": {
        **_ALWAYS,
        "ok": ("", "whether it is complete on disk"),
        "saved_step": ("steps", "the step it holds"),
        "stall_s": ("s", "how long training stood still for it (rank 0)"),
        "save_s": ("s", "from the copy to the moment all ranks knew it complete (rank 0)"),
        "bytes_written": ("bytes", "tensor bytes rank 0 wrote"),
        "reason": ("", "why it failed"),
    },
    "note": {**_ALWAYS, "text": ("", "a remark, such as where a run was resumed")},
}
"""Per kind of line: field -> (unit, meaning). Every line has all the fields of its kind."""


class RecordConfig(Table):
    """The table [record]: what a run writes down and shows."""

    every_steps: int = Field(default=10, ge=1)
    """A line in metrics.jsonl every so many steps (and for the first and last step)."""
    progress: Literal["auto", "bar", "plain", "none"] = "auto"
    """What is shown: a live bar, plain lines, nothing but the summary; auto takes the bar for a
    person at a terminal, else plain lines (docs/operations.md has the rule)."""
    plain_every_s: DurationS = Field(default=5.0, gt=0)
    """Seconds between two plain lines."""
    tensorboard: bool = False
    """Also write TensorBoard event files into the run folder (needs the tensorboard extra)."""


class Recorder(JsonLines):
    """Appends to metrics.jsonl; rank 0 only. Use it in a `with` block.

    Args:
        path: the file.
        attempt: of the run folder.
        step: where this attempt starts, as in `JsonLines`.

    Raises:
        WriteError: the file cannot be written.
    """

    def __init__(self, path: Path, *, attempt: int = 1, step: int = 0) -> None:
        super().__init__(path, step=step)
        self.attempt = attempt

    def write(self, kind: Kind, step: int, **fields: Any) -> Line:
        """Append a line with the given fields, null for the rest of `FIELDS[kind]`. Local.

        Returns:
            The line as a dictionary, the numbers as they were given.

        Raises:
            ValueError: a field that is not in `FIELDS[kind]`.
        """
        unknown = set(fields) - set(FIELDS[kind])
        if unknown:
            raise ValueError(f"{kind} lines have no {sorted(unknown)}; see record.FIELDS")
        given = {"kind": kind, "time_s": time.time(), "attempt": self.attempt, "step": step}
        line: Line = dict.fromkeys(FIELDS[kind]) | given | fields
        self.append(line)
        return line
