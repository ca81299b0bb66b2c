"""PowerSGD on threads: the textbook's numbers, nothing lost, nothing kept of a refused step."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from hpctrain.errors import ConfigError
from hpctrain.exchange.powersgd import PowerSgd
from hpctrain.exchange.setting import Setting
from hpctrain.models.flat import FlatModel
from hpctrain.transport.threads import run_threads

SIZES = [1, 2, 3, 4, 8]
NOW = PowerSgd(start_step=0, min_compression_rate=1.0)
SHAPES = [(12, 30), (30,), (9, 3, 4), (2, 5), (16, 10)]
FACTORED = [(12, 30), (9, 12), (16, 10)]
DENSE = 30 + 10


def make(shapes=SHAPES, dtype=torch.float32) -> FlatModel:
    module = nn.Module()
    for number, shape in enumerate(shapes):
        module.register_parameter(f"p{number}", nn.Parameter(torch.zeros(shape, dtype=dtype)))
    return FlatModel(module)


def build(comm, config=NOW, flat=None):
    flat = flat or make()
    return flat, config.build(Setting(flat, comm, lambda table, names: None))


def gradient(rank, step, n):
    generator = np.random.default_rng((rank, step))
    return generator.standard_normal(n).astype(np.float32) * (1 + rank)


def summed(size, step, n):
    return sum(gradient(rank, step, n).astype(np.float64) for rank in range(size))


def take_step(flat, exchange, grad, *, keep=True):
    flat.zero_grad()
    flat.grads_P.copy_(torch.from_numpy(grad))
    exchange.arm(0.1)
    finite = exchange.finish()
    exchange.settle(keep=keep and finite)
    return finite, flat.grads_P.numpy().copy()


def tensors(exchange):
    return {name: placed.tensor.clone() for name, placed in exchange.state().tensors.items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def train(comm, steps, config=NOW, shapes=SHAPES):
    """(given, residual) of every step."""
    flat, exchange = build(comm, config, make(shapes))
    history = []
    for step in range(steps):
        finite, given = take_step(flat, exchange, gradient(comm.rank, step, flat.n_params))
        assert finite
        assert exchange.current == -1
        history.append((given, tensors(exchange)["residual"].numpy()))
    return history


def pieces(vector):
    """Each parameter's entries as a matrix."""
    bounds = np.cumsum([0, *map(math.prod, SHAPES)])
    return [
        vector[start:stop].reshape(shape[0], -1)
        for start, stop, shape in zip(bounds, bounds[1:], SHAPES, strict=False)
    ]


def textbook(size, steps, q_start):
    """Algorithms 1 and 2 with sums, in float64, matrix by matrix: given gradient and residuals."""
    qs, at = [], 0
    for _, columns in FACTORED:
        qs.append(q_start[at : at + 2 * columns].reshape(columns, 2).astype(np.float64))
        at += 2 * columns
    residuals = [[np.zeros(shape) for shape in FACTORED] for _ in range(size)]
    history = []
    for step in range(steps):
        n = sum(map(math.prod, SHAPES))
        grads = [pieces(gradient(rank, step, n).astype(np.float64)) for rank in range(size)]
        given = [sum(parts) for parts in zip(*grads, strict=True)]
        for number, position in enumerate((0, 2, 4)):
            accs = [grads[rank][position] + residuals[rank][number] for rank in range(size)]
            start = np.linalg.qr(qs[number])[0]
            p = np.linalg.qr(sum(acc @ start for acc in accs))[0]
            own = [acc.T @ p for acc in accs]
            qs[number] = sum(own)
            given[position] = p @ qs[number].T
            for rank in range(size):
                residuals[rank][number] = accs[rank] - p @ own[rank].T
        flat = np.concatenate([part.reshape(-1) for part in given])
        kept = [np.concatenate([m.reshape(-1) for m in mine]) for mine in residuals]
        history.append((flat, kept))
    return history


@pytest.mark.parametrize("size", SIZES[1:])
def test_equals_the_textbook(size):
    def start(comm):
        return tensors(build(comm)[1])["q"].numpy()

    expected = textbook(size, 6, run_threads(1, start)[0])
    for rank, history in enumerate(run_threads(size, lambda comm: train(comm, 6))):
        for (given, residual), (wanted, kept) in zip(history, expected, strict=True):
            np.testing.assert_allclose(given, wanted, atol=2e-4 * size)
            np.testing.assert_allclose(residual, kept[rank], atol=2e-4 * size)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("matrix_rank", [1, 2, 5])
def test_given_and_residuals_conserve_the_sum(size, matrix_rank):
    config = PowerSgd(start_step=2, min_compression_rate=0.5, matrix_rank=matrix_rank)
    results = run_threads(size, lambda comm: train(comm, 8, config))
    n = len(results[0][0][0])
    given = sum(history[0].astype(np.float64) for history in results[0])
    fresh = sum(summed(size, step, n) for step in range(8))
    missing = pieces(fresh - given)
    left = sum(history[-1][1].astype(np.float64) for history in results)
    matrices = [missing[at].reshape(-1) for at in (0, 2, 3, 4)]
    np.testing.assert_allclose(np.concatenate(matrices), left, atol=1e-4 * size)
    np.testing.assert_allclose(missing[1], 0, atol=1e-4 * size)


