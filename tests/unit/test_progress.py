"""What is shown to whom: the table of decisions, plain lines, bar, summary, alphabet."""

from __future__ import annotations

import io
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from hpctrain.runs import console, progress
from hpctrain.runs.console import Terminal, choose_display, find_terminal, make_console
from hpctrain.runs.progress import Progress, Summary, batch_equation, describe, step_text

TERMINAL = Terminal("/dev/pts/3", 100, 40)
LINE = {
    "kind": "step", "step": 1200, "epoch": 2.14, "loss": 0.123, "accuracy": 0.95, "lr": 0.05,
    "samples_per_s": 5321.4, "step_s": 0.1, "exchange_s": 0.012,
}  # fmt: skip


@pytest.mark.parametrize(
    ("mode", "terminal", "variables", "expected"),
    [
        ("auto", TERMINAL, {"TERM": "xterm"}, "bar"),
        ("auto", None, {"TERM": "xterm"}, "plain"),
        ("auto", TERMINAL, {"TERM": "dumb"}, "plain"),
        ("auto", TERMINAL, {}, "plain"),
        ("auto", TERMINAL, {"TERM": "xterm", "PBS_ENVIRONMENT": "PBS_BATCH"}, "plain"),
        ("auto", TERMINAL, {"TERM": "xterm", "PBS_ENVIRONMENT": "PBS_INTERACTIVE"}, "bar"),
        ("auto", TERMINAL, {"TERM": "xterm", "CI": "true"}, "plain"),
        ("bar", None, {}, "bar"),
        ("plain", TERMINAL, {"TERM": "xterm"}, "plain"),
        ("none", TERMINAL, {"TERM": "xterm"}, "none"),
    ],
)
def test_what_is_shown(mode, terminal, variables, expected):
    assert choose_display(mode, terminal, variables) == expected


def fake_process(proc: Path, pid: str, parent: int, name: str, out: str, err: str, args=()) -> None:
    folder = proc / pid
    (folder / "fd").mkdir(parents=True)
    (folder / "stat").write_text(f"{pid} ({name} x) y) S {parent} 0 0")
    (folder / "comm").write_text(name + "\n")
    (folder / "cmdline").write_text("\0".join([name, *args, "hpctrain", "-l"]) + "\0")
    (folder / "fd" / "1").symlink_to(out)
    (folder / "fd" / "2").symlink_to(err)


PTS, FILE, PIPE = "/dev/pts/0", "/home/me/out.log", "pipe:[1]"


@pytest.mark.parametrize(
    ("case", "launched", "own", "launcher", "shown"),
    [
        ("typed without launcher", False, (PTS, PTS), None, True),
        ("stdout redirected", False, (FILE, PTS), None, False),
        ("stderr redirected", False, (PTS, FILE), None, False),
        ("Open MPI at a terminal", True, ("/dev/pts/9", PIPE), ("prterun", PTS, PTS), True),
        ("Open MPI 4 at a terminal", True, ("/dev/pts/9", PIPE), ("mpirun", PTS, PTS), True),
        ("Open MPI > file", True, ("/dev/pts/9", PIPE), ("prterun", FILE, PTS), False),
        ("Open MPI | tee", True, ("/dev/pts/9", PIPE), ("prterun", PIPE, PTS), False),
        ("Open MPI in a batch job", True, ("/dev/pts/9", PIPE), ("prterun", FILE, FILE), False),
        ("MPICH at a terminal", True, (PIPE, PIPE), ("mpiexec", PTS, PTS), True),
        ("srun", True, (PIPE, PIPE), ("slurmstepd", "/dev/null", "/dev/null"), False),
        ("labelled", True, ("/dev/pts/9", PIPE), ("prterun", PTS, PTS, "--tag-output"), False),
    ],
)
def test_terminal_behind_the_launcher(tmp_path, case, launched, own, launcher, shown):
    fake_process(tmp_path, "self", 50, "python", *own)
    fake_process(tmp_path, "50", 40, "hydra_pmi_proxy", PIPE, PIPE)
    if launcher:
        name, out, err, *arguments = launcher
        fake_process(tmp_path, "40", 30, name, out, err, arguments)
        fake_process(tmp_path, "30", 1, "bash", PTS, PTS)
    assert (find_terminal(launched, tmp_path) is not None) == shown, case


