"""The quantised exchange on threads: the textbook's numbers, nothing lost but what is said."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import nn

from hpctrain.compress.quantiser import Quantiser
from hpctrain.errors import ConfigError
from hpctrain.exchange.quantise import Quantise
from hpctrain.exchange.setting import Setting
from hpctrain.models.flat import FlatModel
from hpctrain.transport.threads import run_threads

SIZES = [1, 2, 3, 4, 8]
CODINGS = [("sign", 1), ("qsgd", 2), ("qsgd", 4), ("qsgd", 8)]
CHUNK = 64
SHAPES = [(12, 30), (30,), (9, 3, 4), (2, 5), (16, 10), (100,)]
COARSE = np.concatenate([[np.prod(s) >= CHUNK and len(s) > 1] * np.prod(s) for s in SHAPES])
N_COARSE, N_DENSE = int(COARSE.sum()), int((~COARSE).sum())


def config_of(coding, **keys):
    return Quantise(scheme=coding[0], bits=coding[1], chunk=CHUNK, **keys)


def make(shapes=SHAPES, dtype=torch.float32) -> FlatModel:
    module = nn.Module()
    for number, shape in enumerate(shapes):
        module.register_parameter(f"p{number}", nn.Parameter(torch.zeros(shape, dtype=dtype)))
    return FlatModel(module)


def build(comm, config, flat=None):
    flat = flat or make()
    return flat, config.build(Setting(flat, comm, lambda table, names: None))


def gradient(rank, step, n):
    generator = np.random.default_rng((rank, step))
    return generator.standard_normal(n).astype(np.float32) * (1 + rank)


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


def train(comm, steps, config, shapes=SHAPES):
    """(given, residual) of every step."""
    flat, exchange = build(comm, config, make(shapes))
    history = []
    for step in range(steps):
        finite, given = take_step(flat, exchange, gradient(comm.rank, step, flat.n_params))
        assert finite
        assert exchange.current == -1
        history.append((given, tensors(exchange)["residual"].numpy()))
    return history


def quantised(x, coding, draws):
    """What a rank sends, by the formulas, in float64."""
    sent = np.zeros(len(x))
    for start in range(0, len(x), CHUNK):
        part = x[start : start + CHUNK]
        if coding[0] == "sign":
            levels = np.where(part >= 0, 1.0, -1.0)
        else:
            ratio = (2 ** (coding[1] - 1) - 1) * np.abs(part) / np.abs(part).max()
            levels = np.sign(part) * np.floor(ratio + draws[start : start + CHUNK][: len(part)])
        sent[start : start + CHUNK] = levels * (part @ levels) / (levels @ levels)
    return sent


@pytest.mark.parametrize("size", SIZES[1:])
@pytest.mark.parametrize("coding", CODINGS)
def test_equals_the_textbook(size, coding):
    steps = 4
    results = run_threads(size, lambda comm: train(comm, steps, config_of(coding)))
    padded = -(-N_COARSE // CHUNK) * CHUNK
    residuals = np.zeros((size, N_COARSE))
    for step in range(steps):
        expected = sum(gradient(rank, step, len(COARSE)).astype(np.float64) for rank in range(size))
        expected[COARSE] = 0
        for rank in range(size):
            acc = residuals[rank] + gradient(rank, step, len(COARSE))[COARSE]
            draws = np.random.default_rng((rank, step)).random(padded, np.float32)
            sent = quantised(acc, coding, draws)
            expected[COARSE] += sent
            residuals[rank] = acc - sent
        for rank, history in enumerate(results):
            given, residual = history[step]
            np.testing.assert_allclose(given, expected, atol=2e-5 * size)
            np.testing.assert_allclose(residual, residuals[rank], atol=2e-5 * size)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("coding", CODINGS)
def test_given_and_residuals_conserve_the_sum_and_ranks_agree(size, coding):
    steps = 6
    results = run_threads(size, lambda comm: train(comm, steps, config_of(coding)))
    for history in results:
        for (given, _), (first, _) in zip(history, results[0], strict=True):
            np.testing.assert_array_equal(given, first)
    fresh = sum(
        gradient(rank, step, len(COARSE)).astype(np.float64)
        for rank in range(size)
        for step in range(steps)
    )
    missing = fresh - sum(given.astype(np.float64) for given, _ in results[0])
    left = sum(history[-1][1].astype(np.float64) for history in results)
    np.testing.assert_allclose(missing[COARSE], left, atol=2e-5 * size)
    np.testing.assert_allclose(missing[~COARSE], 0, atol=1e-5 * size)


@pytest.mark.parametrize("coding", CODINGS)
def test_residuals_stay_bounded(coding):
    def rank_program(comm):
        flat, exchange = build(comm, config_of(coding))
        norms = []
        for step in range(200):
            take_step(flat, exchange, gradient(comm.rank, step, flat.n_params))
            norms.append(float(tensors(exchange)["residual"].norm()))
        return norms

    for norms in run_threads(2, rank_program):
        assert max(norms[100:]) < 1.2 * max(norms[30:100])


@pytest.mark.parametrize("coding", CODINGS)
def test_without_feedback_every_step_stands_alone(coding):
    def rank_program(comm):
        config = config_of(coding, feedback=False)
        flat, exchange = build(comm, config)
        given = [
            take_step(flat, exchange, gradient(comm.rank, 0, flat.n_params))[1] for _ in range(2)
        ]
        assert not tensors(exchange)
        assert exchange.state().counters == {"steps": 2}
        return given

    for first, second in run_threads(2, rank_program):
        assert coding[0] == "qsgd" or np.array_equal(first, second)
        np.testing.assert_array_equal(first[~COARSE], second[~COARSE])


def test_without_feedback_the_scale_is_the_unbiased_one():
    def rank_program(comm):
        flat, exchange = build(comm, config_of(("qsgd", 4), feedback=False))
        grad = gradient(0, 0, flat.n_params)
        return grad, take_step(flat, exchange, grad * (comm.rank == 0))[1]

    for grad, given in run_threads(2, rank_program):
        sent, fresh = given[COARSE], grad[COARSE]
        for start in range(0, N_COARSE, CHUNK):
            part = slice(start, start + CHUNK)
            assert np.abs(sent[part]).max() == pytest.approx(np.abs(fresh[part]).max(), rel=1e-6)


@pytest.mark.parametrize("coding", CODINGS)
def test_gradients_made_of_levels_are_sent_whole(coding):
    top = 2 ** (coding[1] - 1) - 1 or 1

    def rank_program(comm):
        flat, exchange = build(comm, config_of(coding))
        signs = np.sign(gradient(comm.rank, 0, flat.n_params))
        grad = np.float32(top / 4) * signs
        given = take_step(flat, exchange, grad)[1]
        np.testing.assert_allclose(tensors(exchange)["residual"], 0, atol=1e-6)
        return grad, given

    (one, given), (other, _) = run_threads(2, rank_program)
    np.testing.assert_allclose(given, one + other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("coding", CODINGS)
def test_one_rank_loses_nothing_and_sends_what_others_left_behind(coding):
    def rank_program(comm):
        flat, exchange = build(comm, config_of(coding))
        state = exchange.state()
        state.tensors["residual"].tensor.fill_(2.0)
        exchange.load_state(state)
        grads = [gradient(0, step, flat.n_params) for step in range(2)]
        given = [take_step(flat, exchange, grad)[1] for grad in grads]
        assert not tensors(exchange)["residual"].any()
        assert comm.ledger.bytes_sent_intra == 0
        np.testing.assert_array_equal(given[0], grads[0] + np.float32(2) * COARSE)
        np.testing.assert_array_equal(given[1], grads[1])

    run_threads(1, rank_program)


@pytest.mark.parametrize("coding", CODINGS)
@pytest.mark.parametrize("feedback", [True, False])
def test_state_continues_bitwise(coding, feedback):
    config = config_of(coding, feedback=feedback)

    def rank_program(comm):
        flat, exchange = build(comm, config)
        for step in range(3):
            take_step(flat, exchange, gradient(comm.rank, step, flat.n_params))
        stored, counters = tensors(exchange), dict(exchange.state().counters)
        other_flat, other = build(comm, config)
        blank = other.state()
        for name, placed in blank.tensors.items():
            placed.tensor.copy_(stored[name])
        blank.counters.update(counters)
        other.load_state(blank)
        for step in range(3, 6):
            grad = gradient(comm.rank, step, flat.n_params)
            given = take_step(flat, exchange, grad)[1]
            np.testing.assert_array_equal(given, take_step(other_flat, other, grad)[1])
        assert same(tensors(exchange), tensors(other))
        assert exchange.state().counters == other.state().counters
        placed = exchange.state().tensors.values()
        assert {(entry.placement, entry.resize) for entry in placed} <= {("per_rank", "sum")}

    run_threads(3, rank_program)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("place", [0, 365, -1])
@pytest.mark.parametrize("coding", [CODINGS[0], CODINGS[2]])
def test_a_step_that_is_not_finite_leaves_no_trace(value, place, coding):
    def rank_program(comm):
        config = config_of(coding)
        (flat, exchange), (clean_flat, clean) = build(comm, config), build(comm, config)
        for step in range(4):
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


@pytest.mark.parametrize("coding", CODINGS)
def test_sums_that_overflow_are_not_finite_on_any_rank(coding):
    def rank_program(comm):
        flat, exchange = build(comm, config_of(coding))
        before = tensors(exchange)
        huge = np.where(COARSE, 3e38, 0).astype(np.float32)
        finite, _ = take_step(flat, exchange, huge)
        assert same(before, tensors(exchange))
        return finite

    assert run_threads(2, rank_program) == [False, False]


def test_a_finite_step_can_be_refused_too():
    def rank_program(comm):
        flat, exchange = build(comm, config_of(("qsgd", 4)))
        take_step(flat, exchange, gradient(comm.rank, 0, flat.n_params))
        before, counters = tensors(exchange), exchange.state().counters
        assert take_step(flat, exchange, gradient(comm.rank, 1, flat.n_params), keep=False)[0]
        assert same(before, tensors(exchange))
        assert exchange.state().counters == counters

    run_threads(2, rank_program)


@pytest.mark.parametrize("coding", CODINGS)
def test_zero_gradients_are_legal(coding):
    def rank_program(comm):
        flat, exchange = build(comm, config_of(coding))
        finite, given = take_step(flat, exchange, np.zeros(flat.n_params, np.float32))
        assert finite
        assert not given.any()
        assert not tensors(exchange)["residual"].any()

    run_threads(2, rank_program)


def test_a_model_of_small_parameters_is_summed():
    shapes = [(1,), (7,), (2, 2)]
    results = run_threads(3, lambda comm: train(comm, 2, Quantise(), shapes))
    for step, (given, residual) in enumerate(results[0]):
        assert residual.size == 0
        expected = sum(gradient(rank, step, 12) for rank in range(3))
        np.testing.assert_allclose(given, expected, atol=1e-5)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("coding", CODINGS)
def test_bytes_are_those_of_the_formula(size, coding):
    chunks = -(-N_COARSE // CHUNK)
    message = chunks * (4 + CHUNK * coding[1] // 8)
    assert Quantiser(N_COARSE, *coding, CHUNK).message_bytes == message

    def rank_program(comm):
        flat, exchange = build(comm, config_of(coding))
        take_step(flat, exchange, gradient(comm.rank, 0, flat.n_params))
        return comm.ledger.bytes_sent_intra

    stated = (size - 1) * message + 2 * (size - 1) * 4 * (2 + N_DENSE) // size
    assert run_threads(size, rank_program) == [stated] * size


def test_residual_norm_is_told_equally():
    def rank_program(comm):
        flat, exchange = build(comm, config_of(("sign", 1)))
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
        flat, exchange = build(comm, Quantise(chunk=32), make([(30, 20), (5,)]))
        flat.module.zero_grad(set_to_none=True)
        exchange.arm()
        sum(((comm.rank + 1) * p).sum() for p in flat.parameters).backward()
        assert exchange.finish()
        exchange.settle(keep=True)
        np.testing.assert_allclose(flat.grads_P.numpy(), 3.0, atol=1e-5)
        assert all(flat.owns_gradient(p) for p in flat.parameters)

    run_threads(2, rank_program)


def test_what_does_not_fit_is_refused():
    for keys in ({"bits": 4}, {"scheme": "qsgd"}, {"chunk": 33}, {"bits": 3}):
        with pytest.raises(ValidationError):
            Quantise(**keys)

    def rank_program(comm):
        with pytest.raises(ConfigError, match='use "float32"'):
            build(comm, Quantise(), make(dtype=torch.float64))
        state = build(comm, Quantise(feedback=False))[1].state()
        other = build(comm, Quantise())[1]
        with pytest.raises(ConfigError, match="Resume with"):
            other.load_state(state)

    run_threads(2, rank_program)
