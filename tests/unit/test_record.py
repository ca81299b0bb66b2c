"""metrics.jsonl: fields, JSON of odd numbers, cut-off on resume, full disks; env.json; logs."""

from __future__ import annotations

import json
import logging
import os
import resource
import subprocess
import sys

import pytest

from hpctrain.errors import BackendError, WriteError
from hpctrain.runs import environment, logs, record
from hpctrain.runs.lines import read, to_json
from hpctrain.runs.record import FIELDS, RecordConfig, Recorder
from hpctrain.runs.tensorboard import TensorBoard
from hpctrain.transport.topology import Topology

ISSUE_FIELDS = {
    "step", "samples", "epoch", "loss", "lr", "batch_global", "step_s", "compute_s", "exchange_s",
    "input_s", "bytes_sent_intra", "bytes_sent_inter", "samples_per_s", "bytes_source",
}  # fmt: skip


def strict(text: str) -> dict:
    def refuse(constant: str):
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


def test_a_step_line_has_every_field_and_unknown_is_null(tmp_path):
    with Recorder(tmp_path / "m.jsonl", attempt=3) as recorder:
        line = recorder.write("step", 10, loss=0.5, samples=1280)
        text = (tmp_path / "m.jsonl").read_text()
    assert text.endswith("\n"), "flushed at once"
    written = strict(text)
    assert written == line
    assert ISSUE_FIELDS <= set(written) == set(FIELDS["step"])
    assert (written["kind"], written["attempt"], written["step"]) == ("step", 3, 10)
    assert written["exchange_s"] is None
    assert written["bytes_source"] is None


def test_every_field_is_documented():
    for fields in FIELDS.values():
        assert all(meaning for _, meaning in fields.values())
    seconds = {name: unit for name, (unit, _) in FIELDS["step"].items() if name.endswith("_s")}
    assert seconds.pop("samples_per_s") == "samples/s"
    assert set(seconds.values()) == {"s"}


def test_unknown_fields_are_refused(tmp_path):
    with Recorder(tmp_path / "m.jsonl") as recorder, pytest.raises(ValueError, match="looss"):
        recorder.write("step", 1, looss=1.0)


def test_inf_and_nan_are_valid_json_and_not_lost():
    line = strict(to_json({"loss": float("nan"), "lr": float("-inf"), "step": 1}))
    assert line == {
        "loss": None, "lr": None, "step": 1, "non_finite": {"loss": "nan", "lr": "-inf"}
    }  # fmt: skip


def test_resume_cuts_later_lines_and_each_step_stands_once(tmp_path):
    path = tmp_path / "m.jsonl"
    with Recorder(path, attempt=1) as recorder:
        for step in range(1, 8):
            recorder.write("step", step)
        recorder.write("eval", 7)
    with path.open("a") as file:
        file.write('{"kind": "step", "step": 8, "lo')  # killed in the middle of a line
    inode = path.stat().st_ino
    with Recorder(path, attempt=2, step=5) as recorder:
        assert recorder.cut_lines == 4
        for step in range(6, 10):
            recorder.write("step", step)
    assert path.stat().st_ino != inode, "replaced in one step, not rewritten in place"
    assert list(tmp_path.iterdir()) == [path]
    lines = list(read(path))
    assert [line["step"] for line in lines] == list(range(1, 10))
    assert [line["attempt"] for line in lines] == [1] * 5 + [2] * 4


def test_a_fresh_start_in_an_old_folder_starts_an_empty_record(tmp_path):
    path = tmp_path / "m.jsonl"
    with Recorder(path) as recorder:
        recorder.write("step", 1)
    with Recorder(path, attempt=2) as recorder:
        recorder.write("note", 0, text="again")
    assert [line["kind"] for line in read(path)] == ["note"]


def test_reading_while_writing_leaves_out_half_a_line(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1}\n{"ste')
    assert [line["step"] for line in read(path)] == [1]


@pytest.fixture
def file_limit():
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda limit: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, old[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, old)


def test_a_full_disk_loses_no_line_and_leaves_no_half_line(tmp_path, file_limit, caplog):
    path = tmp_path / "m.jsonl"
    recorder = Recorder(path)
    recorder.write("step", 1)
    file_limit(path.stat().st_size + 30)
    for step in (2, 3, 4):
        recorder.write("step", step)
    assert [line["step"] for line in read(path)] == [1]
    assert path.read_bytes().endswith(b"\n")
    assert len(caplog.records) == 1, "said once"
    file_limit(resource.getrlimit(resource.RLIMIT_FSIZE)[1])
    recorder.write("step", 5)
    recorder.close()
    assert [line["step"] for line in read(path)] == [1, 2, 3, 4, 5]


def test_lines_that_stay_unwritten_are_an_error_at_the_end(tmp_path):
    recorder = Recorder(tmp_path / "m.jsonl")
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, recorder._file)
    os.close(full)
    recorder.write("step", 1)
    with pytest.raises(WriteError, match="1 lines could not be written"):
        recorder.close()


