"""The Open MPI image on several nodes: under mpirun, and as jobs of SLURM. One node: images/."""

from __future__ import annotations

import json
import shutil

import pytest

from tests.cluster.cluster import Cluster
from tests.cluster.conftest import ROOT, Site, reach, status
from tests.cluster.images.build import Image, image
from tests.cluster.slurm import Slurm
from tests.recorded import lines, losses

# The image is built where the cache has none of this state of the project: minutes.
pytestmark = pytest.mark.timeout(1500)
EPOCHS = ("--set", "train.epochs=2", "--set", "record.every_steps=1")


@pytest.fixture(scope="module")
def built() -> Image:
    found = image("openmpi")
    how = "reused, once built" if found.reused else "built"
    print(f"\nopenmpi: {found.size_mb:.0f} MB, {how} in {found.build_s:.0f} s")
    return found


def test_two_nodes_train_in_containers_as_they_do_outside(
    cluster: Cluster, site: Site, built: Image
) -> None:
    inside = ["apptainer", "exec", "--sharens", str(built.path)]
    found = []
    for out, prefix in (("inside", inside), ("outside", [])):
        command = [*prefix, "hpctrain", "train", "--out", out, *EPOCHS]
        text = cluster.run(command, ranks=4, per_node=2, cwd=site.folder)
        assert "4 ranks on 2 nodes (2+2)" in text
        found.append(losses(site.folder / out))
    assert len(found[0]) == 46
    assert found[0] == pytest.approx(found[1], rel=1e-4)


@pytest.mark.parametrize("launcher", ["srun", "mpirun"])
def test_a_job_with_a_container(launcher: str, slurm: Slurm, site: Site, built: Image) -> None:
    config = "digits.toml"
    (site.folder / config).write_text(slurm.call("hpctrain", "config"))
    job = site.submit(
        config, "--launcher", launcher, "--nodes", "2", "--ranks-per-node", "2", "--time", "5m",
        "--container", str(built.path), "--name", "boxed", *EPOCHS,
    )  # fmt: skip
    table = slurm.wait(job)
    log = site.log("runs/boxed", job)
    assert table["JobState"] == "COMPLETED", log
    assert "4 ranks on 2 nodes (2+2)" in log
    assert len(losses(site.folder / "runs/boxed")) == 46


def test_the_flagship_is_stopped_and_goes_on_with_half_the_ranks(
    slurm: Slurm, site: Site, built: Image
) -> None:
    """Every axis of hpctrain at once, on the digits: 4 nodes x 2 ranks, then 4 nodes x 1."""
    for name in ("flagship.toml", "fashion-cnn.toml"):
        shutil.copy(ROOT / "configs" / name, site.folder)
    run = site.folder / "runs/flagship"
    # `measure` is on, so that a machine with few cores measures as often as any other.
    settings = (
        "data.kind=digits", "model.hidden=64", "exchange.dense_below=200", "exchange.density=0.1",
        "lr.base=0.2", "lr.reference_batch=64", "lr.schedule=constant", "lr.warmup_samples=640",
        "batch.batch_global=64", "batch.batch_max=256", "batch.measure=on", "train.epochs=16",
        "evaluate.every_epochs=0", "record.every_steps=1",
        "sync=[{kind = 'leader', scope = 'world', every = 8, pull = 0.5}]",
    )  # fmt: skip
    options = ["--nodes", "4", "--time", "10m", "--container", str(built.path)]
    options += ["--after-stop", "exit", *(f"--set={text}" for text in settings)]
    job = site.submit("flagship.toml", *options, "--ranks-per-node", "2")
    reach(slurm, job, run, 48, limit_s=180)
    slurm.call("scancel", "--batch", "--signal=USR1", job)
    table, log = slurm.wait(job), site.log("runs/flagship", job)
    assert (table["JobState"], table["ExitCode"]) == ("FAILED", "75:0"), log
    assert "8 ranks on 4 nodes (2+2+2+2)" in log
    assert "2 replicas: leader over world" in log
    stopped_at = status(run)["step"]
    job = site.submit("flagship.toml", *options, "--ranks-per-node", "1")
    table, log = slurm.wait(job), site.log("runs/flagship", job)
    assert table["JobState"] == "COMPLETED", log
    assert "4 ranks on 4 nodes (1+1+1+1)" in log
    assert f"continues after step {stopped_at}" in log
    assert "written by 8 rank(s)" in log
    assert status(run)["state"] == "complete"
    assert lines(run, "eval")[-1]["accuracy"] > 0.9
    decided = [json.loads(text) for text in (run / "batch_plan.jsonl").read_text().splitlines()]
    assert any(line.get("low") for line in decided if line["step"] > stopped_at)
    assert all(64 <= line["batch_global"] <= 256 for line in decided)
    assert {line["batch_global"] for line in decided} > {64}, "it pays to grow: steps are tiny"


def test_the_wrong_family_is_refused_before_it_is_queued(
    slurm: Slurm, site: Site, built: Image
) -> None:
    profile = site.folder / "mpich.toml"
    profile.write_text('scheduler = "slurm"\nlauncher = "srun"\nmpi = "mpich"\nsrun_mpi = "pmi2"\n')
    command = ["hpctrain", "submit", "--site", profile.name, "--container", str(built.path)]
    process = slurm.cluster.start(command, cwd=site.folder, stdout=-1, stderr=-2)
    out, _ = process.communicate()
    assert process.returncode == 69
    assert "openmpi" in out
    assert not slurm.call("squeue", "-h").strip()
