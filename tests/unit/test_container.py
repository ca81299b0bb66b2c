"""`hpctrain container`: command lines, labels, refusals; the container program is a stand-in."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from hpctrain.cli import run_command_line
from hpctrain.commands.container import app
from hpctrain.errors import BackendError, UsageError
from hpctrain.launch import hybrid
from hpctrain.launch.container import (
    build_words,
    cache_settings,
    can_share,
    exec_words,
    find_program,
    gpu_flag,
)
from hpctrain.launch.hybrid import family_of, folders_of
from hpctrain.launch.image import LABEL_MPI, check_family, labels
from hpctrain.launch.recipe import checkout

ROOT = Path(__file__).resolve().parents[2]
HYDRA = "HYDRA build details:\n    Version: 5.0.2"


def program(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def says(folder: Path, name: str, text: str) -> Path:
    return program(folder, name, f"cat <<'END'\n{text}\nEND")


def stand_in(folder: Path, found: dict[str, str], name: str, version: str) -> Path:
    answer = json.dumps({"data": {"attributes": {"labels": found}}, "type": "container"})
    return program(
        folder,
        name,
        f"case $1 in\n--version) echo '{version}';;\ninspect) cat <<'END'\n{answer}\nEND\n;;\nesac",
    )


def apptainer(folder: Path, found: dict[str, str]) -> Path:
    return stand_in(folder, found, "apptainer", "apptainer version 1.4.5")


@pytest.fixture
def tools(tmp_path, monkeypatch):
    """A folder that is the whole PATH besides the system's own, and the working folder."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in ("TMPDIR", "HPCTRAIN_DATA", "APPTAINER_CACHEDIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    return folder


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "x.sif"
    path.touch()
    return path


def printed(capsys) -> list[str]:
    """The words of the command that was printed."""
    return shlex.split(capsys.readouterr().err.strip().splitlines()[-1].strip("()"))


# Words


def test_words_of_a_run():
    assert exec_words("x.sif", binds=["/a", "/b:/c:ro"], flags=["--no-home"], gpu="--nv") == [
        *["apptainer", "exec", "--sharens", "--nv", "--bind", "/a", "--bind", "/b:/c:ro"],
        *["--no-home", "x.sif"],
    ]


@pytest.mark.parametrize(
    ("program", "sharens", "expected"),
    [
        ("/usr/bin/apptainer", None, True),
        ("singularity", None, False),
        ("apptainer", False, False),
        ("singularity", True, True),
    ],
)
def test_only_apptainer_shares_namespaces(program, sharens, expected):
    assert ("--sharens" in exec_words("x", program=program, sharens=sharens)) is expected


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        ("apptainer version 1.3.0", True),
        ("apptainer version 1.10.2-1.el9", True),
        ("apptainer version 1.2.5", False),
        ("singularity-ce version 4.2.1", False),
    ],
)
def test_who_can_share(tools, version, expected):
    assert can_share(str(says(tools, "program", version))) is expected


@pytest.mark.parametrize(
    ("device", "expected"), [("nvidiactl", "--nv"), ("kfd", "--rocm"), ("sda", None)]
)
def test_devices_choose_the_gpu_flag(tmp_path, device, expected):
    (tmp_path / device).touch()
    assert gpu_flag(tmp_path) == expected


def test_cache_stays_out_of_home_unless_chosen():
    (value,) = cache_settings("/opt/bin/singularity", {"TMPDIR": "/local"}).values()
    assert value == f"/local/singularity-cache-{os.getuid()}"
    assert cache_settings("apptainer", {"APPTAINER_CACHEDIR": "/mine"}) == {}


def test_no_program_is_said(tools, monkeypatch):
    monkeypatch.setenv("PATH", str(tools))
    with pytest.raises(BackendError, match="apptainer and singularity not found"):
        find_program()
    says(tools, "singularity", "")
    assert find_program() == "singularity"


# Labels


def test_labels_are_read(tools, image):
    apptainer(tools, {LABEL_MPI: "openmpi"})
    assert labels(image) == {LABEL_MPI: "openmpi"}
    assert check_family(image, "openmpi") is None


def test_the_other_family_is_refused(tools, image):
    apptainer(tools, {LABEL_MPI: "mpich"})
    with pytest.raises(BackendError, match="N jobs of one rank") as caught:
        check_family(image, "openmpi")
    assert "--mpi openmpi" in str(caught.value)


