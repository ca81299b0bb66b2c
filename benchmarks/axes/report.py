"""What the log says: lines t(B), chosen step sizes, times to the target."""

from __future__ import annotations

import statistics
from typing import Any

from benchmarks.axes.cases import (
    FIXED,
    FLAGSHIP,
    LRS,
    SEEDS,
    TARGET,
    TRAINED,
    VARIANTS,
    Case,
    Line,
    Log,
)
from benchmarks.machine import describe_machine
from hpctrain.batch import StepTimes


def fitted(log: Log, variant: str, rate: str) -> StepTimes | None:
    """t(B) through the smallest and the largest batch timed; None before both are.

    Raises:
        ValueError: larger batches did not take longer.
    """
    key = Case(FLAGSHIP if variant == FIXED else variant).key("shaped")
    by_batch: dict[int, list[float]] = {}
    for line in log.lines(**key, rate=rate, shorter=1):
        by_batch.setdefault(line["batch"], []).append(line["step_s"])
    if len(by_batch) < 2:
        return None
    low, high = min(by_batch), max(by_batch)
    low_s, high_s = (statistics.median(by_batch[batch]) for batch in (low, high))
    slope = (high_s - low_s) / (high - low)
    if not 0.0 < slope * low < low_s:
        raise ValueError(f"{variant}: {low} samples took {low_s} s, {high} {high_s} s: no line")
    return StepTimes(low_s - slope * low, slope)


def told(times: StepTimes | None) -> tuple[str, ...]:
    """What a policy is told of the times, for the key of a run."""
    return (f"{times.fixed_s:.3g}", f"{times.per_sample_s:.3g}") if times else ()


def counted(log: Log, case: Case, rate: str) -> Line | None:
    """A training from the log, told the times that are there now; None where there is none."""
    adaptive = case.loaded().run.batch.adaptive
    times = fitted(log, case.variant, rate) if adaptive else None
    return log.find(case.key("count", *told(times)))


def seconds(line: Line, times: StepTimes) -> float:
    """To the target."""
    return float(times.fixed_s * line["steps"] + times.per_sample_s * line["samples"])


def chosen_lr(log: Log, variant: str, rate: str) -> float | None:
    """The step size that arrives first on the first seed; None where none does.

    Before t(B) is known, the one with the fewest steps, which is the same at a fixed batch.
    """
    times = fitted(log, variant, rate) or StepTimes(1.0, 0.0)
    found = {lr: counted(log, Case(variant, lr, SEEDS[0]), rate) for lr in LRS}
    arrived = {lr: line for lr, line in found.items() if line and line["steps"] is not None}
    return min(arrived, key=lambda lr: seconds(arrived[lr], times)) if arrived else None


def summarise(log: Log, rate: str) -> dict[str, Any]:
    """The record: every variant with what is known of it."""
    variants: dict[str, Any] = {}
    for variant in VARIANTS:
        sent = log.lines(what="bytes", variant=variant)
        by_layout = {f"4 x {line['per_node']}": line["bytes_per_node"] for line in sent}
        variants[variant] = {"bytes_per_node": by_layout}
        if variant in TRAINED:
            variants[variant] |= trained(log, variant, rate)
    record = {"target": str(TARGET), "rate": rate, "variants": variants}
    for line in log.lines(what="whole", rate=rate)[-1:]:
        record["whole"] = {name: line[name] for name in ("lr", "steps", "samples", "seconds")}
        record["whole"]["batches"] = line["batches"]
    lines = log.lines(what="shaped", rate=rate)
    record["load_average"] = max((line["load_average"] for line in lines), default=None)
    return record | {"machine": describe_machine()}


def trained(log: Log, variant: str, rate: str) -> dict[str, Any]:
    """Trainings of one variant with its step size, by seed; seconds where t(B) is known."""
    lr, times = chosen_lr(log, variant, rate), fitted(log, variant, rate)
    if lr is None:
        return {}
    lines = [line for seed in SEEDS if (line := counted(log, Case(variant, lr, seed), rate))]
    found: dict[str, Any] = {
        "lr": lr,
        "steps": [line["steps"] for line in lines],
        "samples": [line["samples"] for line in lines],
        "batches": [line["batches"] for line in lines],
    }
    if times is None:
        return found
    found |= {"fixed_s": times.fixed_s, "per_sample_s": times.per_sample_s, "curves": []}
    for line in lines:
        points = [(at, samples, accuracy) for at, samples, _, accuracy in line["curve"]]
        spent = [times.fixed_s * at + times.per_sample_s * samples for at, samples, _ in points]
        found["curves"].append(
            [[round(s, 2), accuracy] for s, (*_, accuracy) in zip(spent, points, strict=True)]
        )
    arrived = [seconds(line, times) for line in lines if line["steps"] is not None]
    if len(arrived) == len(lines):
        found |= {"seconds": arrived, "time_s": statistics.median(arrived)}
    return found


def table(record: dict[str, Any]) -> str:
    """The record in Markdown."""
    rows = [
        "| variant | lr | steps | samples | t(256) | t(1024) | time | of flagship "
        "| MB per step and node, 4 x 1 | 4 x 2 |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    usual = record["variants"][FLAGSHIP].get("time_s")
    for variant, found in record["variants"].items():
        cells = [variant, *_arrival(found), *_time(found, usual)]
        cells += [_mb(found["bytes_per_node"].get(layout)) for layout in ("4 x 1", "4 x 2")]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def _arrival(found: dict[str, Any]) -> list[str]:
    if "lr" not in found:
        return ["-"] * 3
    counts = [[n for n in found[name] if n is not None] for name in ("steps", "samples")]
    return [f"{found['lr']:g}", *(f"{statistics.median(n):,.0f}" for n in counts)]


def _time(found: dict[str, Any], usual: float | None) -> list[str]:
    if "fixed_s" not in found:
        return ["-"] * 4
    steps = [found["fixed_s"] + batch * found["per_sample_s"] for batch in (256, 1024)]
    cells = [f"{1e3 * step_s:.0f} ms" for step_s in steps]
    if "time_s" not in found:
        return [*cells, "not reached", "-"]
    share = f"{found['time_s'] / usual:.2f}" if usual else "-"
    return [*cells, f"{found['time_s']:.0f} s", share]


def _mb(nbytes: int | None) -> str:
    return "-" if nbytes is None else f"{nbytes / 1e6:.3f}"