@pytest.mark.parametrize("size", SIZES)
def test_all_ranks_hold_the_same_bits(size):
    results = run_threads(size, lambda comm: train(comm, 5))
    for history in results:
        for (given, _), (first, _) in zip(history, results[0], strict=True):
            np.testing.assert_array_equal(given, first)


@pytest.mark.parametrize("size", [2, 3])
def test_the_first_steps_are_plain_sums(size):
    def rank_program(comm):
        flat, exchange = build(comm, PowerSgd(start_step=3, min_compression_rate=1.0))
        results = []
        for step in range(4):
            before = tensors(exchange)
            given = take_step(flat, exchange, gradient(comm.rank, step, flat.n_params))[1]
            results.append((given, same(before, tensors(exchange))))
        return results

    for results in run_threads(size, rank_program):
        for step, (given, unchanged) in enumerate(results):
            assert unchanged == (step < 3)
            exact = summed(size, step, len(given))
            assert np.allclose(given, exact, atol=1e-5 * size) == (step < 3)


def test_factors_of_full_rank_lose_nothing():
    config = PowerSgd(start_step=0, matrix_rank=99, min_compression_rate=0.1)

    results = run_threads(3, lambda comm: train(comm, 3, config))
    for step, ((given, _), *_) in enumerate(zip(*results, strict=True)):
        np.testing.assert_allclose(given, summed(3, step, len(given)), atol=1e-4)
    for residuals in zip(*[[left for _, left in history] for history in results], strict=True):
        np.testing.assert_allclose(sum(residuals), 0, atol=1e-4)


def test_a_gradient_of_low_rank_is_sent_whole():
    def rank_program(comm):
        flat, exchange = build(comm, PowerSgd(start_step=0), make([(40, 30)]))
        outer = np.outer(np.arange(1, 41), np.arange(30) - comm.rank).astype(np.float32)
        given = take_step(flat, exchange, outer.reshape(-1))[1]
        return given, tensors(exchange)["residual"].abs().max()

    results = run_threads(2, rank_program)
    expected = sum(np.outer(np.arange(1, 41), np.arange(30) - rank) for rank in range(2))
    for given, left in results:
        np.testing.assert_allclose(given, expected.reshape(-1), atol=2e-3)
        assert left < 2e-3


def test_one_rank_loses_nothing_and_sends_what_others_left_behind():
    def rank_program(comm):
        flat, exchange = build(comm)
        state = exchange.state()
        state.tensors["residual"].tensor.fill_(2.0)
        exchange.load_state(state)
        grads = [gradient(0, step, flat.n_params) for step in range(2)]
        given = [take_step(flat, exchange, grad)[1] for grad in grads]
        assert not tensors(exchange)["residual"].any()
        assert comm.ledger.bytes_sent_intra == 0
        return grads, given

    grads, given = run_threads(1, rank_program)[0]
    np.testing.assert_array_equal(given[1], grads[1])
    extra = pieces(given[0] - grads[0])
    assert [bool(part.any()) for part in extra] == [True, False, True, False, True]
    np.testing.assert_allclose(extra[0], 2.0, atol=1e-5)


def test_state_continues_bitwise():
    def rank_program(comm):
        flat, exchange = build(comm)
        for step in range(3):
            take_step(flat, exchange, gradient(comm.rank, step, flat.n_params))
        state = exchange.state()
        stored = {name: placed.tensor.clone() for name, placed in state.tensors.items()}
        counters = dict(state.counters)
        onwards = [
            take_step(flat, exchange, gradient(comm.rank, step, flat.n_params))[1]
            for step in range(3, 6)
        ]
        other_flat, other = build(comm)
        blank = other.state()
        for name, placed in blank.tensors.items():
            placed.tensor.copy_(stored[name])
        blank.counters.update(counters)
        other.load_state(blank)
        again = [
            take_step(other_flat, other, gradient(comm.rank, step, flat.n_params))[1]
            for step in range(3, 6)
        ]
        np.testing.assert_array_equal(onwards, again)
        assert same(tensors(exchange), tensors(other))
        assert exchange.state().counters == other.state().counters

    run_threads(3, rank_program)


