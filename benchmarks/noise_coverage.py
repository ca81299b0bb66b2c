"""How often intervals for B_S contain it, where it is known: steps with normal gradients.

Noise has variance s2 / d in each of d directions. B_S stands still, doubles every 100 steps up to
the end, or grows in proportion to the step; s2 falls as B_S grows, as in a training.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np

from hpctrain.stats.average import NoiseAverage
from hpctrain.stats.interval import BLOCKS, ratio_of
from hpctrain.stats.noise import GroupSums

DIMENSIONS = (8, 30, 300, 3000)
TIMES_BATCH = (0.5, 5.0, 50.0)
GROUPS = (2, 4, 16)
DRIFTS = ("none", "doubling", "proportional")
BATCH = 64
STEPS = 200
TRIALS = 50
T_95 = 1.753


def path_of(drift: str, last: float) -> np.ndarray:
    """B_S - 1 by step."""
    left = np.arange(STEPS)[::-1]
    if drift == "doubling":
        return last * 2.0 ** (-left / 100)
    return last * (1 - left / STEPS) if drift == "proportional" else np.full(STEPS, last)


def draw(rng: Any, b_simple_t: np.ndarray, d: int, groups: int) -> np.ndarray:
    """(steps, 2): sum_j b |g_j|² and |gbar|² of each step."""
    s2_t = b_simple_t[-1] / b_simple_t
    mu2_t = s2_t / b_simple_t
    one = s2_t / d
    along = np.sqrt(mu2_t) + np.sqrt(one / BATCH) * rng.standard_normal(STEPS)
    mean_sq = along**2 + one / BATCH * rng.chisquare(d - 1, STEPS)
    return np.stack([BATCH * mean_sq + one * rng.chisquare(d * (groups - 1), STEPS), mean_sq], 1)


def jackknife(top_n: np.ndarray, bottom_n: np.ndarray) -> tuple[float, float]:
    """90 % interval of log N / D over blocks; a bound where D does not stand out."""
    top, bottom = (
        x[: STEPS // BLOCKS * BLOCKS].reshape(BLOCKS, -1).mean(1) for x in (top_n, bottom_n)
    )
    n, d = top.mean(), bottom.mean()
    error = T_95 * bottom.std(ddof=1) / math.sqrt(BLOCKS)
    if d <= error:
        return n / (max(d, 0.0) + error), math.inf
    without = (BLOCKS * n - top) / (BLOCKS * d - bottom)
    if (without <= 0).any():
        return n / (d + error), math.inf
    logs = np.log(without)
    half = T_95 * math.sqrt((BLOCKS - 1) * logs.var())
    return n / d * math.exp(-half), n / d * math.exp(half)


def simulate() -> dict[str, Any]:
    """Coverage of the estimate, and without drift of two intervals over all steps."""
    rng = np.random.default_rng(0)
    settings = []
    for d, times, groups, drift in itertools.product(DIMENSIONS, TIMES_BATCH, GROUPS, DRIFTS):
        path = path_of(drift, times * BATCH)
        kinds = ["estimate", "resolved", "within_2x"]
        hits = dict.fromkeys(kinds + ["fieller", "jackknife"] * (drift == "none"), 0)
        for _ in range(TRIALS):
            average = NoiseAverage()
            steps = [GroupSums(groups, BATCH, *row) for row in draw(rng, path, d, groups).tolist()]
            for sums in steps:
                average.add(sums)
            found = average.estimate()
            assert found is not None
            hits["estimate"] += found.low <= 1 + path[-1] <= found.high
            hits["resolved"] += found.resolved
            hits["within_2x"] += found.resolved and 0.5 <= found.b_s / (1 + path[-1]) <= 2
            if drift == "none":
                s2_n, mu2_n = np.array([sums.moments() for sums in steps]).T
                whole = ratio_of(np.ones(STEPS), s2_n, mu2_n, np.array([0]))
                hits["fieller"] += bool(whole.low[0] <= path[-1] <= whole.high[0])
                low, high = jackknife(s2_n, mu2_n)
                hits["jackknife"] += low <= path[-1] <= high
        shares = {key: int(hit) / TRIALS for key, hit in hits.items()}
        settings.append({"d": d, "times_batch": times, "groups": groups, "drift": drift} | shares)
    return {
        "trials": TRIALS * len(settings),
        "steps": STEPS,
        "batch": BATCH,
        "settings": settings,
        "by_drift": {drift: over([s for s in settings if s["drift"] == drift]) for drift in DRIFTS},
    }


def over(settings: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and worst coverage of some settings."""
    result: dict[str, Any] = {"settings": len(settings)}
    still = settings[0]["drift"] == "none"
    for key in ("estimate", "fieller", "jackknife") if still else ("estimate",):
        covered = [setting[key] for setting in settings]
        result[key] = {"mean": float(np.mean(covered)), "min": min(covered)}
    resolved = sum(setting["resolved"] for setting in settings)
    result["resolved"] = resolved / len(settings)
    result["within_2x_of_resolved"] = sum(setting["within_2x"] for setting in settings) / resolved
    return result
