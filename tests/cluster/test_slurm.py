"""Jobs that `hpctrain submit` writes, under a real SLURM on four nodes."""

from __future__ import annotations

import json
import time

import pytest

from tests.cluster.cluster import Cluster
from tests.cluster.conftest import SWITCHES, Site, last_step, reach, status
from tests.cluster.slurm import Slurm
from tests.recorded import losses

STEPS = 60
FOUR = ("--nodes", "4", "--time", "10m")


@pytest.fixture(scope="session")
def expected(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """Losses of the same run on the same ranks, started by mpirun and never interrupted."""
    site = Site(tmp_path_factory.mktemp("expected"), None)
    command = ["hpctrain", "train", site.config(STEPS), "--out", "run"]
    cluster.run(command, ranks=4, per_node=1, cwd=site.folder, extra=site.environment)
    found = losses(site.folder / "run")
    assert len(found) == STEPS
    return found


def at_once(slurm: Slurm, job: str) -> None:
    """A requeued job may start soon: SLURM otherwise holds it back for two minutes.

    In the second in which they ended it, the nodes take the same job for a revoked one.
    """
    slurm.wait(job, ["PENDING"])
    time.sleep(3)
    slurm.call("scontrol", "update", f"JobId={job}", "StartTime=now")


@pytest.mark.parametrize("launcher", ["srun", "mpirun"])
def test_a_job_of_four_nodes_completes(
    launcher: str, site: Site, slurm: Slurm, expected: dict[int, float]
) -> None:
    job = site.submit(site.config(STEPS), *FOUR, "--launcher", launcher)
    table = slurm.wait(job)
    assert table["JobState"] == "COMPLETED", site.log("runs/job", job)
    assert table["NumNodes"] == "4"
    assert losses(site.folder / "runs/job") == expected


@pytest.mark.smoke
@pytest.mark.parametrize("launcher", ["srun", "mpirun"])
def test_a_stopped_job_is_requeued_and_ends_with_the_same_losses(
    launcher: str, site: Site, slurm: Slurm, expected: dict[int, float]
) -> None:
    run = site.folder / "runs/job"
    job = site.submit(site.config(STEPS, 0.1), *FOUR, "--launcher", launcher)
    reach(slurm, job, run, 8)
    # What SLURM itself sends when --signal says so: to the steps, or with B: to the script.
    slurm.call("scancel", *(["--batch"] if launcher == "mpirun" else []), "--signal=USR1", job)
    at_once(slurm, job)
    table = slurm.wait(job)
    assert table["JobState"] == "COMPLETED", site.log("runs/job", job)
    assert table["Restarts"] == "1"
    log = site.log("runs/job", job)
    assert "attempt 1 ended with 75" in log
    assert "attempt 2 ended with 0" in log
    assert losses(run) == expected


def test_a_job_at_its_time_limit_saves_in_time_and_is_chained(site: Site, slurm: Slurm) -> None:
    """One minute is the shortest limit that SLURM has; nothing here tells the job to stop."""
    run = site.folder / "runs/job"
    config = site.config(140, 0.5)
    first = site.submit(config, "--nodes", "4", "--time", "1m", "--after-stop", "chain")
    table = slurm.wait(first)
    assert (table["JobState"], table["ExitCode"]) == ("FAILED", "75:0"), site.log("runs/job", first)
    stopped_at = last_step(run)
    assert 20 < stopped_at < 140
    second = str(int(first) + 1)
    assert slurm.wait(second)["JobState"] in ("COMPLETED", "FAILED")
    while status(run)["state"] != "complete":
        second = str(int(second) + 1)
        slurm.wait(second)
    reference = Site(site.folder / "reference", None)
    reference.folder.mkdir()
    slurm.cluster.run(
        ["hpctrain", "train", reference.config(140), "--out", "run"],
        ranks=4, per_node=1, cwd=reference.folder, extra=site.environment,
    )  # fmt: skip
    assert losses(run) == losses(reference.folder / "run")


def test_killed_ranks_fail_the_job_promptly_and_the_requeued_one_resumes(
    site: Site, slurm: Slurm, expected: dict[int, float]
) -> None:
    run = site.folder / "runs/job"
    job = site.submit(site.config(STEPS, 0.1), *FOUR)
    reach(slurm, job, run, 25)
    start = time.monotonic()
    slurm.cluster.on("node3", ["pkill", "-KILL", "-f", "hpctrain train"])
    slurm.wait(job, ["PENDING", "COMPLETING"])
    assert time.monotonic() - start < 20, "a job without one of its ranks has to end at once"
    at_once(slurm, job)
    assert slurm.wait(job)["JobState"] == "COMPLETED", site.log("runs/job", job)
    assert losses(run) == expected
    assert "continues after step 20 from step-00000020" in site.log("runs/job", job)


def test_a_lost_node_requeues_the_job_and_it_resumes(
    site: Site, slurm: Slurm, expected: dict[int, float]
) -> None:
    run = site.folder / "runs/job"
    job = site.submit(site.config(STEPS, 0.1), *FOUR)
    reach(slurm, job, run, 25)
    slurm.cluster.kill_node("node4")
    slurm.wait(job, ["PENDING"], timeout_s=90)
    slurm.cluster.start_node("node4")
    slurm.start_slurmd("node4")
    at_once(slurm, job)
    assert slurm.wait(job)["JobState"] == "COMPLETED", site.log("runs/job", job)
    assert losses(run) == expected


def test_scancel_ends_everything(site: Site, slurm: Slurm) -> None:
    run = site.folder / "runs/job"
    job = site.submit(site.config(2000, 0.1), *FOUR)
    reach(slurm, job, run, 5)
    slurm.call("scancel", job)
    assert slurm.wait(job)["JobState"] == "CANCELLED"
    until = time.monotonic() + 20
    for node in slurm.cluster.plan.names:
        while "hpctrain train" in slurm.cluster.on(node, ["ps", "axww"]):
            assert time.monotonic() < until, f"ranks are left on {node}"
            time.sleep(0.2)
    assert "queue" not in slurm.call("squeue", "-h")
    # srun gives ranks the whole KillWait, so they save even then.
    assert status(run)["state"] == "stopped"


def test_seeds_are_an_array_with_a_run_each(site: Site, slurm: Slurm) -> None:
    job = site.submit(
        site.config(5), "--nodes", "1", "--ranks-per-node", "2", "--time", "5m", "--seeds", "3,5"
    )
    slurm.wait(f"{job}_0")
    slurm.wait(f"{job}_1")
    runs = [losses(site.folder / f"runs/job-seed-{seed}") for seed in (3, 5)]
    assert all(len(run) == 5 for run in runs)
    assert runs[0] != runs[1]


def test_an_impossible_job_is_refused_before_it_is_queued(site: Site, slurm: Slurm) -> None:
    options = ["--scheduler", "slurm", "--nodes", "9", "--time", "5m", "--dry-run"]
    command = ["hpctrain", "submit", site.config(5), *options]
    process = slurm.cluster.start(command, cwd=site.folder, stdout=-1, stderr=-2)
    out, _ = process.communicate()
    assert process.returncode == 69
    assert "--test-only" in out


def test_topology_has_the_switches_that_every_rank_proves(site: Site, slurm: Slurm) -> None:
    step = ["srun", "--mpi=pmix", "-N4", "-n8", "--ntasks-per-node=2"]
    draw = ["hpctrain", "topology", "--groups", "switch", "--json"]
    found = json.loads(slurm.call(*step, *draw, cwd=site.folder))
    assert [node["host"] for node in found["nodes"]] == slurm.cluster.plan.names
    assert [node["switches"][-1] for node in found["nodes"]] == list(SWITCHES.values())
    assert found["groups"] == [[0, 1, 2, 3], [4, 5, 6, 7]]


@pytest.mark.parametrize("by", ["slurm", "agent"])
def test_addresses_of_ranks_that_mpirun_starts(by: str, site: Site, slurm: Slurm) -> None:
    """SLURM tells mpirun's daemons where each is; those an agent starts repeat mpirun's own."""
    script = site.folder / "job.sh"
    agent = "export OMPI_MCA_plm=rsh PRTE_MCA_plm=ssh\n" if by == "agent" else ""
    start = "mpirun -n 4 --map-by ppr:1:node hpctrain topology --json"
    script.write_text(f"#!/bin/sh\n{agent}{start}\n")
    job = slurm.sbatch("-N4", "--ntasks-per-node=1", "--output=out", script.name, cwd=site.folder)
    assert slurm.wait(job)["JobState"] == "COMPLETED"
    found = json.loads((site.folder / "out").read_text())
    switches = [node["switches"] for node in found["nodes"]]
    if by == "slurm":
        assert [path[-1] for path in switches] == list(SWITCHES.values())
    else:
        assert switches == [None] * 4
        assert "node1" in found["switches_unknown"]
