"""Builds a run from its configuration; the one place where the classes of all rooms meet.

In order of dependency: folder, device, data, model, exchange, record.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from hpctrain import __version__
from hpctrain.agreement import Agreement
from hpctrain.batch_control import BatchControl
from hpctrain.census import measure_diversity
from hpctrain.clock import Clock
from hpctrain.config import Loaded, Run
from hpctrain.data.loader import Loader
from hpctrain.data.order import SampleOrder
from hpctrain.data.partition import shards_of
from hpctrain.data.spec import DataSets
from hpctrain.errors import ConfigError
from hpctrain.exchange.setting import Setting
from hpctrain.hardware import choose_device, choose_threads, make_reducer
from hpctrain.journal import Journal
from hpctrain.measurement import Measurement
from hpctrain.models.flat import FlatModel
from hpctrain.optimiser import AppliedUpdate
from hpctrain.place import Place, claimed
from hpctrain.randomness import RandomState
from hpctrain.reconcile import caution, find_scopes, hold_probe, make_rules
from hpctrain.regularise.regularisers import Regularisers
from hpctrain.replicas import Replicas
from hpctrain.runs import environment, restore
from hpctrain.runs.checkpoint import Checkpointer
from hpctrain.runs.console import choose_display, find_terminal, make_console
from hpctrain.runs.plan import Plan
from hpctrain.runs.progress import Progress, batch_equation
from hpctrain.runs.record import Recorder
from hpctrain.runs.signals import StopRequest
from hpctrain.runs.tensorboard import TensorBoard
from hpctrain.session import Session
from hpctrain.toml_text import to_toml
from hpctrain.transport.abort import exit_code_of
from hpctrain.transport.communicator import Communicator
from hpctrain.transport.launcher import launch_from_environment
from hpctrain.transport.watchdog import Watchdog
from hpctrain.views import Views


@dataclass(frozen=True)
class Options:
    """What one start of a run is told beside its configuration."""

    out: Path | None = None
    """The run folder; None: the next free runs/NAME-NNN."""
    resume: str = "never"
    """"auto", "never", or the folder of the run to continue."""
    walltime_s: float | None = None
    """Save and stop before so many seconds have passed since the start."""
    dry_run: bool = False
    """Build everything, take one batch, write no file."""


@dataclass(frozen=True)
class World:
    """The ranks, and what only their transport can tell or do."""

    comm: Communicator
    facts: Callable[[], dict[str, str]] = dict
    """For env.json."""
    abort: Callable[[int], object] = os._exit
    """Ends all ranks with an exit code."""


@contextmanager
def open_session(loaded: Loaded, world: World, options: Options) -> Iterator[Session]:
    """Collective. Everything a run needs, ready for its first or next step.

    Only local things are undone when an exception passes through: other ranks may not be coming.

    Raises:
        HpctrainError: what was asked for does not fit this place; nothing was overwritten.
    """
    run, comm = loaded.run, world.comm
    with ExitStack() as local:
        place = None
        if not options.dry_run:
            place = local.enter_context(claimed(run.name, options.out, options.resume, comm))
        stop_file = place.folder.stop_file if place and comm.rank == 0 else None
        stop = local.enter_context(StopRequest(options.walltime_s, stop_file))
        device = choose_device(run.train.device, comm)
        if run.train.autocast != "off" and device.type == "cpu":
            raise ConfigError(
                f'train.autocast = "{run.train.autocast}" is for GPUs and this run is on the CPU; '
                'set it to "off"'
            )
        threads = choose_threads(run.train.threads, comm)
        data = run.data.load(comm.node(), run.seed)
        random = RandomState(run.seed, comm.rank)
        flat = build_model(run, data, device, random, comm)
        scopes = find_scopes(run, comm)
        replicas = Replicas.make(comm, scopes(run.exchange.scope))
        reducers = partial(
            make_reducer, comm=replicas.inside, device=device, stall_check_s=run.watchdog.warn_s
        )
        exchange = run.exchange.build(Setting(flat, replicas.inside, reducers, run.optimiser))
        # Before the watchdog: the first optimiser of a process imports for seconds.
        optimiser = AppliedUpdate() if exchange.gives == "update" else run.optimiser.build(flat)
        watchdog = Watchdog(
            comm,
            exchange.bucket_names,
            run.watchdog.warn_s,
            run.watchdog.abort_s or None,
            lambda text: print(f"hpctrain: {text}", file=sys.stderr, flush=True),
            world.abort,
            heartbeat_s=run.watchdog.heartbeat_s,
            bucket=lambda: exchange.current,
        )
        train, probe = hold_probe(run, data)
        clock = Clock.of(run.train, len(train), run.batch.batch_global)
        shards = shards_of(run.data, train, comm.size, run.seed)
        order = SampleOrder(len(train), run.seed, comm.rank, comm.size, shards, replicas.ranks)
        rules = make_rules(run, replicas, scopes, comm, flat, optimiser, data.spec, probe)
        clock.own_pace = order.own_pace = rules.own_pace
        measurement = Measurement.of(run, comm, flat, replicas.count, own_pace=rules.own_pace)
        batch = BatchControl(
            run.batch,
            run.lr,
            ranks=comm.size,
            replicas=replicas.count,
            flat=flat,
            measurement=measurement,
            census=lambda: measure_diversity(flat, data.spec, train, comm).b_s,
        )
        session = Session(
            run=run,
            comm=comm,
            device=device,
            data=data,
            loader=Loader(train, order, run.batch.micro_for(comm.size), run.data.prefetch, device),
            flat=flat,
            optimiser=optimiser,
            exchange=exchange,
            batch=batch,
            measurement=measurement,
            lr=run.lr,
            clock=clock,
            replicas=replicas,
            agreement=Agreement(comm, replicas, own_pace=rules.own_pace),
            rules=rules,
            regularisers=Regularisers(
                [(r.kind, r.build(flat, run.seed + replicas.mine)) for r in run.regulariser]
            ),
            views=Views(flat, replicas, comm),
            random=random,
            watchdog=watchdog,
            journal=Journal(Progress(None, "none"), comm.size, run.record.every_steps),
            stop=stop,
            checkpoints=make_checkpointer(run, comm, place),
        )
        random.seed_rank(0)
        if place and place.checkpoint:
            session.load(restore.load(place.checkpoint.path, comm.rank, comm.size, session.parts()))
            if place.checkpoint.size != comm.size:
                random.seed_rank(clock.samples)
        if comm.rank == 0:
            session.journal = open_journal(session, place, local)
            session.journal.say(header(loaded, session, threads, place))
            if place:
                facts = {"exchange": exchange.algorithm, "device": str(device)} | world.facts()
                place.folder.begin(to_toml(run), environment.collect(comm.topology, facts))
                session.journal.start(clock, place.checkpoint)
        if place:
            session.checkpoints.reserve(session.parts())
        flat.module.train()
        try:
            yield session
        except BaseException as error:
            session.journal.end(clock, None, exit_code_of(error))
            raise
        watchdog.close()
        session.exchange.close()
        session.loader.close()
        data.close()


def build_model(
    run: Run, data: DataSets, device: torch.device, random: RandomState, comm: Communicator
) -> FlatModel:
    """Collective. The model with equal parameters on all ranks.

    Raises:
        ConfigError: the model does not fit the data.
    """
    random.seed_model()
    dtype = torch.float64 if run.train.dtype == "float64" else torch.float32
    flat = FlatModel(
        run.model.build(data.spec).to(device=device, dtype=dtype), run.exchange.comes_last
    )
    flat.broadcast(comm)
    return flat


def make_checkpointer(run: Run, comm: Communicator, place: Place | None) -> Checkpointer:
    """Local. Saves into the run folder; on a dry run never asked to."""
    found = place.checkpoint if place else None
    return Checkpointer(
        place.folder.checkpoints if place else Path(os.devnull),
        run.checkpoint,
        rank=comm.rank,
        size=comm.size,
        attempt=place.folder.attempt if place else 0,
        saved_step=found.step if found else None,
        refused=[refusal.name for refusal in found.refused] if found else (),
    )


def open_journal(session: Session, place: Place | None, local: ExitStack) -> Journal:
    """Local, rank 0. The display, and on a real run the record.

    Raises:
        WriteError: the record cannot be written.
        BackendError: TensorBoard is asked for and not installed.
    """
    record = session.run.record
    launched = launch_from_environment().family != "none"
    terminal = find_terminal(launched)
    display = choose_display(record.progress, terminal, os.environ)
    progress = local.enter_context(
        Progress(
            make_console(display, terminal, os.environ),
            display,
            fraction=session.clock.progress,
            total_steps=session.clock.total_steps,
            plain_every_s=record.plain_every_s,
            ranks=session.comm.size,
        )
    )
    recorder = plan = tensorboard = None
    if place:
        step = session.clock.step
        recorder = local.enter_context(
            Recorder(place.folder.metrics, attempt=place.folder.attempt, step=step)
        )
        plan = local.enter_context(Plan(place.folder.plan, step))
        if record.tensorboard:
            tensorboard = local.enter_context(TensorBoard(place.folder.tensorboard, step))
    folder = place.folder if place else None
    return Journal(
        progress, session.comm.size, record.every_steps, folder, recorder, plan, tensorboard
    )


def header(loaded: Loaded, session: Session, threads: int, place: Place | None) -> list[str]:
    """Local. What a person sees first: the run in equations."""
    run, data, comm = loaded.run, session.data, session.comm
    where = f"{comm.topology.describe()}, {session.device}"
    if session.device.type == "cpu":
        where += f", {threads} thread{'s' if threads > 1 else ''} per rank"
    lines = [
        f"hpctrain {__version__}  {run.name} ({loaded.source})",
        f"ranks     {where}",
        f"data      {run.data.kind}: {len(data.train):,} training samples, "
        f"{len(data.test):,} held out, {data.nbytes / 1e6:,.1f} MB per node",
        f"model     {run.model.kind}: {session.flat.n_params:,} parameters, {run.train.dtype}",
        f"batch     {batch_equation(run.batch.batch_global, comm.size)}",
        f"exchange  {run.exchange.kind}, {session.exchange.algorithm}"
        if session.replicas.inside.size > 1
        else "exchange  nothing to exchange: one rank per replica",
    ]
    if run.sync:
        rules = ", ".join(
            f"{rule.kind} over {rule.scope} "
            + (f"every {rule.every} {rule.unit}" if not rule.schedule else "by schedule")
            for rule in run.sync
        )
        lines.append(f"sync      {session.replicas.count} replicas: {rules}")
    if text := caution(run):
        lines.append(f"caution   {text}")
    if place:
        lines.append(f"run       {place.note}")
    if session.watchdog.note and comm.size > 1:
        lines.append(f"watchdog  {session.watchdog.note}")
    return lines