def test_an_image_that_says_nothing_is_warned_of(tools, image):
    apptainer(tools, {})
    assert "has no label" in (check_family(image, "mpich") or "")


def test_what_cannot_be_read_is_said(tools, image):
    with pytest.raises(UsageError, match="no such image"):
        labels(image.with_name("y.sif"))
    with pytest.raises(BackendError, match="cannot be started"):
        labels(image, "apptainer-that-is-not-there")
    program(tools, "apptainer", "echo broken >&2; exit 255")
    with pytest.raises(BackendError, match="ended with 255: broken"):
        labels(image)


# The launcher


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("mpirun (Open MPI) 4.1.4", "openmpi"),
        ("prterun (PRRTE) 3.0.11", "openmpi"),
        (HYDRA, "mpich"),
        ("Intel(R) MPI Library for Linux* OS, Version 2021.11", "mpich"),
        ("something else", None),
    ],
)
def test_families_of_launchers(tools, said, expected):
    assert family_of(str(says(tools, "mpirun", said))) == expected


def test_srun_does_not_tell_and_a_missing_launcher_is_said():
    assert family_of("srun") is None
    with pytest.raises(BackendError, match="cannot be started"):
        family_of("/nowhere/mpirun")


# Folders


def test_folders_a_run_names_are_bound(tmp_path, monkeypatch):
    monkeypatch.setattr(hybrid, "ALWAYS_BOUND", ())
    for name in ("home/me/project", "data/digits", "configs", "local", "scratch"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "runs").symlink_to("scratch")
    config = tmp_path / "configs/my.toml"
    config.write_text(f'[data]\nroot = "{tmp_path}/data"\npath = "{tmp_path}/data/digits"\n')
    home = tmp_path / "home/me"
    env = {"HOME": str(home), "TMPDIR": str(tmp_path / "local")}
    words = ["train", str(config), "--out", str(tmp_path / "runs/new"), "--resume", "auto"]
    found = folders_of(words, env, home / "project")
    names = ["configs", "data", "local", "runs", "scratch"]
    assert found == [str(tmp_path / name) for name in names]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["train", "--out", "/opt/new/run"], ["/opt"]),
        (["train", "--out=/opt/new/run"], ["/opt"]),
        (["train", "--set", "data.root=/usr/share"], ["/usr/share"]),
        (["train", "--set", "data.root=/usr/share", "--out", "/usr/x"], ["/usr"]),
        (["train", "--resume", "never", "--set", "lr.base=0.1"], []),
    ],
)
def test_folders_outside_home(words, expected, tmp_path):
    assert folders_of(words, {"HOME": str(tmp_path)}, tmp_path) == expected


# Commands


def test_run_prints_the_exact_command(tools, image, capsys):
    apptainer(tools, {LABEL_MPI: "mpich"})
    says(tools, "mpirun", HYDRA)
    command = ["container", "run", str(image), "--ranks", "2", "--bind", "/usr/share", "--dry-run"]
    assert run_command_line([*command, "--", "train", "--set", "train.epochs=1"]) == 0
    words = printed(capsys)
    assert words[0].startswith("APPTAINER_CACHEDIR=/")
    assert words[1:6] == ["mpirun", "-n", "2", "apptainer", "exec"]
    assert "--sharens" in words
    assert words[words.index("/usr/share") - 1] == "--bind"
    assert words[words.index(str(image)) :] == [
        *[str(image), "hpctrain", "train", "--set", "train.epochs=1"]
    ]


