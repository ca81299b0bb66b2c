"""Stop requests: real signals to a real process, the deadline rule, the STOP file."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from hpctrain.errors import UsageError
from hpctrain.runs import signals
from hpctrain.runs.signals import StopRequest, budget_s, describe

CHILD = """
import sys, time
from hpctrain.runs.signals import StopRequest, describe
with StopRequest() as stop:
    print("ready", flush=True)
    while not (code := stop.poll(0.0)):
        time.sleep(0.01)
    print(describe(code), flush=True)
    if "wait" in sys.argv:
        time.sleep(60)
"""


def start(*arguments: str) -> subprocess.Popen:
    root = Path(signals.__file__).parents[2]
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, env=os.environ | {"PYTHONPATH": str(root)},
    )  # fmt: skip
    assert child.stdout.readline() == "ready\n"
    return child


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (signal.SIGUSR1, signals.USR1),
        (signal.SIGTERM, signals.TERM),
        (signal.SIGINT, signals.INT),
    ],
)
def test_a_signal_asks(number, code):
    child = start()
    child.send_signal(number)
    out, errors = child.communicate(timeout=30)
    assert (out.strip(), errors, child.returncode) == (describe(code), "", 0)


def test_a_signal_before_training_is_remembered():
    """hpctrain notes SIGUSR1 from its first line on; this one comes while it loads torch."""
    program = """
import os, signal, sys
import hpctrain.runs.signals as signals
signals.note_early_signals()
os.kill(os.getpid(), signal.SIGUSR1)
with signals.StopRequest() as stop:
    print(signals.describe(stop.poll(0.0)))
os.kill(os.getpid(), signal.SIGUSR1)
print("alive")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == (f"{describe(signals.USR1)}\nalive\n", "")


def test_a_storm_of_signals_does_no_harm():
    child = start("wait")
    for _ in range(300):
        child.send_signal(signal.SIGUSR1)
        child.send_signal(signal.SIGTERM)
    assert child.stdout.readline().strip() in (describe(signals.USR1), describe(signals.TERM))
    assert child.poll() is None
    child.kill()
    assert child.communicate()[1] == ""


def test_the_second_interrupt_kills():
    child = start("wait")
    child.send_signal(signal.SIGINT)
    assert child.stdout.readline().strip() == describe(signals.INT)
    child.send_signal(signal.SIGINT)
    child.communicate(timeout=30)
    assert child.returncode == -signal.SIGINT


def test_old_handlers_come_back_and_usr2_is_left_alone():
    numbers = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)
    before = [signal.getsignal(number) for number in numbers]
    with StopRequest():
        inside = [signal.getsignal(number) for number in numbers]
    assert [signal.getsignal(number) for number in numbers] == before
    assert inside[3] == before[3]
    assert all(a != b for a, b in zip(inside[:3], before[:3], strict=True))


def test_outside_of_the_main_thread_the_rest_still_works(tmp_path):
    (tmp_path / "STOP").touch()
    codes = []

    def rank_main():
        with StopRequest(stop_file=tmp_path / "STOP") as stop:
            codes.append(stop.poll(0.0))

    thread = threading.Thread(target=rank_main)
    thread.start()
    thread.join()
    assert codes == [signals.STOP_FILE]


def test_reasons_are_ordered_and_described():
    codes = [signals.NONE, signals.STOP_FILE, signals.DEADLINE, signals.USR1, signals.TERM]
    assert codes == sorted(codes)
    assert signals.NONE == 0
    assert len({describe(code) for code in [*codes, signals.INT]}) == 6


class Clock:
    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize(
    ("save", "poll", "total", "expected"),
    [
        (10.0, 1.0, 86400.0, 2 * 10 + 2 * 1 + 60),  # the rule: twice a save, two steps, 60 s
        (0.0, 0.0, 86400.0, 60.0),
        (0.0, 0.0, 30.0, 3.0),  # short: a tenth of it instead of 60 s
        (5.0, 1.0, 30.0, 15.0),  # 10 + 2 + 3, at half
        (8.0, 1.0, 30.0, 15.0),  # 16 + 2 + 3 = 21, but at most half is given up
        (20.0, 1.0, 30.0, 22.0),  # what the save needs is always left
    ],
)
def test_budget(save, poll, total, expected):
    assert budget_s(save, poll, total) == pytest.approx(expected)


def test_deadline_by_walltime_counts_from_the_start_and_knows_the_longest_step():
    clock = Clock(1000.0)
    stop = StopRequest(3600.0, environment={}, start_s=900.0, clock=clock)
    assert stop.end_s == 4500.0
    assert stop.poll(10.0) == signals.NONE
    clock.now = 1030.0  # one slow step of 30 s: budget 2 x 10 + 2 x 30 + 60 = 140
    assert stop.poll(10.0) == signals.NONE
    for clock.now in range(1031, 4359, 20):
        assert stop.poll(10.0) == signals.NONE
    clock.now = 4361.0
    assert stop.poll(10.0) == signals.DEADLINE
    clock.now = 2000.0
    assert stop.poll(10.0) == signals.DEADLINE, "once asked, it stays asked"


def test_the_earlier_of_walltime_and_slurm_counts():
    for walltime, end in ((100.0, 1100.0), (9000.0, 5000.0), (None, 5000.0)):
        stop = StopRequest(walltime, environment={"SLURM_JOB_END_TIME": "5000"}, start_s=1000.0)
        assert stop.end_s == end
    for odd in ("", "0", "Unknown"):
        assert StopRequest(environment={"SLURM_JOB_END_TIME": odd}).end_s is None


def test_walltime_must_be_positive():
    with pytest.raises(UsageError, match="--walltime -1"):
        StopRequest(-1.0)


def test_stop_file_is_looked_for_every_two_seconds(tmp_path):
    clock = Clock()
    looks = []

    class Watched(type(tmp_path)):
        def exists(self, **options):
            looks.append(clock.now)
            return super().exists(**options)

    file = Watched(tmp_path / "STOP")
    stop = StopRequest(stop_file=file, environment={}, clock=clock)
    for tenth in range(60):
        clock.now = 1000 + tenth / 10
        assert stop.poll(0.0) == signals.NONE
    assert len(looks) == 3
    Path(file).touch()
    clock.now = 1007.0
    assert stop.poll(0.0) == signals.STOP_FILE


def test_process_start_lies_in_the_past_but_after_boot():
    age_s = time.time() - signals.process_start_s()
    assert 0 <= age_s < time.clock_gettime(time.CLOCK_BOOTTIME) + 1
