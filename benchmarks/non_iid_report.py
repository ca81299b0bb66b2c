"""What the trainings of `benchmarks.non_iid` say: means over seeds, differences, intervals.

    python -m benchmarks.non_iid_report --log LOG [--out benchmarks/results/non_iid.json]

Intervals are two-sided 95 % ones by Student's t over the seeds, of differences seed by seed.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from benchmarks.machine import describe_machine
from benchmarks.non_iid import (
    ALL,
    LEADERS,
    LRS,
    MORE,
    PARTITIONS,
    PARTS,
    PERIODS,
    PULLS,
    SCORES,
    SYSTEMS,
    TRIES,
    Case,
    Log,
    case_of,
)
from hpctrain.config import from_mapping
from hpctrain.data.partition import shards_of
from hpctrain.data.spec import DataSets
from hpctrain.reconcile import hold_probe
from hpctrain.transport.threads import run_threads

Line = dict[str, Any]
Summary = dict[str, Any]
Measure = Callable[[Line], float]


def averaged(line: Line) -> float:
    """Accuracy of the average of all replicas, as `benchmarks.non_iid` defines it."""
    curve = line["curve"]
    return float(curve[-1] if line["length"] == "one pass" else np.mean(curve[len(curve) // 2 :]))


ENDS: dict[str, Measure] = {
    "average": lambda line: float(line["curve"][-1]),
    "leader": lambda line: float(line["leader_accuracy"]),
    "replicas": lambda line: float(line["replica_accuracy_mean"]),
    "best replica": lambda line: float(line["replica_accuracy_max"]),
}
"""At the end of training: of the replicas' average, of the leader, the mean over replicas."""


class Runs:
    """The finished trainings by case."""

    def __init__(self, lines: Sequence[Line]) -> None:
        self._lines = {case_of(line): line for line in lines}

    def by_seed(self, case: Case) -> dict[int, Line]:
        """Seed -> what was found; without diverged trainings."""
        found = {c.seed: line for c, line in self._lines.items() if replace(c, seed=0) == case}
        return {seed: line for seed, line in sorted(found.items()) if "curve" in line}

    def mean(self, case: Case, measure: Measure = averaged) -> Summary:
        """Of one case over its seeds."""
        found = self.by_seed(case)
        return interval({seed: measure(line) for seed, line in found.items()})

    def less(self, case: Case, other: Case, measure: Measure = averaged) -> Summary:
        """`case` less `other`, seed by seed."""
        a, b = self.by_seed(case), self.by_seed(other)
        return interval({seed: measure(a[seed]) - measure(b[seed]) for seed in a if seed in b})


def interval(by_seed: dict[int, float]) -> Summary:
    """Mean and half the width of its 95 % interval, in percent of the held-out set."""
    each = [100.0 * value for value in by_seed.values()]
    half = None
    if len(each) > 1:
        quantile = stats.t.ppf(0.975, len(each) - 1)
        half = round(quantile * statistics.stdev(each) / math.sqrt(len(each)), 2)
    return {
        "mean": round(statistics.fmean(each), 2) if each else None,
        "half_95": half,
        "each": [round(value, 2) for value in each],
        "seeds": list(by_seed),
    }


def of_leaders(runs: Runs, case: Case) -> Summary:
    """How even the elections of a case were, and whom they chose most."""
    shares, shards = [], []
    for seed, line in runs.by_seed(case).items():
        leader, times = Counter(map(int, line["leader"])).most_common(1)[0]
        shares.append(times / len(line["leader"]))
        shards.append(shard_of(replace(case, seed=seed), leader))
    return {
        "share_of_the_most_frequent": round(statistics.fmean(shares), 3),
        "by_seed": [round(share, 3) for share in shares],
        "its_samples": [samples for samples, _ in shards],
        "its_largest_class": [round(largest, 3) for _, largest in shards],
    }


def shard_of(case: Case, rank: int) -> tuple[int, float]:
    """A rank's samples, and the share that its most frequent class has of them."""
    run = from_mapping(case.tree()).run
    train, _ = hold_probe(run, load(case.length))
    labels = train.labels()
    assert labels is not None
    shards = shards_of(run.data, train, case.replicas, case.seed)
    own = labels if shards is None else labels[shards[rank]]
    return len(own), float(np.bincount(own).max() / len(own))


@cache
def load(length: str) -> DataSets:
    """The data; the same for all cases of a length."""
    run = from_mapping(Case("averaging", length=length).tree()).run
    (data,) = run_threads(1, lambda comm: run.data.load(comm, 0))
    return data


def elections(runs: Runs) -> Summary:
    """Both scores, by partition and number of replicas."""
    found: Summary = {}
    for replicas in (8, 4):
        for partition in PARTITIONS:
            cases = [Case(system, partition, replicas) for system in SCORES]
            if not all(map(runs.by_seed, cases)):
                continue
            probe, loss = cases
            entry: Summary = {"probe less train_loss": {"accuracy": runs.less(probe, loss)}}
            for name, measure in ENDS.items():
                entry["probe less train_loss"][f"end, {name}"] = runs.less(probe, loss, measure)
            for score, case in zip(("probe", "train_loss"), cases, strict=True):
                ends = {f"end, {name}": runs.mean(case, m) for name, m in ENDS.items()}
                entry[score] = {"accuracy": runs.mean(case)} | ends
                entry[score]["leaders"] = of_leaders(runs, case)
            found[f"{replicas} replicas, {partition}"] = entry
    return found


