"""The residual and the velocity are those of the formulas, and a refused step leaves no trace."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from hpctrain.compress.feedback import Feedback, LocalRule
from hpctrain.compress.select import Selector

N, BLOCK = 230, 64
RULES = [
    LocalRule(momentum, nesterov, weight_decay, feedback, clips, masking)
    for momentum, nesterov, weight_decay, feedback, clips, masking in product(
        (0.0, 0.9), (False, True), (0.0, 0.01), (True, False), (False, True), (False, True)
    )
    if momentum or not (nesterov or masking)
]
NAMED = {"argvalues": RULES, "ids": lambda r: (
    f"{r.momentum}{'n' if r.nesterov else ''}-decay{r.weight_decay}"
    f"-{'kept' if r.feedback else 'lost'}-{'clip' if r.clips else 'free'}"
    f"{'-masked' if r.masking else ''}"
)}  # fmt: skip


class Textbook:
    """The docstring of `compress.feedback`, in float64."""

    def __init__(self, rule: LocalRule) -> None:
        self.rule = rule
        self.residual, self.velocity = np.zeros(N), np.zeros(N)

    def accumulate(self, grad: np.ndarray, params: np.ndarray, lr: float, clip: float) -> None:
        rule = self.rule
        grad = clip * grad + rule.weight_decay * params
        if rule.momentum:
            self.after = rule.momentum * self.velocity + grad
            grad = grad + rule.momentum * self.after if rule.nesterov else self.after
        self.acc = self.residual * rule.feedback + lr * grad

    def commit(self, indices: np.ndarray, sent: np.ndarray, *, sent_all: bool) -> None:
        self.residual = self.acc.copy()
        self.residual[indices] -= sent
        if self.rule.masking:
            self.after[indices] = 0.0
        if self.rule.momentum:
            self.velocity = self.after
        if sent_all or not self.rule.feedback:
            self.residual = np.zeros(N)


class Piece:
    """A `Feedback` with the memory it works on."""

    def __init__(self, rule: LocalRule, neighbours: int = 0, *, waits: bool = True) -> None:
        self.grads = [np.zeros(N, np.float32) for _ in range(neighbours + 1)]
        self.params = np.random.default_rng(1).standard_normal(N).astype(np.float32)
        self.sums = None if waits else np.zeros(N, np.float32)
        self.feedback = Feedback(
            rule, self.grads[0], self.grads[1:], self.params, self.sums, block=BLOCK
        )

    def fill(self, step: int, scale: float = 1.0) -> np.ndarray:
        """New gradients; their sum."""
        rng = np.random.default_rng(step)
        for grad in self.grads:
            grad[:] = rng.standard_normal(N) * scale
        return np.sum(self.grads, axis=0, dtype=np.float64)

    def memory(self) -> list[bytes]:
        feedback = self.feedback
        return [feedback.residual_N.tobytes(), feedback.velocity_N.tobytes()]


def close(found: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def pick(acc: np.ndarray, k: int) -> np.ndarray:
    return np.sort(np.argsort(-np.abs(acc), kind="stable")[:k]).astype(np.uint32)


@pytest.mark.parametrize("rule", **NAMED)
@pytest.mark.parametrize("neighbours", [0, 2])
def test_many_steps_follow_the_formulas(rule, neighbours):
    piece, book = Piece(rule, neighbours), Textbook(rule)
    feedback, selector = piece.feedback, Selector(N, BLOCK)
    for step in range(12):
        lr, clip = 0.1 + 0.05 * step, 0.7 if rule.clips and step % 3 else 1.0
        total = piece.fill(step)
        feedback.begin(lr, clip)
        book.accumulate(total, piece.params, lr, clip)
        everywhere = slice(None)
        sampled = feedback.sample(everywhere)
        close(sampled, book.acc)
        close(feedback.sample(slice(3, None, 17)), book.acc[3::17])
        if step % 2:
            assert feedback.prepare_all()
        picked = feedback.pick(selector, 20)
        assert picked.finite
        close(feedback.acc_N, book.acc)
        np.testing.assert_allclose(feedback.acc_N, sampled, rtol=1e-5, atol=1e-6)
        if rule.clips:
            assert feedback.grad_sq == pytest.approx(float(np.dot(total, total)), rel=1e-5)
        indices = pick(feedback.acc_N, 20)
        np.testing.assert_array_equal(picked.indices_K, indices)
        sent = feedback.acc_N[indices].astype(np.float16).astype(np.float32)
        feedback.take(indices, sent)
        whole = step == 7
        feedback.commit(sent_all=whole)
        book.commit(indices, sent, sent_all=whole)
        close(feedback.residual_N, book.residual)
        if rule.momentum:
            close(feedback.velocity_N, book.velocity)
        expected_sq = float(np.dot(book.residual, book.residual))
        assert feedback.residual_sq == pytest.approx(expected_sq, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("rule", **NAMED)
def test_without_a_residual_everything_goes(rule):
    piece, book = Piece(rule, 1, waits=False), Textbook(rule)
    feedback = piece.feedback
    assert len(feedback.residual_N) == 0
    for step in range(6):
        total = piece.fill(step)
        feedback.begin(0.3)
        book.accumulate(total, piece.params, 0.3, 1.0)
        close(feedback.sample(slice(0, N)), book.acc)
        assert feedback.prepare_all()
        close(feedback.acc_N, book.acc)
        feedback.publish()
        np.testing.assert_array_equal(piece.sums, feedback.acc_N)
        feedback.commit(sent_all=True)
        book.commit(np.empty(0, int), np.empty(0), sent_all=True)
        if rule.momentum:
            close(feedback.velocity_N, book.velocity)
        assert feedback.residual_sq == 0.0


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_publish_brings_acc_to_the_gradient(momentum):
    piece = Piece(LocalRule(momentum))
    for step in range(3):
        piece.fill(step)
        piece.feedback.begin(0.5)
        piece.feedback.prepare_all()
        piece.feedback.publish()
        np.testing.assert_array_equal(piece.grads[0], piece.feedback.acc_N)
        piece.feedback.commit()


@pytest.mark.parametrize("rule", **NAMED)
def test_no_rounding_is_lost(rule):
    """acc = sent + residual exactly, entry by entry, whatever is sent."""
    piece = Piece(rule)
    feedback = piece.feedback
    for step in range(4):
        piece.fill(step)
        feedback.begin(0.1)
        feedback.prepare_all()
        acc = feedback.acc_N.copy()
        indices = pick(acc, 50)
        # Half precision of a float32 leaves a difference that float32 holds exactly.
        sent = acc[indices].astype(np.float16).astype(np.float32)
        feedback.take(indices, sent)
        feedback.commit()
        if rule.feedback:
            rebuilt = feedback.residual_N.copy()
            rebuilt[indices] += sent
            np.testing.assert_array_equal(rebuilt, acc)
        else:
            assert not feedback.residual_N.any()


@pytest.mark.parametrize("rule", **NAMED)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3e38])
def test_a_step_that_is_not_committed_leaves_no_trace(rule, value):
    piece, twin = Piece(rule, 1), Piece(rule, 1)

    def take_step(piece: Piece, step: int) -> None:
        piece.fill(step)
        piece.feedback.begin(0.1, 0.5)
        piece.feedback.prepare_all()
        indices = pick(piece.feedback.acc_N, 30)
        piece.feedback.take(indices, piece.feedback.acc_N[indices])
        piece.feedback.commit()

    for step in range(3):
        take_step(piece, step)
        take_step(twin, step)
    before, norm = piece.memory(), piece.feedback.residual_sq
    for at in (0, BLOCK, N - 1):
        for rank in (0, 1):
            piece.fill(99)
            piece.grads[rank][at] = value
            piece.feedback.begin(10.0 if at or value == 3e38 else 0.0)
            piece.feedback.sample(slice(None))
            if rank:
                assert not piece.feedback.prepare_all()
            assert not piece.feedback.pick(Selector(N, BLOCK), 9).finite
            assert piece.memory() == before
    # A finite step that another party refuses, with something taken out already:
    piece.fill(98)
    piece.feedback.begin(0.1)
    assert piece.feedback.prepare_all()
    piece.feedback.take(np.arange(9, dtype=np.uint32), np.ones(9, np.float32))
    assert piece.memory() == before
    assert piece.feedback.residual_sq == norm
    take_step(piece, 5)
    take_step(twin, 5)
    assert piece.memory() == twin.memory()


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("masking", [False, True])
def test_masking_sets_the_velocity_to_zero_where_something_was_sent(nesterov, masking):
    piece = Piece(LocalRule(0.9, nesterov, masking=masking))
    feedback = piece.feedback
    for step in range(3):
        piece.fill(step)
        feedback.begin(0.1)
        feedback.prepare_all()
        indices = pick(feedback.acc_N, 40)
        feedback.take(indices, feedback.acc_N[indices])
        feedback.commit()
        assert feedback.velocity_N[indices].any() != masking
        others = np.setdiff1d(np.arange(N), indices)
        assert feedback.velocity_N[others].all()
        assert not feedback.residual_N[indices].any()


def test_a_warm_up_step_keeps_the_velocity_and_empties_the_residual():
    piece = Piece(LocalRule(0.9))
    feedback = piece.feedback
    piece.fill(0)
    feedback.begin(0.1)
    feedback.prepare_all()
    feedback.commit(sent_all=True)
    drawn = np.random.default_rng(0).standard_normal(N).astype(np.float32)
    np.testing.assert_array_equal(feedback.velocity_N, drawn)
    assert not feedback.residual_N.any()


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_loaded_memory_continues_bitwise(momentum):
    first, second = Piece(LocalRule(momentum)), Piece(LocalRule(momentum))

    def take_step(piece: Piece, step: int) -> None:
        piece.fill(step)
        piece.feedback.begin(0.1)
        piece.feedback.prepare_all()
        indices = pick(piece.feedback.acc_N, 30)
        piece.feedback.take(indices, piece.feedback.acc_N[indices])
        piece.feedback.commit()

    for step in range(5):
        take_step(first, step)
    velocity = first.feedback.velocity_N.copy() if momentum else None
    second.feedback.load(first.feedback.residual_N.copy(), velocity)
    assert second.feedback.residual_sq == pytest.approx(first.feedback.residual_sq, rel=1e-4)
    for step in range(5, 9):
        take_step(first, step)
        take_step(second, step)
        assert first.memory() == second.memory()


def test_without_watch_the_norm_is_unknown_and_all_else_the_same():
    watched, unwatched = Piece(LocalRule()), Piece(LocalRule())
    for step in range(3):
        for piece, watch in ((watched, True), (unwatched, False)):
            piece.fill(step)
            piece.feedback.begin(0.1, watch=watch)
            picked = piece.feedback.pick(Selector(N, BLOCK), 30)
            piece.feedback.take(picked.indices_K, picked.values_K)
            piece.feedback.commit()
        assert watched.memory() == unwatched.memory()
        norm = float(np.dot(watched.feedback.residual_N, watched.feedback.residual_N))
        assert watched.feedback.residual_sq == pytest.approx(norm, rel=1e-4)
        assert np.isnan(unwatched.feedback.residual_sq)


def test_residuals_are_never_rescaled():
    """Units of the update: another lr changes nothing of what waits."""
    piece = Piece(LocalRule())
    waiting = np.zeros(N)
    for step, lr in enumerate((1.0, 1e-3, 7.0, 0.0, 0.5)):
        waiting += lr * piece.fill(step)
        piece.feedback.begin(lr)
        piece.feedback.prepare_all()
        piece.feedback.commit()
        np.testing.assert_allclose(piece.feedback.residual_N, waiting, rtol=1e-5, atol=1e-5)
