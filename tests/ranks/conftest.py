"""Runs the tests of this folder on all ranks of an MPI launch at once:

    tools/launch 2 -- .venv/bin/python -m pytest tests/ranks

Every rank runs every test. After each one the ranks tell each other how it went, on a communicator
of their own, so that a failure anywhere is reported by rank 0 and the next test starts aligned. If
a rank fails while another still waits for it inside the test, or if a test takes too long, all
ranks print their stacks and end together; nothing hangs. Only rank 0 prints pytest's report.

`@pytest.mark.ranks(2, 4, limit_s=30)` runs a test at launches of 2 and 4 ranks, and ends it after
30 s; without the marker it runs at every size.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from _pytest.runner import runtestprotocol

if TYPE_CHECKING:
    from hpctrain.transport.communicator import Communicator

LIMIT_S = 120.0
"""How long one test may take."""
GRACE_S = 10.0
"""How long a rank that failed waits for the others to come out of the same test."""
START_S = 60.0
"""How long ranks wait for each other at the start, after collection and at the end."""
STAGGER_S = 0.2
"""Between the stacks of two ranks, so that their lines do not mix."""
EXIT_FAILED = 1
EXIT_DEADLOCK = 99
DUMP_SIGNAL = signal.SIGRTMIN + 8
PASSED, SKIPPED, FAILED, COLLECTED, ENDED = range(5)

HERE = Path(__file__).resolve().parent
RUNNER = pytest.StashKey["Runner"]()


class Runner:
    """What one rank knows of the others."""

    def __init__(self, stderr: int) -> None:
        from hpctrain.transport import mpi

        # Both hooks are pytest's while it runs: an exception in a thread is a failed test.
        hooks = sys.excepthook, threading.excepthook
        self.world: Communicator = mpi.start()
        sys.excepthook, threading.excepthook = hooks
        self.mpi = mpi.MPI
        self.control = mpi.MPI.COMM_WORLD.Dup()
        self.rank, self.size = self.control.rank, self.control.size
        self.peers = self.control.allgather((socket.gethostname(), os.getpid()))
        self.stderr = stderr
        self.unselected = 0
        self.collection_errors = ""
        self._meetings = 0
        faulthandler.register(DUMP_SIGNAL, file=stderr, all_threads=True)

    def say(self, text: str) -> None:
        """Print at once, past pytest's capture, each line with this rank's number."""
        lines = "".join(f"[rank {self.rank}] {line}\n" for line in text.splitlines())
        os.write(self.stderr, lines.encode(errors="replace"))

    def meet(self, code: int, patience_s: float) -> list[int | None]:
        """Collective. Every rank's code; None for those that did not come within the patience."""
        self._meetings += 1
        others = [rank for rank in range(self.size) if rank != self.rank]
        sent = bytearray([code])
        codes = {rank: bytearray(1) for rank in others}
        tag = self._meetings % 30000
        posts = [self.control.Isend(sent, rank, tag) for rank in others]
        waits = {rank: self.control.Irecv(codes[rank], rank, tag) for rank in others}
        deadline_s = time.monotonic() + patience_s
        here = {self.rank: code}
        while len(here) < self.size and time.monotonic() < deadline_s:
            for rank in [rank for rank in others if rank not in here]:
                if waits[rank].Test():
                    here[rank] = codes[rank][0]
            time.sleep(0.0005)
        if len(here) == self.size:
            self.mpi.Request.Waitall(posts)
        return [here.get(rank) for rank in range(self.size)]

    def end_all(self, why: str, code: int) -> None:
        """Print why and every rank's stacks, then end all ranks."""
        self.say(why)
        for rank, (host, pid) in enumerate(self.peers):
            if host == socket.gethostname():
                self.say(f"stacks of rank {rank}:")
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, DUMP_SIGNAL)
                time.sleep(STAGGER_S)
        self.abort(code)

    def abort(self, code: int) -> None:
        """End all ranks, a second from now: those who are printing finish first."""
        time.sleep(1.0)
        self.mpi.COMM_WORLD.Abort(code)

    def deadlock(self, nodeid: str, limit_s: float) -> None:
        """Called on every rank by its own clock."""
        time.sleep(STAGGER_S * self.rank)
        self.say(f"{nodeid}: not done after {limit_s:g} s; this rank's stacks:")
        faulthandler.dump_traceback(self.stderr, all_threads=True)
        time.sleep(STAGGER_S * (self.size - self.rank))
        self.abort(EXIT_DEADLOCK)

    @contextlib.contextmanager
    def watch(self, nodeid: str, limit_s: float) -> Iterator[None]:
        """End all ranks if the block takes longer than its limit."""
        timer = threading.Timer(limit_s, self.deadlock, (nodeid, limit_s))
        timer.daemon = True
        timer.start()
        # For code that never gives the interpreter up, where no Python thread can run.
        faulthandler.dump_traceback_later(limit_s + 10, exit=True, file=self.stderr)
        try:
            yield
        finally:
            timer.cancel()
            faulthandler.cancel_dump_traceback_later()

    def agree(
        self, nodeid: str, reports: list[pytest.TestReport], grace_s: float
    ) -> list[pytest.TestReport]:
        """Collective. The reports, failed on every rank if the test failed on any."""
        failed = next((report for report in reports if report.failed), None)
        skipped = any(report.skipped for report in reports)
        outcome = FAILED if failed else SKIPPED if skipped else PASSED
        if failed and self.size > 1:
            sections = "".join(f"\n-- {title}\n{text}" for title, text in failed.sections)
            self.say(f"{nodeid} failed in {failed.when}\n{failed.longreprtext}{sections}")
        codes = self.meet(outcome, grace_s if failed else float("inf"))
        absent = [rank for rank, code in enumerate(codes) if code not in (PASSED, SKIPPED, FAILED)]
        if absent:
            known = [rank for rank, code in enumerate(codes) if code == FAILED]
            if not known:
                why = f"{nodeid}: rank(s) {absent} left the tests (an internal error?)"
                self.end_all(f"{why}; all ranks end", EXIT_DEADLOCK)
            self.end_all(
                f"{nodeid}: failed on rank(s) {known}; rank(s) {absent} did not come out of it "
                f"within {grace_s:g} s. Their stacks follow, then all ranks end.",
                EXIT_FAILED,
            )
        if set(codes) in ({PASSED}, {SKIPPED}):
            return reports
        ranks = {code: [r for r, c in enumerate(codes) if c == code] for code in codes}
        if FAILED in ranks:
            text = f"failed on rank(s) {ranks[FAILED]}"
        else:
            text = (
                f"skipped on rank(s) {ranks[SKIPPED]} but run on rank(s) {ranks[PASSED]}: "
                "a test runs on all ranks or on none"
            )
        if failed:
            failed.sections.append(("ranks", text))
        else:
            report = next((r for r in reports if r.when == "call"), reports[0])
            report.outcome, report.longrepr = "failed", text
            report.__dict__.pop("wasxfail", None)
        return reports

    # Hooks of pytest, in the order in which they are called.

    def pytest_report_header(self) -> str:
        library = self.mpi.Get_library_version().split(",")[0].split("\n")[0]
        return f"ranks: {self.size}, {library}"

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.collection_errors += f"{report.nodeid}\n{report.longreprtext}\n"

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(
        self, config: pytest.Config, items: list[pytest.Item]
    ) -> None:
        """Keep the tests of this launch size."""
        kept, dropped = [], []
        for item in items:
            marker = item.get_closest_marker("ranks") if of_this_folder(item) else None
            fits = marker is None or not marker.args or self.size in marker.args
            (kept if fits else dropped).append(item)
            if of_this_folder(item):
                item.add_marker(pytest.mark.timeout(0))  # this runner's own watch ends all ranks
        if dropped:
            items[:] = kept
            self.unselected = len(dropped)
            config.hook.pytest_deselected(items=dropped)

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Collective. A rank that could not collect, or collected otherwise, fails all."""
        self.come("to the end of collection", COLLECTED)
        mine = (self.collection_errors, [item.nodeid for item in session.items])
        found = self.control.allgather(mine)
        for rank, (errors, nodeids) in enumerate(found):
            if not errors and nodeids != found[0][1]:
                errors = f"collected other tests than rank 0: {nodeids}, not {found[0][1]}"
            if errors and not (rank == self.rank and self.collection_errors):
                report = pytest.CollectReport(f"rank {rank}", "failed", errors, [])
                session.config.hook.pytest_collectreport(report=report)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(
        self, item: pytest.Item, nextitem: pytest.Item | None
    ) -> bool | None:
        """Collective. One test on all ranks, reported once they agree."""
        if not of_this_folder(item):
            return None
        limit_s, grace_s = limits(item)
        item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        with self.watch(item.nodeid, limit_s):
            try:
                reports = runtestprotocol(item, nextitem=nextitem, log=False)
            except BaseException as error:  # pytest.exit and Ctrl-C: the others would wait for ever
                self.say(f"{item.nodeid}: left by {error!r}; all ranks end")
                self.abort(EXIT_FAILED)
                raise
            reports = self.agree(item.nodeid, reports, grace_s)
        for report in reports:
            item.ihook.pytest_runtest_logreport(report=report)
        item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
        return True

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        """Collective. One exit code; no test for this launch size is no failure."""
        if exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED and self.unselected:
            session.exitstatus = exitstatus = pytest.ExitCode.OK
        self.come("to the end of the session", ENDED)
        session.exitstatus = max(self.control.allgather(int(exitstatus)))

    def come(self, where: str, code: int) -> None:
        """Collective. Wait for all ranks here; end them if one does not come or is elsewhere."""
        codes = self.meet(code, START_S)
        absent = [rank for rank, found in enumerate(codes) if found != code]
        if absent:
            why = f"rank(s) {absent} did not come {where} (an internal error?); all ranks end"
            self.end_all(why, EXIT_DEADLOCK)


def of_this_folder(item: pytest.Item) -> bool:
    return item.path.is_relative_to(HERE)


def limits(item: pytest.Item) -> tuple[float, float]:
    marker = item.get_closest_marker("ranks")
    given = marker.kwargs if marker else {}
    return float(given.get("limit_s", LIMIT_S)), float(given.get("grace_s", GRACE_S))


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    # Descriptor 2 is a file of pytest's while a test runs; what goes there is lost in an abort.
    capture = config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled() if capture else contextlib.nullcontext():
        stderr = os.dup(2)
    faulthandler.dump_traceback_later(START_S, exit=True, file=stderr)
    runner = config.stash[RUNNER] = Runner(stderr)
    faulthandler.cancel_dump_traceback_later()
    if runner.rank > 0:
        # pytest and its plugins then leave reports and caches to another process: rank 0.
        config.workerinput = {"workerid": f"rank{runner.rank}"}
        config.pluginmanager.unregister(name="terminalreporter")
    elif reporter := config.pluginmanager.getplugin("terminalreporter"):
        # Under mpirun its stream looks like a terminal even when it goes to a file.
        reporter.isatty = type(reporter.isatty)(False)
    config.pluginmanager.register(runner, "ranks-runner")


def pytest_unconfigure(config: pytest.Config) -> None:
    if RUNNER in config.stash:  # what is left is MPI's own end, which must not hang either
        stderr = config.stash[RUNNER].stderr
        faulthandler.dump_traceback_later(START_S, exit=True, file=stderr)


@pytest.fixture(scope="session")
def comm(request: pytest.FixtureRequest) -> Communicator:
    """The communicator of all ranks of this launch."""
    return request.config.stash[RUNNER].world


@pytest.fixture
def rank_tmp_path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Collective. One fresh folder, the same on all ranks."""
    control = request.config.stash[RUNNER].control
    name = re.sub(r"\W", "_", request.node.name)[:30]
    return control.bcast(tmp_path_factory.mktemp(name) if control.rank == 0 else None)
