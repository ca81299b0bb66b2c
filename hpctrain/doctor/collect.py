"""Gathers one rank's facts. Local; a part that fails is written down as unknown and ends nothing.

Before MPI starts: it runs child processes (git, squeue, the probe).
"""

from __future__ import annotations

import json
import os
import resource
import socket
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import hpctrain
from hpctrain.doctor import allocation
from hpctrain.doctor.facts import Container, Facts, Gpus, Mpi
from hpctrain.doctor.mounts import space
from hpctrain.doctor.probe import probe
from hpctrain.runs import environment as recorded
from hpctrain.transport.algorithm import loaded_library
from hpctrain.transport.launcher import Launch

_VISIBLE = ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")
_TOPOLOGY = ("SLURMD_NODENAME", "SLURM_TOPOLOGY_ADDR", "SLURM_TOPOLOGY_ADDR_PATTERN")
_SETTINGS = (
    "OMPI_MCA_pml",
    "OMPI_MCA_btl",
    "OMPI_MCA_mtl",
    "OMPI_MCA_btl_tcp_if_include",
    "OMPI_MCA_btl_vader_single_copy_mechanism",
    "OMPI_MCA_btl_sm_single_copy_mechanism",
    "OMPI_MCA_smsc",
    "UCX_TLS",
    "UCX_NET_DEVICES",
    "FI_PROVIDER",
    "MPICH_OFI_NIC_POLICY",
    "NCCL_SOCKET_IFNAME",
    "SLURM_MPI_TYPE",
)
_LIBRARIES = {"libucp.so": "ucx", "libfabric.so": "libfabric", "libpsm2.so": "psm2"}
_ALL_IDS = ["0", "0", "4294967295"]
_IMAGE = Path("/.singularity.d/labels.json")


def collect(
    launch: Launch, environment: Mapping[str, str], *, alone: bool, first_on_node: bool
) -> Facts:
    """One rank's facts, without MPI. Local.

    Args:
        launch: What the launcher says.
        environment: This process's variables; only harmless ones are kept.
        alone: Whether MPI will not be started: then the probe loads its library.
        first_on_node: Whether this rank loads torch and Horovod on behalf of its node.
    """
    parts: dict[str, Callable[[], Any]] = {
        "versions": lambda: _versions(first_on_node),
        "processor": recorded.processor,
        "boot_id": lambda: Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
        "user_namespace": lambda: os.readlink("/proc/self/ns/user"),
        "in_user_namespace": lambda: Path("/proc/self/uid_map").read_text().split() != _ALL_IDS,
        "cores": lambda: sorted(os.sched_getaffinity(0)),
        "cores_of_node": os.cpu_count,
        "omp_threads": lambda: _positive(environment.get("OMP_NUM_THREADS", "")),
        "gpus": lambda: _gpus(launch.local_rank, environment),
        "fabric": _fabric,
        "memlock_bytes": lambda: resource.getrlimit(resource.RLIMIT_MEMLOCK)[0],
        "open_files": lambda: resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        "temporary": lambda: space(Path(tempfile.gettempdir())),
        "shared_memory": lambda: space(Path("/dev/shm")),
        "container": lambda: _container(environment),
        "user_site": _user_site,
    }
    if launch.rank == 0:
        parts["allocation"] = lambda: allocation.find(environment)
    if first_on_node:
        stages = ("torch", "horovod", "mpi") if alone else ("torch", "horovod")
        parts["probe"] = lambda: probe(stages)
    found: dict[str, Any] = {"versions": {}}
    unknown: dict[str, str] = {}
    for name, part in parts.items():
        try:
            found[name] = part()
        except Exception as error:  # whatever it is, the report goes on without this fact
            unknown[name] = f"{type(error).__name__}: {error}"
    return Facts(
        rank=launch.rank,
        host=socket.gethostname(),
        launcher=launch.title,
        launcher_family=launch.family,
        launcher_size=launch.size,
        topology={name: environment[name] for name in _TOPOLOGY if name in environment},
        settings={name: environment[name] for name in _SETTINGS if name in environment},
        unknown=unknown,
        **found,
    )


def with_mpi(facts: Facts, rank: int, size: int, said: Mapping[str, str]) -> Facts:
    """The facts once MPI has been started. Local.

    Args:
        facts: From before.
        rank: By MPI.
        size: By MPI.
        said: `mpi.facts()`.
    """
    loaded = loaded_library()
    mpi = Mpi(
        rank=rank,
        size=size,
        library=said["mpi_library"],
        standard=said["mpi_standard"],
        thread_level=said["mpi_thread_level"],
        mpi4py=said["mpi4py"],
        allreduce=said["allreduce"],
        loaded=None if loaded is None else str(loaded),
        transports=_libraries_in_memory(),
    )
    return facts.model_copy(update={"mpi": mpi, "rank": rank})


def _versions(first_on_node: bool) -> dict[str, str | None]:
    found = recorded.versions()
    # Once per node: git reads many files, and the ranks of a node read the same ones.
    state = recorded.git_state(Path(hpctrain.__file__).parent) if first_on_node else None
    if state:
        changed = " with changes" if state["dirty"] else ""
        found["git"] = f"{state['commit'][:12]}{changed}"
    return found


def _gpus(local_rank: int | None, environment: Mapping[str, str]) -> Gpus:
    dev = Path("/dev")
    devices = sorted(p.name for p in dev.glob("nvidia[0-9]*")) or ["kfd"][: (dev / "kfd").exists()]
    names = [name for name in _VISIBLE if name in environment]
    visible = f"{names[0]}={environment[names[0]]}" if names else None
    if not devices:
        return Gpus(devices=[], visible=visible)
    import torch

    count = torch.cuda.device_count()
    # The rule of hardware.choose_device.
    one_each = count == 1 and environment.get("CUDA_VISIBLE_DEVICES", "").isdigit()
    index = 0 if one_each else local_rank
    taken = None
    if index is not None and index < count:
        uuid = getattr(torch.cuda.get_device_properties(index), "uuid", None)
        taken = None if uuid is None else str(uuid)
    return Gpus(devices=devices, visible=visible, torch_count=count, taken=taken)


def _fabric() -> list[str]:
    found = []
    for kind in ("infiniband", "cxi"):
        folder = Path("/sys/class") / kind
        if folder.is_dir():
            found += [f"{kind}/{entry.name}" for entry in sorted(folder.iterdir())]
    return found


def _container(environment: Mapping[str, str]) -> Container | None:
    if named := recorded.container(environment):
        labels = json.loads(_IMAGE.read_text()) if _IMAGE.is_file() else {}
        image = named.get("APPTAINER_CONTAINER") or named.get("SINGULARITY_CONTAINER")
        texts = {str(name): str(value) for name, value in labels.items()}
        return Container(kind="apptainer", image=image, labels=texts)
    return Container(kind="docker") if Path("/.dockerenv").exists() else None


def _user_site() -> str | None:
    import site

    folder = site.getusersitepackages()
    return folder if folder in sys.path else None


def _libraries_in_memory() -> list[str]:
    try:
        maps = Path("/proc/self/maps").read_text(errors="replace")
    except OSError:
        return []
    return [title for name, title in _LIBRARIES.items() if name in maps]


def _positive(text: str) -> int | None:
    # OMP_NUM_THREADS="4,2" gives nested levels; the outer one counts.
    first = text.partition(",")[0].strip()
    return int(first) if first.isdigit() and int(first) > 0 else None
