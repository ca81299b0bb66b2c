"""Accumulate, sample, select, gather and trim: how long against an in-place `r += g`.

One core. Peers: torch.topk of the magnitudes, numpy's argpartition, and the sampled threshold of
DGC as its authors write it in torch (compare, nonzero, gather), all with the accumulation.

    python -m benchmarks.selection [--repeats 9] [--out FILE.json]
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.machine import describe_machine
from hpctrain.compress.feedback import Feedback, LocalRule
from hpctrain.compress.select import Selector

SIZES = (1_000_000, 10_000_000, 25_000_000)
DENSITIES = (0.01, 0.001)


def heavy_tailed(n: int, seed: int) -> np.ndarray:
    """Gradients look like this: normal values whose scale is log-normal."""
    rng = np.random.default_rng(seed)
    values = rng.standard_normal(n, dtype=np.float32)
    values *= np.exp(rng.standard_normal(n, dtype=np.float32))
    return values


def median_s(run: Callable[[], object], prepare: Callable[[], object], repeats: int) -> float:
    seconds = []
    for _ in range(repeats + 1):
        prepare()
        began = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[1:])


def measure(n: int, density: float, repeats: int) -> dict[str, float]:
    k = int(n * density)
    fresh_N = heavy_tailed(n, 0)
    grad_N = fresh_N.copy()
    feedback = Feedback(LocalRule(), grad_N, [], np.zeros(n, np.float32))
    feedback.residual_N[:] = heavy_tailed(n, 1)
    residual_N = feedback.residual_N.copy()
    residual, grad = torch.from_numpy(residual_N), torch.from_numpy(grad_N)

    def refill() -> None:
        grad_N[:] = fresh_N

    def ours(selector: Selector) -> None:
        feedback.begin(0.1, watch=False)
        picked = feedback.pick(selector, k)
        assert len(picked.indices_K) == k

    def torch_topk() -> None:
        residual.add_(grad, alpha=0.1)
        _, indices = torch.topk(residual.abs(), k, sorted=False)
        residual[indices]

    def argpartition() -> None:
        np.add(residual_N, grad_N, out=residual_N)
        residual_N[np.argpartition(np.abs(residual_N), n - k)[n - k :]]

    def dgc() -> None:
        residual.add_(grad, alpha=0.1)
        magnitudes = residual.abs()
        sample = magnitudes[::100]
        threshold = torch.topk(sample, max(1, int(len(sample) * density)))[0].min()
        (indices,) = torch.nonzero(magnitudes >= threshold, as_tuple=True)
        residual[indices[:k]]

    runs: dict[str, Callable[[], object]] = {
        "r += g": lambda: np.add(residual_N, grad_N, out=residual_N),
        "hpctrain, numba": partial(ours, Selector(n, kernel="numba")),
        "hpctrain, NumPy": partial(ours, Selector(n, kernel="numpy")),
        "torch.topk": torch_topk,
        "numpy.argpartition": argpartition,
        "DGC sample, torch": dgc,
    }
    found: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(3):
        for name, run in runs.items():
            found[name].append(median_s(run, refill, repeats if n < 2e7 else repeats // 2))
    return {name: statistics.median(seconds) for name, seconds in found.items()}


def count_in_training(steps: int) -> dict[str, int]:
    """Steps of a training in which every pick had min(k, non-zeros) entries; and all picks."""
    from hpctrain.api import run_on
    from hpctrain.assemble import Options, World
    from hpctrain.config import load
    from hpctrain.transport.threads import run_threads

    counts = {"steps": steps, "picks": 0, "exact": 0}
    pick = Selector.pick

    def counted(self: Selector, x_N: np.ndarray, k: int, **how: Any) -> Any:
        picked = pick(self, x_N, k, **how)
        counts["picks"] += 1
        counts["exact"] += len(picked.indices_K) == min(k, np.count_nonzero(x_N))
        return picked

    loaded = load(
        None,
        [
            f"train.steps={steps}", "record.progress=none", "exchange.kind=topk",
            "exchange.algorithm=gather", "exchange.density=0.01", "exchange.dense_below=1000",
        ],
    )  # fmt: skip
    Selector.pick = counted  # type: ignore[method-assign]
    try:
        with tempfile.TemporaryDirectory() as folder:
            options = Options(out=Path(folder) / "run")
            run_threads(2, lambda comm: run_on(World(comm), loaded, options), node_of=[0, 1])
    finally:
        Selector.pick = pick  # type: ignore[method-assign]
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    rows = []
    for n in SIZES:
        for density in DENSITIES:
            found = measure(n, density, args.repeats)
            results[f"{n}, {density}"] = found
            floor = found["r += g"]
            cells = [f"{n:,}", f"{density:.1%}", f"{1e3 * floor:.2f} ms"]
            cells += [
                f"{1e3 * seconds:.2f} ms, {seconds / floor:.1f}x"
                for name, seconds in found.items()
                if name != "r += g"
            ]
            if not rows:
                rows += [f"| n | density | {' | '.join(found)} |", "|---" * len(cells) + "|"]
            rows.append(f"| {' | '.join(cells)} |")
            print(rows[-1], flush=True)
    counted = count_in_training(1000)
    print(f"exact counts in training: {counted}")
    record = {
        "machine": describe_machine(),
        "threads": 1,
        "seconds": results,
        "training": counted,
    }
    if args.out:
        args.out.write_text(json.dumps(record, indent=1) + "\n")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
