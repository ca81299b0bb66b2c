"""What every exchange must do, written once: functions of (communicator, row) that assert.

A row is an [exchange] table. `tests/unit/test_exchanges.py` runs them on threads,
`tests/ranks/test_exchanges.py` under mpirun. Gradients are given, by a loss that is linear in the
parameters, so what must come out is known exactly.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import nn

from hpctrain.compress.lowrank import factor_columns
from hpctrain.compress.wire import Coding
from hpctrain.drop_in import attach
from hpctrain.exchange import ExchangeConfig
from hpctrain.exchange.auto import Auto
from hpctrain.exchange.cyclic import Cyclic
from hpctrain.exchange.dense import Dense
from hpctrain.exchange.powersgd import PowerSgd
from hpctrain.exchange.quantise import Quantise
from hpctrain.exchange.setting import Setting
from hpctrain.exchange.topk import Topk
from hpctrain.hardware import make_reducer
from hpctrain.models.flat import FlatModel
from hpctrain.optimiser import OptimiserConfig, Sgd
from hpctrain.state import shard_bounds
from hpctrain.transport.communicator import Communicator

Shapes = Sequence[tuple[int, ...]]
SHAPES: Shapes = ((9, 40), (6,), (7, 11), (1, 5), (5, 13, 2), (3,))
LRS = (0.5, 0.1, 0.0, 0.3, 1.0, 0.02, 0.2, 0.4)
TINY = {"density": 0.1, "dense_below": 20, "bucket_mib": 2e-4}


@dataclass(frozen=True)
class Row:
    """An [exchange] table under a name."""

    name: str
    config: ExchangeConfig
    conserves: bool = True
    """Whether what is not sent waits."""
    optimiser: OptimiserConfig = Sgd()

    def __str__(self) -> str:
        return self.name


def topk(algorithm: str, index: str, values: str, gives: str, **keys: object) -> Row:
    who = "" if keys.get("hierarchy", True) else "-flat"
    extra = "".join(f"-{key}" for key in keys if key != "hierarchy")
    table = TINY | {
        "algorithm": algorithm, "index": index, "values": values, "gives": gives, **keys
    }  # fmt: skip
    return Row(
        f"{algorithm}-{index}-{values}-{gives}{who}{extra}",
        Topk(**table),
        conserves=bool(keys.get("feedback", True)),
    )


TOPK = [
    topk("gather", "uint32", "float32", "update"),
    topk("gather", "block16", "float16", "gradient"),
    topk("gather", "uint32", "bfloat16", "update", hierarchy=False),
    topk("gather", "uint32", "float32", "update", feedback=False),
    topk("gather", "block16", "float16", "update", warmup_steps=4),
    topk("exclusive", "uint32", "float32", "update"),
    topk("exclusive", "block16", "float16", "gradient", hierarchy=False),
    topk("exclusive", "block16", "sign", "update"),
    topk("exclusive", "block16", "bfloat16", "update", xi_every=2),
    topk("owner", "uint32", "float32", "gradient"),
    topk("owner", "block16", "float16", "update"),
    topk("owner", "block16", "sign", "update", hierarchy=False),
]
ROWS = [
    Row("dense", Dense(dense_backend="mpi", bucket_mib=2e-4)),
    *TOPK,
    Row("auto", Auto(**TINY)),
    Row("powersgd", PowerSgd(start_step=2, min_compression_rate=1.0)),
    Row("quantise-sign", Quantise(chunk=32)),
    Row("quantise-qsgd4", Quantise(scheme="qsgd", bits=4, chunk=32)),
]


class Given(nn.Module):
    """Parameters of given shapes; equal on all ranks."""

    def __init__(self, shapes: Shapes) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(7)
        self.weights = nn.ParameterList(
            nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes
        )


class Rig:
    """One rank's model and exchange. Collective to make."""

    def __init__(self, comm: Communicator, row: Row, shapes: Shapes = SHAPES) -> None:
        self.comm, self.row = comm, row
        self.flat = FlatModel(Given(shapes), row.config.comes_last)
        reducers = partial(make_reducer, comm=comm, device=torch.device("cpu"), stall_check_s=60.0)
        self.exchange = row.config.build(Setting(self.flat, comm, reducers, row.optimiser))
        self.n = self.flat.n_params
        self.begun_P = self.params()
        self.given_P = np.zeros(self.n)

    def params(self) -> np.ndarray:
        return self.flat.params_P.numpy().copy()

    def backward(self, grad_P: np.ndarray, skip: Sequence[int] = ()) -> None:
        """A backward pass that leaves `grad_P`, without the parameters in `skip`."""
        parts = self.flat.views(torch.from_numpy(grad_P))
        loss = torch.zeros(())
        for position, (parameter, part) in enumerate(zip(self.flat.parameters, parts, strict=True)):
            if position not in skip:
                loss = loss + (parameter * part).sum()
        if loss.requires_grad:
            loss.backward()

    def step(
        self,
        grads: Sequence[np.ndarray],
        lr: float = 1.0,
        skip: Sequence[int] = (),
        keep: bool | None = None,
    ) -> bool:
        """Collective. A step of some micro-batches, maybe none; whether it was finite."""
        self.flat.zero_grad()
        if not grads:
            self.exchange.arm(lr)
        for number, grad_P in enumerate(grads, start=1):
            if number == len(grads):
                self.exchange.arm(lr)
            self.backward(grad_P, skip)
        finite = self.exchange.finish()
        self.exchange.settle(keep=finite if keep is None else keep)
        if self.exchange.gives == "gradient" and finite and keep is not False:
            self.given_P += self.flat.grads_P.numpy()
        return finite

    def applied(self) -> np.ndarray:
        """Everything that has come out so far, in the units of the exchange."""
        if self.exchange.gives == "gradient":
            return self.given_P.copy()
        return self.begun_P.astype(np.float64) - self.params()

    def weight(self, lr: float) -> float:
        """What the exchange makes of a gradient at this lr."""
        return lr if self.exchange.gives == "update" else 1.0

    def waiting(self) -> np.ndarray:
        """Collective. All that waits on all ranks, by entry."""
        total_P = np.zeros(self.n)
        placed = self.exchange.state().tensors.get("residual")
        if placed is not None:
            values = placed.tensor.numpy().astype(np.float64).ravel()
            if placed.pieces is not None:
                where = [span.indices().numpy() for span in placed.pieces.spans]
            else:
                where = [np.arange(part.start, part.stop) for part in self._compressed()]
            indices = np.concatenate([np.empty(0, np.int64), *where])
            assert len(indices) == len(values)
            np.add.at(total_P, indices, values)
        self.comm.allreduce(total_P)
        return total_P

    def memory(self) -> list[bytes]:
        """Parameters and the exchange's state, bit by bit."""
        tensors = self.exchange.state().tensors
        return [
            self.params().tobytes(),
            *(tensors[name].tensor.numpy().tobytes() for name in sorted(tensors)),
        ]

    def _compressed(self) -> list[slice]:
        """The parameters that powersgd and quantise compress."""
        config, pairs = self.row.config, zip(self.flat.slices, self.flat.shapes, strict=True)
        if isinstance(config, PowerSgd):
            return [
                where
                for where, shape in pairs
                if factor_columns(shape, config.matrix_rank, config.min_compression_rate)
            ]
        assert isinstance(config, Quantise)
        return [where for where, shape in pairs if len(shape) > 1 and shape.numel() >= config.chunk]