def test_a_record_that_cannot_be_opened_says_why(tmp_path):
    with pytest.raises(WriteError, match=r"absent/m.jsonl: No such file.*--out"):
        Recorder(tmp_path / "absent" / "m.jsonl")


def test_config_takes_durations():
    assert RecordConfig(plain_every_s="2m").plain_every_s == 120.0
    assert RecordConfig(plain_every_s=3).plain_every_s == 3.0


def test_tensorboard_writes_event_files(tmp_path):
    pytest.importorskip("tensorboard", reason="the tensorboard extra is not installed")
    with TensorBoard(tmp_path) as board, Recorder(tmp_path / "m.jsonl") as recorder:
        board.show(recorder.write("step", 3, loss=0.25))
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    accumulator = events.EventAccumulator(str(tmp_path))
    accumulator.Reload()
    assert accumulator.Tags()["scalars"] == ["step/loss"]
    [point] = accumulator.Scalars("step/loss")
    assert (point.step, point.value) == (3, 0.25)


def test_tensorboard_missing_is_a_clear_error(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(BackendError, match=r"hpctrain\[tensorboard\]"):
        TensorBoard(tmp_path)


def test_environment_of_a_run(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("APPTAINER_CONTAINER", "/images/hpctrain.sif")
    monkeypatch.setenv("SECRET_TOKEN", "hunter2")
    topology = Topology.from_labels(["a", "a", "b"])
    facts = environment.collect(topology, {"mpi": "Open MPI 5.0"}, ["hpctrain", "x.toml"], tmp_path)
    text = json.dumps(facts)
    assert "hunter2" not in text
    assert facts["versions"]["torch"]
    assert (facts["ranks"], facts["nodes"], facts["job_id"]) == (3, 2, "77")
    assert facts["container"] == {"APPTAINER_CONTAINER": "/images/hpctrain.sif"}
    assert facts["mpi"] == "Open MPI 5.0"
    assert facts["git"] is None
    assert facts["cores_of_rank_0"] >= 1


def test_git_state(tmp_path):
    def git(*arguments: str) -> None:
        identity = ("-c", "user.name=t", "-c", "user.email=t@example.org")
        subprocess.run(["git", "-C", tmp_path, *identity, *arguments], check=True,
                       capture_output=True)  # fmt: skip

    git("init")
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "-m", "one")
    clean = environment.git_state(tmp_path)
    assert len(clean["commit"]) == 40
    assert clean["dirty"] is False
    (tmp_path / "file").write_text("2")
    assert environment.git_state(tmp_path)["dirty"] is True


def test_logs_append_and_warnings_of_rank_0_reach_stderr(tmp_path, capsys):
    for attempt in (1, 2):
        path = tmp_path / "logs" / "rank-00000.log"
        with logs.logging_to(path, rank=0, size=2, attempt=attempt) as logger:
            logger.info("quiet")
            try:
                raise OSError(28, "full")
            except OSError:
                logging.getLogger("hpctrain.runs.jobs").exception("writing failed")
    text = path.read_text()
    assert text.count("attempt 1: rank 0 of 2") == text.count("attempt 2: rank 0 of 2") == 1
    assert text.count("Traceback") == 2
    errors = capsys.readouterr().err
    assert errors == "hpctrain: writing failed: No space left on device\n" * 2


def test_other_ranks_are_silent(tmp_path, capsys):
    with logs.logging_to(tmp_path / "rank-00003.log", rank=3, size=4, attempt=1) as logger:
        logger.warning("only in the file")
    assert capsys.readouterr().err == ""
    assert "only in the file" in (tmp_path / "rank-00003.log").read_text()


def test_record_needs_no_torch():
    code = (
        "import sys; from hpctrain.runs import folder, report, record, environment, signals, "
        "progress, console, logs, tensorboard, manifest; "
        "bad = {'torch', 'mpi4py', 'horovod'} & set(sys.modules); sys.exit(str(bad) if bad else 0)"
    )
    root = os.path.dirname(os.path.dirname(os.path.dirname(record.__file__)))
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": root}, capture_output=True
    )
    assert done.returncode == 0, done.stderr
