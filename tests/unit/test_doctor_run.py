"""`hpctrain doctor` as a whole: alone, among threads, and its exit code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, outside_any_launch
from test_doctor import facts

from hpctrain.cli import run_command_line
from hpctrain.doctor import clocks, collect, network, storage
from hpctrain.doctor.report import Report
from hpctrain.doctor.run import examine, examine_alone, tell
from hpctrain.doctor.survey import survey
from hpctrain.errors import BackendError
from hpctrain.transport.communicator import Communicator
from hpctrain.transport.launcher import launch_from_environment
from hpctrain.transport.threads import run_threads

SAID = {
    "mpi_library": "Open MPI v5.0.11, x",
    "mpi_standard": "3.1",
    "mpi_thread_level": "multiple",
    "mpi4py": "4.1.2",
    "allreduce": "ring",
}


def test_alone_it_examines_this_process_and_survives_a_crash_of_mpi(tmp_path: Path) -> None:
    """MPI is loaded by a child, never started; here the library ends that child."""
    hidden = tmp_path / "modules" / "mpi4py"
    hidden.mkdir(parents=True)
    (hidden / "__init__.py").write_text("import os\nos.abort()\n")
    folder = tmp_path / "work"
    folder.mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "hpctrain", "doctor", "--json", "--out", str(folder / "runs")],
        env={**outside_any_launch(), "PYTHONPATH": str(hidden.parent)},
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    content = json.loads(done.stdout)
    found = {finding["check"]: finding for finding in content["findings"]}
    assert {"launcher", "torch", "versions", "cores", "run_folder"} <= set(found)
    assert (found["mpi"]["level"], "signal 6" in found["mpi"]["text"]) == ("warning", True)
    assert content["facts"][0]["mpi"] is None
    assert list(folder.iterdir()) == []


def test_wrong_options() -> None:
    assert run_command_line(["doctor", "--limit", "soon"]) == 2
    assert run_command_line(["topology", "--groups", "rack"]) == 2


def test_topology_alone_loads_no_mpi() -> None:
    code = (
        "import sys\n"
        "from hpctrain.cli import run_command_line\n"
        "assert run_command_line(['topology']) == 0\n"
        "assert not {'mpi4py', 'torch', 'horovod'} & set(sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=outside_any_launch(), capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "1 rank on 1 node, 1 group" in done.stdout


def test_a_part_that_fails_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise OSError("no such device")

    monkeypatch.setattr(collect, "_fabric", fail)
    launch = launch_from_environment({})
    found = collect.collect(launch, {"OMP_NUM_THREADS": "4,2"}, alone=False, first_on_node=False)
    assert found.unknown == {"fabric": "OSError: no such device"}
    assert found.omp_threads == 4
    assert found.cores == sorted(os.sched_getaffinity(0))


def test_ranks_together(tmp_path: Path) -> None:
    """Two nodes of two threads each; ranks 0 and 1 start with other facts than they end with."""

    def body(comm: Communicator) -> tuple[Report | None, int]:
        mine = facts(comm.rank, comm.size, mpi=None)
        report = examine(mine, comm, SAID, tmp_path)
        shown: list[Report] = []
        code = tell(comm, report, lambda made: shown.append(made) or made.exit_code)
        assert len(shown) == (comm.rank == 0)
        return report, code

    results = run_threads(4, body, node_of=[0, 0, 1, 1])
    report = results[0][0]
    assert report is not None
    assert [other for other, _ in results[1:]] == [None] * 3
    assert [code for _, code in results] == [0] * 4
    checks = {finding.check for finding in report.findings}
    assert {"clocks", "run_folder", "allreduce_node", "allreduce_cross"} <= checks
    assert {"allreduce_world", "transport", "groups"} <= checks
    assert [one.rank for one in report.facts] == [0, 1, 2, 3]
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_other_nodes_do_not_see(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "_appears", lambda path: False)

    def body(comm: Communicator) -> storage.Stored | None:
        return storage.try_folder(tmp_path, comm)

    found = run_threads(3, body, node_of=[0, 0, 1])[0]
    assert found is not None
    assert found.blind == ("node0", "node1")


def test_a_folder_that_cannot_be_written_is_a_fault(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    report = examine_alone(facts(0), Path("/proc/sys/nothing"))
    assert report.exit_code == 69
    assert report.findings[-1].text.startswith("/proc/sys: cannot be written")
    assert storage.try_folder(tmp_path / "a" / "b", None).folder == str(tmp_path)


def test_a_refused_launch_is_the_first_finding(tmp_path: Path) -> None:
    problem = BackendError("4 processes, 1 rank. What to do: use another launcher")
    report = examine_alone(facts(0, mpi=None), tmp_path, problem)
    first = report.findings[0]
    assert (first.check, first.level, first.fix) == ("launcher", "fault", "use another launcher")
    assert report.exit_code == 69


def test_measures_among_threads() -> None:
    offsets = run_threads(3, clocks.measure, node_of=[0, 1, 2])
    assert [clock.host for clock in offsets[0]] == ["node1", "node2"]
    assert all(abs(clock.ahead_s) <= clock.within_s + 1e-3 for clock in offsets[0])
    assert offsets[1:] == [[], []]
    alone = run_threads(1, network.measure)
    assert alone == [[]]
    pairs = run_threads(2, network.measure, node_of=[0, 1])
    assert {one.scope for one in pairs[0]} == {"cross"}


def test_survey_among_threads() -> None:
    def body(comm: Communicator) -> str:
        host = comm.topology.hosts[comm.rank]
        told = {
            "SLURMD_NODENAME": host,
            "SLURM_TOPOLOGY_ADDR": f"s{comm.rank // 2}.{host}",
            "SLURM_TOPOLOGY_ADDR_PATTERN": "switch.node",
        }
        return survey(comm, told, "switch").to_json()

    found = run_threads(4, body, node_of=[0, 1, 2, 3])
    assert len(set(found)) == 1
    assert json.loads(found[0])["groups"] == [[0, 1], [2, 3]]
