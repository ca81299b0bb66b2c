from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace

from hpctrain.transport.communicator import Communicator
from hpctrain.transport.stall import Heard, Place, Stall, classify
from hpctrain.transport.threads import run_threads
from hpctrain.transport.watchdog import Watchdog, stack_of

WAITS = Place(step=12, phase="exchange", bucket=1, idle_s=64.0, waits=True, at="train.py:9 step")
BUSY = Place(step=12, phase="compute", bucket=-1, idle_s=65.0, waits=False, at="model.py:3 forward")


def judge(*places: Place | None, silent_s: float = 1.0, **silences: float) -> Stall | None:
    heard = [
        Heard(place, silences.get(f"rank{rank}", silent_s)) for rank, place in enumerate(places)
    ]
    return classify(
        heard,
        hosts=[f"host{rank}" for rank in range(len(places))],
        bucket_names=["fc", "conv.weight, conv.bias"],
        warn_s=60.0,
        heartbeat_s=5.0,
    )


def test_a_moving_run_is_no_stall() -> None:
    moving = replace(WAITS, idle_s=50.0)
    assert judge(moving, moving) is None
    assert judge(None, None, silent_s=59.0) is None


def test_waiting_and_missing_ranks_are_named() -> None:
    stall = judge(WAITS, BUSY, WAITS, WAITS)
    assert stall is not None
    assert stall.message.splitlines() == [
        "no progress for 65 s: 3 rank(s) wait for 1",
        "  waiting: ranks 0, 2-3 in exchange of step 12, bucket 1 (conv.weight, conv.bias) "
        "for 65 s",
        "  missing: rank 1 (host1) in compute of step 12 for 66 s, at model.py:3 forward",
    ]
    assert stall.longest_s == 65.0


def test_a_rank_that_fell_silent_is_missing_whatever_it_said_last() -> None:
    stall = judge(WAITS, WAITS, rank1=61.0)
    assert stall is not None
    assert "waiting: rank 0 in exchange" in stall.message
    assert "rank 1 (host1) does not answer since 61 s; last seen in exchange of step 12" in (
        stall.message
    )
    never = judge(WAITS, None, rank1=70.0)
    assert never is not None
    assert "rank 1 (host1) has not answered since the start, 70 s ago" in never.message


def test_a_rank_that_waits_in_an_earlier_step_or_bucket_is_missing() -> None:
    for behind in (replace(WAITS, step=11), replace(WAITS, bucket=0)):
        stall = judge(WAITS, behind)
        assert stall is not None
        assert "waiting: rank 0" in stall.message
        assert "missing: rank 1 (host1) in exchange" in stall.message


def test_all_ranks_waiting_blames_the_network() -> None:
    stall = judge(WAITS, WAITS)
    assert stall is not None
    assert "no rank is missing" in stall.message


def test_slow_ranks_without_waiters_are_not_blamed() -> None:
    stall = judge(BUSY, BUSY)
    assert stall is not None
    assert "no rank is seen waiting for another" in stall.message


def test_the_key_stays_while_nothing_moves() -> None:
    first, later = judge(WAITS, BUSY), judge(replace(WAITS, idle_s=80.0), replace(BUSY, idle_s=90))
    other = judge(BUSY, WAITS)
    assert first is not None
    assert later is not None
    assert other is not None
    assert first.key == later.key
    assert first.key != other.key


def test_places_survive_the_mailbox() -> None:
    assert Place.decode(WAITS.encode()) == WAITS


def stack_while_waiting(wait: Callable[[threading.Event], object]) -> tuple[bool, str]:
    """What `stack_of` says of a thread in `wait`, once it is there."""
    release = threading.Event()

    def step_of_the_loop() -> None:
        wait(release)

    thread = threading.Thread(target=step_of_the_loop)
    thread.start()
    try:
        for _ in range(5000):
            assert thread.ident is not None
            seen = stack_of(thread.ident)
            if seen[1].endswith("step_of_the_loop"):
                return seen
            time.sleep(0.001)
    finally:
        release.set()
        thread.join()
    raise AssertionError(f"never seen in the loop, last {seen}")


def test_the_stack_tells_who_communicates() -> None:
    transport = {"__name__": "hpctrain.transport.imagined"}
    exec("def wait(event): event.wait()", transport)
    assert stack_while_waiting(threading.Event.wait)[0] is False
    waits, at = stack_while_waiting(transport["wait"])  # type: ignore[arg-type]
    assert waits
    assert at.startswith("test_stall.py:")
    assert stack_of(-1) == (False, "?")


def test_no_watchdog_where_threads_may_not_communicate() -> None:
    def body(comm: Communicator) -> str | None:
        dog = Watchdog(comm, [], 1.0, None, print, print)
        dog.beat(1, "compute")
        dog.close()
        return dog.note

    assert run_threads(1, body) == ["no stall watchdog: a single rank waits for nobody"]
    assert run_threads(2, body) == ["no stall watchdog: it needs MPI_THREAD_MULTIPLE"] * 2