def test_a_real_terminal_is_found_with_its_size(tmp_path):
    ours, theirs = pty.openpty()
    import fcntl
    import struct
    import termios

    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 33, 77, 0, 0))
    code = "from hpctrain.runs.console import find_terminal; print(find_terminal(False))"
    root = Path(console.__file__).parents[2]
    subprocess.run(
        [sys.executable, "-c", code], stdout=theirs, stderr=theirs, check=True,
        env=os.environ | {"PYTHONPATH": str(root)},
    )  # fmt: skip
    shown = os.read(ours, 4096).decode()
    os.close(ours)
    os.close(theirs)
    assert "width=77, height=33" in shown


@pytest.mark.parametrize(
    ("variables", "utf8"),
    [
        ({"LANG": "en_US.UTF-8"}, True),
        ({"LANG": "C.UTF-8"}, True),
        ({"LANG": "de_DE.utf8"}, True),
        ({"LANG": "C"}, False),
        ({}, False),
        ({"LC_CTYPE": "C.UTF-8"}, False),  # what Python itself sets under a POSIX locale
        ({"LC_CTYPE": "C.UTF-8", "LANG": "C"}, False),
        ({"LC_CTYPE": "en_US.UTF-8", "LANG": "C"}, True),
        ({"LC_ALL": "POSIX", "LANG": "en_US.UTF-8"}, False),
        ({"LC_ALL": "en_US.ISO-8859-1"}, False),
    ],
)
def test_alphabet(variables, utf8):
    assert console.speaks_utf8(variables) == utf8


class Stream(io.TextIOWrapper):
    def __init__(self) -> None:
        super().__init__(io.BytesIO(), encoding="utf-8", write_through=True)

    @property
    def text(self) -> str:
        return self.buffer.getvalue().decode()


def summary(**changes) -> Summary:
    values = {
        "results": {"loss": 0.1, "accuracy": 0.978}, "steps": 1000, "samples": 128_000,
        "duration_s": 20.0, "compute_s": 14.0, "exchange_s": 4.0, "sync_s": 0.0, "input_s": 1.0,
        "bytes_sent_intra": 12_345_678, "bytes_sent_inter": 0, "bytes_source": "formula",
        "folder": "/scratch/[group]/" + "long/" * 40 + "digits-001",
        "following": ["hpctrain status X", "and [that]"],
    }  # fmt: skip
    return Summary(**values | changes)


def shown(display: str, variables: dict[str, str], terminal=None) -> str:
    stream = Stream()
    out = make_console(display, terminal, variables, stream)
    with Progress(out, display, total_steps=5000) as shows:
        shows.say(["batch_global 1,024 = 8 ranks x 128"])
        shows.show(LINE)
        shows.tick(1201, 0.24)
        shows.show({"kind": "eval", "step": 1201, "loss": 0.2, "accuracy": 0.9, "eval_s": 0.5})
    shows.summary(summary())
    return stream.text


def test_plain_output_has_no_escapes_and_keeps_long_paths_whole():
    text = shown("plain", {"LANG": "en_US.UTF-8"})
    assert "\x1b" not in text
    assert "\r" not in text
    assert "run folder: " + summary().folder in text.splitlines()
    assert "step 1201/5000 epoch 2.1 loss 0.123 accuracy 0.950 lr 0.05 5321 samples/s " in text
    assert "evaluation at step 1201: loss 0.2 accuracy 90.00 % (0.5 s)" in text.splitlines()
    assert "and [that]" in text
    assert "compute 70%, exchange 20%, input 5%, other 5%" in text
    assert "12.3 MB inside nodes, 0 B between nodes (formula)" in text
    assert "6,400 samples/s" in text


