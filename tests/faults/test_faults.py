"""What can go wrong with a job, what happens, and that nothing is lost."""

from __future__ import annotations

import json
import os
import pickle
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hpctrain.runs import report
from tests.faults.conftest import HPCTRAIN, ROOT, Jobs, wait_for_step
from tests.recorded import lines, losses

SLOW = '[model]\nkind = "misbehaving:calm"\n[model.args]\nsleep_s = 0.05\njitter_s = 0.005\n'


def checkpoints(run: Path) -> list[int]:
    folders = (run / "checkpoints").glob("step-*")
    return sorted(int(path.name.split("-")[1]) for path in folders if ".tmp" not in path.name)


def assert_continues_exactly(jobs: Jobs, run: Path, config: str, undisturbed: Path) -> None:
    """Resume `run` to its end: every step recorded once, losses equal an undisturbed run's."""
    job = jobs.start(2, "--out", str(run), "--resume", "auto", config=config)
    assert job.wait() == 0, job.text()
    steps = [line["step"] for line in lines(run)]
    assert steps == list(range(1, len(steps) + 1))
    assert losses(run) == losses(undisturbed)


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that all interrupted ones must equal bit by bit: 2 ranks, dropout, Horovod."""
    jobs = Jobs(tmp_path_factory.mktemp("undisturbed"))
    job = jobs.start(2, "--out", str(jobs.folder / "run"), config=SLOW)
    assert job.wait() == 0, job.text()
    return jobs.folder / "run"


@pytest.mark.parametrize("how", ["usr1", "stop command", "walltime", "term to a rank"])
def test_asked_to_stop_saves_exits_75_and_continues_bitwise(jobs, undisturbed, how):
    run = jobs.folder / "run"
    more = ["--walltime", "12s"] if how == "walltime" else []
    config = SLOW.replace("0.05", "1.0") if how == "walltime" else SLOW
    job = jobs.start(2, "--out", str(run), *more, config=config)
    if how != "walltime":
        wait_for_step(run, 4, job)
    if how == "usr1":
        job.process.send_signal(signal.SIGUSR1)
    elif how == "term to a rank":
        os.kill(job.ranks()[0], signal.SIGTERM)
    elif how == "stop command":
        report.stop(run)
    assert job.wait() == 75, job.text()
    stopped_at = checkpoints(run)[-1]
    assert max(losses(run)) == stopped_at
    assert json.loads((run / "status.json").read_text())["state"] == "stopped"
    assert_continues_exactly(jobs, run, SLOW, undisturbed)


def test_killed_rank_ends_the_job_and_resume_loses_no_step(jobs, undisturbed):
    run = jobs.folder / "run"
    config = SLOW + "[checkpoint]\nevery_steps = 5\n"
    job = jobs.start(2, "--out", str(run), config=config)
    wait_for_step(run, 9, job)
    os.kill(job.ranks()[1], signal.SIGKILL)
    assert job.wait(20) != 0
    assert checkpoints(run)[-1] >= 5
    assert_continues_exactly(jobs, run, config, undisturbed)


@pytest.mark.parametrize("asynchronous", [False, True], ids=["meeting", "asynchronous"])
def test_killed_replica_ends_the_job_and_resume_goes_on(jobs, asynchronous):
    run = jobs.folder / "run"
    rule = '[[sync]]\nkind = "leader"\nevery = 4\n' + "asynchronous = true\n" * asynchronous
    config = SLOW + '[checkpoint]\nevery_steps = 5\n[exchange]\nkind = "none"\n' + rule
    longer = ("--set", "train.epochs=8")  # replicas hear from each other every 16 steps
    job = jobs.start(2, "--out", str(run), *longer, config=config)
    wait_for_step(run, 32, job)
    os.kill(job.ranks()[1], signal.SIGKILL)
    assert job.wait(20) != 0
    saved = checkpoints(run)[-1]
    job = jobs.start(2, "--out", str(run), "--resume", "auto", *longer, config=config)
    assert job.wait() == 0, job.text()
    assert saved >= 5
    assert min(line["step"] for line in lines(run) if line["attempt"] == 2) > saved
    assert json.loads((run / "status.json").read_text())["state"] == "complete"


def test_exception_on_one_rank_is_told_once_and_ends_all(jobs):
    job = jobs.start(3, config='[model]\nkind = "misbehaving:raises"\n')
    assert job.wait(60) == 70, job.text()
    text = job.err.read_text()
    assert text.count("RuntimeError: planted: the fifth step of rank 1") == 1
    assert "rank 1/3" in text


def test_rank_that_exits_alone_ends_all(jobs):
    job = jobs.start(2, config='[model]\nkind = "misbehaving:exits"\n')
    assert job.wait(60) == 3, job.text()


def test_loss_that_is_not_finite_stops_before_the_update(jobs):
    run = jobs.folder / "run"
    config = '[model]\nkind = "misbehaving:not_a_number"\n[checkpoint]\nevery_steps = 2\n'
    job = jobs.start(3, "--out", str(run), config=config)
    assert job.wait(60) == 70
    text = job.err.read_text()
    assert text.count("is inf or NaN on rank(s) [1]") == 1, text
    assert max(losses(run)) == 4
    assert checkpoints(run)[-1] in (2, 4), "4 waits if 2 was still under way"
    assert json.loads((run / "status.json").read_text())["state"] == "failed"


@pytest.mark.parametrize("backend", ["horovod", "mpi"])
def test_stalled_rank_is_named_and_ends_the_job(jobs, backend):
    config = (
        f'[model]\nkind = "misbehaving:hangs"\n[exchange]\ndense_backend = "{backend}"\n'
        "[watchdog]\nheartbeat_s = 0.2\nwarn_s = 4\nabort_s = 8\n"
    )
    job = jobs.start(3, config=config)
    assert job.wait(60) == 70, job.text()
    text = job.err.read_text()
    assert "rank 1" in text, text
    assert "ranks 0, 2" in text or "rank(s) 0, 2" in text or "ranks [0, 2]" in text, text
    assert "body." in text, "the bucket's tensors are named"


@pytest.mark.parametrize("on_error", ["continue", "stop"])
def test_full_disk_keeps_the_previous_checkpoint(jobs, undisturbed, on_error):
    run = jobs.folder / "run"
    config = SLOW + f'[checkpoint]\nevery_steps = 4\nat_end = false\non_error = "{on_error}"\n'
    job = jobs.start(2, "--out", str(run), config=config)
    wait_for_step(run, 6, job)
    wait_until(lambda: 4 in checkpoints(run))
    for pid in job.ranks():  # from now on no file may grow beyond 4 kB: the next save fails
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (4096, 4096))
    code = job.wait()
    assert "checkpoint" in job.text()
    assert 4 in checkpoints(run)
    # "continue" trains to the end; that the record's last lines found no room is told at the end.
    assert code == 73, job.text()
    assert ("step 29" in job.text() or "step 30" in job.text()) == (on_error == "continue")
    if on_error == "stop":
        assert_continues_exactly(jobs, run, SLOW, undisturbed)


def wait_until(condition, limit_s: float = 20) -> None:
    until = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)


def test_damaged_newest_checkpoint_falls_back_to_the_older(jobs, undisturbed):
    run = jobs.folder / "run"
    config = SLOW + "[checkpoint]\nevery_steps = 4\nkeep = 3\n"
    job = jobs.start(2, "--out", str(run), config=config)
    wait_for_step(run, 10, job)
    job.process.send_signal(signal.SIGUSR1)
    assert job.wait() == 75
    newest = run / "checkpoints" / f"step-{checkpoints(run)[-1]:08d}" / "replicated.safetensors"
    data = bytearray(newest.read_bytes())
    data[-1] ^= 1
    newest.write_bytes(data)
    job = jobs.start(2, "--out", str(run), "--resume", "auto", config=config)
    assert job.wait() == 0
    assert "sha256" in job.text()
    assert str(newest.parent.name) in job.text()
    assert losses(run) == losses(undisturbed)


class Malicious:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return (Path.touch, (self.target,))


def test_pickle_in_a_checkpoint_is_refused_and_not_run(jobs):
    run = jobs.folder / "run"
    assert jobs.start(1, "--out", str(run), "--set", "train.epochs=0.2").wait() == 0
    folder = run / "checkpoints" / f"step-{checkpoints(run)[-1]:08d}"
    planted = jobs.folder / "executed"
    (folder / "optimizer.pt").write_bytes(pickle.dumps(Malicious(planted)))
    job = jobs.start(1, "--out", str(run), "--resume", "auto")
    assert job.wait() != 0
    assert "pickle" in job.text()
    assert not planted.exists()


def test_another_number_of_ranks_continues_the_same_samples(jobs):
    run, whole = jobs.folder / "run", jobs.folder / "whole"
    config = '[model]\nkind = "misbehaving:regular"\n[train]\ndtype = "float64"\n'
    assert jobs.start(2, "--out", str(whole), config=config).wait() == 0
    for ranks, stop in ((3, 6), (1, 16), (2, None)):
        job = jobs.start(ranks, "--out", str(run), "--resume", "auto", config=config)
        if stop:
            wait_for_step(run, stop, job)
            job.process.send_signal(signal.SIGUSR1)
            assert job.wait() == 75, job.text()
        else:
            assert job.wait() == 0
    expected, found = losses(whole), losses(run)
    assert found.keys() == expected.keys()
    for step, loss in expected.items():
        assert found[step] == pytest.approx(loss, rel=1e-10)


def test_existing_run_is_not_overwritten(jobs):
    run = jobs.folder / "run"
    assert jobs.start(1, "--out", str(run), "--set", "train.epochs=0.2").wait() == 0
    before = (run / "metrics.jsonl").read_bytes()
    job = jobs.start(2, "--out", str(run))
    assert job.wait() == 2
    assert "--resume auto" in job.text()
    assert (run / "metrics.jsonl").read_bytes() == before
    # Continued without a configuration, a run takes the one it was started with.
    job = jobs.command(1, "train", "--resume", str(run))
    assert job.wait() == 0, job.text()
    assert "misbehaving:calm" in job.text()


def test_complaints_come_once_and_before_any_communication(jobs):
    job = jobs.start(3, "--set", "batch.batch_globl=3")
    assert job.wait() == 78
    assert job.text().count("batch_globl") == 1
    job = jobs.command(3, "train", "--walltme", "3")
    assert job.wait() == 2
    assert job.text().count("walltme") == 1
    job = jobs.command(3, "--help")
    assert job.wait() == 0
    assert job.text().count("Examples:") == 1


def test_a_slow_rank_0_is_heard_and_so_is_a_rank_that_complains_alone(jobs):
    slow_rank_0 = 'test "$OMPI_COMM_WORLD_RANK" != 0 || sleep 2; exec "$@" --walltme 3'
    job = jobs.run(2, "bash", "-c", slow_rank_0, "slow", *HPCTRAIN)
    assert job.wait() == 2
    assert job.text().count("walltme") == 1
    only_rank_1 = 'test "$OMPI_COMM_WORLD_RANK" = 0 || set -- "$@" --walltme; exec "$@"'
    job = jobs.run(2, "bash", "-c", only_rank_1, "alone", *HPCTRAIN)
    assert job.wait() == 2
    assert "[rank 1 " in job.text()
    assert job.text().count("walltme") == 1


def test_missing_and_damaged_data_exit_65_once(jobs):
    config = '[data]\nkind = "idx"\nfolder = "nowhere"\n[model]\nkind = "cnn"\n'
    job = jobs.start(2, config=config)
    assert job.wait() == 65
    assert job.text().count("the train images not found") == 1
    assert "nowhere" in job.text()


def test_launcher_of_another_mpi_is_refused(tmp_path):
    # What each of two processes sees when MPICH's mpiexec starts a Python whose MPI is Open MPI.
    variables = {"PMI_RANK": "0", "PMI_SIZE": "2", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "hpctrain", "--out", str(tmp_path / "run")],
        capture_output=True, text=True, check=False, env=os.environ | variables,
    )  # fmt: skip
    assert done.returncode == 69, done.stderr
    assert "started 2 processes" in done.stderr
    assert not (tmp_path / "run").exists()


def test_output_of_a_batch_job_has_no_escape_codes(jobs):
    job = jobs.start(2, "--set", "train.epochs=1", LC_ALL="C")
    assert job.wait() == 0
    text = job.text()
    assert "\x1b" not in text
    assert "\r" not in text
    assert text.isascii()


def test_python_examples_of_the_documentation_run():
    plain = subprocess.run(
        [sys.executable, ROOT / "docs/examples/plain.py"],
        capture_output=True,
        text=True,
        check=True,
    )
    launched = subprocess.run(
        [ROOT / "tools/launch", "2", "--", sys.executable, ROOT / "docs/examples/attached.py"],
        capture_output=True, text=True, check=True, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    accuracies = [float(text.stdout.split()[-1]) for text in (plain, launched)]
    assert accuracies[0] > 0.85
    assert abs(accuracies[0] - accuracies[1]) < 0.03
