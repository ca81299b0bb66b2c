from __future__ import annotations

import sys
import threading

import pytest

from hpctrain.errors import BackendError, DataError
from hpctrain.transport.abort import AbortGuard, exit_code_of


class Fake:
    def __init__(self, *, all_leave: bool = False) -> None:
        self.codes: list[int] = []
        self.guard = AbortGuard(
            label="rank 0/2 here",
            rank=0,
            abort_all=self.codes.append,
            all_leave=lambda: all_leave,
        )


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (SystemExit(), 0),
        (SystemExit(75), 75),
        (SystemExit("text"), 1),
        (DataError("x"), 65),
        (BackendError("x"), 69),
        (KeyboardInterrupt(), 130),
        (ZeroDivisionError(), 70),
    ],
)
def test_exit_codes(error: BaseException, code: int) -> None:
    assert exit_code_of(error) == code


def test_an_exception_ends_all_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    fake = Fake()
    told: list[int] = []
    fake.guard.before_abort.append(told.append)
    with pytest.raises(SystemExit), fake.guard.guarded():
        raise ZeroDivisionError("boom")
    assert fake.codes == told == [70]
    lines = capsys.readouterr().err.splitlines()
    assert all(line.startswith("[rank 0/2 here] ") for line in lines)
    assert lines[0].endswith("Traceback (most recent call last):")
    assert lines[-1].endswith("ZeroDivisionError: boom")


def test_an_error_with_a_remedy_has_no_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    fake = Fake()
    with pytest.raises(SystemExit), fake.guard.guarded():
        raise DataError("file x ends early\nfetch it again")
    assert fake.codes == [65]
    assert capsys.readouterr().err.splitlines() == [
        "[rank 0/2 here] DataError: file x ends early",
        "[rank 0/2 here] fetch it again",
    ]


def test_a_callback_that_fails_does_not_stop_the_abort() -> None:
    fake = Fake()
    fake.guard.before_abort.append(lambda code: 1 // 0)  # type: ignore[arg-type, return-value]
    with pytest.raises(SystemExit):
        fake.guard.abort(3)
    assert fake.codes == [3]


@pytest.mark.parametrize(("code", "all_leave"), [(0, False), (None, False), (75, True)])
def test_exits_of_all_ranks_are_no_failure(code: int | None, all_leave: bool) -> None:
    fake = Fake(all_leave=all_leave)
    with pytest.raises(SystemExit) as caught, fake.guard.guarded():
        sys.exit(code)
    assert caught.value.code == code
    assert fake.codes == []


def test_a_lonely_exit_ends_all_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    fake = Fake()
    with pytest.raises(SystemExit), fake.guard.guarded():
        sys.exit(75)
    assert fake.codes == [75]
    assert "exits with code 75 while other ranks go on" in capsys.readouterr().err


def test_hooks_catch_what_escapes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)
    fake = Fake()
    fake.guard.install()

    def body() -> None:
        raise OSError("gone")

    thread = threading.Thread(target=body, name="loader")
    thread.start()
    thread.join()
    assert fake.codes == [70]
    assert "in thread loader" in capsys.readouterr().err
    other = Fake()
    other.guard.install()
    with pytest.raises(SystemExit):
        sys.excepthook(DataError, DataError("bad"), None)
    assert other.codes == [65]


def test_higher_ranks_let_lower_ones_speak_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """So an error that all ranks have is printed by rank 0, whose abort ends the others."""
    pauses: list[float] = []
    monkeypatch.setattr("time.sleep", pauses.append)
    for rank in (0, 1, 2, 1000):
        guard = AbortGuard(label="", rank=rank, abort_all=id, all_leave=lambda: False)
        with pytest.raises(SystemExit):
            guard.abort(1)
    assert pauses[0] == 0
    assert 0 < pauses[1] < pauses[2] <= pauses[3] <= 1
