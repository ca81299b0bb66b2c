"""The record and the table of `benchmarks.batch_policies` from its log."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from scipy import stats

from benchmarks.batch.cluster import fitted, timed
from benchmarks.batch.runs import Case, Line, Log, chosen_lr, target_of
from benchmarks.batch.target import arrival
from benchmarks.batch.tasks import FIXED_START, SEEDS, TASKS, methods
from benchmarks.machine import describe_machine
from hpctrain.batch import StepTimes

Record = dict[str, Any]
OURS = "goodput"
PUBLISHED = ("AdaBatch as published", "DiveBatch as published")
GOALS = {
    "start batch": 2.0,
    "AdaBatch, best period": 1.5,
    "AdaBatch as published": 1.5,
    "DiveBatch, best period": 1.2,
    "DiveBatch as published": 1.2,
    "best fixed batch": 0.7,
}
"""How many times faster, the geometric mean over the tasks."""


def summarise(log: Log, tasks: Iterable[str]) -> Record:
    """Per task the seconds of every method; over all tasks what the policy gains over others."""
    found: Record = {"method": "alpha x steps + beta x samples to the target", "tasks": {}}
    for task in tasks:
        found["tasks"][task] = of_task(log, task)
    found["gains"] = {
        name: {
            "each": {task: one["gains"].get(name) for task, one in found["tasks"].items()},
            "mean": geometric(one["gains"].get(name) for one in found["tasks"].values()),
            "goal": goal,
        }
        for name, goal in GOALS.items()
    }
    return found | {"machine": describe_machine()}


def of_task(log: Log, task: str) -> Record:
    """One task's part of the record."""
    defined, lr, times = TASKS[task], chosen_lr(log, task), fitted(log, task)
    target = target_of(log, task, SEEDS)
    medians = timed(log, task)
    found: Record = {
        "title": defined.title,
        "lr": lr,
        "epochs": defined.epochs,
        "target": target,
        "alpha_s": times.fixed_s,
        "beta_s": times.per_sample_s,
        "b_half": times.b_half,
        "step_s": medians,
        "misfit": {b: line_at(times, b) / seconds - 1 for b, seconds in medians.items()},
        "methods": {},
    }
    for name, method in methods(defined).items():
        what = "start" if name == FIXED_START else "run"
        lines = [
            log.find(Case(what, task, name, seed, lr), times if method.timed else None, target)
            for seed in SEEDS
        ]
        ran = [line for line in lines if line is not None]
        if ran:
            found["methods"][name] = {"family": method.family} | of_method(ran, target, times)
    found["chosen"] = choices(found["methods"])
    ours = found["methods"].get(OURS)
    found["gains"] = {}
    if ours and all(ours["reached"]):  # else it has no time to the target
        found["gains"] = {
            name: found["methods"][chosen]["mean_s"] / ours["mean_s"]
            for name, chosen in found["chosen"].items()
        }
    found["final"] = compare_final(log, task, lr, times)
    found["shaped"] = [on_the_cluster(line, times) for line in log.lines("shaped", task)[-1:]]
    return found


def line_at(times: StepTimes, batch: float) -> float:
    """Seconds of a step."""
    return times.fixed_s + times.per_sample_s * batch


def of_method(lines: Sequence[Line], target: float, times: StepTimes) -> Record:
    """Seconds to the target by seed; where it is not reached, those of the whole training."""
    rows = []
    for line in lines:
        there = arrival(line["curve"], TASKS[line["task"]].span, target)
        steps, samples = there or line["curve"][-1][:2]
        seconds = times.fixed_s * steps + times.per_sample_s * samples
        rows.append((seconds, steps, samples, there is not None))
    seconds_S, steps_S, samples_S, reached_S = (list(column) for column in zip(*rows, strict=True))
    return {
        "seeds": [line["seed"] for line in lines],
        "seconds": seconds_S,
        "steps": steps_S,
        "samples": samples_S,
        "reached": reached_S,
        "mean_s": statistics.fmean(seconds_S),
        "curve": lines[0]["curve"],
        "plan": lines[0]["plan"],
    }


def choices(found: Record) -> dict[str, str]:
    """Whom the policy is compared with, by what they stand for: the fastest of their kind.

    Methods that missed the target on some seed are chosen where there is no other: the seconds
    they had are fewer than those they would need.
    """
    names = {"start batch": FIXED_START}
    families = {
        "best fixed batch": "fixed",
        "AdaBatch, best period": "AdaBatch",
        "DiveBatch, best period": "DiveBatch",
    }
    for what, family in families.items():
        mine = [n for n, one in found.items() if one["family"] == family and n not in PUBLISHED]
        reached = [n for n in mine if all(found[n]["reached"])]
        if mine:
            names[what] = min(reached or mine, key=lambda name: found[name]["mean_s"])
    return names | {name: name for name in PUBLISHED if name in found}


