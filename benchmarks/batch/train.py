"""One training of hpctrain with its ranks as threads of this process, up to a target."""

from __future__ import annotations

import contextlib
import io
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from benchmarks.batch.target import Point, level
from hpctrain.assemble import Options, World, open_session
from hpctrain.batch import StepTimes
from hpctrain.config import Loaded, from_mapping
from hpctrain.errors import NonFinite
from hpctrain.runs import signals
from hpctrain.runs.lines import read
from hpctrain.session import Session
from hpctrain.train import run_training
from hpctrain.transport.communicator import Communicator
from hpctrain.transport.threads import RankError, run_threads

Tree = dict[str, Any]


@dataclass
class Arrival:
    """In place of a run's requests to stop: stops it at the target, and where an evaluation is
    HOPELESS times the first one."""

    session: Session
    target: float
    span: float
    _latest: Mapping[str, float] | None = None
    _curve: list[Point] = field(default_factory=list)

    HOPELESS: ClassVar[float] = 100.0

    def poll(self, save_s: float) -> int:
        """The reason to stop, as `signals.StopRequest.poll`. Local, equal on all ranks."""
        clock, results = self.session.clock, self.session.results
        if not results or results is self._latest:
            return signals.NONE
        self._latest = results
        self._curve.append((clock.step, clock.samples, results["loss"]))
        lost = not results["loss"] <= self.HOPELESS * self._curve[0][2]
        there = level(self._curve, self.span) <= self.target
        return signals.STOP_FILE if there or lost else signals.NONE


def train(
    tree: Tree,
    ranks: int,
    *,
    times: StepTimes | None = None,
    target: float = 0.0,
    span: float = 0.0,
) -> dict[str, Any]:
    """One training; what its record says.

    Args:
        tree: The configuration.
        ranks: Threads, which compute one after the other.
        times: What a policy is told of the times of steps, in place of the threads' own.
        target: Held-out loss at which it ends.
        span: Samples over which the loss is averaged for that.

    Returns:
        curve: (step, samples, loss, accuracy) of every evaluation; plan: the policy's decisions
        that changed the batch; diverged.
    """
    began = time.process_time()
    loaded = from_mapping(tree | {"data": {"prefetch": 0} | tree["data"]})
    with tempfile.TemporaryDirectory() as name, contextlib.redirect_stderr(io.StringIO()):
        folder, diverged = Path(name) / "run", False
        try:
            run_threads(
                ranks,
                lambda comm: one_rank(comm, loaded, folder, times, target, span),
                only_waits=True,
            )
        except RankError as error:
            if not isinstance(error.__cause__, NonFinite):
                raise
            diverged = True
        found = record_of(folder)
    cpu_s = round(time.process_time() - began, 1)
    return found | {"diverged": diverged, "cpu_s": cpu_s}


def one_rank(
    comm: Communicator,
    loaded: Loaded,
    folder: Path,
    times: StepTimes | None,
    target: float,
    span: float,
) -> None:
    """Collective. What a rank does."""
    with open_session(loaded, World(comm), Options(out=folder)) as session:
        session.stop = Arrival(session, target, span)  # type: ignore[assignment]
        if times is not None:
            session.batch.fix_times(times)
        run_training(session)


def record_of(folder: Path) -> dict[str, Any]:
    """The curve of a run folder, and the decisions that changed the batch, without their numbers.

    Both are what a log keeps of hundreds of trainings, so losses have six digits.
    """
    lines = [line for line in read(folder / "metrics.jsonl") if line["kind"] == "eval"]
    curve = [[x["step"], x["samples"], x["loss"], x["accuracy"]] for x in lines]
    plan_path = folder / "batch_plan.jsonl"
    return {
        "samples_per_epoch": round(lines[-1]["samples"] / lines[-1]["epoch"]),
        "curve": [rounded(point) for point in curve if point[2] is not None],
        "plan": changes(read(plan_path)) if plan_path.exists() else [],
    }


def rounded(point: Sequence[float]) -> list[float]:
    """(step, samples, loss, accuracy)."""
    step, samples, loss, accuracy = point
    return [step, samples, float(f"{loss:.6g}"), float(f"{accuracy:.4g}")]


def changes(plan: Iterable[Tree]) -> list[Tree]:
    """Where the batch is another one than before."""
    found: list[Tree] = []
    for decision in plan:
        if not found or found[-1]["batch_global"] != decision["batch_global"]:
            found.append({name: decision[name] for name in ("step", "samples", "batch_global")})
    return found
