"""Checks of the container: image and its MPI family, namespaces, packages from outside."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from hpctrain.doctor.facts import Facts
from hpctrain.doctor.finding import Finding, name_ranks
from hpctrain.doctor.software import mpi_family
from hpctrain.transport.topology import Topology

_LABEL_MPI = "org.hpctrain.mpi"
_SINGLE_COPY = (
    "UCX_TLS",
    "OMPI_MCA_btl_vader_single_copy_mechanism",
    "OMPI_MCA_btl_sm_single_copy_mechanism",
    "OMPI_MCA_smsc",
)


def container(ranks: Sequence[Facts]) -> Iterator[Finding]:
    """Which image the ranks run in, and whether its MPI is the one that was loaded."""
    outside = [rank.rank for rank in ranks if rank.container is None]
    if len(outside) == len(ranks):
        yield Finding("container", "ok", "none", values={"kind": None})
        return
    found = next(rank.container for rank in ranks if rank.container)
    values = found.model_dump()
    if outside:
        text = f"{name_ranks(outside)} run outside of the container of the others"
        fix = "start all ranks alike: mpirun -n 4 apptainer exec IMAGE hpctrain ..."
        yield Finding("container", "fault", text, fix, {"outside": outside})
        return
    images = sorted({r.container.image or "" for r in ranks if r.container})
    if len(images) > 1:
        text = f"ranks run in different images: {', '.join(images)}"
        yield Finding("container", "fault", text, "start all ranks from one image")
        return
    named = Path(found.image).name if found.image else "image unknown"
    yield Finding("container", "ok", f"{found.kind}, {named}", values=values)
    family, mpi = found.labels.get(_LABEL_MPI), ranks[0].mpi
    if family and mpi and mpi_family(mpi.library) not in (family, None):
        yield Finding(
            "container",
            "note",
            f"the image was made for {family}, and the library in use is {mpi.library}: a bound "
            "host MPI of another family does not fit what was compiled in the image",
            "use the image of the host's MPI family (docs/containers.md)",
        )


def namespaces(ranks: Sequence[Facts], topology: Topology) -> Iterator[Finding]:
    """Ranks of a node in different user namespaces cannot copy from each other's memory."""
    apart = []
    for node in range(topology.n_nodes):
        members = topology.ranks_on(node)
        spaces = {ranks[rank].user_namespace for rank in members} - {None}
        if len(spaces) > 1:
            apart.append(ranks[members[0]].host)
    if not apart:
        return
    told = [name for name in _SINGLE_COPY if name in ranks[0].settings]
    text = f"the ranks of a node ({apart[0]}) are in different user namespaces"
    values = {"hosts": apart, "settings": told}
    if told:
        text += f"; {' and '.join(told)} set"
        yield Finding("namespaces", "note", text, values=values)
        return
    yield Finding(
        "namespaces",
        "warning",
        f'{text}: copies from process to process (CMA) fail with "Operation not permitted"',
        "apptainer exec --sharens; or UCX_TLS=^cma,posix and, for Open MPI, "
        "OMPI_MCA_btl_vader_single_copy_mechanism=none (4.x), OMPI_MCA_smsc=^cma (5.x)",
        values,
    )


def user_packages(ranks: Sequence[Facts]) -> Iterator[Finding]:
    """Packages of ~/.local hide the ones of the image."""
    leaking = [rank.rank for rank in ranks if rank.container and rank.user_site]
    if leaking:
        folder = ranks[leaking[0]].user_site
        yield Finding(
            "user_packages",
            "warning",
            f"{name_ranks(leaking)}: Python in the container also reads {folder}",
            "set PYTHONNOUSERSITE=1",
            {"folder": folder},
        )
