"""The loop. Three functions, three levels: per run, per step, per micro-batch.

`assemble.py` builds what they use; the methods themselves (exchange, batch policy, learning rate)
stand in their rooms, so nothing here depends on which one a run chose.
"""

from __future__ import annotations

import math
import resource
import time
from functools import partial

import torch
from torch import Tensor

from hpctrain.data.loader import Batch
from hpctrain.errors import NonFinite
from hpctrain.models.loss import per_sample_loss
from hpctrain.session import Session
from hpctrain.timing import Stepped, Timing
from hpctrain.transport.communicator import Communicator


def run_training(session: Session) -> str | None:
    """Per run. Collective. Train until the run is complete or asked to stop.

    Returns:
        None when complete, else the reason for which all ranks stopped at this step, with a good
        checkpoint behind them.

    Raises:
        NonFinite: on all ranks, before the update that would have used it.
        WriteError: a checkpoint could not be written and `checkpoint.on_error = "stop"`.
    """
    while not session.clock.done:
        if session.evaluation_due():
            evaluate(session)
        began = time.perf_counter()
        decision = session.decide()
        batch = session.loader.next(decision.batch_global, session.clock.samples_left)
        lr = session.lr_for(batch, decision.gain)
        step = train_step(session, batch, lr, began)
        session.clock.advance(batch.batch_global, batch.batch_local)
        heard = session.hear(step)
        session.record_step(heard, batch, lr, step.timing)
        if reason := session.stop_reason(heard):
            session.save_and_wait(stopped=True)
            return reason
        session.save_if_due(heard)
    evaluate(session)
    session.save_and_wait(stopped=False)
    return None


def train_step(session: Session, batch: Batch, lr: float, began: float) -> Stepped:
    """Per step. Collective. One optimiser update from this rank's share of the global batch.

    Collective over the replica, and over the members of each [[sync]] rule that is due.

    Args:
        session: The run.
        batch: This rank's micro-batches; none is legal.
        lr: Step size.
        began: `time.perf_counter()` before the batch was asked for.

    Returns:
        What this rank and its replica said, and this rank's seconds.

    Raises:
        NonFinite: on all ranks, before the update, where all ranks are one replica.
    """
    fetched = time.perf_counter()
    session.flat.zero_grad()
    session.regularisers.perturb(session.clock.own_step, partial(gradient, session, batch))
    losses: list[Tensor] = []
    micro_batches = session.measurement.begin(session.clock.step, batch)
    if not micro_batches:
        session.exchange.arm(lr)
    for position, (inputs, targets) in enumerate(micro_batches, start=1):
        session.watchdog.beat(session.clock.step, "compute")
        session.measurement.piece(len(targets))
        if position == len(micro_batches):
            session.exchange.arm(lr)
        losses.append(backward(session, inputs, targets, batch.batch_replica))
    squares = session.measurement.end(batch)
    session.regularisers.restore()
    loss, correct = torch.stack(losses).sum(0).tolist() if losses else (0.0, 0.0)
    computed = time.perf_counter()
    session.watchdog.beat(session.clock.step, "exchange")
    said = session.vote(loss, correct, batch.batch_local, squares)
    session.agreement.start(*said)
    finite = session.exchange.finish()
    replica = session.agreement.wait()
    finite = finite and not replica.sums.non_finite
    session.exchange.settle(keep=finite)
    if not finite and session.agreement.in_step:
        refuse_update(session, not math.isfinite(loss))
    session.batch.take(session.measurement.settled(replica.sums, batch.batch_replica))
    exchanged = time.perf_counter()
    session.watchdog.beat(session.clock.step, "sync")
    moment = session.moment(lr, loss, batch.batch_local)
    session.rules.before_update(moment)
    mixed = time.perf_counter()
    if finite and batch.batch_replica and session.exchange.ready:
        session.regularisers.adjust_gradient(session.clock.own_step, batch.batch_replica)
        session.optimiser.step(lr, batch.batch_replica)
    updated = time.perf_counter()
    session.rules.after_update(moment)
    ended = time.perf_counter()
    timing = Timing(
        step_s=ended - began,
        compute_s=computed - fetched + updated - mixed,
        exchange_s=exchanged - computed,
        sync_s=mixed - exchanged + ended - updated,
        input_s=fetched - began,
    )
    return Stepped(*said, replica, timing)