def test_placements_conserve_the_sum_when_ranks_change():
    def rank_program(comm):
        placed = build(comm)[1].state().tensors
        return {name: (entry.placement, entry.resize) for name, entry in placed.items()}

    assert run_threads(1, rank_program)[0] == {
        "residual": ("per_rank", "sum"),
        "q": ("replicated", "keep"),
    }


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("place", [0, 365, -1])
@pytest.mark.parametrize("start_step", [0, 99])
def test_a_step_that_is_not_finite_leaves_no_trace(value, place, start_step):
    def rank_program(comm):
        config = PowerSgd(start_step=start_step, min_compression_rate=1.0)
        (flat, exchange), (clean_flat, clean) = build(comm, config), build(comm, config)
        for step in range(5):
            grad = gradient(comm.rank, step, flat.n_params)
            before = tensors(exchange)
            bad = grad.copy()
            if comm.rank == 1:
                bad[place] = value
            assert not take_step(flat, exchange, bad)[0]
            assert same(before, tensors(exchange))
            assert exchange.current == -1
            given = take_step(flat, exchange, grad)[1]
            np.testing.assert_array_equal(given, take_step(clean_flat, clean, grad)[1])

    run_threads(3, rank_program)


def test_sums_that_overflow_are_not_finite_on_any_rank():
    def rank_program(comm):
        flat, exchange = build(comm)
        before = tensors(exchange)
        huge = np.full(flat.n_params, 3e38, np.float32)
        with np.errstate(over="ignore"):
            finite, _ = take_step(flat, exchange, huge)
        assert same(before, tensors(exchange))
        return finite

    assert run_threads(2, rank_program) == [False, False]


def test_a_finite_step_can_be_refused_too():
    def rank_program(comm):
        flat, exchange = build(comm)
        take_step(flat, exchange, gradient(comm.rank, 0, flat.n_params))
        before = tensors(exchange)
        assert take_step(flat, exchange, gradient(comm.rank, 1, flat.n_params), keep=False)[0]
        assert same(before, tensors(exchange))

    run_threads(2, rank_program)


def test_zero_gradients_are_legal_and_leave_the_next_step_sound():
    def rank_program(comm):
        flat, exchange = build(comm)
        for _ in range(2):
            finite, given = take_step(flat, exchange, np.zeros(flat.n_params, np.float32))
            assert finite
            assert not given.any()
        grad = gradient(0, 0, flat.n_params)
        given = take_step(flat, exchange, grad)[1]
        return given, grad

    for given, grad in run_threads(2, rank_program):
        assert 0 < np.linalg.norm(given - 2 * grad) < np.linalg.norm(2 * grad)


def test_a_model_without_matrices_is_summed():
    shapes = [(1,), (7,), (2, 2)]
    for history in run_threads(3, lambda comm: train(comm, 2, NOW, shapes)):
        for step, (given, residual) in enumerate(history):
            assert residual.size == 0
            np.testing.assert_allclose(given, summed(3, step, len(given)), atol=1e-5)


@pytest.mark.parametrize("size", SIZES)
def test_bytes_are_those_of_the_formula(size):
    first = 4 * (2 + DENSE + sum(2 * rows for rows, _ in FACTORED))
    second = 4 * sum(2 * columns for _, columns in FACTORED)

    def rank_program(comm):
        flat, exchange = build(comm)
        take_step(flat, exchange, gradient(comm.rank, 0, flat.n_params))
        return comm.ledger.bytes_sent_intra

    stated = sum(2 * (size - 1) * part // size for part in (first, second))
    assert run_threads(size, rank_program) == [stated] * size


def test_residual_norm_is_told_equally():
    def rank_program(comm):
        flat, exchange = build(comm)
        take_step(flat, exchange, gradient(comm.rank, 0, flat.n_params))
        left = tensors(exchange)["residual"]
        assert exchange.tally() == {"residual_norm": 0.0}
        take_step(flat, exchange, gradient(comm.rank, 1, flat.n_params))
        return exchange.tally()["residual_norm"], float(left.square().sum())

    results = run_threads(3, rank_program)
    norms = {norm for norm, _ in results}
    assert len(norms) == 1
    assert norms.pop() == pytest.approx(math.sqrt(sum(left for _, left in results)), rel=1e-5)


def test_gradients_set_to_none_are_adopted():
    def rank_program(comm):
        flat, exchange = build(comm, NOW, make([(30, 20), (5,)]))
        flat.module.zero_grad(set_to_none=True)
        exchange.arm()
        sum(((comm.rank + 1) * p).sum() for p in flat.parameters).backward()
        assert exchange.finish()
        exchange.settle(keep=True)
        np.testing.assert_allclose(flat.grads_P.numpy(), 3.0, atol=1e-5)
        assert all(flat.owns_gradient(p) for p in flat.parameters)

    run_threads(2, rank_program)


def test_what_does_not_fit_is_refused():
    def rank_program(comm):
        with pytest.raises(ConfigError, match='use "float32"'):
            build(comm, NOW, make(dtype=torch.float64))
        state = build(comm)[1].state()
        other = build(comm, PowerSgd(matrix_rank=1, min_compression_rate=1.0))[1]
        with pytest.raises(ConfigError, match="Resume with"):
            other.load_state(state)

    run_threads(2, rank_program)
