"""The arithmetic that batch policies share: what a batch is worth, which batches there are.

efficiency(B) = 1 / (1 + (B - 1) / B_S)             progress per sample, of that at batch 1
goodput(B)    = B / t(B) * efficiency(B)            useful samples per second
B*            = sqrt(B_half * (B_S - 1))            has the largest goodput for t(B) = a + b B,
                                                    B_half = a / b
goodput(c B*) / goodput(B*) >= 4 c / (1 + c)²       a factor of two from B* costs at most 11 %

B_S = 1 + s2/mu2 is the bound of `hpctrain.stats.noise`. efficiency(B) is AdaScale's gain over its
scale and Pollux's statistical efficiency, both relative to batch 1.

Source: Qiao et al. 2021, "Pollux", OSDI (goodput); McCandlish et al. 2018, arXiv 1812.06162 (their
simple noise scale is B_S - 1); Yin et al. 2018, arXiv 1706.05699 (B <= delta B_S + 1). The closed
form of B* is the argmax of Pollux's goodput for a straight-line step time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from hpctrain.batch.policy import Facts, StepTimes
from hpctrain.batch.table import AdaptiveTable
from hpctrain.stats.noise import NoiseEstimate


def efficiency(batch: float, b_s: float) -> float:
    """Progress per sample at a batch, relative to batch 1; in (0, 1]. Local, pure."""
    return 1.0 / (1.0 + (batch - 1.0) / b_s)


def goodput(batch: float, b_s: float, times: StepTimes) -> float:
    """Useful samples per second. Local, pure."""
    step_s = times.fixed_s + times.per_sample_s * batch
    return batch / step_s * efficiency(batch, b_s)


def best_batch(b_s: float, times: StepTimes) -> float:
    """B*, the batch of the largest goodput. Local, pure."""
    return math.sqrt(times.b_half * max(b_s - 1.0, 0.0))


def gain_of(target: int, batch: int, b_s: float, times: StepTimes) -> float:
    """By what share the goodput of `target` exceeds that of `batch`. Local, pure."""
    return goodput(target, b_s, times) / goodput(batch, b_s, times) - 1.0


def floor_batch(b_s: float, floor: float) -> float:
    """The largest batch whose efficiency is at least `floor`. Local, pure."""
    return (1.0 / floor - 1.0) * b_s + 1.0


def scaled(b_s: float, factor: float) -> float:
    """B_S where the critical batch is `factor` times the measured B_S - 1. Local, pure."""
    return 1.0 + factor * max(b_s - 1.0, 0.0)


def ladder(table: AdaptiveTable) -> list[int]:
    """The start batch times powers of two within the bounds, ascending. Local, pure.

    Below the start only where it divides without a rest.
    """
    rungs = [table.batch_global]
    while rungs[0] % 2 == 0 and rungs[0] // 2 >= table.smallest:
        rungs.insert(0, rungs[0] // 2)
    while rungs[-1] * 2 <= table.batch_max:
        rungs.append(rungs[-1] * 2)
    return rungs


def cap_of(best: float, above: dict[str, float], below: dict[str, float]) -> str | None:
    """The name of the nearest bound that `best` lies beyond; None: it lies within. Local, pure."""
    name = min(above, key=lambda key: above[key])
    if best > above[name]:
        return name
    name = max(below, key=lambda key: below[key])
    return name if best < below[name] else None


def noise_facts(noise: NoiseEstimate | None) -> Facts:
    """The estimate as numbers for batch_plan.jsonl; null where it says nothing. Local, pure."""
    if noise is None:
        return {}
    return {
        "s2": noise.s2,
        "mu2": noise.mu2,
        "b_s": noise.b_s if noise.resolved else None,
        "low": noise.low,
        "high": noise.high if math.isfinite(noise.high) else None,
        "resolved": noise.resolved,
    }


def percent(share: float) -> str:
    """A share in words. Local, pure."""
    return f"{100.0 * share:.0f} %"


def in_words(noise: NoiseEstimate) -> str:
    """The estimate in words. Local, pure."""
    if not noise.resolved:
        return f"B_S is at least {noise.low:.0f}"
    return f"B_S {noise.b_s:.0f} [{noise.low:.0f}-{noise.high:.0f}]"


def times_facts(b_s: float, times: StepTimes) -> Facts:
    """The step times as numbers for batch_plan.jsonl. Local, pure."""
    return {
        "fixed_s": times.fixed_s,
        "per_sample_s": times.per_sample_s,
        "b_half": times.b_half,
        "b_star": best_batch(b_s, times),
    }


def weigh(
    batch: int,
    b_s: tuple[float, float, float],
    times: StepTimes,
    rungs: Sequence[int],
    *,
    floor: float,
    least: float,
) -> tuple[int, float, str]:
    """(the batch of `rungs` to take in place of `batch`, its gain, why). Local, pure.

    Args:
        batch: The present one.
        b_s: Low end, best guess and high end of B_S.
        times: Of a step.
        rungs: Batches that may be taken, ascending.
        floor: Smallest efficiency of a sample.
        least: A gain worth a change.
    """
    low, point, high = b_s
    smaller = [rung for rung in rungs if rung < batch]
    if smaller and batch > floor_batch(high, floor):
        share = percent(efficiency(batch, point))
        why = f"a sample brings {share} at {batch}, less than {percent(floor)}"
        return smaller[-1], gain_of(smaller[-1], batch, point, times), why
    most = max(floor_batch(point, floor), batch)
    reach = [r for r in rungs if batch / 2 <= r <= 4 * batch and r <= most]
    wanted = max(reach, key=lambda rung: goodput(rung, point, times), default=batch)
    if wanted == batch:
        return batch, 0.0, "nothing in reach is better"
    tried = [r for r in rungs if batch < r <= wanted] or [wanted]
    gains = {r: gain_of(r, batch, low if r > batch else high, times) for r in tried}
    worth = [rung for rung in tried if gains[rung] > least]
    if worth:
        return worth[-1], gains[worth[-1]], f"gain {percent(gains[worth[-1]])}"
    best = max(tried, key=lambda rung: gains[rung])
    why = f"gain {percent(gains[best])} of {best} is below {percent(least)}"
    return batch, gains[best], why
