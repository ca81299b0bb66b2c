"""`hpctrain doctor` and `hpctrain topology` under the launcher, and what they do between ranks."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from hpctrain.doctor import clocks, network, storage
from hpctrain.doctor.collect import collect
from hpctrain.doctor.report import Report
from hpctrain.doctor.run import examine, tell
from hpctrain.transport import mpi
from hpctrain.transport.communicator import Communicator
from hpctrain.transport.launcher import launch_from_environment


@pytest.mark.ranks(1, 2, 3, 4, limit_s=60)
def test_one_report_and_one_exit_code(comm: Communicator, rank_tmp_path: Path) -> None:
    mine = collect(launch_from_environment(), {}, alone=False, first_on_node=False)
    report = examine(mine, comm, mpi.facts(), rank_tmp_path)
    shown: list[Report] = []
    code = tell(comm, report, lambda made: shown.append(made) or 69)
    assert code == 69
    assert (report is not None) == (comm.rank == 0) == bool(shown)
    assert report is None or [one.rank for one in report.facts] == list(range(comm.size))


@pytest.mark.ranks(2, 3)
def test_what_is_measured(comm: Communicator, rank_tmp_path: Path) -> None:
    stored = storage.try_folder(rank_tmp_path, comm)
    assert (stored is None) == (comm.rank > 0)
    assert stored is None or (stored.blind, stored.problem) == ((), "")
    assert clocks.measure(comm) == []
    measured = network.measure(comm)
    assert [one.n_bytes for one in measured] == (list(network.SIZES_BYTES) if not comm.rank else [])
    assert all(one.size == comm.size and one.mb_per_s > 0 for one in measured)


@pytest.mark.ranks(1)
def test_doctor_prints_once(run_ranks: object, tmp_path: Path) -> None:
    done = run_ranks(2, "-m", "hpctrain", "doctor", "--out", tmp_path)  # type: ignore[operator]
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(re.findall("hpctrain .*: 2 ranks on 1 node", done.stdout)) == 1
    assert re.search(r"ok +allreduce_node +2 ranks inside a node", done.stdout)
    assert re.search(r"^fault", done.stdout, re.MULTILINE) is None


@pytest.mark.ranks(1)
def test_a_fault_ends_all_ranks_with_69(run_ranks: object) -> None:
    done = run_ranks(  # type: ignore[operator]
        2, "-m", "hpctrain", "doctor", "--json", "--out", "/proc/sys"
    )
    assert done.returncode == 69, done.stderr
    content = json.loads(done.stdout)
    faults = [one["check"] for one in content["findings"] if one["level"] == "fault"]
    assert faults == ["run_folder"]
    assert content["exit_code"] == 69
    assert "Traceback" not in done.stderr


@pytest.mark.ranks(1)
def test_a_launcher_of_another_family_is_reported(run_ranks: object, tmp_path: Path) -> None:
    """Each process believes that a launcher started three of them; MPI sees one."""
    foreign = (
        "import os, sys\n"
        "for name in [n for n in os.environ if n.startswith(('OMPI_', 'PMIX_', 'PRTE_'))]:\n"
        "    del os.environ[name]\n"
        "os.environ.update(PMI_RANK='0', PMI_SIZE='3', MPI_LOCALRANKID='0')\n"
        "os.environ.update(OMPI_ALLOW_RUN_AS_ROOT='1', OMPI_ALLOW_RUN_AS_ROOT_CONFIRM='1')\n"
        "from hpctrain.cli import run_command_line\n"
        f"sys.exit(run_command_line(['doctor', '--out', {str(tmp_path)!r}]))\n"
    )
    if mpi.facts()["mpi_library"].startswith("Open MPI"):
        done = run_ranks(1, "-c", foreign)  # type: ignore[operator]
        assert done.returncode == 69, done.stderr
        assert re.search(r"fault +launcher +MPICH's mpiexec started 3 processes", done.stdout)
        assert "MPI not started" in done.stdout


@pytest.mark.ranks(1)
def test_a_rank_that_does_not_come_ends_the_examination(run_ranks: object) -> None:
    code = (
        "import sys, time\n"
        "from hpctrain.cli import run_command_line\n"
        "from hpctrain.doctor import clocks, collect\n"
        "from hpctrain.doctor.facts import Probe\n"
        "from hpctrain.transport.launcher import launch_from_environment\n"
        "collect.probe = lambda stages: Probe()\n"
        "if launch_from_environment().rank == 1:\n"
        "    clocks.measure = lambda comm: time.sleep(60)\n"
        "sys.exit(run_command_line(['doctor', '--limit', '10']))\n"
    )
    done = run_ranks(2, "-c", code, limit_s=40)  # type: ignore[operator]
    assert done.returncode == 69, done.stderr
    assert "not done after 10 s: rank 0 was at comparing clocks" in done.stderr


@pytest.mark.ranks(1)
def test_topology_is_drawn_once(run_ranks: object) -> None:
    done = run_ranks(3, "-m", "hpctrain", "topology", "--groups", "size:2")  # type: ignore[operator]
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("3 ranks on 1 node, 2 groups") == 1
    assert "ranks 0-2  0-1 in group 0; 2 in group 1" in done.stdout
    refused = run_ranks(2, "-m", "hpctrain", "topology", "--groups", "switch")  # type: ignore[operator]
    assert refused.returncode == 2
    assert "SLURM_TOPOLOGY_ADDR" in refused.stderr
