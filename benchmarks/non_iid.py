"""Replicas whose data differ: who should lead, and what of their movements should be kept.

    python -m benchmarks.non_iid --log LOG [--parts NAME ...] [--seeds 0 1 2 3 4]
    python -m benchmarks.non_iid_report --log LOG [--out benchmarks/results/non_iid.json]

Fashion-MNIST (below $HPCTRAIN_DATA), an MLP of 784-64-10, SGD with momentum 0.9 and a constant step
size, 64 samples per replica and step; a replica is one rank. The samples are dealt out once: at
random, sorted by label, or as mixtures by Dirichlet(0.1). The seed decides the mixtures, the first
parameters and the order of samples; systems are compared seed by seed.

A training takes 256 steps on the first 10,000 samples, so that ranks with few samples pass over
them as often as the others; `one pass` is one over all 60,000, in which a rank that has used up its
own part waits. The accuracy is that of the average of all replicas on the held-out set, the mean of
the evaluations of the second half (every 32 steps); of `one pass`, the last one.

Every finished run is one line of LOG; those that are there already are skipped. hpctrain's ranks
are threads of one process, which computes on one core.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from hpctrain.api import run_on
from hpctrain.assemble import Options, World
from hpctrain.config import from_mapping
from hpctrain.errors import NonFinite
from hpctrain.runs import record as records
from hpctrain.transport.threads import RankError, run_threads

Tree = dict[str, Any]
STEPS, BATCH, EVERY, EVALUATED = 256, 64, 16, 32
SEEDS, LRS = range(5), [0.01, 0.03, 0.1]
PARTITIONS: dict[str, Tree] = {
    "iid": {"partition": "iid"},
    "dirichlet": {"partition": "dirichlet", "alpha": 0.1},
    "shard": {"partition": "shard"},
}
LENGTHS: dict[str, Tree] = {
    "rounds": {"data": {"limit_train": 10_000}, "train": {"steps": STEPS}},
    "one pass": {"data": {}, "train": {"epochs": 1.0}},
}
PULLS, PERIODS = [0.1, 0.5, 1.0], [4, 16, 64]


def alone(**rule: Any) -> Tree:
    """Replicas of one rank, reconciled by one rule every EVERY steps unless it says otherwise."""
    return {"exchange": {"kind": "none"}, "sync": [{"every": EVERY} | rule]}


def leader(score: str, pull: float, every: int = EVERY) -> Tree:
    """Leader SGD. With either score the probe's samples are kept aside: a rule that never meets
    sees to that, so that both train on the same samples and the same mixtures."""
    aside = {"kind": "leader", "score": "probe", "every": STEPS + 1}
    elects = {"kind": "leader", "score": score, "pull": pull, "every": every}
    return {"exchange": {"kind": "none"}, "sync": [aside, elects]}


def fedaware(form: str, **keys: Any) -> Tree:
    return alone(kind="fedaware", form=form, **keys)


SYSTEMS: dict[str, Tree] = {
    "averaging": alone(kind="average"),
    "FedAWARE, direction": fedaware("direction"),
    "FedAWARE, projection": fedaware("projection"),
    "FedAWARE, alpha 1": fedaware("direction", alpha=1.0),
    "EASGD": alone(kind="elastic"),
    "SlowMo": alone(kind="average", outer={"kind": "slowmo"}),
    "synchronous SGD": {},
}
"""Beside each other at every step size."""
LEADERS = {
    f"{score}, pull {pull}, every {every}": leader(score, pull, every)
    for score in ("probe", "train_loss")
    for pull in PULLS
    for every in PERIODS
    if score == "probe" or pull == 0.5
}
TRIES: dict[str, Tree] = {
    "averaging, every 4": alone(kind="average", every=4),
    "FedAWARE, alpha 0.1": fedaware("direction", alpha=0.1),
    "FedAWARE, lr 2": fedaware("direction", lr=2.0),
    "FedAWARE, alpha 1, lr 1.5": fedaware("direction", alpha=1.0, lr=1.5),
    "FedAWARE, alpha 1, projection": fedaware("projection", alpha=1.0),
    "FedAWARE, every 4": fedaware("direction", every=4),
    "FedAWARE, alpha 1, every 4": fedaware("direction", alpha=1.0, every=4),
}
MORE: dict[str, Tree] = {
    "averaging, every 64": alone(kind="average", every=64),
    "averaging, momentum reset": alone(kind="average", momentum="reset"),
    "FedAWARE, every 64": fedaware("direction", every=64),
    "FedAWARE, length unit": fedaware("direction", length="unit"),
    "FedAWARE, lr 2, momentum reset": fedaware("direction", lr=2.0, momentum="reset"),
}
ALL = SYSTEMS | LEADERS | TRIES | MORE


@dataclass(frozen=True)
class Case:
    """One training."""

    system: str
    partition: str = "dirichlet"
    replicas: int = 8
    lr: float = 0.03
    length: str = "rounds"
    seed: int = 0

    def tree(self) -> Tree:
        """Its configuration."""
        length = LENGTHS[self.length]
        data = {"kind": "idx", "folder": "fashion-mnist", "prefetch": 0}
        return ALL[self.system] | {
            "seed": self.seed,
            "data": data | PARTITIONS[self.partition] | length["data"],
            "model": {"kind": "mlp", "widths": [64]},
            "optimiser": {"kind": "sgd", "momentum": 0.9},
            "lr": {"base": self.lr},
            "batch": {"batch_global": BATCH * self.replicas},
            "train": {"threads": 1} | length["train"],
            "evaluate": {"every_epochs": 0.0, "every_steps": EVALUATED},
            "record": {"every_steps": 1, "progress": "none"},
            "checkpoint": {"at_end": False},
        }


SCORES = [f"{score}, pull 0.5, every {EVERY}" for score in ("probe", "train_loss")]
COMPARED = ["averaging", "FedAWARE, direction", "FedAWARE, alpha 1"]
PARTS: dict[str, list[Case]] = {
    "leader": [Case(s, p) for p in ("dirichlet", "iid") for s in SCORES],
    "systems": [Case(s) for s in SYSTEMS],
    "knobs": [Case(s) for s in LEADERS],
    "small": [Case(s, lr=0.01) for s in SYSTEMS],
    "tries": [Case(s) for s in TRIES],
    "shard": [Case(s, "shard") for s in [*SCORES, *COMPARED]],
    "one pass": [Case(s, length="one pass") for s in [*COMPARED, "SlowMo"]],
    "four": [Case(s, p, 4) for p in ("iid", "dirichlet") for s in SCORES]
    + [Case(s, replicas=4) for s in COMPARED],
    "large": [Case(s, lr=0.1) for s in SYSTEMS],
    "more": [Case(s) for s in MORE],
}
"""Seed 0 of each; a case may be in several parts."""


def train(case: Case) -> Tree:
    """One training; what its record says. Diverged trainings have no accuracy."""
    loaded, began = from_mapping(case.tree()), time.process_time()
    found: Tree = asdict(case) | {"configuration": case.tree()}
    with tempfile.TemporaryDirectory() as name:
        options = Options(out=Path(name) / "run")
        try:
            run_threads(case.replicas, lambda comm: run_on(World(comm), loaded, options))
        except RankError as error:
            if not isinstance(error.__cause__, NonFinite):
                raise
            return found | {"diverged": str(error.__cause__)}
        lines = list(records.read(Path(name) / "run" / "metrics.jsonl"))
    evaluations = [line for line in lines if line["kind"] == "eval"]
    last = evaluations[-1]
    ends = [f"replica_accuracy_{which}" for which in ("min", "mean", "max")]
    found |= {name: last[name] for name in [*ends, "leader_accuracy"] if last[name] is not None}
    found["curve"] = [line["accuracy"] for line in evaluations]
    every = case.tree().get("sync", [{"every": 1}])[-1]["every"]
    meetings = [
        {name.split(".")[1]: value for name, value in line["sync"].items()}
        for line in lines
        if line["kind"] == "step" and line["sync"] and line["step"] % every == 0
    ]
    for name in meetings[0] if meetings else []:
        found[name] = [float(f"{meeting[name]:.5g}") for meeting in meetings]
    return found | {"cpu_s": round(time.process_time() - began, 2)}


def case_of(line: Tree) -> Case:
    """The case of a line of the log."""
    return Case(**{field.name: line[field.name] for field in fields(Case)})


class Log:
    """Finished runs, a JSON line each."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def lines(self) -> list[Tree]:
        """All of them, oldest first."""
        text = self._path.read_text() if self._path.exists() else ""
        return [json.loads(line) for line in text.splitlines()]

    def done(self) -> set[Case]:
        """What need not be run again."""
        return set(map(case_of, self.lines()))

    def append(self, line: Tree) -> None:
        """Write one line in one piece."""
        with open(self._path, "a") as file:
            file.write(json.dumps(line) + "\n")


def run(args: argparse.Namespace) -> None:
    """All cases that the log lacks, seed by seed, so that a first answer is there early."""
    log = Log(args.log)
    done = log.done()
    for seed in args.seeds:
        for part in args.parts:
            for case in PARTS[part]:
                case = replace(case, seed=seed)
                if case not in done:
                    line = train(case)
                    log.append(line)
                    done.add(case)
                    print(case, line.get("curve"), file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--log", type=Path, required=True)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    run(parser.parse_args())


if __name__ == "__main__":
    main()
