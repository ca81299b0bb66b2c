"""The run folder: choice, status, and what status, stop and logs say about it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from hpctrain.errors import UsageError, WriteError
from hpctrain.runs import folder, report
from hpctrain.runs.durable import write_durably
from hpctrain.runs.folder import RunFolder, choose
from hpctrain.runs.record import Recorder
from hpctrain.runs.status import is_running, read_status

needs_permissions = pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")


@pytest.fixture
def base(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return Path("runs")


def make_run(path: Path, state: str = "stopped", checkpoint: bool = True, attempt: int = 1):
    run = RunFolder(path, attempt)
    run.begin("x = 1\n", {"hosts": ["a"]})
    if state != "running":
        run.end(state, 100, 12800, 2.5, {"stopped": 75, "complete": 0, "failed": 70}[state])
    if checkpoint:
        saved = run.checkpoints / "step-00000100"
        saved.mkdir()
        (saved / "manifest.json").write_text("{}")
    return run


def as_of(run: RunFolder, **changes) -> None:
    path = run.path / "status.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def dead_pid() -> int:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


def test_default_takes_the_next_free_number(base):
    assert choose("digits", None, "never").folder.path == base / "digits-001"
    (base / "digits-041").mkdir()
    (base / "digits-041b").mkdir()
    (base / "other-100").mkdir()
    choice = choose("digits", None, "never")
    assert choice.folder.path == base / "digits-042"
    assert not choice.resumes
    assert choice.folder.attempt == 1


def test_simultaneous_starts_get_different_folders(base):
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(choose("x", None, "never").folder.path))
        for _ in range(16)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 16


def test_out_never(base, tmp_path):
    assert choose("x", tmp_path / "a" / "b", "never").folder.path == tmp_path / "a" / "b"
    assert choose("x", tmp_path / "a" / "b", "never").note.startswith("new run"), "still empty"
    make_run(tmp_path / "a" / "b")
    with pytest.raises(UsageError, match=r"already holds a run; continue it with --resume auto"):
        choose("x", tmp_path / "a" / "b", "never")
    for other in (tmp_path / "notes", tmp_path / "notes" / "file"):
        other.mkdir(exist_ok=True) if other.name == "notes" else other.touch()
    for resume in ("never", "auto"):
        for other in (tmp_path / "notes", tmp_path / "notes" / "file"):
            with pytest.raises(UsageError, match="is no run folder"):
                choose("x", other, resume)


def test_out_auto(base, tmp_path):
    fresh = choose("x", tmp_path / "a", "auto")
    assert (fresh.resumes, fresh.folder.attempt) == (False, 1)
    make_run(tmp_path / "a", "failed", checkpoint=False)
    second = choose("x", tmp_path / "a", "auto")
    assert (second.resumes, second.folder.attempt) == (False, 2)
    make_run(tmp_path / "a", attempt=2)
    third = choose("x", tmp_path / "a", "auto")
    assert (third.resumes, third.folder.attempt) == (True, 3)
    assert "continues" in third.note
    assert "attempt 3" in third.note


def test_a_start_killed_at_once_does_not_block_its_successor(tmp_path):
    run = RunFolder(tmp_path / "a")
    run.log(0).parent.mkdir(parents=True)
    run.log(0).touch()
    assert not choose("x", run.path, "auto").resumes


def test_auto_takes_the_newest_unfinished(base):
    make_run(base / "x-001")
    make_run(base / "x-002", "failed")
    make_run(base / "x-003", "stopped", checkpoint=False)
    make_run(base / "x-004", "complete")
    make_run(base / "y-005")
    assert choose("x", None, "auto").folder.path == base / "x-002"
    as_of(RunFolder(base / "x-002"), state="complete")
    assert choose("x", None, "auto").folder.path == base / "x-001"
    as_of(RunFolder(base / "x-001"), state="complete")
    new = choose("x", None, "auto")
    assert new.folder.path == base / "x-005"
    assert "nothing unfinished" in new.note


def test_a_killed_run_is_continued_and_a_living_one_is_not(base):
    run = make_run(base / "x-001", "running")
    as_of(run, pid=dead_pid())
    assert choose("x", None, "auto").folder.path == run.path
    sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        start = int(Path(f"/proc/{sleeper.pid}/stat").read_text().rsplit(")", 1)[1].split()[19])
        as_of(run, pid=sleeper.pid, pid_start=start)
        assert choose("x", None, "auto").folder.path == base / "x-002"
        with pytest.raises(UsageError, match=r"still running \(process \d+"):
            choose("x", run.path, "auto")
        with pytest.raises(UsageError, match="hpctrain stop"):
            choose("x", None, str(run.path))
        as_of(run, pid_start=start - 1)  # the number was given to a later process
        assert choose("x", run.path, "auto").resumes
    finally:
        sleeper.kill()
        sleeper.wait()


def test_resume_of_a_named_folder(base, tmp_path):
    run = make_run(tmp_path / "a")
    assert choose("x", None, str(run.path)).resumes
    assert choose("x", run.path, str(run.path)).resumes
    with pytest.raises(UsageError, match="leave --out"):
        choose("x", tmp_path / "b", str(run.path))
    with pytest.raises(UsageError, match="not a run folder with a checkpoint"):
        choose("x", None, str(tmp_path / "absent"))


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(WriteError, match=r"file/a: Not a directory.*--out") as caught:
        choose("x", tmp_path / "file" / "a", "never")
    assert caught.value.exit_code == 73
    with pytest.raises(UsageError, match="is not a folder"):
        choose("x", None, "never", base=tmp_path / "file")
    with pytest.raises(WriteError, match="cannot write /proc/"):
        choose("x", Path("/proc/hpctrain"), "never")


@needs_permissions
def test_a_folder_without_permission(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(WriteError, match="Permission denied"):
        choose("x", None, "never", base=tmp_path / "runs")
    tmp_path.chmod(0o700)


def test_begin_writes_and_keeps_what_differed(tmp_path):
    run = RunFolder(tmp_path / "a")
    run.begin("seed = 1\n", {"ranks": 2})
    run.stop_file.touch()
    again = RunFolder.from_bytes(RunFolder(tmp_path / "a", 2).to_bytes())
    assert again.attempt == 2
    again.begin("seed = 1\n", {"ranks": 4})
    assert not run.stop_file.exists(), "an old STOP must not stop the next attempt"
    assert run.config.read_text() == "seed = 1\n"
    assert json.loads(run.environment.read_text()) == {"ranks": 4}
    assert json.loads((run.path / "env.attempt-1.json").read_text()) == {"ranks": 2}
    assert not (run.path / "config.attempt-1.toml").exists()
    assert run.log(12).name == "rank-00012.log"


def test_status_is_replaced_in_one_step_and_says_how_it_ended(tmp_path, monkeypatch):
    monkeypatch.setenv("PBS_JOBID", "12.pbs")
    run = RunFolder(tmp_path / "a")
    run.begin("", {})
    status = read_status(run.path)
    assert (status.state, status.pid, status.job_id, status.exit_code) == (
        "running", os.getpid(), "12.pbs", None,
    )  # fmt: skip
    run.running(5, 640, 0.1)
    assert read_status(run.path).step == 0, "at most every 5 s"
    run.end("stopped", 7, 896, 0.2, 75)
    status = read_status(run.path)
    assert (status.state, status.step, status.samples, status.exit_code) == ("stopped", 7, 896, 75)
    assert is_running(status) is False
    RunFolder(tmp_path / "a", 2).begin("", {})
    assert read_status(run.path).step == 7, "until the next attempt knows better"
    assert not list(run.path.glob("*.tmp*"))


def test_a_full_disk_does_not_end_the_run_but_is_logged(tmp_path, monkeypatch, caplog):
    run = make_run(tmp_path / "a", "running")
    before = (run.path / "status.json").read_text()

    def full(path, data):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(folder, "write_durably", full)
    run.end("complete", 1, 2, 3.0, 0)
    assert "No space left on device" in caplog.text
    assert (run.path / "status.json").read_text() == before
    with pytest.raises(WriteError, match="No space left"):
        RunFolder(tmp_path / "a").begin("", {})


def test_write_durably_leaves_the_old_content_when_it_fails(tmp_path):
    path = tmp_path / "x"
    write_durably(path, b"old")
    path.chmod(0o644)
    with pytest.raises(FileNotFoundError):
        write_durably(tmp_path / "absent" / "x", b"new")
    write_durably(path, b"new")
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_status_text(tmp_path):
    run = make_run(tmp_path / "a")
    with Recorder(run.metrics) as recorder:
        recorder.write("step", 90, loss=0.5, samples_per_s=5321.0)
        recorder.write("step", 100, loss=0.25)
        recorder.write("eval", 100, loss=0.3, accuracy=0.975)
    text = report.status(run.path)
    assert "state       stopped (attempt 1)" in text
    assert "100, epoch 2.50, 12,800 samples" in text
    assert "training    loss 0.25 (step 100)" in text
    assert "evaluation  loss 0.3, accuracy 0.975 (step 100)" in text
    assert "checkpoint  step-00000100 (" in text
    assert "exit code   75" in text


def test_status_of_killed_and_of_distant_runs(tmp_path):
    run = make_run(tmp_path / "a", "running")
    as_of(run, pid=dead_pid())
    text = report.status(run.path)
    assert "killed without a word" in text
    assert f"--out {run.path} --resume auto" in text
    as_of(run, host="another-host")
    assert "running when last heard of" in report.status(run.path)


def test_stop_writes_the_file_only_for_a_running_run(tmp_path):
    run = make_run(tmp_path / "a", "running")
    as_of(run, host="another-host")
    assert "exits with 75" in report.stop(run.path)
    assert run.stop_file.exists()
    run.stop_file.unlink()
    as_of(run, state="complete")
    with pytest.raises(UsageError, match=r"is not running \(complete"):
        report.stop(run.path)
    as_of(run, state="running", host=os.uname().nodename, pid=dead_pid())
    with pytest.raises(UsageError, match="nothing to stop; killed"):
        report.stop(run.path)
    assert not run.stop_file.exists()


def test_unknown_runs_name_those_nearby(tmp_path):
    make_run(tmp_path / "runs" / "x-001")
    make_run(tmp_path / "runs" / "x-002")
    for action in (report.status, report.stop, report.logs):
        with pytest.raises(UsageError, match=r"x-01: does not exist; runs nearby: .*x-00"):
            action(tmp_path / "runs" / "x-01")
    with pytest.raises(UsageError, match=r"is no run folder.*x-002"):
        report.status(tmp_path / "runs")


def test_logs(tmp_path):
    run = make_run(tmp_path / "a")
    run.log(0).write_text("".join(f"line {n}\n" for n in range(100)))
    run.log(3).write_text("three\n")
    assert report.logs(run.path, 0, 2) == "line 98\nline 99"
    assert report.logs(run.path, 3) == "three"
    with pytest.raises(UsageError, match="no log of rank 1; there are logs of rank 0, 3"):
        report.logs(run.path, 1)
