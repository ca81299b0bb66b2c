"""The runner of tests/ranks (its conftest.py), on small test files of its own, with 2 ranks."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HEAD = """
import os
import time
import pytest
from mpi4py import MPI

world = MPI.COMM_WORLD
"""


@pytest.fixture
def run_tests(tmp_path, run_ranks):
    """Run test code as 2 ranks (or as many as asked for) under the runner."""

    def run(code, ranks=2, options=()):
        shutil.copy(ROOT / "tests" / "ranks" / "conftest.py", tmp_path)
        (tmp_path / "test_sample.py").write_text(HEAD + code)
        config = [
            "--color=no",
            "-c",
            ROOT / "pyproject.toml",
            "--rootdir",
            tmp_path,
            "-p",
            "no:cacheprovider",
        ]
        return run_ranks(ranks, "-m", "pytest", *config, *options, tmp_path)

    return run


def test_passing_tests_are_reported_once(run_tests):
    done = run_tests("""
def test_sum(comm, rank_tmp_path):
    assert world.allreduce(1) == comm.size == 2
    (rank_tmp_path / str(comm.rank)).write_text("here")
    comm.barrier()
    assert sorted(p.name for p in rank_tmp_path.iterdir()) == ["0", "1"]
""")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("1 passed") == 1
    assert done.stdout.count("test session starts") == 1
    assert "ranks: 2" in done.stdout


def test_failure_of_one_rank_is_reported_by_rank_0_and_the_next_test_runs(run_tests):
    done = run_tests("""
def test_uneven():
    assert world.rank == 0, "only on rank one"

def test_next():
    assert world.allreduce(1) == 2
""")
    assert done.returncode == 1
    assert "failed on rank(s) [1]" in done.stdout
    assert "1 failed, 1 passed" in done.stdout
    assert "[rank 1] E       AssertionError: only on rank one" in done.stderr
    assert "[rank 0]" not in done.stderr


def test_failure_of_all_ranks_fails_once(run_tests):
    done = run_tests("""
def test_all():
    print("said before")
    assert world.rank == 7
""")
    assert done.returncode == 1
    assert "failed on rank(s) [0, 1]" in done.stdout
    assert "1 failed in" in done.stdout
    assert "[rank 1] said before" in done.stderr


def test_exception_before_a_barrier_ends_all_ranks_with_both_places(run_tests):
    started = time.monotonic()
    done = run_tests("""
@pytest.mark.ranks(2, grace_s=1)
def test_barrier():
    if world.rank == 1:
        raise RuntimeError("never came")
    world.Barrier()  # rank 0 waits here
""")
    assert done.returncode == 1
    assert "[rank 1] E           RuntimeError: never came" in done.stderr
    assert "failed on rank(s) [1]; rank(s) [0] did not come out of it within 1 s" in done.stderr
    assert "stacks of rank 0" in done.stderr
    assert "in test_barrier" in done.stderr
    assert time.monotonic() - started < 30


def test_deadlock_ends_at_the_limit_with_every_rank_s_stack(run_tests):
    done = run_tests("""
@pytest.mark.ranks(2, limit_s=2)
def test_stuck():
    world.recv(source=1 - world.rank)
""")
    assert done.returncode == 99
    for rank in range(2):
        assert f"[rank {rank}] test_sample.py::test_stuck: not done after 2 s" in done.stderr
    assert done.stderr.count("in test_stuck") == 2


def test_skip_on_one_rank_is_a_failure(run_tests):
    done = run_tests("""
def test_uneven():
    if world.rank == 1:
        pytest.skip("not here")

@pytest.mark.xfail(reason="known")
def test_known():
    assert False

def test_all_skip():
    pytest.skip("nowhere")
""")
    assert done.returncode == 1
    assert "skipped on rank(s) [1] but run on rank(s) [0]" in done.stdout
    assert "1 failed, 1 skipped, 1 xfailed" in done.stdout


def test_failure_in_a_fixture_of_one_rank(run_tests):
    done = run_tests("""
@pytest.fixture
def folder():
    yield 1
    assert world.rank == 0, "no clean-up"

def test_it(folder):
    pass

def test_next():
    assert world.allreduce(1) == 2
""")
    assert done.returncode == 1
    assert "failed on rank(s) [1]" in done.stdout
    assert "no clean-up" in done.stderr


def test_collection_error_on_one_rank_fails_all(run_tests):
    done = run_tests("""
if world.rank == 1:
    import no_such_module

def test_it():
    world.Barrier()
""")
    assert done.returncode == 2, done.stdout + done.stderr
    assert "No module named 'no_such_module'" in done.stdout
    assert "1 error" in done.stdout


def test_ranks_that_collect_different_tests_fail(run_tests):
    done = run_tests("""
if world.rank == 1:
    def test_extra():
        pass

def test_it():
    world.Barrier()
""")
    assert done.returncode == 2
    assert "collected other tests than rank 0" in done.stdout


def test_marker_selects_launch_sizes(run_tests):
    code = """
@pytest.mark.ranks(1, 3)
def test_odd():
    assert world.size in (1, 3)

@pytest.mark.ranks(3)
def test_three():
    assert world.size == 3
"""
    done = run_tests(code, ranks=2)
    assert done.returncode == 0
    assert "2 deselected" in done.stdout
    done = run_tests(code, ranks=3)
    assert done.returncode == 0
    assert "2 passed" in done.stdout
    done = run_tests(code, ranks=1)
    assert "1 passed, 1 deselected" in done.stdout
    done = run_tests("", ranks=2)
    assert done.returncode == 5  # a folder without any test is not taken for a success


def test_internal_error_on_one_rank_ends_all(run_tests, tmp_path):
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "conftest.py").write_text(
        f"""{HEAD}
def pytest_collection_modifyitems():
    assert world.rank == 0, "a broken plugin"
"""
    )
    (tmp_path / "inner" / "test_inner.py").write_text("def test_it(): pass")
    done = run_tests("def test_sample(): pass")
    assert done.returncode == 99
    assert "(an internal error?); all ranks end" in done.stderr


def test_leaving_the_session_on_one_rank_ends_all(run_tests):
    done = run_tests("""
def test_leave():
    if world.rank == 1:
        pytest.exit("enough")
    world.Barrier()
""")
    assert done.returncode == 1
    assert "all ranks end" in done.stderr
