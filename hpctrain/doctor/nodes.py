"""Checks of the nodes: which ranks live where, cores, GPUs, limits and local folders."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from hpctrain.doctor.facts import Facts, Space
from hpctrain.doctor.finding import Finding, fold, name_ranks, size_text, some
from hpctrain.doctor.mounts import IN_MEMORY, SHARED
from hpctrain.transport.topology import Topology

_MIN_SHM_BYTES = 65 << 20
_MIN_TMP_BYTES = 256 << 20
_MIN_OPEN_FILES = 1024
_FREE_CORES = (
    "start fewer ranks per node, set OMP_NUM_THREADS lower, or ask for more cores "
    "(srun --cpus-per-task, PBS ncpus)"
)
_UNBIND = "let each rank have its own cores: mpirun --bind-to none, srun --cpus-per-task=C"


def node_map(ranks: Sequence[Facts], topology: Topology) -> Iterator[Finding]:
    """Ranks per node, and whether host names tell the nodes apart."""
    if ranks[0].mpi is None:
        return
    on = [topology.ranks_on(node) for node in range(topology.n_nodes)]
    hosts = [topology.hosts[members[0]] for members in on]
    sizes = [len(members) for members in on]
    shown = some([f"{host} ({len(members)})" for host, members in zip(hosts, on, strict=True)], 6)
    values = {"hosts": hosts, "ranks_per_node": sizes}
    yield Finding("nodes", "ok", f"{topology.describe()}: {shown}", values=values)
    if len(set(sizes)) > 1:
        yield Finding(
            "nodes",
            "note",
            f"uneven: between {min(sizes)} and {max(sizes)} ranks per node",
            "equal numbers make full use of every node: srun --ntasks-per-node, mpirun --map-by "
            "ppr:R:node, PBS mpiprocs",
            values,
        )
    for host in sorted({host for host in hosts if hosts.count(host) > 1}):
        heads = [members[0] for members in on if topology.hosts[members[0]] == host]
        kernels = {ranks[head].boot_id for head in heads}
        if len(kernels) == 1 and None not in kernels:
            text = (
                f"{name_ranks(heads)} run on one machine ({host}), but MPI sees {len(heads)} "
                "nodes: their containers do not share memory"
            )
            fix = "start the containers of a node with one namespace: apptainer exec --sharens"
        else:
            text = f"{len(heads)} nodes call themselves {host}"
            fix = "give every node its own host name; launchers, logs and NCCL tell nodes by it"
        yield Finding("nodes", "warning", text, fix, {"host": host, "ranks": heads})
    allocation = ranks[0].allocation
    if allocation and allocation.nodes and allocation.nodes > topology.n_nodes:
        yield Finding(
            "nodes",
            "warning",
            f"the job has {allocation.nodes} nodes, the ranks run on {topology.n_nodes} of them",
            "start ranks on every node: srun --ntasks-per-node, mpirun --map-by ppr:R:node",
        )


def cores(ranks: Sequence[Facts], topology: Topology) -> Iterator[Finding]:
    """Whether the threads of a node's ranks fit into the cores they may use."""
    crowded = []
    for node in range(topology.n_nodes):
        members = [ranks[rank] for rank in topology.ranks_on(node) if ranks[rank].cores]
        if found := _crowded(members):
            crowded.append(found)
    yield from crowded[:4]
    if len(crowded) > 4:
        yield Finding("cores", "warning", f"the same on {len(crowded) - 4} more nodes")
    known = [rank for rank in ranks if rank.cores]
    if known and not crowded:
        each = _range([len(rank.cores or ()) for rank in known])
        threads = sorted({rank.omp_threads or 0 for rank in known})
        asked = ", ".join(str(number or "not set") for number in threads)
        alike = len({(topology.node_of[r.rank], *(r.cores or ())) for r in known})
        whose = "each rank" if alike == len(known) else "each node, shared by its ranks"
        text = f"{each} for {whose} (logical processors), OMP_NUM_THREADS {asked}"
        yield Finding("cores", "ok", text, values={"omp_num_threads": threads})