def gradient(rank: int, step: int, n: int) -> np.ndarray:
    """Of one rank at one step, heavy-tailed; any rank can compute any other's."""
    rng = np.random.default_rng([step, rank])
    return (rng.standard_normal(n) * np.exp(rng.standard_normal(n))).astype(np.float32)


def summed(comm: Communicator, step: int, n: int) -> np.ndarray:
    return np.sum([gradient(rank, step, n) for rank in range(comm.size)], axis=0, dtype=np.float64)


def assert_same_bits(comm: Communicator, data: bytes) -> None:
    assert len(set(comm.allgather_bytes(data))) == 1


def assert_close(found: np.ndarray, expected: np.ndarray, tolerance: float = 2e-6) -> None:
    """To rounding: the error is measured against the largest entry."""
    scale = max(1.0, float(np.abs(expected).max(initial=0.0)))
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * scale * 4)


def assert_conserved(rig: Rig, expected_P: np.ndarray) -> None:
    """Collective. What came out and what waits is what went in, and ranks agree bit by bit."""
    assert_same_bits(rig.comm, rig.params().tobytes())
    assert_same_bits(rig.comm, rig.applied().tobytes())
    waiting_P = rig.waiting()
    if rig.row.conserves or rig.comm.size == 1:
        assert_close(rig.applied() + waiting_P, expected_P)
    else:
        assert not waiting_P.any()


