"""Steps, samples and bytes, with the ranks as threads of this process."""

from __future__ import annotations

import contextlib
import io
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from benchmarks.axes.cases import NODES, ROUND, SKIPPED, TARGET, UNMEASURED, Case, Line
from hpctrain.assemble import Options, World, open_session
from hpctrain.batch import StepTimes
from hpctrain.config import Loaded
from hpctrain.errors import NonFinite
from hpctrain.runs import signals
from hpctrain.runs.lines import read
from hpctrain.session import Session
from hpctrain.train import run_training
from hpctrain.transport.communicator import Communicator
from hpctrain.transport.threads import RankError, run_threads


def count(case: Case, times: StepTimes | None) -> Line:
    """A training to the target.

    Args:
        case: Which.
        times: What its batch policy is told of the times of steps.
    """
    loaded = case.loaded("data.prefetch=0", "record.every_steps=25")
    return on_threads(loaded, range(NODES), times, read_training)


def count_bytes(variant: str, per_node: int) -> Line:
    """Bytes between nodes per step and node, over one round of leaders; measuring is off."""
    more = (*UNMEASURED, f"batch.batch_global={NODES * per_node}")
    more += ("data.limit_train=4000", "data.limit_test=8", "data.prefetch=0")
    more += ("record.every_steps=1", "evaluate.every_epochs=0")
    loaded = Case(variant, 1e-4).loaded(*more, length=f"train.steps={SKIPPED + ROUND + 16}")
    node_of = [rank // per_node for rank in range(NODES * per_node)]
    return on_threads(loaded, node_of, None, read_bytes)


def on_threads(
    loaded: Loaded, node_of: Sequence[int], times: StepTimes | None, look: Callable[[Path], Line]
) -> Line:
    """A training, stopped at the target; what `look` finds in its folder."""
    began, diverged = time.process_time(), False

    def rank(folder: Path, comm: Communicator) -> None:
        with open_session(loaded, World(comm), Options(out=folder)) as session:
            session.stop = Arrival(session)  # type: ignore[assignment]
            if times is not None:
                session.batch.fix_times(times)
            run_training(session)

    with tempfile.TemporaryDirectory() as name, contextlib.redirect_stderr(io.StringIO()):
        folder = Path(name) / "run"
        try:
            run_threads(len(node_of), partial(rank, folder), node_of=node_of, only_waits=True)
        except RankError as error:
            if not isinstance(error.__cause__, NonFinite):
                raise
            diverged = True
        found = look(folder)
    return found | {"diverged": diverged, "cpu_s": round(time.process_time() - began, 1)}


@dataclass
class Arrival:
    """In place of a run's requests to stop: stops it once the target was held twice in a row."""

    session: Session
    seen: list[Mapping[str, float]] = field(default_factory=list)

    def poll(self, save_s: float) -> int:
        """As `signals.StopRequest.poll`. Local, equal on all ranks."""
        results = self.session.results
        if results and (not self.seen or self.seen[-1] is not results):
            self.seen.append(results)
        curve = [(0.0, found["loss"], found["accuracy"]) for found in self.seen]
        return signals.NONE if TARGET.reached_at(curve) is None else signals.STOP_FILE


def read_training(folder: Path) -> Line:
    """Where a training arrived, its curve of (step, samples, loss, accuracy), and its batches."""
    lines = [line for line in read(folder / "metrics.jsonl") if line["kind"] == "eval"]
    curve = [[line[name] for name in ("step", "samples", "loss", "accuracy")] for line in lines]
    curve = [point for point in curve if point[2] is not None]
    step = TARGET.reached_at([(at, loss, accuracy) for at, _, loss, accuracy in curve])
    samples = next((samples for at, samples, *_ in curve if at == step), None)
    batches: list[list[int]] = []
    for decided in read(folder / "batch_plan.jsonl"):
        if not batches or batches[-1][1] != decided["batch_global"]:
            batches.append([decided["step"], decided["batch_global"]])
    return {"steps": step, "samples": samples, "batches": batches, "curve": curve}


def read_bytes(folder: Path) -> Line:
    """Bytes per step and node, over one round.

    A line tells the mean of the steps since the one before, as far as they were heard of. The last
    line of a run, which hears of all that is left, is not among them.
    """
    lines = [line for line in read(folder / "metrics.jsonl") if line["kind"] == "step"]
    pairs = [(a, b) for a, b in zip(lines, lines[1:], strict=False) if a["step"] >= SKIPPED]
    pairs = [(a, b) for a, b in pairs if b["step"] <= SKIPPED + ROUND]
    steps = sum(b["step"] - a["step"] for a, b in pairs)
    assert steps == ROUND, [b["step"] for _, b in pairs]
    sent = sum(b["bytes_sent_inter"] * (b["step"] - a["step"]) for a, b in pairs)
    return {"bytes_per_node": round(sent / steps / NODES), "of_steps": steps}
