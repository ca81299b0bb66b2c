"""The Open MPI image on several nodes: under mpirun, and as jobs of SLURM. One node: images/."""

from __future__ import annotations

import pytest

from tests.cluster.cluster import Cluster
from tests.cluster.conftest import Site
from tests.cluster.images.build import Image, image
from tests.cluster.slurm import Slurm
from tests.recorded import losses

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
