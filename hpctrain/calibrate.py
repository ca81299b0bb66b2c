"""The real critical batch of a run: train on from a checkpoint with B, 2 B, 4 B, ... and compare.

    branch k   from the checkpoint, over the same samples in the same order, with batches of k B and
               the step size that the run has at B times f(k)
    f(k)       "linear" k, "sqrt" k^(1/2), "none" 1, "adascale" k (phi + B) / (phi + k B) with
               phi = B_S - 1 as measured
    loss(k)    exponential average, new <- (old + block) / 2, over blocks of `most` B samples, of
               the mean training loss of a block, each sample's before the update that takes it
    critical   k* B, k* the largest k with loss(j) <= loss(1) + tolerance for all j <= k
    scale      noise_scale_factor = k* B / (B_S - 1), for [batch] kind = "goodput"

The first branch is what the run itself would do. Micro-batches stay as they are, so memory does
not grow. Once a branch is too large no larger one is trained; one whose loss or gradient is inf or
NaN is too large.

Source: Merrill et al. 2025, arXiv 2505.23971: branches of 2e9 tokens, an exponential average with
weight 1/2, a tolerance of 0.01, the step size times k for SGD and times the root of k for Adam.
Differences: the average runs over blocks of the same samples in all branches, not over steps, so
that the noise of a small batch's loss is not what is compared; all smaller branches must be within
the tolerance too.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from hpctrain.assemble import Options, World, open_session
from hpctrain.batch.lr import adascale_gain
from hpctrain.config import Loaded
from hpctrain.errors import NonFinite, UsageError
from hpctrain.place import agree_on
from hpctrain.runs import manifest, restore
from hpctrain.runs.calibration import (
    FILE,
    HEADINGS,
    Branch,
    Calibration,
    LrRule,
    Wanted,
    block_means,
    smoothed,
)
from hpctrain.runs.status import is_running, read_status
from hpctrain.session import Session
from hpctrain.stats.noise import NoiseEstimate
from hpctrain.train import evaluate, train_step
from hpctrain.transport.communicator import Communicator

Say = Callable[[str], None]


def calibrate(
    world: World, loaded: Loaded, checkpoint: Path, wanted: Wanted, say: Say
) -> Calibration | None:
    """Collective. Find the critical batch of a run; writes calibration.json into its folder.

    Nothing else there is changed.

    Args:
        world: The ranks; their number may differ from the run's.
        loaded: The run's configuration.
        checkpoint: A run folder, whose newest checkpoint is taken, or one of its checkpoints.
        wanted: What is tried.
        say: Called on rank 0 with every line of the report as soon as it is known.

    Returns:
        What was found; None where the ranks were asked to stop, and nothing is written.

    Raises:
        UsageError: there is no checkpoint, the run is running, its ranks go at their own pace, so
            many samples do not fit, or `wanted.lr` needs a B_S that is not known.
        NonFinite: the run's own batch diverges.
        WriteError: the result cannot be written.
    """
    say = say if world.comm.rank == 0 else _say_nothing
    found = agree_on(checkpoint, world.comm)
    folder = found.path.parent.parent
    if world.comm.rank == 0:
        refuse_running(folder)
    quiet = _quiet(loaded, world.comm.size)
    branches: list[Branch] = []
    noise: NoiseEstimate | None = None
    with open_session(quiet, world, Options(dry_run=True)) as session:
        _go_back(session, found)
        batch, _ = _held(session)
        samples = choose_samples(wanted, batch, session)
        rule = wanted.lr or choose_rule(session)
        say(f"run       {folder} from step {found.step}, {world.comm.size} rank(s)")
        say(f"branches  {samples:,} samples, step size {rule}, tolerance {wanted.tolerance}")
        say(HEADINGS)
        for multiple in wanted.multiples:
            factor = lr_factor(rule, multiple, batch / session.replicas.count, noise)
            branch = take_branch(session, found, multiple, factor, samples, wanted.most * batch)
            if branch is None:
                say("stopped on request; nothing is written")
                return None
            noise = session.measurement.estimate() if multiple == 1 else noise
            branches.append(branch)
            say(branch.row(branches[0]))
            if not wanted.tolerance.allows(branch.loss, branches[0].loss):
                break
    if math.isinf(branches[0].loss):
        raise NonFinite(
            f"{folder}: from step {found.step} the run's own batch of {batch} samples comes to a "
            "loss or gradient that is inf or NaN; take an earlier checkpoint"
        )
    within = wanted.tolerance.allows(branches[-1].loss, branches[0].loss)
    result = Calibration(
        run=str(folder),
        step=found.step,
        ranks=world.comm.size,
        samples=samples,
        lr=rule,
        tolerance=str(wanted.tolerance),
        branches=branches,
        too_large=None if within else branches[-1].batch_global,
        noise=noise,
    )
    if world.comm.rank == 0:
        result.write(folder)
    for line in [*result.lines(), f"written   {folder / FILE}"]:
        say(line)
    return result


def refuse_running(folder: Path) -> None:
    """Local, rank 0.

    Raises:
        UsageError: the run in `folder` is running and may delete the checkpoint.
    """
    status = read_status(folder)
    if status and is_running(status):
        raise UsageError(
            f"{folder}: this run is still running and deletes old checkpoints; stop it first "
            f"(`hpctrain stop {folder}`), or calibrate a copy of the folder"
        )


def choose_samples(wanted: Wanted, batch: int, session: Session) -> int:
    """Samples of each branch. Local.

    Raises:
        UsageError: they do not fit (`Wanted.samples_for`), or branches of this run would not take
            the same samples.
    """
    clock, left = session.clock, math.inf
    if clock.own_pace:
        raise UsageError(
            "with asynchronous [[sync]] rules ranks go at their own pace, and branches would not "
            "take the same samples; calibrate a run whose rules meet"
        )
    if session.lr.schedule == "cosine":
        left = clock.total_samples - clock.samples
    return wanted.samples_for(batch, clock.samples_per_epoch, left)


def choose_rule(session: Session) -> LrRule:
    """How the step size follows the batch where that is not given. Local."""
    return "sqrt" if session.run.optimiser.kind == "adamw" else "linear"


def lr_factor(rule: LrRule, multiple: int, batch: float, noise: NoiseEstimate | None) -> float:
    """f(k): what the step size is multiplied by. Local, pure.

    Args:
        rule: How it follows the batch.
        multiple: k.
        batch: Samples of an update at k = 1.
        noise: As measured; only "adascale" needs it, and not at k = 1.

    Raises:
        UsageError: it is needed and not known.
    """
    if rule == "adascale" and multiple > 1:
        if noise is None or not noise.resolved:
            raise UsageError(
                "--lr adascale: the run's B_S is not known, or not resolved; measure it with --set "
                "batch.measure=on, or give linear, sqrt or none"
            )
        return multiple * adascale_gain(multiple * batch, batch, noise.b_s - 1.0)
    power = {"linear": 1.0, "sqrt": 0.5}.get(rule, 0.0)
    return float(multiple**power)


def take_branch(
    session: Session, found: manifest.Found, multiple: int, factor: float, samples: int, block: int
) -> Branch | None:
    """Collective. Train over `samples` from the checkpoint with `multiple` times the batch.

    Args:
        session: The run; its state is overwritten.
        found: The checkpoint.
        multiple: Of the run's batch.
        factor: Of the run's step size.
        samples: Where the branch ends.
        block: Samples of a block of the smoothed loss.

    Returns:
        None where the ranks were asked to stop.
    """
    _go_back(session, found)
    batch_global, gain = _held(session)
    sums_T2: list[tuple[float, float]] = []
    lrs: list[float] = []
    left, diverged = samples, False
    try:
        while left > 0:
            began = time.perf_counter()
            batch = session.loader.next(multiple * batch_global, left)
            as_one = replace(batch, batch_replica=max(1, round(batch.batch_replica / multiple)))
            lrs.append(session.lr_for(as_one, gain * factor))
            step = train_step(session, batch, lrs[-1], began)
            session.clock.advance(batch.batch_global, batch.batch_local)
            left -= batch.batch_global
            sums_T2.append((step.own.loss, step.own.samples))
            if session.stop_reason(session.hear(step)):
                return None
    except NonFinite:
        diverged = True
    session.agreement.drain()
    session.rules.settle()
    session.measurement.settle()
    loss_T, samples_T = _summed(sums_T2, session.comm)
    finite = not diverged and bool(np.isfinite(loss_T).all())
    if finite:
        evaluate(session)
    blocks = block_means(loss_T, samples_T, block)
    return Branch(
        batch_global=multiple * batch_global,
        lr=lrs[0],
        losses=(loss_T / samples_T).tolist(),
        block_losses=blocks,
        loss=smoothed(blocks) if finite else math.inf,
        held_out_loss=session.results["loss"] if finite else None,
    )


def _quiet(loaded: Loaded, ranks: int) -> Loaded:
    """The run without a display, and with the micro-batches it has at its own batch."""
    run = loaded.run
    micro = run.batch.micro_for(ranks) or -(-run.batch.batch_global // ranks)
    changed = {
        "batch": run.batch.model_copy(update={"micro_batch": micro}),
        "record": run.record.model_copy(update={"progress": "none"}),
    }
    return replace(loaded, run=run.model_copy(update=changed))


def _go_back(session: Session, found: manifest.Found) -> None:
    """Collective. The state of the checkpoint, as a run that continues from it has it."""
    session.random.seed_rank(0)
    session.load(restore.load(found.path, session.comm.rank, session.comm.size, session.parts()))
    if found.size != session.comm.size:
        session.random.seed_rank(session.clock.samples)


def _held(session: Session) -> tuple[int, float]:
    """The batch at the checkpoint, and what the step size is multiplied by."""
    counters = session.batch.state().counters
    batch = int(counters.get("batch_global") or session.run.batch.batch_global)
    return batch, float(counters.get("gain") or 1.0)


def _summed(
    sums_T2: list[tuple[float, float]], comm: Communicator
) -> tuple[np.ndarray, np.ndarray]:
    """Losses and samples of every step, over all ranks."""
    sums = np.array(sums_T2, dtype=np.float64).reshape(-1, 2)
    comm.allreduce(sums)
    return sums[:, 0].copy(), sums[:, 1].copy()


def _say_nothing(line: str) -> None:
    """On ranks other than 0."""