def _crowded(members: Sequence[Facts]) -> Finding | None:
    """The gravest way in which one node's ranks fight for cores."""
    if not members:
        return None
    host = members[0].host
    sets: dict[tuple[int, ...], list[Facts]] = {}
    for member in members:
        sets.setdefault(tuple(member.cores or ()), []).append(member)
    every = {core for own in sets for core in own}
    for own, holders in sets.items():
        threads = sum(member.omp_threads or 1 for member in holders)
        if len(own) < len(every) or len(own) < (members[0].cores_of_node or 0):
            names = name_ranks([member.rank for member in holders])
            if threads > len(own):
                both = f"all {len(holders)} " if len(holders) > 1 else ""
                text = (
                    f"{names} on {host}: {both}bound to core{'s' * (len(own) > 1)} {fold(own)} "
                    f"with {threads} threads in all"
                )
                values = {"host": host, "cores": list(own), "threads": threads}
                return Finding("cores", "warning", text, _UNBIND, values)
    threads = sum(member.omp_threads or 1 for member in members)
    if threads <= len(every):
        return None
    each = _range([member.omp_threads or 1 for member in members])
    text = (
        f"{len(members)} rank{'s' * (len(members) > 1)} x {each} thread(s) on the {len(every)} "
        f"core{'s' * (len(every) > 1)} of {host}: they slow each other down"
    )
    values = {"host": host, "cores": sorted(every), "threads": threads}
    return Finding("cores", "warning", text, _FREE_CORES, values)


def gpus(ranks: Sequence[Facts], topology: Topology) -> Iterator[Finding]:
    """Whether every rank has a GPU of its own."""
    having = [rank for rank in ranks if rank.gpus and rank.gpus.devices]
    if not having:
        if any(rank.gpus is None for rank in ranks):
            return
        text = "none: no device file of NVIDIA or AMD on any node"
        yield Finding("gpus", "note", text, values={"devices": 0})
        return
    blind = [r for r in having if r.gpus and not r.gpus.torch_count]
    if blind:
        boxed = any(rank.container and rank.container.kind == "apptainer" for rank in blind)
        text = f"{name_ranks([r.rank for r in blind])}: device files are there, torch sees no GPU"
        fix = (
            "use apptainer exec --nv (or --rocm)"
            if boxed
            else ("install a torch built for these GPUs, and look at CUDA_VISIBLE_DEVICES")
        )
        yield Finding("gpus", "warning", text, fix)
        return
    lacking = [rank.rank for rank in ranks if rank not in having]
    if lacking:
        yield Finding(
            "gpus",
            "fault",
            f"{name_ranks(lacking)} see no GPU, the others do",
            'ask for GPUs on every node, or set train.device = "cpu"',
        )
    few = [
        r
        for r in having
        if r.gpus and _too_few(r, len(topology.ranks_on(topology.node_of[r.rank])))
    ]
    if few:
        first = few[0]
        mates = len(topology.ranks_on(topology.node_of[first.rank]))
        assert first.gpus is not None
        yield Finding(
            "gpus",
            "fault",
            f"{first.host} has {mates} ranks and shows {first.gpus.torch_count} GPU(s) "
            f'({some(sorted({rank.host for rank in few}))}): train.device = "auto" refuses this',
            'start one rank per GPU, or set train.device = "cpu"',
        )
    owners: dict[str, list[int]] = {}
    for rank in having:
        if rank.gpus and rank.gpus.taken:
            owners.setdefault(rank.gpus.taken, []).append(rank.rank)
    doubly = {gpu: holders for gpu, holders in owners.items() if len(holders) > 1}
    for gpu, holders in list(doubly.items())[:4]:
        yield Finding(
            "gpus",
            "warning",
            f"{name_ranks(holders)} on {ranks[holders[0]].host} would compute on one GPU ({gpu})",
            "give each rank its own: unset CUDA_VISIBLE_DEVICES, or srun --gpus-per-task=1",
            {"gpu": gpu, "ranks": holders},
        )
    if not (lacking or few or doubly):
        sight = sorted({r.gpus.visible or "no restriction" for r in having if r.gpus})
        text = f"one for each rank ({some(sight, 3)})"
        yield Finding("gpus", "ok", text, values={"devices": len(owners)})


