"""How Open MPI's mpirun, 4.1 or 5, is told about the virtual cluster."""

from __future__ import annotations

import functools
import re
import shutil
import subprocess

from tests.cluster.plan import NETWORK, Plan


@functools.cache
def mpirun() -> tuple[str, int]:
    """Path and major version of the mpirun on PATH, which has to be Open MPI's."""
    path = shutil.which("mpirun")
    if not path:
        raise RuntimeError("no mpirun on PATH: activate the environment that `make setup` made")
    text = subprocess.run([path, "--version"], capture_output=True, text=True).stdout
    found = re.search(r"Open MPI\)? (\d+)\.", text)
    if not found:
        raise RuntimeError(f"{path} is not Open MPI's; the virtual cluster knows no other launcher")
    return path, int(found[1])


def environment(plan: Plan) -> dict[str, str]:
    """Variables that a site's MPI would have built in: the network, the agent, root allowed."""
    agent = str(plan.path("agent"))
    network = {
        "pml": "ob1",
        "btl_tcp_if_include": NETWORK,
        "oob_tcp_if_include": NETWORK,
        "plm_rsh_agent": agent,
        # Ranks that spin take the cores from those that work: all nodes share this machine's.
        "mpi_yield_when_idle": "1",
    }
    _, major = mpirun()
    network["btl"] = "tcp,vader,self" if major < 5 else "tcp,sm,self"
    return {
        **{f"OMPI_MCA_{name}": value for name, value in network.items()},
        "PRTE_MCA_plm_ssh_agent": agent,
        "PRTE_MCA_prte_if_include": NETWORK,
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "PRTE_ALLOW_RUN_AS_ROOT": "1",
        "PRTE_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "OMP_NUM_THREADS": "1",
        "TMPDIR": "/tmp",
    }


def words(plan: Plan, ranks: int, per_node: int | None = None) -> list[str]:
    """mpirun and its options for so many ranks, `per_node` of them on each of the first nodes."""
    each = per_node or -(-ranks // plan.nodes)
    used = -(-ranks // each)
    if used > plan.nodes:
        raise ValueError(f"{ranks} ranks, {each} per node, need {used} nodes of {plan.nodes}")
    path, major = mpirun()
    hosts = ",".join(f"{name}:{each}" for name in plan.names[:used])
    mapping = f"ppr:{each}:node" + ("" if major < 5 else ":OVERSUBSCRIBE")
    spread = ["--map-by", mapping, *(["--oversubscribe"] if major < 5 else [])]
    return [path, "-n", str(ranks), "-H", hosts, *spread, "--bind-to", "none"]