def what_is_sent_and_what_waits_is_what_came_in(comm: Communicator, row: Row) -> None:
    rig = Rig(comm, row)
    expected_P = np.zeros(rig.n)
    for step, lr in enumerate(LRS + LRS[:2]):
        assert rig.step([gradient(comm.rank, step, rig.n)], lr)
        expected_P += rig.weight(lr) * summed(comm, step, rig.n)
        if step in (0, 2, 5, 9):
            assert_conserved(rig, expected_P)
    told = rig.exchange.tally()
    assert_same_bits(comm, repr([told.get("density"), told.get("residual_norm")]).encode())
    rig.exchange.close()


def the_residual_norm_is_that_of_the_residuals(comm: Communicator, row: Row) -> None:
    rig = Rig(comm, row)
    for step in range(4):
        placed = rig.exchange.state().tensors.get("residual")
        squares = np.zeros(1)
        if placed is not None:
            values = placed.tensor.numpy().astype(np.float64)
            pieces = placed.pieces
            if pieces is not None and pieces.spare:
                kept = pieces.spans[: len(pieces.spans) - pieces.spare]
                values = values[: sum(len(span.indices()) for span in kept)]
            squares[0] = np.dot(values, values)
        comm.allreduce(squares)
        rig.step([gradient(comm.rank, step, rig.n)], 0.3)
        told = rig.exchange.tally()
        if "residual_norm" in told:
            np.testing.assert_allclose(told["residual_norm"], squares[0] ** 0.5, rtol=1e-3)
    rig.exchange.close()


def micro_batches_unused_parameters_and_ranks_without_samples(comm: Communicator, row: Row) -> None:
    rig = Rig(comm, row)
    expected_P = np.zeros(rig.n)
    for step, lr in enumerate(LRS):
        total_P = np.zeros(rig.n)
        for rank in range(comm.size):
            parts = [gradient(rank, 10 * step + part, rig.n) for part in range(step % 3 + 1)]
            if step % 2 and rank == step // 2 % comm.size:
                parts = []
            skip = [step % len(SHAPES)] if step > 3 else []
            if rank == comm.rank:
                mine = parts, skip
            for part_P in parts:
                part_P = part_P.copy()
                for position in skip:
                    part_P[rig.flat.slices[position]] = 0.0
                total_P += part_P
        assert rig.step(mine[0], lr, mine[1])
        expected_P += rig.weight(lr) * total_P
        if step in (1, 4, 7):
            assert_conserved(rig, expected_P)
    rig.exchange.close()


ODD: list[tuple[int, Shapes]] = [
    (0, [(1, 1)]),
    (0, [(2, 2), (3, 1)]),
    (0, [(60, 50)]),
    (0, [(30, 10), (8, 4)]),
    (0, [(), (5, 30)]),
    (20, [(40,)]),
    (20, [(4, 4), (3, 5), (2,)]),
]
"""dense_below and shapes: one parameter, one entry, no small parameter, only small ones."""


