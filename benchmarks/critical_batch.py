"""Saturation at the critical batch and at the critical delay, in the manner of Stich et al. 2021.

    python -m benchmarks.critical_batch [--out benchmarks/results/critical_batch.json]

Interpolating least squares, n = 256 rows of d = 32 features, float64:

    f(w) = mean_i (a_i . w - a_i . w*)^2 / 2,   H = mean_i a_i a_i^T,   L = its largest eigenvalue
    w_{t+1} = w_t - lr g_{t - tau},   g_t = mean gradient of B rows drawn with replacement

The noise of g vanishes with the gradient: E|g - grad f|^2 = M(w) |grad f(w)|^2 / B. `blocks` and
`coordinates` have M(w) = d - 1 = 31 at every w (see `blocked`); for Gaussian rows M depends on w.
Counted are iterations until the loss, averaged over 32 trajectories, is 1e-3 of that at the start.
The step size is the best of a grid in factors of 2^(1/4), every trajectory meets the same samples
at all step sizes. Three seeds: another problem and other samples. For known M the expected loss
obeys a recursion in closed form, which gives the same counts without chance (`expected`).

Stich, Mohtashami, Jaggi 2021, arXiv 2103.02351: iterations grow as 1 + M/B + tau.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import describe_machine
from hpctrain.assemble import Options, World, open_session
from hpctrain.batch.lr import LrConfig
from hpctrain.config import from_mapping
from hpctrain.data.order import SampleOrder
from hpctrain.train import run_training
from hpctrain.transport.communicator import Communicator
from hpctrain.transport.threads import run_threads

N, D = 256, 32
CONDITION = 16
TARGET = 1e-3
SEEDS = [0, 1, 2]
TRAJECTORIES = 32
BATCHES = [1, 2, 4, 8, 16, 32, 64, 128, 256]
DELAYS = [0, 2, 4, 8, 16, 32, 64, 128, 256]
BOTH = [(batch, delay) for batch in (4, 16, 64) for delay in (2, 16, 64)]
GRID = np.arange(-12, 9) / 4
"""Exponents of 2: step sizes tried, as multiples of 1 / (L (1 + M/B + tau))."""

Array = np.ndarray


@dataclass(frozen=True)
class Problem:
    """Rows in the eigenbasis of H, so that H is diagonal."""

    rows: Array
    """(n, d)."""
    solution: Array
    """(d,), w*; training starts at w = 0."""

    @property
    def spectrum(self) -> Array:
        """(d,) eigenvalues of H, in the order of the coordinates."""
        return np.asarray((self.rows**2).mean(0))

    @property
    def smoothness(self) -> float:
        return float(self.spectrum.max())

    def noise(self, errors_RD: Array) -> float:
        """M(w) = E|g_i|^2 / |E g_i|^2 - 1, each a mean over R points w* + e."""
        residuals = errors_RD @ self.rows.T
        squares = residuals**2 @ (self.rows**2).sum(1) / len(self.rows)
        means = ((errors_RD * self.spectrum) ** 2).sum(1)
        return float(squares.mean() / means.mean() - 1)

    def noise_range(self) -> tuple[float, float]:
        """Smallest and largest M(w) over all w."""
        scaled = self.rows / self.spectrum
        lengths = (self.rows**2).sum(1)
        values = np.linalg.eigvalsh((scaled * lengths[:, None]).T @ scaled / len(self.rows))
        return float(values[0] - 1), float(values[-1] - 1)


def blocked(blocks: int, seed: int) -> Problem:
    """Every row sees one of `blocks` groups of coordinates, through columns of a Hadamard matrix.

    A row of a group has entries +-s there. With d/m coordinates and n/m rows for each of the m
    groups, E|g_i|^2 = d |grad f|^2 at every w: M = d - 1 whatever m and the amplitudes s. Half of
    the groups have s = 1, the others s = 1/4: condition number 16, equal shares of the first loss.
    """
    rng = np.random.default_rng([seed, blocks])
    height, width = N // blocks, D // blocks
    index = np.arange(height)
    parity = np.array([[bin(i & j).count("1") % 2 for j in index] for i in index])
    rows, solution = np.zeros((N, D)), np.zeros(D)
    for block in range(blocks):
        amplitude = 1.0 if block % 2 == 0 else CONDITION**-0.5
        columns = rng.choice(height, width, replace=False)
        where = slice(block * width, (block + 1) * width)
        rows[block * height : (block + 1) * height, where] = (
            amplitude * (1 - 2 * parity)[:, columns]
        )
        solution[where] = rng.choice([-1.0, 1.0], width) / amplitude
    return Problem(rows, solution)


def gaussian(density: float, seed: int) -> Problem:
    """Rows with density * d entries that are not 0, at random places, each ~ N(0, 1)."""
    rng = np.random.default_rng([seed, round(100 * density)])
    rows = rng.standard_normal((N, D))
    places = rng.permuted(np.tile(np.arange(D), (N, 1)), axis=1)
    rows[places >= round(density * D)] = 0.0
    _, basis = np.linalg.eigh(rows.T @ rows / N)
    return Problem(rows @ basis, rng.standard_normal(D))


PROBLEMS = {
    "blocks": partial(blocked, 2),
    "coordinates": partial(blocked, D),
    "gaussian": partial(gaussian, 1.0),
    "sparse gaussian": partial(gaussian, 0.125),
}


def iterations(
    problem: Problem, batch: int, delay: int, lrs_G: Array, seed: int, *, first: bool = False
) -> list[int | None]:
    """Iterations to the target at each step size; None: not within 8 times what is expected.

    With `first` it ends when one of them is there: all others take longer.
    """
    rng = np.random.default_rng([seed, batch, delay])
    errors_RGD = np.tile(-problem.solution, (TRAJECTORIES, len(lrs_G), 1))
    sums = np.zeros((delay + 1, *errors_RGD.shape))
    half = problem.spectrum / 2
    start = float((half * problem.solution**2).sum())
    found: list[int | None] = [None] * len(lrs_G)
    limit = round(8 * math.log(1 / TARGET) * CONDITION * (1 + D / batch + delay))
    for step in range(limit):
        rows_RBD = problem.rows[rng.integers(0, N, (TRAJECTORIES, batch))]
        residuals_RGB = np.matmul(errors_RGD, rows_RBD.swapaxes(1, 2))
        sums[step % (delay + 1)] = np.matmul(residuals_RGB, rows_RBD) / batch
        if step >= delay:
            errors_RGD -= lrs_G[:, None] * sums[(step - delay) % (delay + 1)]
        losses_G = (errors_RGD**2 @ half).mean(0) / start
        for place in np.flatnonzero(losses_G <= TARGET):
            found[place] = found[place] or step + 1
        alive = [f is None and x < 1e6 for f, x in zip(found, losses_G, strict=True)]
        if not any(alive) or (first and any(found)):
            break
    return found


def expected_losses(lr: float, noise: float, batch: int, delay: int, steps: int) -> Array:
    """(steps + 1,) expected f / f(0) of `blocks` and `coordinates`, L = 1, without chance.

    In a coordinate of eigenvalue l the mean error m obeys the delayed recursion, and so does what
    noise adds, u being its answer to a unit pulse:

        E e_t^2 = m_t^2 + (lr l)^2 (M/B) sum_{s + tau < t} u_{t-1-tau-s}^2 E e_s^2
    """
    total = np.zeros(steps + 1)
    for value in (1.0, 1.0 / CONDITION):
        a = lr * value
        mean, pulse, squares = np.ones(steps + 1), np.ones(steps + 1), np.ones(steps + 1)
        for t in range(1, steps + 1):
            if t > delay:
                mean[t] = mean[t - 1] - a * mean[t - 1 - delay]
                pulse[t] = pulse[t - 1] - a * pulse[t - 1 - delay]
        pulse_squares = pulse**2
        for t in range(1, steps + 1):
            past = max(t - delay, 0)
            added = pulse_squares[:past][::-1] @ squares[:past]
            squares[t] = mean[t] ** 2 + a * a * noise / batch * added
            if squares[t] > 1e6:
                return np.full(steps + 1, np.inf)
        total += squares / 2
    return total


def expected(batch: int, delay: int, noise: float = D - 1) -> dict[str, Any]:
    """Iterations by the expected loss, at the best step size of the grid."""
    best: dict[str, Any] = {"iterations": 10**6}
    scale = 1 + noise / batch + delay
    limit = round(CONDITION * math.log(1 / TARGET) * scale)
    for lr in 2.0**GRID / scale:
        losses = expected_losses(lr, noise, batch, delay, min(limit, best["iterations"]))
        reached = np.flatnonzero(losses <= TARGET)
        if len(reached) and reached[0] < best["iterations"]:
            best = {"iterations": int(reached[0]), "lr_L": float(lr)}
    return best


def tuned(problem: Problem, noise: float, batch: int, delay: int, seed: int) -> dict[str, Any]:
    """Iterations at the best step size of the grid, and that step size times L."""
    scaled_G = 2.0**GRID / (1 + noise / batch + delay)
    found = iterations(problem, batch, delay, scaled_G / problem.smoothness, seed, first=True)
    count, place = min((count, place) for place, count in enumerate(found) if count)
    if place in (0, len(GRID) - 1):
        raise RuntimeError(f"the best step size at B = {batch}, tau = {delay} ends the grid")
    return {"iterations": count, "lr_L": float(scaled_G[place])}


def rules(base: float, noise: float, batch: int, delay: int) -> dict[str, float]:
    """Step sizes times L by hpctrain's [lr] kind = "stich".

    From the best step size for one sample and no delay, from that of the theorem, 1 / (1 + M), and
    from the best one with the delay counted twice.
    """

    def lr(base: float, delay: int) -> float:
        config = LrConfig(kind="stich", base=base, reference_batch=1, critical_batch=noise)
        return config.lr_at(0, 1, N, batch, delay=delay)

    return {
        "rule": lr(base, delay),
        "rule_from_theorem": lr(1 / (1 + noise), delay),
        "rule_twice_the_delay": lr(base, 2 * delay),
    }


def limit(noise: float, delay: int) -> float:
    """Largest step size times L at B = 1 at which the expected loss falls, for small step sizes.

    The delayed recursion e' = -a e(t - tau) answers a pulse with squares that sum to
    tan(pi/4 + a tau/2) / (2 a); noise is a^2 M times those: a M tan(pi/4 + a tau/2) = 2. Without
    noise a tau = pi/2, without delay a M = 2.
    """
    low, high = 0.0, math.pi / 2 / max(delay, 1e-9)
    for _ in range(100):
        a = (low + high) / 2
        stable = a * noise * math.tan(math.pi / 4 + a * delay / 2) < 2
        low, high = (a, high) if stable else (low, a)
    return low


def knee(places: list[int], counts: list[float], *, delay: bool) -> float:
    """M in counts ~ c (1 + M / B), or c (1 + M + tau), by least squares of logarithms."""
    candidates = np.geomspace(0.5, 2000, 8000)[:, None]
    x = np.array(places, float)
    shape = np.log(1 + candidates + x) if delay else np.log(1 + candidates / x)
    misses = (np.log(counts) - shape).var(axis=1)
    return float(candidates[misses.argmin(), 0])


def study(name: str, log: Any) -> dict[str, Any]:
    """All batches and delays of one problem."""
    rows: dict[tuple[int, int], dict[str, Any]] = {}
    ranges, noises, ends = [], [], []
    for seed in SEEDS:
        problem = PROBLEMS[name](seed)
        noise = problem.noise(-problem.solution[None])
        noises.append(noise)
        ranges.append(problem.noise_range())
        base = math.nan
        for batch, delay in pairs():
            best = tuned(problem, noise, batch, delay, seed)
            if (batch, delay) == (1, 0):
                base = best["lr_L"]
            lrs = rules(base, noise, batch, delay)
            lrs_G = np.array(list(lrs.values())) / problem.smoothness
            found = dict(zip(lrs, iterations(problem, batch, delay, lrs_G, seed), strict=True))
            row = rows.setdefault((batch, delay), {})
            for key, value in (best | found).items():
                row.setdefault(key, []).append(value)
            log(name, seed, batch, delay, best, found)
        ends.append(problem.noise(late(problem, base, seed)))
    by_batch = [[rows[b, 0]["iterations"][i] for b in BATCHES] for i in range(len(SEEDS))]
    by_delay = [[rows[1, t]["iterations"][i] for t in DELAYS] for i in range(len(SEEDS))]
    result: dict[str, Any] = {
        "M": {"least": [r[0] for r in ranges], "at_start": noises,
              "at_target": ends, "largest": [r[1] for r in ranges]},
        "knee_of_batch": [knee(BATCHES, counts, delay=False) for counts in by_batch],
        "knee_of_delay": [knee(DELAYS, counts, delay=True) for counts in by_delay],
        "rows": [{"batch": b, "delay": t} | row for (b, t), row in rows.items()],
    }  # fmt: skip
    return result


def pairs() -> list[tuple[int, int]]:
    """Every (batch, delay) that is measured; that without either comes first."""
    return [(b, 0) for b in BATCHES] + [(1, t) for t in DELAYS[1:]] + BOTH


def late(problem: Problem, lr_L: float, seed: int) -> Array:
    """(R, d) errors of trajectories with B = 1 near the target."""
    rng = np.random.default_rng([seed, 1, 0])
    errors_RD = np.tile(-problem.solution, (TRAJECTORIES, 1))
    start = (errors_RD**2 @ problem.spectrum).mean()
    while (errors_RD**2 @ problem.spectrum).mean() > TARGET * start:
        rows_RD = problem.rows[rng.integers(0, N, TRAJECTORIES)]
        residuals_R = (rows_RD * errors_RD).sum(1, keepdims=True)
        errors_RD -= lr_L / problem.smoothness * residuals_R * rows_RD
    return errors_RD


class Rows:
    """A problem as hpctrain's data: pairs (row, target)."""

    def __init__(self, problem: Problem) -> None:
        self.inputs = problem.rows.astype(np.float32)
        self.targets = (problem.rows @ problem.solution).astype(np.float32)[:, None]
        if (self.inputs != problem.rows).any():
            raise ValueError("entries are not exact in float32, the format of hpctrain's inputs")

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> tuple[Array, Array]:
        return self.inputs[index], self.targets[index]