def test_posix_locale_gets_ascii_only():
    assert shown("plain", {"LANG": "C"}).isascii()
    assert shown("bar", {"LANG": "C", "TERM": "xterm"}, TERMINAL).isascii()
    assert not shown("plain", {"LANG": "C.UTF-8"}).isascii(), "else this test proves nothing"


def test_bar_moves_and_no_color_has_no_colours():
    variables = {"LANG": "C.UTF-8", "TERM": "xterm"}
    coloured = shown("bar", variables, TERMINAL)
    assert "\x1b[" in coloured
    assert re.search(r"\x1b\[[39]\dm", coloured)
    plain = shown("bar", variables | {"NO_COLOR": "1"}, TERMINAL)
    assert not re.search(r"\x1b\[[39]\dm", plain)
    assert "step 1201/5000" in plain


def test_width_comes_from_columns_then_terminal_then_120():
    assert make_console("plain", TERMINAL, {"COLUMNS": "66"}, Stream()).width == 66
    assert make_console("plain", TERMINAL, {"COLUMNS": "x"}, Stream()).width == 100
    assert make_console("plain", None, {}, Stream()).width == 120


def test_none_shows_the_summary_only_and_other_ranks_nothing():
    text = shown("none", {})
    assert "run folder:" in text
    assert "step 1201" not in text
    silent = Progress(None, "plain")
    silent.say(["x"])
    silent.show(LINE)
    silent.tick(1, 0.5)
    silent.summary(summary())


def test_plain_lines_come_every_few_seconds():
    now = [0.0]
    stream = Stream()
    out = Console(file=stream, width=200)
    shows = Progress(out, "plain", plain_every_s=5.0, clock=lambda: now[0], fraction=0.5)
    for tick in range(100):
        now[0] = tick / 10
        if tick % 10 == 0:
            shows.show(LINE | {"step": tick})
        shows.tick(tick, 0.5 + tick / 1000)
    lines = stream.text.splitlines()
    assert [line.split()[1] for line in lines] == ["0", "50"]
    # 5 % of the run took 5 s, 45 % are left.
    assert lines[1].endswith("exchange 12% eta 00:00:45")


def test_replicas_have_a_row_of_their_own():
    spread = {
        "replica_accuracy_min": 0.7,
        "replica_accuracy_mean": 0.8,
        "replica_accuracy_max": 0.9,
    }
    results = {"loss": 0.1, "accuracy": 0.95} | spread | {"leader_accuracy": 0.85}
    rows = dict(progress.summary_rows(summary(results=results)))
    assert rows["held-out accuracy"] == "95.00 %"
    assert rows["accuracy of replicas"] == "70.00 % to 90.00 %, mean 80.00 %; leader 85.00 %"
    assert not any("replica_" in name for name in rows)


def test_texts():
    assert step_text(3, None, {}, None) == "step 3"
    assert batch_equation(1024, 8) == "batch_global 1,024 = 8 ranks x 128"
    assert batch_equation(10, 3) == "batch_global 10 = 3 ranks x 3 + 1"
    assert progress.clock_text(3725.4) == "01:02:05"
    assert progress.bytes_text(999) == "999 B"
    assert progress.bytes_text(1.5e15) == "1500.0 TB"
    good = {"kind": "checkpoint", "ok": True, "saved_step": 5, "save_s": 0.4, "stall_s": 0.0123}
    assert describe(good) == "checkpoint of step 5 on disk after 0.4 s; training stalled 12.3 ms"
    bad = good | {"ok": False, "reason": "rank 1: No space left on device"}
    assert describe(bad).startswith("checkpoint of step 5 FAILED: rank 1: No space left")
    unknown = summary(bytes_sent_intra=None, bytes_source=None, steps=0)
    assert progress.summary_rows(unknown)[-1][1] == "unknown inside nodes, 0 B between nodes"