def gradient(session: Session, batch: Batch) -> None:
    """Local. Add the gradient of this rank's share of a step to the flat gradient."""
    for inputs, targets in batch.micro_batches:
        backward(session, inputs, targets, batch.batch_replica)


def backward(session: Session, inputs: Tensor, targets: Tensor, batch_replica: int) -> Tensor:
    """Per micro-batch. Local, but the last one of a step starts the exchange of its gradients.

    Adds the gradient of (sum of this micro-batch's losses) / batch_replica to the flat gradient.

    Returns:
        (2,): sum of losses and sum of correctness, detached.
    """
    with session.autocast():
        loss_B, correct_B = per_sample_loss(session.flat.module, session.spec, inputs, targets)
    loss = loss_B.sum()
    (loss / batch_replica).backward()
    return torch.stack([loss.detach(), correct_B.sum()]).double()


@torch.no_grad()
def evaluate(session: Session) -> None:
    """Collective. Record mean loss and accuracy over the held-out set, each rank its share of it.

    Leaves no trace in the training state. With several replicas their average is measured, and
    each of them where `evaluate.replicas` asks for it.
    """
    began = time.perf_counter()
    session.rules.settle()
    with session.views.average():
        results = measure(session, session.comm)
    if session.replicas_due():
        with session.views.own():
            own = measure(session, session.replicas.inside)
        results |= session.views.spread(own, session.rules.leader)
    session.record_evaluation(results, time.perf_counter() - began)


def measure(session: Session, comm: Communicator) -> dict[str, float]:
    """Collective over `comm`. Loss and accuracy of the present parameters on the held-out set."""
    sums = torch.zeros(2, dtype=torch.float64)
    for inputs, targets in session.held_out_batches(comm):
        session.watchdog.beat(session.clock.step, "evaluate")
        with session.autocast():
            losses = per_sample_loss(session.flat.module, session.spec, inputs, targets)
        sums += torch.stack([part.sum() for part in losses]).to("cpu", torch.float64)
    comm.allreduce(sums.numpy())
    loss, correct = (sums / len(session.data.test)).tolist()
    return {"loss": loss} | ({} if math.isnan(correct) else {"accuracy": correct})


def refuse_update(session: Session, mine: bool) -> None:
    """Collective. Say what is not finite and on which ranks, after the save under way, if any.

    Raises:
        NonFinite: always, equal on all ranks.
    """
    ranks = session.agreement.ranks_with(mine)
    session.finish_save()
    what = f"the loss of step {session.clock.step} is inf or NaN on rank(s) {ranks}"
    if not ranks:
        what = f"a gradient of step {session.clock.step} is inf or NaN (the losses are finite)"
    raise NonFinite(
        f"{what}; stopped before the update. Lower lr.base, lengthen lr.warmup_epochs, set "
        "optimiser.clip_norm, or check the data; --resume auto starts again from the last "
        "checkpoint"
    )


def rehearse(session: Session) -> list[str]:
    """Collective. One gradient without an update or a file; what memory it takes, in words."""
    decision = session.batch.next(session.clock).decision
    batch = session.loader.next(decision.batch_global, session.clock.samples_left)
    gradient(session, batch)
    flat_bytes = session.flat.n_params * session.flat.params_P.element_size()
    state_bytes = sum(
        placed.tensor.numel() * placed.tensor.element_size()
        for state in session.parts().values()
        for placed in state.tensors.values()
    )
    if session.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(session.device)
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return [
        f"dry run   one batch of {batch.batch_global} samples went through, no file was written",
        f"memory    peak {peak / 1e6:,.0f} MB on rank 0 (parameters and gradients "
        f"{2 * flat_bytes / 1e6:,.1f} MB, a checkpoint {state_bytes / 1e6:,.1f} MB)",
    ]