def load_blocks(seed: int) -> tuple[Rows, Rows]:
    """`[data] kind = "benchmarks.critical_batch:load_blocks"`."""
    rows = Rows(blocked(2, seed))
    return rows, rows


def through_hpctrain(base: float, batch: int, delay: int, steps: int, ranks: int) -> dict[str, Any]:
    """The trainer against the recursion above over the trainer's own sequence of samples.

    `blocks`, seed 0; ranks on threads, [exchange] kind = "delayed", [lr] kind = "stich".
    """
    problem = blocked(2, 0)
    tree = {
        "name": "critical-batch",
        "seed": 0,
        "data": {"kind": "benchmarks.critical_batch:load_blocks", "args": {"seed": 0}},
        "model": {"kind": "logistic", "bias": False},
        "optimiser": {"kind": "sgd"},
        "lr": {"kind": "stich", "base": base / problem.smoothness, "reference_batch": 1,
               "critical_batch": D - 1},
        "batch": {"batch_global": batch},
        "exchange": {"kind": "delayed", "delay": delay},
        "train": {"steps": steps, "dtype": "float64", "device": "cpu", "threads": 1},
        "evaluate": {"every_epochs": 0.0},
        "record": {"progress": "none"},
    }  # fmt: skip
    loaded = from_mapping(tree)
    lr = loaded.run.lr.lr_at(0, 1, N, batch, delay=delay)

    def train(comm: Communicator) -> tuple[Array, float]:
        with open_session(loaded, World(comm), Options(out=Path(parent) / "run")) as session:
            run_training(session)
            return session.flat.params_P.numpy().copy(), session.results["loss"]

    with tempfile.TemporaryDirectory() as parent:
        params_D, loss = run_threads(ranks, train, only_waits=True)[0]
    order = SampleOrder(N, 0, 0, 1)
    errors_D, sums, losses = -problem.solution.copy(), [], []
    for step in range(steps):
        rows = problem.rows[order.next(batch).indices]
        sums.append(rows.T @ (rows @ errors_D) / batch)
        if step >= delay:
            errors_D -= lr * sums[step - delay]
        losses.append(float(errors_D**2 @ problem.spectrum / 2))
    start = float(problem.solution**2 @ problem.spectrum / 2)
    difference = np.abs(params_D - (errors_D + problem.solution)).max()
    return {
        "batch": batch, "delay": delay, "steps": steps, "ranks": ranks, "lr_L": lr / 2,
        "largest_difference": float(difference / np.abs(problem.solution).max()),
        "loss": loss, "loss_of_recursion": losses[-1], "loss_at_start": start,
        "reached": int(np.argmax(np.array(losses) <= TARGET * start)) + 1,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/critical_batch.json"))
    args = parser.parse_args()
    np.seterr(over="ignore", invalid="ignore")
    log = partial(print, file=sys.stderr, flush=True)
    problems = {name: study(name, log) for name in PROBLEMS}
    without_chance = [{"batch": b, "delay": t} | expected(b, t) for b, t in pairs()]
    by = {(row["batch"], row["delay"]): row["iterations"] for row in without_chance}
    record = {
        "settings": {"n": N, "d": D, "condition": CONDITION, "target": TARGET, "seeds": SEEDS,
                     "trajectories": TRAJECTORIES},
        "expected": {
            "limit_lr_L": {delay: limit(D - 1, delay) for delay in DELAYS},
            "rows": without_chance,
            "knee_of_batch": knee(BATCHES, [by[b, 0] for b in BATCHES], delay=False),
            "knee_of_delay": knee(DELAYS, [by[1, t] for t in DELAYS], delay=True),
        },
        "problems": problems,
        "hpctrain": [
            through_hpctrain(1 / D, batch, delay, steps, ranks)
            for batch, delay, steps, ranks in ((1, 1, 2000, 1), (4, 32, 2400, 4), (64, 8, 800, 2))
        ],
        "machine": describe_machine(),
    }  # fmt: skip
    args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