def odd_gradient(kind: int, rank: int, step: int, n: int) -> np.ndarray:
    """Heavy-tailed; zero; one entry on one rank; all equal; very small."""
    if kind == 1:
        return np.zeros(n, np.float32)
    if kind == 2:
        return (np.arange(n) == n // 2).astype(np.float32) * np.float32(-(rank == 0))
    if kind == 3:
        return np.ones(n, np.float32)
    return gradient(rank, step, n) * np.float32(1e-20 if kind == 4 else 1.0)


def odd_models_and_gradients(comm: Communicator, row: Row) -> None:
    for below, shapes in ODD:
        keys = {"dense_below": below} if isinstance(row.config, Topk | Auto) else {}
        rig = Rig(comm, replace(row, config=row.config.model_copy(update=keys)), shapes)
        expected_P = np.zeros(rig.n)
        for step, kind in enumerate((1, 2, 0, 1, 2, 3, 4, 0)):
            assert rig.step([odd_gradient(kind, comm.rank, step, rig.n)], 0.5)
            expected_P += rig.weight(0.5) * np.sum(
                [odd_gradient(kind, rank, step, rig.n) for rank in range(comm.size)],
                axis=0,
                dtype=np.float64,
            )
            if step in (1, 4, 7):
                assert_conserved(rig, expected_P)
        rig.exchange.close()


def one_value_that_is_not_finite_changes_nothing(comm: Communicator, row: Row) -> None:
    if isinstance(row.config, Dense):
        return  # it looks at nothing; the loop does
    row = replace(row, optimiser=Sgd(momentum=0.9, clip_norm=30.0))
    rig, twin = Rig(comm, row), Rig(comm, row)
    refusals = (
        (np.nan, 0, 0),
        (np.inf, comm.size - 1, -1),
        (-np.inf, comm.size // 2, 400),
        (np.nan, comm.size - 1, 361),
    )
    for step, (value, rank, at) in enumerate(refusals):
        for both in (rig, twin):
            assert both.step([gradient(comm.rank, step, rig.n)], 0.2)
        before = rig.memory()
        grad_P = gradient(comm.rank, 10 + step, rig.n)
        if comm.rank == rank:
            grad_P[at] = value
        assert not rig.step([grad_P], 0.2 * (step % 2))
        assert rig.memory() == before
        # A finite step can be refused as well.
        rig.step([gradient(comm.rank, 20 + step, rig.n)], 0.2, keep=False)
        assert rig.memory() == before
        if skips_steps(row.config):
            assert before == twin.memory()
    assert_same_bits(comm, rig.params().tobytes())
    rig.exchange.close()
    twin.exchange.close()


def skips_steps(config: ExchangeConfig) -> bool:
    """Whether a refused step leaves no trace in what comes later: no rotation, no warm-up."""
    if isinstance(config, Topk):
        return config.algorithm != "exclusive" and not config.warmup_steps
    return not isinstance(config, Auto)


def full_density_is_dense(comm: Communicator, row: Row) -> None:
    """Bit by bit the same on all ranks, and the optimiser's own rule to rounding."""
    rule = {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01}
    config = row.config.model_copy(update={"density": 1.0, "warmup_steps": 0})
    rig = Rig(comm, replace(row, config=config, optimiser=Sgd(**rule)))
    weights_P = torch.from_numpy(rig.params().astype(np.float64)).requires_grad_()
    sgd = torch.optim.SGD([weights_P], lr=1.0, **rule)
    given_P = np.zeros(rig.n)
    for step, lr in enumerate(LRS):
        assert rig.step([gradient(comm.rank, step, rig.n)], lr)
        given_P += summed(comm, step, rig.n)
        weights_P.grad = torch.from_numpy(summed(comm, step, rig.n))
        sgd.param_groups[0]["lr"] = lr
        sgd.step()
    assert not rig.waiting().any()
    if rig.exchange.gives == "update":
        assert_close(rig.params(), weights_P.detach().numpy())
    else:
        assert_close(rig.applied(), given_P)
    assert_same_bits(comm, rig.params().tobytes())
    rig.exchange.close()


def all_that_came_in_is_momentum_sgd(comm: Communicator, row: Row) -> None:
    """Parameters less everything that waits move as under momentum SGD, to rounding."""
    config = row.config.model_copy(update={"masking": False})
    rig = Rig(comm, replace(row, config=config, optimiser=Sgd(momentum=0.9)))
    weights_P, velocity_P = rig.params().astype(np.float64), np.zeros(rig.n)
    for step in range(12):
        lr = LRS[step % len(LRS)]
        assert rig.step([gradient(comm.rank, step, rig.n)], lr)
        velocity_P = 0.9 * velocity_P + summed(comm, step, rig.n)
        weights_P -= lr * velocity_P
        assert_close(rig.params() - rig.waiting(), weights_P, 1e-4)
    rig.exchange.close()


def parties_of(comm: Communicator, config: Topk) -> tuple[list[list[int]], int]:
    """The ranks of each party, and the shards per bucket."""
    topology = comm.topology
    if not config.hierarchy:
        return [[rank] for rank in range(comm.size)], 1
    nodes = [list(topology.ranks_on(node)) for node in range(topology.n_nodes)]
    return nodes, min(len(ranks) for ranks in nodes)


def shards_of(rig: Rig) -> list[tuple[int, int, int]]:
    """(start, stop, entries to send; 0 = whole) of each shard, one bucket per large parameter."""
    config = rig.row.config
    assert isinstance(config, Topk)
    parties, places = parties_of(rig.comm, config)
    found, small = [], []
    for where, shape in zip(rig.flat.slices, rig.flat.shapes, strict=True):
        if config.comes_last(shape):
            small.append(where)
            continue
        for place in range(places):
            start, stop = shard_bounds(where.stop - where.start, place, places)
            count = 0
            if len(parties) > 1 and config.density < 1.0:
                count = min(stop - start, int(np.ceil(config.density * (stop - start))))
            found.append((where.start + start, where.start + stop, count))
    if small:
        first, last = small[0].start, small[-1].stop
        for place in range(places):
            start, stop = shard_bounds(last - first, place, places)
            found.append((first + start, first + stop, 0))
    return found


def gather_is_the_textbook_algorithm(comm: Communicator, row: Row) -> None:
    """Alistarh et al. 2018, Algorithm 1, with momentum before selection (Lin et al. 2018)."""
    rule = Sgd(momentum=0.9, nesterov=True, weight_decay=0.02, clip_norm=20.0)
    config = row.config.model_copy(update={"bucket_mib": 1e-6})
    rig = Rig(comm, replace(row, config=config, optimiser=rule))
    parties, _ = parties_of(comm, rig.row.config)
    count = len(parties)
    weights_P = rig.params().astype(np.float64)
    residual, velocity = np.zeros((2, count, rig.n))
    factors = np.ones(count)
    for step in range(20):
        lr = LRS[step % len(LRS)]
        total_P = np.zeros(rig.n)
        for party, ranks in enumerate(parties):
            grad_P = np.sum(
                [gradient(rank, step, rig.n) for rank in ranks], axis=0, dtype=np.float64
            )
            norm = np.linalg.norm(grad_P)
            grad_P = factors[party] * grad_P + rule.weight_decay / count * weights_P
            factors[party] = min(1.0, rule.clip_norm / (np.sqrt(count) * norm))
            velocity[party] = rule.momentum * velocity[party] + grad_P
            acc_P = residual[party] + lr * (grad_P + rule.momentum * velocity[party])
            for start, stop, k in shards_of(rig):
                chosen = np.argsort(-np.abs(acc_P[start:stop]), kind="stable")[: k or stop - start]
                where = start + chosen
                total_P[where] += acc_P[where]
                acc_P[where] = 0.0
                if k and config.masking:
                    velocity[party, where] = 0.0
            residual[party] = acc_P
        weights_P -= total_P
        assert rig.step([gradient(comm.rank, step, rig.n)], lr)
        assert_close(rig.params(), weights_P, 1e-5)
        assert_close(rig.waiting(), residual.sum(0), 1e-5)
    for name, of_party in (("residual", residual), ("velocity", velocity)):
        placed = rig.exchange.state().tensors.get(name)
        if placed is None:
            continue
        assert placed.pieces is not None
        party = next(number for number, ranks in enumerate(parties) if comm.rank in ranks)
        assert (placed.pieces.party, placed.pieces.parties) == (party, count)
        where = [span.indices().numpy() for span in placed.pieces.spans]
        mine = of_party[party][np.concatenate([np.empty(0, int), *where])]
        assert_close(placed.tensor.numpy(), mine, 1e-5)
    rig.exchange.close()


def exactly_k_entries_go_out(comm: Communicator, row: Row) -> None:
    """Of float32 values nothing is left where something was sent."""
    config = row.config.model_copy(update={"bucket_mib": 1e-6, "xi_every": 0})
    rig = Rig(comm, replace(row, config=config))
    parties, places = parties_of(comm, config)
    count = len(parties)
    cut = {(start, stop): k for start, stop, k in shards_of(rig)}
    for step in range(12):
        before_P = rig.applied()
        rig.step([gradient(comm.rank, step, rig.n)], 0.5)
        changed = np.flatnonzero(rig.applied() - before_P)
        placed = rig.exchange.state().tensors["residual"]
        assert placed.pieces is not None
        at = 0
        for span in placed.pieces.spans[: len(placed.pieces.spans) - placed.pieces.spare]:
            k = cut[span.start, span.stop]
            n = span.stop - span.start
            sent = int((placed.tensor[at : at + n] == 0.0).sum())
            at += n
            if not k:
                assert sent == n
            elif config.algorithm == "gather":
                assert sent == k
            elif config.algorithm == "exclusive":
                parts = [shard_bounds(n, part, count) for part in range(count)]
                assert sent == sum(min(stop - start, -(-k // count)) for start, stop in parts)
            else:
                assert 0 < sent <= k
        for (start, stop), k in cut.items():
            inside = np.count_nonzero((changed >= start) & (changed < stop))
            most = {"gather": count * k}.get(config.algorithm, count * -(-k // count))
            assert inside <= (most if k else stop - start)
    rig.exchange.close()


def exact_bytes(rig: Rig) -> int:
    """What all ranks together send per step, headers and spare room included."""
    config = rig.row.config
    assert isinstance(config, Topk)
    coding = config.coding
    size = len(parties_of(rig.comm, config)[0])
    total = 0
    for start, stop, k in shards_of(rig):
        n = stop - start
        if not k:
            total += size * (2 * (size - 1) * 4 * n // size)
        elif config.algorithm == "gather":
            total += size * (size - 1) * coding.slot_bytes(n, k)
        elif config.algorithm == "exclusive":
            part, each = shard_bounds(n, 0, size)[1], -(-k // size)
            places = Coding(coding.index, "none").slot_bytes(part, each)
            numbers = Coding("none", coding.value).slot_bytes(part, each)
            total += size * (size - 1) * (places + 2 * numbers)
        else:
            part, each = Cyclic(n, size).length(0), k / size
            room = min(part, k, int(np.ceil(each + 4 * each**0.5)))
            total += size * (size - 1) * (
                coding.slot_bytes(part, room) + coding.slot_bytes(part, -(-k // size))
            )  # fmt: skip
    return total


def formula_bytes(rig: Rig) -> float:
    """What a party sends per step by the formulas in the modules' texts."""
    config = rig.row.config
    assert isinstance(config, Topk)
    size = len(parties_of(rig.comm, config)[0])
    index = {"uint32": 4, "block16": 2}[config.index]
    value = {"float32": 4, "float16": 2, "bfloat16": 2, "sign": 0.125}[config.values]
    total = 0.0
    for start, stop, k in shards_of(rig):
        if not k:
            total += 2 * (size - 1) / size * 4 * (stop - start)
        elif config.algorithm == "gather":
            total += k * (size - 1) * (index + value)
        elif config.algorithm == "exclusive":
            total += k * (size - 1) / size * (index + 2 * value)
        else:
            total += 2 * k * (size - 1) / size * (index + value)
    return total


def bytes_counted_are_bytes_stated(comm: Communicator, row: Row) -> None:
    config = row.config.model_copy(update={"bucket_mib": 1e-6, "warmup_steps": 0, "xi_every": 0})
    rig = Rig(comm, replace(row, config=config), [(90, 800), (6,), (7, 11), (70, 30)])
    ledger = comm.ledger
    for step in range(3):
        before = np.array([ledger.bytes_sent_intra, ledger.bytes_sent_inter], np.int64)
        rig.step([gradient(comm.rank, step, rig.n)])
        spent = np.array([ledger.bytes_sent_intra, ledger.bytes_sent_inter], np.int64) - before
        comm.allreduce(spent)
        # A ring's share is rounded down rank by rank.
        assert abs(int(spent.sum()) - exact_bytes(rig)) <= comm.size
        if config.hierarchy:
            assert spent[0] == 0
        told = rig.exchange.tally()
        np.testing.assert_allclose(told["bytes_formula"], formula_bytes(rig), rtol=1e-9)
        sent = sum(k or stop - start for start, stop, k in shards_of(rig))
        np.testing.assert_allclose(told["density"], sent / rig.n, rtol=1e-9)
    rig.exchange.close()


def warm_up_goes_down_to_the_density(comm: Communicator, row: Row) -> None:
    """The density goes down in stages and nothing is lost on the way."""
    config = row.config.model_copy(update={"warmup_steps": 6, "density": 0.01, "tune": None})
    rig = Rig(comm, replace(row, config=config))
    expected_P = np.zeros(rig.n)
    densities = []
    for step in range(9):
        rig.step([gradient(comm.rank, step, rig.n)], 0.5)
        expected_P += rig.weight(0.5) * summed(comm, step, rig.n)
        assert_conserved(rig, expected_P)
        densities.append(rig.exchange.tally()["density"])
    assert densities == sorted(densities, reverse=True)
    if len(parties_of(comm, config)[0]) > 1:
        assert densities[0] > 2 * densities[-1]
    rig.exchange.close()


def an_optimiser_of_torch_takes_the_gradient(comm: Communicator, row: Row) -> None:
    """`attach` at full density is one process with everything; below that it still learns."""
    for make, density in (
        (lambda p: torch.optim.SGD(p, lr=0.3, momentum=0.9), 1.0),
        (lambda p: torch.optim.AdamW(p, lr=0.02), 1.0),
        (lambda p: torch.optim.AdamW(p, lr=0.02), 0.2),
    ):
        keys = {"density": density, "gives": "gradient", "warmup_steps": 0, "xi_every": 0}
        found, first, last = trained(comm, make, row.config.model_copy(update=keys))
        assert_same_bits(comm, found.tobytes())
        if density == 1.0:
            alone, _, _ = trained(None, make)
            np.testing.assert_allclose(found, alone, rtol=1e-4, atol=1e-5)
        assert last < 0.85 * first


def trained(
    comm: Communicator | None,
    make: Callable[..., torch.optim.Optimizer],
    config: ExchangeConfig | None = None,
) -> tuple[np.ndarray, float, float]:
    """Parameters, and loss at first and at the end, of a small problem shared out over ranks."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(24, 8, generator=generator)
    targets = torch.randint(0, 4, (24,), generator=generator)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 4))
    optimizer = make(model.parameters())
    losses = []

    def whole_loss() -> torch.Tensor:
        return nn.functional.cross_entropy(model(inputs), targets)

    if comm is None:
        for _ in range(15):
            optimizer.zero_grad()
            whole_loss().backward()
            optimizer.step()
    else:
        with attach(model, optimizer, config, comm) as sync:
            mine = slice(comm.rank, None, comm.size)
            for _ in range(15):
                with torch.no_grad():
                    losses.append(float(whole_loss()))
                loss = nn.functional.cross_entropy(model(inputs[mine]), targets[mine])
                sync.backward(loss, samples=len(inputs[mine]))
                sync.step()
    with torch.no_grad():
        losses.append(float(whole_loss()))
        vector = torch.cat([parameter.flatten() for parameter in model.parameters()])
    return vector.numpy().copy(), losses[0], losses[-1]


def wait_a_little(late: random.Random, parameter: torch.Tensor) -> None:
    time.sleep(late.random() * 0.004)


def delays_change_nothing(comm: Communicator, row: Row) -> None:
    """Gradients that are late by chance, on every rank otherwise: the same calls, the same bits."""
    shapes = [(30, 20)] * 6 + [(9,)]
    results = []
    for delayed in (False, True):
        rig = Rig(comm, row, shapes)
        late = random.Random(comm.rank)
        if delayed:
            for parameter in rig.flat.parameters:
                parameter.register_post_accumulate_grad_hook(partial(wait_a_little, late))
        for step in range(10):
            assert rig.step([gradient(comm.rank, step, rig.n)], 0.3)
        results.append(rig.params().tobytes())
        rig.exchange.close()
    assert results[0] == results[1]


CHECKS: list[Callable[[Communicator, Row], None]] = [
    what_is_sent_and_what_waits_is_what_came_in,
    micro_batches_unused_parameters_and_ranks_without_samples,
    one_value_that_is_not_finite_changes_nothing,
    odd_models_and_gradients,
    the_residual_norm_is_that_of_the_residuals,
]
"""For every row."""

TOPK_CHECKS: list[Callable[[Communicator, Row], None]] = [
    full_density_is_dense,
    bytes_counted_are_bytes_stated,
    warm_up_goes_down_to_the_density,
]
"""For top-k."""
TELESCOPES = [row for row in TOPK if row.conserves and row.config.gives == "update"]
TEXTBOOK = [
    topk("gather", "uint32", "float32", "update", masking=False),
    topk("gather", "block16", "float32", "update", hierarchy=False, masking=False),
    topk("gather", "uint32", "float32", "update"),
]
EXACT = [
    topk(algorithm, "block16", "float32", "gradient", hierarchy=hierarchy)
    for algorithm in ("gather", "exclusive", "owner")
    for hierarchy in (True, False)
]