def geometric(values: Iterable[float | None]) -> float | None:
    """Mean; None where a value is missing."""
    listed = list(values)
    given = [value for value in listed if value is not None]
    return statistics.geometric_mean(given) if given and len(given) == len(listed) else None


def compare_final(log: Log, task: str, lr: float, times: StepTimes) -> Record | None:
    """Accuracy of the policy less that of the start batch, in points, paired by seed."""
    both = []
    for seed in range(5):
        pair = [
            log.find(Case("final", task, name, seed, lr), times if name == OURS else None)
            for name in (OURS, FIXED_START)
        ]
        if None not in pair:
            both.append([100 * line["curve"][-1][3] for line in pair if line])
    if len(both) < 2:
        return None
    each = [ours - theirs for ours, theirs in both]
    spread = stats.t.ppf(0.95, len(each) - 1) * statistics.stdev(each) / math.sqrt(len(each))
    mean = statistics.fmean(each)
    accuracy = [statistics.fmean(column) for column in zip(*both, strict=True)]
    return {
        "goodput": accuracy[0],
        "start": accuracy[1],
        "each": each,
        "mean": mean,
        "lower_95": mean - spread,
    }


def on_the_cluster(line: Line, times: StepTimes) -> Record:
    """A training that measured its own times: seconds to the target, and by the fitted line."""
    there = arrival(line["curve"], TASKS[line["task"]].span, line["target"])
    if there is None:
        return {"reached": False}
    steps, samples = there
    spent = [second for _, _, second in line["steps"][1 : steps + 1]]
    return {
        "reached": True,
        "steps": steps,
        "samples": samples,
        "seconds": sum(spent),
        "by_the_line_s": times.fixed_s * steps + times.per_sample_s * samples,
        "load_average": line["load_average"],
        "plan": line["plan"],
    }


def at_least(one: Record, method: str) -> str:
    """A mark for a gain over a method that has missed the target on some seed."""
    reached = one["methods"].get(method, {}).get("reached", [True])
    return "" if all(reached) else "≥ "


def table(record: Record) -> str:
    """Markdown."""
    tasks = record["tasks"]
    rows = [f"| goodput, times as fast as | {' | '.join(tasks)} | geometric mean | goal |"]
    rows.append("|---" * (len(tasks) + 3) + "|")
    for name, gain in record["gains"].items():
        cells = []
        for task, one in tasks.items():
            ratio, chosen = gain["each"].get(task), one["chosen"].get(name, "")
            cells.append("" if ratio is None else f"{at_least(one, chosen)}{ratio:.2f} ({chosen})")
        least = max((at_least(one, one["chosen"].get(name, "")) for one in tasks.values()), key=len)
        mean = "" if gain["mean"] is None else f"{least}{gain['mean']:.2f}"
        rows.append(f"| {name} | {' | '.join(cells)} | {mean} | {gain['goal']} |")
    texts = ["\n".join(rows)]
    for task, one in tasks.items():
        head = (
            f"{task}: {one['title']}; lr {one['lr']:g} at the start batch, target loss "
            f"{one['target']:.4f}; t(B) = {1e3 * one['alpha_s']:.2f} ms + "
            f"{1e6 * one['beta_s']:.2f} us x B"
        )
        lines = [head, "", "| | seconds | samples | steps |", "|---|---|---|---|"]
        for name, found in one["methods"].items():
            missed = "" if all(found["reached"]) else " (not reached)"
            lines.append(
                f"| {name} | {found['mean_s']:.2f}{missed} | "
                f"{statistics.fmean(found['samples']):,.0f} | "
                f"{statistics.fmean(found['steps']):,.0f} |"
            )
        if one["final"]:
            final = one["final"]
            lines.append(
                f"\nFinal accuracy {final['goodput']:.2f} %, start batch {final['start']:.2f} %: "
                f"{final['mean']:+.2f} points, 95 % bound {final['lower_95']:+.2f}"
            )
        for shaped in one["shaped"]:
            if shaped["reached"]:
                lines.append(
                    f"\nOn the cluster: {shaped['seconds']:.2f} s in {shaped['steps']} steps, "
                    f"{shaped['by_the_line_s']:.2f} s by the line"
                )
        texts.append("\n".join(lines))
    return "\n\n".join(texts)
