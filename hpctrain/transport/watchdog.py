"""The stall watchdog: names the ranks that wait and the ranks they wait for.

A thread on every rank tells rank 0 now and then where its main thread stands; rank 0 compares and
speaks once per stall. Rank 0 answers everybody, so a rank that stands still and hears nothing from
rank 0 speaks for itself. A rank's place is taken from its Python stack: whoever has `hpctrain.
transport` or Horovod on it waits in a communication call.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType

import numpy as np

from hpctrain.errors import EXIT_INTERNAL
from hpctrain.transport.communicator import Communicator, Ledger, Mailbox
from hpctrain.transport.stall import SILENT_BEATS, Heard, Place, Stall, classify

_GOODBYE = b"bye"
_GOODBYE_PATIENCE_S = 2.0
_COMMUNICATING = ("hpctrain.transport.", "horovod.")
_NOT_TELLING = frozenset(sys.stdlib_module_names - {"__main__"} | {"torch", "numpy"})


class Watchdog:
    """Watches over the ranks of `comm`. Collective to make and to close; `beat` is local.

    Make it in the thread whose progress is watched. It is silent for ever where threads may not
    share MPI; `note` then says so.

    Args:
        comm: The ranks; the watchdog works on a duplicate, and its own bytes are not counted.
        bucket_names: What buckets hold, by index.
        warn_s: Report once the run has stood still so long.
        abort_s: End all ranks with code 70 after so long; None: never.
        report: Takes the message; on rank 0, or where rank 0 does not answer on every rank.
        abort: Ends all ranks with an exit code (`mpi.guard().abort`).
        heartbeat_s: Interval between reports to rank 0.
        bucket: Tells the bucket that is waited for (a reducer's `current`); called by the thread.
    """

    def __init__(
        self,
        comm: Communicator,
        bucket_names: Sequence[str],
        warn_s: float,
        abort_s: float | None,
        report: Callable[[str], None],
        abort: Callable[[int], object],
        *,
        heartbeat_s: float = 5.0,
        bucket: Callable[[], int] = lambda: -1,
    ) -> None:
        self.note: str | None = None
        self._comm, self._bucket_names, self._bucket = comm, tuple(bucket_names), bucket
        self._warn_s, self._abort_s, self._heartbeat_s = warn_s, abort_s, heartbeat_s
        self._report, self._abort = report, abort
        self._main = threading.get_ident()
        self._moved_at_s = self._started_at_s = time.monotonic()
        self._step, self._phase, self._detail = 0, "start", -1
        self._last_key: tuple[object, ...] | None = None
        self._places: list[tuple[Place | None, float]] = [(None, self._moved_at_s)] * comm.size
        self._heard_root_at_s = self._moved_at_s
        self._departed: set[int] = set()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        if comm.size == 1:
            self.note = "no stall watchdog: a single rank waits for nobody"
            return
        if not comm.any_thread:
            self.note = "no stall watchdog: it needs MPI_THREAD_MULTIPLE"
            return
        duplicate = comm.split(0, comm.rank)
        assert duplicate is not None
        duplicate.ledger = Ledger()
        self._mailbox: Mailbox = duplicate.mailbox()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def beat(self, step: int, phase: str, detail: int = -1) -> None:
        """Say where the loop is; costs a few attribute stores. Local.

        Args:
            step: Steps done.
            phase: A word for people: "compute", "exchange", ...
            detail: Bucket index, where the loop knows it.
        """
        self._step, self._phase, self._detail = step, phase, detail
        self._moved_at_s = time.monotonic()

    def close(self) -> None:
        """Collective, but waits only briefly for ranks that do not come. End the thread."""
        if self._thread is not None:
            self._stop.set()
            self._thread.join()
            self._thread = None
            self._say_goodbye()

    def _watch(self) -> None:
        while not self._stop.wait(self._heartbeat_s):
            place = self._place()
            if self._comm.rank == 0:
                self._places[0] = (place, time.monotonic())
                for rank in range(1, self._comm.size):
                    self._post(rank, b"")
            else:
                self._post(0, place.encode())
            self._receive()
            stall = self._everyone() if self._comm.rank == 0 else self._only_me(place)
            self._judge(stall)

    def _everyone(self) -> Stall | None:
        now_s = time.monotonic()
        return classify(
            [Heard(place, now_s - at_s) for place, at_s in self._places],
            hosts=self._comm.topology.hosts,
            bucket_names=self._bucket_names,
            warn_s=self._warn_s,
            heartbeat_s=self._heartbeat_s,
        )

    def _only_me(self, place: Place) -> Stall | None:
        """Rank 0 speaks for all as long as it answers."""
        silent_s = time.monotonic() - self._heard_root_at_s
        if silent_s <= SILENT_BEATS * self._heartbeat_s or place.idle_s < self._warn_s:
            return None
        message = (
            f"no progress for {place.idle_s:.0f} s\n"
            f"  this rank {self._comm.rank} is in {place.phase} of step {place.step}, "
            f"at {place.at}\n"
            f"  rank 0 ({self._comm.topology.hosts[0]}) does not answer since {silent_s:.0f} s"
        )
        return Stall(message, place.idle_s, (place.step, place.phase))

    def _judge(self, stall: Stall | None) -> None:
        if stall is None:
            self._last_key = None
            return
        late = self._abort_s is not None and stall.longest_s >= self._abort_s
        if stall.key != self._last_key or late:
            self._last_key = stall.key
            ending = f"\n  ending all ranks after {self._abort_s:.0f} s" if late else ""
            self._report(stall.message + ending)
        if late:
            self._abort(EXIT_INTERNAL)
            self._stop.set()

    def _place(self) -> Place:
        waits, at = stack_of(self._main)
        bucket = self._bucket()
        return Place(
            step=self._step,
            phase=self._phase,
            bucket=self._detail if bucket < 0 else bucket,
            idle_s=time.monotonic() - self._moved_at_s,
            waits=waits,
            at=at,
        )

    def _post(self, rank: int, payload: bytes) -> None:
        self._mailbox.post(rank, np.frombuffer(payload, np.uint8))

    def _receive(self) -> None:
        now_s = time.monotonic()
        for source, payload in self._mailbox.poll():
            message = payload.tobytes()
            if message == _GOODBYE:
                self._departed.add(source)
            elif self._comm.rank == 0:
                self._places[source] = (Place.decode(message), now_s)
            if source == 0:
                self._heard_root_at_s = now_s

    def _say_goodbye(self) -> None:
        """Take what is still on the way: MPI libraries complain about messages nobody received.

        Never hangs: while an exception unwinds, the others do not come here.
        """
        partners = range(1, self._comm.size) if self._comm.rank == 0 else range(1)
        for rank in partners:
            self._post(rank, _GOODBYE)
        deadline_s = time.monotonic() + _GOODBYE_PATIENCE_S
        while not self._departed.issuperset(partners) and time.monotonic() < deadline_s:
            self._receive()
            time.sleep(0.001)


def stack_of(thread: int) -> tuple[bool, str]:
    """Whether a thread is inside a communication call, and where it is. Local.

    Args:
        thread: `threading.get_ident()` of the thread.

    Returns:
        (waits, at): `at` is file:line and function, of the caller of the communication or else of
        the innermost frame outside the standard library and torch.
    """
    waits = False
    at: FrameType | None = None
    frame = sys._current_frames().get(thread)
    while frame is not None:
        module = str(frame.f_globals.get("__name__", ""))
        if module.startswith(_COMMUNICATING):
            waits, at = True, None
        elif at is None and module.partition(".")[0] not in _NOT_TELLING:
            at = frame
        frame = frame.f_back
    if at is None:
        return waits, "?"
    return waits, f"{Path(at.f_code.co_filename).name}:{at.f_lineno} {at.f_code.co_name}"