def beside(runs: Runs, case: Case, other: Case) -> Summary:
    """One case and what it has more than another, and than averaging as often as it."""
    period = case.system.partition(", every ")[2]
    same = replace(other, system=f"averaging, every {period}") if period else other
    return {
        "accuracy": runs.mean(case),
        "less averaging": runs.less(case, other),
        "less averaging as often": runs.less(case, same),
    }


def systems(runs: Runs) -> Summary:
    """Every system at every step size, beside averaging at the same one and at its best."""
    best = {}
    for system in SYSTEMS:
        means = {lr: runs.mean(Case(system, lr=lr))["mean"] for lr in LRS}
        best[system] = max(LRS, key=lambda lr: means[lr] or 0.0)
    found: Summary = {}
    for system, lr_best in best.items():
        at = {f"lr {lr}": beside(runs, Case(system, lr=lr), Case("averaging", lr=lr)) for lr in LRS}
        both = (Case(system, lr=lr_best), Case("averaging", lr=best["averaging"]))
        found[system] = at | {"best lr": lr_best, "at the best of each": runs.less(*both)}
    return found


def summarise(lines: Sequence[Line]) -> Summary:
    """The whole record. Lines of other cases than today's are left out."""
    today = {case for part in PARTS.values() for case in part}
    lines = [line for line in lines if replace(case_of(line), seed=0) in today]
    runs = Runs(lines)

    def compared(plain: Case) -> Summary:
        names = [*SYSTEMS, *TRIES, *MORE]
        entries = {name: beside(runs, replace(plain, system=name), plain) for name in names}
        return {name: entry for name, entry in entries.items() if entry["accuracy"]["seeds"]}

    plain = Case("averaging")
    return {
        "machine": describe_machine(),
        "trainings": len(lines),
        "cpu_s": round(sum(line.get("cpu_s", 0.0) for line in lines)),
        "configurations": {system: Case(system).tree() for system in ALL},
        "elections": elections(runs),
        "systems": systems(runs),
        "compared": compared(plain),
        "one pass": compared(replace(plain, length="one pass")),
        "shard": compared(replace(plain, partition="shard")),
        "four replicas": compared(replace(plain, replicas=4)),
        "knobs": {system: runs.mean(Case(system)) for system in LEADERS},
        "runs": [{k: v for k, v in line.items() if k != "configuration"} for line in lines],
    }


def text(found: Summary) -> str:
    """Mean and interval for people."""
    if not found["seeds"]:
        return ""
    if len(found["seeds"]) < 3:  # an interval would say nothing
        return f"{found['mean']:.1f} (seeds: {len(found['seeds'])})"
    return f"{found['mean']:.1f} ± {found['half_95']:.1f}"


def table(record: Summary) -> str:
    """The documentation's tables."""
    rows = [
        "| | score | average | at the end: average | leader | replicas | most frequent leader |"
    ]
    rows += ["|---|---|---|---|---|---|---|"]
    for name, entry in record["elections"].items():
        for score in ("probe", "train_loss", "probe less train_loss"):
            cells = [text(found) for key, found in entry[score].items() if key != "leaders"][:4]
            leads = entry[score].get("leaders", {})
            share = f"{leads['share_of_the_most_frequent']:.0%}" if leads else ""
            rows.append(f"| {name} | {score} | {' | '.join(cells)} | {share} |")
    steps = " | ".join(f"lr {lr}" for lr in LRS)
    rows += ["", f"| | {steps} | less averaging at lr 0.03 | at the best of each |"]
    rows += ["|---|" + "---|" * (len(LRS) + 2)]
    for system, entry in record["systems"].items():
        cells = [text(entry[f"lr {lr}"]["accuracy"]) for lr in LRS]
        cells += [text(entry["lr 0.03"]["less averaging"]), text(entry["at the best of each"])]
        rows.append(f"| {system} | {' | '.join(cells)} |")
    for part in ("compared", "one pass", "shard", "four replicas"):
        rows += ["", f"| {part} | accuracy | less averaging | as often |", "|---|---|---|---|"]
        for system, entry in record[part].items():
            rows.append(f"| {system} | {' | '.join(map(text, entry.values()))} |")
    rows += [
        "",
        "| | " + " | ".join(f"every {every}" for every in PERIODS) + " |",
        "|---|---|---|---|",
    ]
    for score in ("probe", "train_loss"):
        for pull in PULLS:
            names = [f"{score}, pull {pull}, every {every}" for every in PERIODS]
            cells = [text(record["knobs"][n]) if n in record["knobs"] else "" for n in names]
            rows.append(f"| {score}, pull {pull} | {' | '.join(cells)} |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--log", type=Path, required=True)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    record = summarise(Log(args.log).lines())
    if args.out:
        args.out.write_text(json.dumps(record, indent=1) + "\n")
    print(table(record))


if __name__ == "__main__":
    main()