def test_run_becomes_the_launcher(tools, image):
    apptainer(tools, {LABEL_MPI: "openmpi"})
    says_words = "printf '%s ' \"$@\"; exit 75"
    program(tools, "mpirun", f'case $1 in --version) echo "Open MPI";; *) {says_words};; esac')
    command = [sys.executable, "-m", "hpctrain", "container", "run", str(image), "--ranks", "3"]
    done = subprocess.run(
        [*command, "--", "train", "my config.toml"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 75, done.stderr
    assert done.stdout.startswith("-n 3 apptainer exec --sharens")
    assert "'my config.toml'" in done.stderr


def test_run_refuses_the_wrong_family(tools, image):
    apptainer(tools, {LABEL_MPI: "openmpi"})
    says(tools, "mpiexec", HYDRA)
    with pytest.raises(BackendError, match="instead of one job of N ranks"):
        app(["run", str(image), "--launcher", "mpiexec -n 2"], standalone_mode=False)


def test_run_takes_the_site_s_launcher_binds_and_variables(tools, image, capsys):
    stand_in(tools, {LABEL_MPI: "mpich"}, "singularity", "singularity-ce version 4.2.1")
    Path("cluster.toml").write_text(
        'scheduler = "slurm"\nlauncher = "srun"\nmpi = "mpich"\nsrun_mpi = "pmi2"\n'
        'container = "singularity"\nbinds = ["/opt/cray"]\ncontainer_flags = ["--no-home"]\n'
        'environment = {FI_PROVIDER = "cxi"}\n'
    )
    command = ["container", "run", str(image), "--site", "cluster.toml", "--ranks", "4"]
    assert run_command_line([*command, "--dry-run"]) == 0
    words = printed(capsys)
    assert "FI_PROVIDER=cxi" in words
    assert words[words.index("srun") :] == [
        *["srun", "--mpi=pmi2", "-n", "4", "singularity", "exec"],
        *["--bind", "/opt/cray", "--no-home", str(image), "hpctrain"],
    ]


def test_mpirun_passes_the_site_s_variables_on(tools, image, capsys):
    apptainer(tools, {LABEL_MPI: "openmpi"})
    Path("cluster.toml").write_text('scheduler = "pbs"\nenvironment = {UCX_TLS = "all"}\n')
    command = ["container", "run", str(image), "--site", "cluster.toml", "--ranks", "4"]
    assert run_command_line([*command, "--dry-run"]) == 0
    words = printed(capsys)
    assert words[words.index("mpirun") :][:5] == ["mpirun", "-n", "4", "-x", "UCX_TLS"]


def test_run_without_ranks_needs_no_launcher(tools, image, capsys):
    apptainer(tools, {LABEL_MPI: "openmpi"})
    assert run_command_line(["container", "run", str(image), "--dry-run", "--", "check"]) == 0
    words = printed(capsys)
    assert words[1:3] == ["apptainer", "exec"]
    assert words[-2:] == ["hpctrain", "check"]
    assert "--sharens" not in words


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--ranks", "2", "--launcher", "mpirun"], "not both"),
        (["--launcher", "mpirun 'x"], "No closing quotation"),
    ],
)
def test_run_refuses(tools, image, words, message):
    with pytest.raises(UsageError, match=message):
        app(["run", str(image), *words], standalone_mode=False)


def test_inspect_says_who_starts_it(tools, image, capsys):
    apptainer(tools, {LABEL_MPI: "mpich", "org.hpctrain.torch": "2.13.0"})
    assert run_command_line(["container", "inspect", str(image)]) == 0
    shown = capsys.readouterr()
    assert f"apptainer inspect --labels --json {image}" in shown.err
    assert "srun --mpi=pmi2" in shown.out
    assert "2.13.0" in shown.out


def test_build_prints_the_exact_command(tools, capsys):
    apptainer(tools, {})
    command = ["container", "build", "out.sif", "--mpi", "mpich", "--cuda", "--dry-run"]
    assert run_command_line([*command, "--build-arg", "wheels=/mnt", "--bind", "/w:/mnt"]) == 0
    words = printed(capsys)
    assert words[:2] == ["cd", str(ROOT)]
    assert words[-2:] == [str(Path("out.sif").absolute()), "containers/hpctrain-mpich.def"]
    assert "containers/cuda.args" in words
    assert "wheels=/mnt" in words
    assert "/w:/mnt" in words


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["there.sif"], "exists: remove it"),
        (["new.sif", "--build-arg", "wheels"], "write NAME=VALUE"),
        (["new.sif", "--source", "."], "no checkout of hpctrain"),
    ],
)
def test_build_refuses(tools, words, message):
    apptainer(tools, {})
    Path("there.sif").touch()
    with pytest.raises(UsageError, match=message):
        app(["build", *words], standalone_mode=False)


def test_the_own_checkout_is_found():
    assert checkout() == ROOT


def test_build_words():
    words = build_words("x.def", "x.sif", arguments=["a=b c"], flags=["--fakeroot"])
    assert words == ["apptainer", "build", "--build-arg", "a=b c", "--fakeroot", "x.sif", "x.def"]