def limits(ranks: Sequence[Facts]) -> Iterator[Finding]:
    """Locked memory, which RDMA needs, and open files."""
    tight = [r for r in ranks if r.fabric and r.memlock_bytes not in (None, -1)]
    if tight:
        least = min(rank.memlock_bytes or 0 for rank in tight)
        yield Finding(
            "limits",
            "warning",
            f"{name_ranks([r.rank for r in tight])}: at most {size_text(least)} of locked memory, "
            f"and there is {tight[0].fabric[0]}, which needs it for RDMA",
            "ulimit -l unlimited in the job script; where that is refused, the site must allow it",
            {"memlock_bytes": least},
        )
    few = [r for r in ranks if r.open_files is not None and 0 <= r.open_files < _MIN_OPEN_FILES]
    if few:
        least = min(rank.open_files or 0 for rank in few)
        text = f"{name_ranks([r.rank for r in few])}: at most {least} open files"
        yield Finding("limits", "warning", text, f"ulimit -n {_MIN_OPEN_FILES} in the job script")
    if not tight and not few and ranks[0].memlock_bytes is not None:
        locked = ranks[0].memlock_bytes
        shown = "unlimited" if locked == -1 else size_text(locked)
        text = f"locked memory {shown}, open files {ranks[0].open_files}"
        values = {"memlock_bytes": locked, "open_files": ranks[0].open_files}
        yield Finding("limits", "ok", text, values=values)


def temporary(ranks: Sequence[Facts]) -> Iterator[Finding]:
    """TMPDIR: MPI keeps its sockets and files there."""
    seen = {r.host: r.temporary for r in ranks if r.temporary}
    for host, found in list(seen.items()):
        if not found.writable:
            text, fix = "cannot be written", "set TMPDIR to a folder on the node's own disk"
        elif found.free_bytes < _MIN_TMP_BYTES:
            text = f"{size_text(found.free_bytes)} free"
            fix = "clean it up, or set TMPDIR to a folder with room"
        elif found.type in SHARED:
            text = f"on {found.type}, which is slow for MPI's files and refuses its sockets"
            fix = "set TMPDIR to a folder on the node's own disk, e.g. /tmp"
        else:
            continue
        yield Finding("temporary", "warning", f"{found.folder} on {host}: {text}", fix)
        return
    if seen:
        yield Finding("temporary", "ok", _space_text(list(seen.values())))


def shared_memory(ranks: Sequence[Facts]) -> Iterator[Finding]:
    """/dev/shm: the ranks of a node exchange there."""
    seen = {r.host: r.shared_memory for r in ranks if r.shared_memory}
    for host, found in seen.items():
        if found.free_bytes < _MIN_SHM_BYTES:
            yield Finding(
                "shared_memory",
                "warning",
                f"/dev/shm on {host}: {size_text(found.free_bytes)} of "
                f"{size_text(found.total_bytes)} free",
                "docker run --shm-size=4g; or remove what dead jobs left there",
                {"host": host, "free_bytes": found.free_bytes},
            )
            return
    if seen:
        yield Finding("shared_memory", "ok", _space_text(list(seen.values())))


def _space_text(spaces: Sequence[Space]) -> str:
    least = min(spaces, key=lambda space: space.free_bytes)
    memory = " (in memory)" if least.type in IN_MEMORY and least.folder != "/dev/shm" else ""
    at_least = "at least " if len(spaces) > 1 else ""
    return (
        f"{least.folder}: {least.type or 'unknown type'}{memory}, {at_least}"
        f"{size_text(least.free_bytes)} free"
    )


def _too_few(rank: Facts, mates: int) -> bool:
    assert rank.gpus is not None
    count, visible = rank.gpus.torch_count or 0, rank.gpus.visible or ""
    one_each = count == 1 and visible.partition("=")[2].isdigit()
    return not one_each and count < mates


def _range(numbers: Sequence[int]) -> str:
    low, high = min(numbers), max(numbers)
    return str(low) if low == high else f"{low} to {high}"
