"""The checks of `hpctrain doctor`, on facts made up for the purpose."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from hpctrain.doctor import allocation, clocks, network, storage
from hpctrain.doctor.checks import judge
from hpctrain.doctor.facts import Allocation, Container, Facts, Gpus, Mpi, Probe, Space
from hpctrain.doctor.finding import Finding, fold, name_ranks, size_text, time_text, worst
from hpctrain.doctor.mounts import type_of
from hpctrain.doctor.network import Measured
from hpctrain.doctor.probe import read
from hpctrain.doctor.report import Report
from hpctrain.doctor.software import mpi_family
from hpctrain.transport.topology import Topology

OPEN_MPI = "Open MPI v5.0.11, package: Open MPI someone"
VERSIONS = {"hpctrain": "0.1.0", "python": "3.11.7", "torch": "2.6.0", "horovod": "0.28.1"}


def mpi(rank: int, size: int, **changes: Any) -> Mpi:
    said = {
        "library": OPEN_MPI,
        "standard": "3.1",
        "thread_level": "multiple",
        "mpi4py": "4.1.2",
        "allreduce": "ring",
        "loaded": "/lib/libmpi.so.40",
        "transports": ["ucx"],
    }
    return Mpi(rank=rank, size=size, **{**said, **changes})


def disk(folder: str = "/tmp", **changes: Any) -> Space:
    made = {"type": "ext4", "free_bytes": 1 << 36, "total_bytes": 1 << 37, "writable": True}
    return Space(folder=folder, **{**made, **changes})


def facts(rank: int, size: int = 1, **changes: Any) -> Facts:
    """One healthy rank of `size`, two to a node, each bound to a core of its own."""
    made: dict[str, Any] = {
        "host": f"n{rank // 2}",
        "launcher": "Open MPI's mpirun",
        "launcher_family": "openmpi",
        "launcher_size": size,
        "versions": VERSIONS,
        "processor": "a processor",
        "boot_id": f"boot-{rank // 2}",
        "user_namespace": "user:[1]",
        "cores": [rank % 2],
        "cores_of_node": 2,
        "omp_threads": 1,
        "gpus": Gpus(devices=[]),
        "memlock_bytes": -1,
        "open_files": 4096,
        "temporary": disk(),
        "shared_memory": disk("/dev/shm", type="tmpfs"),
        "mpi": mpi(rank, size),
    }
    return Facts(rank=rank, **{**made, **changes})


def pair(**of_rank_1: Any) -> list[Facts]:
    return [facts(0, 2), facts(1, 2, **of_rank_1)]


def look(ranks: list[Facts], node_of: list[int] | None = None) -> list[Finding]:
    """All findings but the good ones and the constant note on GPUs."""
    labels = node_of or [rank.rank // 2 for rank in ranks]
    topology = Topology.from_labels(labels, [rank.host for rank in ranks])
    quiet = ("ok",)
    found = [one for one in judge(ranks, topology) if one.level not in quiet]
    return [one for one in found if (one.check, one.level) != ("gpus", "note")]


def only(findings: list[Finding], check: str) -> Finding:
    assert [one.check for one in findings] == [check], findings
    return findings[0]


def test_healthy_ranks_give_nothing_to_remark() -> None:
    assert look([facts(rank, 4) for rank in range(4)]) == []


def test_words() -> None:
    assert fold([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8"
    assert (name_ranks([3]), name_ranks([0, 1])) == ("rank 3", "ranks 0-1")
    assert [size_text(n) for n in (8, 1 << 20, 3.5 * 2**40)] == ["8 B", "1 MiB", "3.5 TiB"]
    said = [time_text(s) for s in (7500, 600, 35.2, 0.0042, 12e-6)]
    assert said == ["2 h 05 min", "10 min", "35.2 s", "4.2 ms", "12 us"]
    assert worst([]) == "ok"
    assert worst([Finding("a", "warning", ""), Finding("b", "note", "")]) == "warning"


def test_facts_survive_the_journey() -> None:
    there = facts(1, 2, allocation=Allocation(scheduler="PBS", job="5[0].x", seconds_left=1.5))
    assert Facts.from_bytes(there.to_bytes()) == there


def test_a_rank_with_another_torch_is_named() -> None:
    ranks = [facts(rank, 4) for rank in range(3)]
    ranks.append(facts(3, 4, versions={**VERSIONS, "torch": "2.5.1"}))
    found = only(look(ranks), "versions")
    assert found.level == "fault"
    assert found.text == "torch: rank 3 on n1 has 2.5.1; ranks 0-2 have 2.6.0"


def test_other_differences() -> None:
    other = pair(versions={**VERSIONS, "horovod": None})
    assert only(look(other), "versions").text.endswith("rank 1 on n0 has none")
    library = only(look(pair(mpi=mpi(1, 2, library="Open MPI v4.1.4, x"))), "versions")
    assert library.values["what"] == "MPI library"
    assert only(look(pair(processor="an older one")), "processors").level == "note"


def test_launcher_and_mpi() -> None:
    assert only(look([facts(0, 1, launcher_size=4)]), "launcher").level == "warning"
    alone = facts(0, launcher_family="none", mpi=None, launcher_size=1)
    assert "mpirun" in only(look([alone]), "launcher").fix
    broken = alone.model_copy(update={"probe": Probe(problems={"mpi": "no libmpi"})})
    assert [one.check for one in look([broken])] == ["launcher", "mpi"]
    level = only(look(pair(mpi=mpi(1, 2, thread_level="funneled"))), "thread_level")
    assert "rank 1" in level.text


@pytest.mark.parametrize(
    ("text", "family"),
    [
        (OPEN_MPI, "openmpi"),
        ("/opt/mpi/lib/libmpi.so.40", "openmpi"),
        ("MPICH Version: 4.1.2", "mpich"),
        ("Intel(R) MPI Library 2021.9", "mpich"),
        ("MPI VERSION    : CRAY MPICH version 8.1.25", "mpich"),
        ("another", None),
    ],
)
def test_families(text: str, family: str | None) -> None:
    assert mpi_family(text) == family


def test_horovod() -> None:
    features = {
        "version": "0.28.1", "mpi": True, "nccl": False, "gloo": False,
        "dtypes": ["float", "half"], "mpi_library": "/lib/libmpi.so.12",
    }  # fmt: skip
    found = only(look([facts(0, probe=Probe(horovod=features))]), "horovod")
    assert found.level == "fault"
    assert "built for /lib/libmpi.so.12" in found.text
    features["mpi_library"] = "/other/libmpi.so.40"
    assert look([facts(0, probe=Probe(horovod=features))]) == []
    missing = only(look([facts(0, versions={**VERSIONS, "horovod": None})]), "horovod")
    assert (missing.level, "make horovod" in missing.fix) == ("note", True)
    crashed = read(("torch", "horovod"), '{"stage":"torch","found":{},"problem":null}\n', -11, "")
    assert "signal 11" in only(look([facts(0, probe=crashed)][:1]), "horovod").text


def test_what_a_probe_says() -> None:
    noise = 'hello\n{"stage": "torch", "found": null, "problem": "ImportError: libcuda"}\n[1]\n'
    found = read(("torch", "horovod", "mpi"), noise, 1, "Traceback\nboom")
    assert found.problems["torch"] == "ImportError: libcuda"
    assert found.problems["horovod"].endswith("boom")
    assert found.problems["mpi"] == "not tried, as horovod failed"
    assert "60 s" in read(("mpi",), "", None, "").problems["mpi"]


def test_cores() -> None:
    pinned = only(look(pair(cores=[0])), "cores")
    assert pinned.text == "ranks 0-1 on n0: all 2 bound to core 0 with 2 threads in all"
    wide = [facts(rank, 2, cores=[0, 1], omp_threads=2) for rank in range(2)]
    assert "2 ranks x 2 thread(s) on the 2 cores of n0" in only(look(wide), "cores").text
    apart = [facts(rank, 2, cores=[2 * rank, 2 * rank + 1], omp_threads=2) for rank in range(2)]
    assert look(apart) == []
    many = [facts(rank, 20, cores=[0], omp_threads=2) for rank in range(20)]
    assert look(many)[-1].text == "the same on 6 more nodes"


def gpu(taken: str | None, count: int = 2, visible: str | None = None) -> Gpus:
    return Gpus(devices=["nvidia0"], torch_count=count, taken=taken, visible=visible)


def test_gpus() -> None:
    ranks = [facts(rank, 2, gpus=gpu(f"GPU-{rank}")) for rank in range(2)]
    assert look(ranks) == []
    shared = [facts(rank, 2, gpus=gpu("GPU-0", 1, "CUDA_VISIBLE_DEVICES=0")) for rank in range(2)]
    assert only(look(shared), "gpus").text == "ranks 0-1 on n0 would compute on one GPU (GPU-0)"
    few = [facts(0, 2, gpus=gpu("GPU-0", 1)), facts(1, 2, gpus=gpu(None, 1))]
    assert "2 ranks and shows 1 GPU(s)" in only(look(few), "gpus").text
    lacking = [facts(0, 2, gpus=gpu("GPU-0")), facts(1, 2)]
    assert only(look(lacking), "gpus").level == "fault"
    boxed = facts(0, gpus=gpu(None, 0), container=Container(kind="apptainer", image="/x.sif"))
    assert "--nv" in only(look([boxed]), "gpus").fix


def test_nodes() -> None:
    uneven = only(look([facts(rank, 3) for rank in range(3)]), "nodes")
    assert "between 1 and 2" in uneven.text
    twins = [facts(0, 2), facts(1, 2, boot_id="another")]
    assert only(look(twins, [0, 1]), "nodes").text == "2 nodes call themselves n0"
    split = only(look(pair(), [0, 1]), "nodes")
    assert "--sharens" in split.fix
    half = [facts(0, 2, allocation=Allocation(scheduler="PBS", job="1", nodes=4, seconds_left=1e4))]
    assert (
        "the job has 4 nodes, the ranks run on 1" in only(look([*half, facts(1, 2)]), "nodes").text
    )


def test_node_local_limits_and_folders() -> None:
    rdma = pair(fabric=["infiniband/mlx5_0"], memlock_bytes=8 << 20)
    assert "rank 1: at most 8 MiB of locked memory" in only(look(rdma), "limits").text
    assert only(look(pair(open_files=256)), "limits").level == "warning"
    full = facts(0, temporary=disk(free_bytes=1000))
    assert "/tmp on n0: 1000 B free" in only(look([full]), "temporary").text
    assert "lustre" in only(look([facts(0, temporary=disk(type="lustre"))]), "temporary").text
    docker = facts(0, shared_memory=disk("/dev/shm", free_bytes=64 << 20))
    assert "--shm-size" in only(look([docker]), "shared_memory").fix


def test_unknown_facts_are_told() -> None:
    found = only(look(pair(unknown={"cores": "OSError: gone"}, cores=None)), "unknown")
    assert found.text == "cores is unknown (rank 1): OSError: gone"


def test_containers() -> None:
    box = Container(kind="apptainer", image="/img/a.sif", labels={"org.hpctrain.mpi": "mpich"})
    assert "made for mpich" in only(look([facts(0, container=box)]), "container").text
    outside = only(look(pair(container=box)), "container")
    assert (outside.level, outside.text[:6]) == ("fault", "rank 0")
    other = box.model_copy(update={"image": "/img/b.sif", "labels": {}})
    two = [facts(0, 2, container=box), facts(1, 2, container=other)]
    assert "different images" in only(look(two), "container").text
    apart = pair(user_namespace="user:[2]")
    assert "--sharens" in only(look(apart), "namespaces").fix
    told = [one.model_copy(update={"settings": {"UCX_TLS": "^cma,posix"}}) for one in apart]
    assert only(look(told), "namespaces").level == "note"
    leak = facts(0, container=other, user_site="/home/a/.local/lib")
    assert "PYTHONNOUSERSITE" in only(look([leak]), "user_packages").fix


def test_switches_are_told_under_slurm_only() -> None:
    def ranks(address: str) -> list[Facts]:
        return [
            facts(
                rank, 2, host=f"n{rank}",
                topology={
                    "SLURM_TOPOLOGY_ADDR": address.format(rank),
                    "SLURM_TOPOLOGY_ADDR_PATTERN": "switch.node",
                },
            )
            for rank in range(2)
        ]  # fmt: skip

    assert look(ranks("s1.n{}"), [0, 1]) == []
    inherited = only(look(ranks("s1.n0"), [0, 1]), "switches")
    assert "rank 1 on n1" in inherited.text


SLURM = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2"}


@pytest.mark.parametrize(
    ("answer", "left"),
    [("35:10\n", 2110), ("1-02:00:00\n", 93600), ("9:05\n", 545), ("UNLIMITED\n", None),
     ("", None), (None, None), ("odd\n", None)],
)  # fmt: skip
def test_time_left_by_squeue(answer: str | None, left: float | None) -> None:
    found = allocation.find(SLURM, lambda command: answer)
    assert found is not None
    assert (found.seconds_left, found.nodes) == (left, 2)


def test_time_left_by_the_environment_and_by_qstat(tmp_path: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(allocation.time, "time", lambda: 1000.0)
    found = allocation.find({**SLURM, "SLURM_JOB_END_TIME": "1300"}, lambda command: None)
    assert found is not None
    assert found.seconds_left == 300
    assert only(look([facts(0, allocation=found.model_copy(update={"nodes": 1}))]), "time_left")
    (tmp_path / "nodes").write_text("a\na\nb\n")
    job = {
        "Resource_List": {"walltime": "01:00:00"},
        "resources_used": {"walltime": "00:10:00"},
    }
    environment = {"PBS_JOBID": "5[0].pbs", "PBS_NODEFILE": str(tmp_path / "nodes")}
    found = allocation.find(environment, lambda command: json.dumps({"Jobs": {"5": job}}))
    assert found is not None
    assert (found.seconds_left, found.nodes) == (3000, 2)
    for odd in ("{}", "no json", '{"Jobs": {}}', None):
        found = allocation.find(environment, lambda command, odd=odd: odd)
        assert found is not None
        assert found.seconds_left is None
    assert allocation.find({}, lambda command: None) is None


def test_file_system_types() -> None:
    mounts = "/dev/a / ext4 rw 0 0\nsrv /my\\040disk nfs4 rw 0 0\nt /my\\040disk/tmp tmpfs rw 0 0\n"
    assert type_of(Path("/home/x"), mounts) == "ext4"
    assert type_of(Path("/my disk/x"), mounts) == "nfs4"
    assert type_of(Path("/my disk/tmp"), mounts) == "tmpfs"
    assert type_of(Path("/my diskette"), mounts) == "ext4"
    assert type_of(Path("/x"), "") is None


@pytest.mark.parametrize(
    ("changes", "level", "said"),
    [
        ({}, "ok", "seen by all 2 nodes; write + fsync + rename: 4 KiB 1 ms, 4 MiB 20 ms"),
        ({"blind": ("n1",)}, "fault", "not seen on n1"),
        ({"problem": "cannot be written: Read-only file system"}, "fault", "Read-only"),
        ({"type": "tmpfs"}, "warning", "tmpfs"),
        ({"type": "overlay"}, "warning", "overlay"),
        ({"free_bytes": 1000}, "warning", "1000 B free"),
        ({"big_s": 2.0}, "warning", "4 MiB 2 s"),
    ],
)
def test_run_folder(changes: dict[str, Any], level: str, said: str) -> None:
    made: dict[str, Any] = {
        "folder": "/scratch", "problem": "", "type": "lustre", "free_bytes": 1 << 40,
        "small_s": 0.001, "big_s": 0.02, "blind": (), "n_nodes": 2,
    }  # fmt: skip
    found = only(list(storage.check(storage.Stored(**{**made, **changes}))), "run_folder")
    assert found.level == level
    assert said in found.text
    assert bool(found.fix) == (level != "ok")


def test_clocks() -> None:
    near = only(list(clocks.check([clocks.Clock("n1", 1e-4, 1e-4)])), "clocks")
    assert near.text == "the nodes agree within 200 us"
    far = only(list(clocks.check([clocks.Clock("n1", -3.0, 1e-4)])), "clocks")
    assert (far.level, far.text) == ("warning", "n1 is 3 s behind rank 0's node")


def timed(scope: str, big_s: float, call_s: float = 1e-5, **changes: Any) -> list[Measured]:
    made = {"scope": scope, "host": "n0", "size": 4, "algorithm": "ring", "carried": {}}
    seconds = dict(zip(network.SIZES_BYTES, (call_s, big_s / 4, big_s), strict=True))
    return [Measured(n_bytes=n, seconds=s, **{**made, **changes}) for n, s in seconds.items()]


def test_bandwidth() -> None:
    ranks = [facts(0, 4)]
    good = only(list(network.check(timed("node", 0.001), ranks)), "allreduce_node")
    assert good.text == "4 ranks inside a node: 1 MiB 6.29 GB/s, 4 MiB 6.29 GB/s, 8 B in 10 us"
    assert good.values["bus_mb_per_s"]["4194304"] == 6291.5
    slow = timed("node", 0.002, host="n9")
    both = only(list(network.check([*timed("node", 0.001), *slow], ranks)), "allreduce_node")
    assert "(slowest of 2: n9)" in both.text
    crowded = only(list(network.check(timed("node", 0.1, call_s=0.02), ranks)), "allreduce_node")
    assert crowded.level == "warning"
    link = only(list(network.check(timed("cross", 0.06), ranks)), "allreduce_cross")
    assert (link.level, "105 MB/s" in link.text) == ("ok", True)
    unused = [facts(0, 4, fabric=["cxi/cxi0"])]
    assert "cxi0" in only(list(network.check(timed("cross", 0.06), unused)), "allreduce_cross").fix


def test_transport() -> None:
    told = [facts(0, 4, settings={"OMPI_MCA_pml": "ob1"})]
    measured = [*timed("node", 0.001), *timed("cross", 0.06, carried={"eth0": 1.02})]
    found = list(network.transport(measured, told))
    assert found[0].text == (
        "inside a node through shared memory; between nodes over eth0 (kernel TCP); "
        "set: OMPI_MCA_pml=ob1; in memory: ucx"
    )
    assert found[1].text == "all-reduce: ring"


def test_report_for_people_and_programs() -> None:
    ranks = (facts(0),)
    long = Finding("a_check", "fault", "words " * 30, "do this", {"n": 1})
    report = Report(Topology((0,), ("n0",)), ranks, (Finding("b", "ok", "fine"), long))
    stream = io.StringIO()
    report.show(Console(file=stream, width=80, color_system=None))
    lines = stream.getvalue().splitlines()
    assert lines[0] == "hpctrain 0.1.0: 1 rank on 1 node"
    assert lines[2] == "ok       b        fine"
    assert lines[3].startswith("fault    a_check  words words")
    assert lines[-3] == "                  -> do this"
    assert lines[-1] == "1 fault"
    assert max(map(len, lines)) <= 80
    content = json.loads(report.to_json())
    assert (content["level"], content["exit_code"], report.exit_code) == ("fault", 69, 69)
    assert content["findings"][1]["values"] == {"n": 1}
    assert content["facts"][0]["host"] == "n0"
