from __future__ import annotations

import os
from pathlib import Path

import pytest

from hpctrain.transport.algorithm import (
    RING_FROM_BYTES,
    applied,
    choose,
    configuration_files,
    han_rules,
    tuned_rules,
)

OPEN_MPI_4 = "Open MPI v4.1.4, package: Debian OpenMPI, ident: 4.1.4"
OPEN_MPI_5 = "Open MPI v5.0.11, package: x, ident: 5.0.11\0"
MPICH = "MPICH Version:      5.0.2\nMPICH Release date: x"


EAGER = dict.fromkeys(
    ("OMPI_MCA_btl_tcp_eager_limit", "OMPI_MCA_btl_tcp_max_send_size"), str((2 << 20) + 4096)
)


def numbers(text: str) -> list[str]:
    return " ".join(line.partition("#")[0] for line in text.splitlines()).split()


def test_rules_leave_small_sizes_to_the_library() -> None:
    # collectives, all-reduce, sizes of communicators, from 2 ranks, sizes of messages, and then
    # from bytes, algorithm, fan-out, segment
    assert " ".join(numbers(tuned_rules(4096))) == "1 2 1 2 2 0 0 0 0 4096 4 0 0"
    assert " ".join(numbers(han_rules(4096))) == "1 allreduce 1 2 1 1 2 0 han 4096 tuned"


def test_open_mpi_gets_rules() -> None:
    four = choose(OPEN_MPI_4, {}, [])
    assert list(four.files) == ["OMPI_MCA_coll_tuned_dynamic_rules_filename"]
    assert four.variables == {"OMPI_MCA_coll_tuned_use_dynamic_rules": "1"} | EAGER
    assert "ring from 1 MiB" in four.report
    assert "Open MPI 4.1" in four.report
    five = choose(OPEN_MPI_5, {}, [])
    assert "OMPI_MCA_coll_han_dynamic_rules_filename" in five.files
    assert five.variables["OMPI_MCA_coll_han_use_dynamic_file_rules"] == "1"
    assert RING_FROM_BYTES == 1 << 20


@pytest.mark.parametrize(
    "name", ["OMPI_MCA_coll", "OMPI_MCA_coll_tuned_allreduce_algorithm", "OMPI_MCA_coll_han_x"]
)
def test_the_sites_environment_wins(name: str) -> None:
    choice = choose(OPEN_MPI_5, {name: "3"}, [])
    assert not choice.files
    assert not any("coll" in name for name in choice.variables)
    assert f"as the site set it (Open MPI 5.0: {name}=3)" in choice.report


def test_the_sites_configuration_wins(tmp_path: Path) -> None:
    path = tmp_path / "openmpi-mca-params.conf"
    path.write_text("# coll = commented\nbtl = ^openib\ncollisions = 3\n")
    assert choose(OPEN_MPI_4, {}, [path]).files
    path.write_text("btl = ^openib\n  coll_tuned_use_dynamic_rules = 1\n")
    choice = choose(OPEN_MPI_4, {}, [path])
    assert not choice.files
    assert "coll_tuned_use_dynamic_rules = 1" in choice.report
    assert str(path) in choice.report


def test_under_the_launcher_of_open_mpi_4_han_is_off() -> None:
    choice = choose(OPEN_MPI_5, {"OMPI_MCA_orte_launch": "1"}, [])
    assert choice.variables["OMPI_MCA_coll_han_priority"] == "0"
    assert list(choice.files) == ["OMPI_MCA_coll_tuned_dynamic_rules_filename"]
    assert "OMPI_MCA_coll_han_priority" not in choose(OPEN_MPI_5, {}, []).variables
    assert (
        "OMPI_MCA_coll_han_priority"
        not in choose(OPEN_MPI_4, {"OMPI_MCA_orte_launch": "1"}, []).variables
    )


def test_a_site_that_tuned_its_tcp_keeps_it(tmp_path: Path) -> None:
    name = "OMPI_MCA_btl_tcp_eager_limit"
    assert not choose(OPEN_MPI_5, {name: "65536"}, []).variables.keys() & EAGER.keys()
    path = tmp_path / "openmpi-mca-params.conf"
    path.write_text("btl_tcp_max_send_size = 262144\n")
    assert not choose(OPEN_MPI_4, {}, [path]).variables.keys() & EAGER.keys()
    path.write_text("btl_tcp_if_include = eth0\n")
    assert choose(OPEN_MPI_4, {}, [path]).variables.keys() > EAGER.keys()


def test_other_libraries_are_reported() -> None:
    assert choose(MPICH, {}, []).report == "library default (MPICH Version:      5.0.2)"
    environ = {"MPIR_CVAR_ALLREDUCE_INTRA_ALGORITHM": "ring"}
    assert "MPIR_CVAR_ALLREDUCE_INTRA_ALGORITHM=ring" in choose(MPICH, environ, []).report
    assert not choose("Open MPI v3.1.3", {}, []).files
    assert not choose("", {}, []).files


def test_nothing_remains_after_the_start() -> None:
    before = dict(os.environ)
    choice = choose(OPEN_MPI_5, {}, [])
    with applied(choice):
        path = Path(os.environ[next(iter(choice.files))])
        assert path.read_text() == tuned_rules()
        assert path.parent.stat().st_mode & 0o077 == 0
        assert all(os.environ[name] == text for name, text in choice.variables.items())
    assert not path.parent.exists()
    assert dict(os.environ) == before


def test_configuration_files_are_found(tmp_path: Path) -> None:
    library = tmp_path / "prefix" / "lib" / "libmpi.so.40"
    found = [
        tmp_path / "home" / ".openmpi" / "mca-params.conf",
        tmp_path / "prefix" / "etc" / "openmpi-mca-params.conf",
        tmp_path / "more.conf",
    ]
    for path in found:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
    environ = {
        "HOME": str(tmp_path / "home"),
        "OMPI_MCA_mca_base_param_files": f"{tmp_path}/absent.conf,{tmp_path}/more.conf",
    }
    assert configuration_files(environ, library) == found
    assert configuration_files({"HOME": str(tmp_path)}, None) == []
