"""The trainings and the systems that `benchmarks.time_to_target` compares."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from benchmarks.peers.target import Target

Tree = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """One training up to a target."""

    title: str
    tables: Tree
    """An hpctrain configuration without seed, lr.base and [exchange]."""
    target: Target
    lrs: tuple[float, ...]
    """The same grid for every system."""
    evaluate_from: int
    """The peers' first evaluation; hpctrain's own trainings evaluate from the start."""
    final_steps: int
    """Length of the trainings whose last evaluations are compared."""
    batch_statistics: bool = False
    """Whether a sample's gradient depends on what else its rank computes (batch normalisation)."""


EVALUATE = {"every_steps": 25, "every_epochs": 0.0, "batch": 250}

TASKS = {
    "fashion": Task(
        title="Fashion-MNIST, CNN of 3.17M parameters, batch 256, SGD with momentum 0.9",
        tables={
            "data": {"kind": "idx", "folder": "fashion-mnist"},
            "model": {"kind": "cnn", "channels": [32, 64], "hidden": 1000},
            "optimiser": {"kind": "sgd", "momentum": 0.9},
            "lr": {"warmup_samples": 25 * 256},
            "batch": {"batch_global": 256},
            "train": {"steps": 1500},
            "evaluate": EVALUATE,
        },
        target=Target("accuracy", 0.90),
        lrs=(0.03, 0.06, 0.12),
        evaluate_from=300,
        final_steps=703,  # 3 epochs
    ),
    "gpt": Task(
        title="gpt of 3.19M parameters on 57 novels, batch 16 windows of 64 characters, SGD with "
        "momentum 0.9 and gradients clipped to 1",
        tables={
            "data": {
                "kind": "text",
                "train": "text/novels-train.txt.xz",
                "test": "text/novels-valid.txt.xz",
                "tokens": "char",
                "context": 64,
                "limit_test": 500,
            },
            "model": {"kind": "gpt", "n_layer": 4, "n_head": 4, "d_model": 256},
            "optimiser": {"kind": "sgd", "momentum": 0.9, "clip_norm": 1.0},
            "lr": {"warmup_samples": 100 * 16},
            "batch": {"batch_global": 16},
            "train": {"steps": 1500},
            "evaluate": EVALUATE | {"batch": 25},
        },
        target=Target("loss", 2.15),
        lrs=(0.1, 0.2, 0.4),
        evaluate_from=200,
        final_steps=800,
    ),
    "cifar": Task(
        title="CIFAR-10, ResNet-20, batch 128, SGD with Nesterov momentum 0.9",
        tables={
            "data": {"kind": "cifar-binary", "augment": "crop-flip"},
            "model": {"kind": "resnet20"},
            "optimiser": {
                "kind": "sgd",
                "momentum": 0.9,
                "nesterov": True,
                "weight_decay": 5e-4,
            },
            "lr": {"warmup_samples": 100 * 128},
            "batch": {"batch_global": 128},
            "train": {"steps": 1600},
            "evaluate": EVALUATE | {"every_steps": 100},
        },
        target=Target("accuracy", 0.70),
        lrs=(0.1,),
        evaluate_from=0,
        final_steps=1600,
        batch_statistics=True,
    ),
}


@dataclass(frozen=True)
class System:
    """One way to exchange gradients."""

    family: str
    """horovod, ddp (scripts of this folder) or hpctrain."""
    options: tuple[str, ...] = ()
    """Of the peer's script."""
    tables: Mapping[str, Any] = field(default_factory=dict)
    """hpctrain: merged over the task's tables, as [exchange] and [optimiser]."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """For Open MPI, in timings."""
    steps_of: str = ""
    """The system whose steps to target are this one's too, because the arithmetic is the same; of
    float16 because only rounding differs."""
    flat: bool = False
    """The result does not depend on which ranks share a node."""
    linear: bool = False
    """The result depends on the mean of the ranks' gradients only, so steps to target are computed
    by one rank with the whole batch: dense float32 sums, and PowerSGD, whose factors and residuals
    add up over ranks (Vogels et al. 2019); up to rounding."""


RING = {
    "OMPI_MCA_coll_tuned_use_dynamic_rules": "1",
    "OMPI_MCA_coll_tuned_allreduce_algorithm": "4",
}
DENSE = "Horovod float32"
ALONE_FOR_EVER = "hpctrain, never reconciled"
"""Timed only: a step that is nothing but computing."""


def topk(density: float, *, masking: bool = True, **more: Any) -> System:
    """hpctrain's top-k at a density; all else by default unless given."""
    table = {"kind": "topk", "density": density, "masking": masking, **more}
    return System("hpctrain", tables={"exchange": table})


ALONE: Tree = {"kind": "none"}
NODES: Tree = {"kind": "dense", "dense_backend": "mpi", "scope": "node"}


def replicas(*rules: Mapping[str, Any], exchange: Tree = ALONE) -> System:
    """hpctrain's ranks on their own, or nodes on their own, reconciled by rules."""
    flat = exchange is ALONE and all("scope" not in rule for rule in rules)
    return System("hpctrain", tables={"exchange": exchange, "sync": list(rules)}, flat=flat)


SYSTEMS = {
    DENSE: System("horovod", linear=True),
    "Horovod float16": System("horovod", ("--compression", "fp16"), steps_of=DENSE),
    "Horovod float32, ring": System("horovod", environment=RING, steps_of=DENSE),
    "Horovod float16, ring": System(
        "horovod", ("--compression", "fp16"), environment=RING, steps_of=DENSE
    ),
    "DDP": System("ddp", steps_of=DENSE),
    "DDP PowerSGD-1": System("ddp", ("--powersgd", "1"), linear=True),
    "DDP PowerSGD-2": System("ddp", ("--powersgd", "2"), linear=True),
    "DDP PowerSGD-4": System("ddp", ("--powersgd", "4"), linear=True),
    "hpctrain dense, horovod": System(
        "hpctrain", tables={"exchange": {"dense_backend": "horovod"}}, steps_of=DENSE
    ),
    "hpctrain dense, mpi": System(
        "hpctrain", tables={"exchange": {"dense_backend": "mpi"}}, steps_of=DENSE
    ),
    **{f"hpctrain top-k {100 * share:g} %": topk(share) for share in (0.001, 0.003, 0.01, 0.03)},
    "hpctrain top-k 1 %, exclusive": topk(0.01, algorithm="exclusive"),
    **{
        f"hpctrain top-k {100 * share:g} %, gather{', no masking' * (not masking)}": topk(
            share, algorithm="gather", masking=masking
        )
        for share in (0.004, 0.01, 0.02)
        for masking in (True, False)
    },
    "hpctrain top-k 3 %, gather, dense below 1024": topk(
        0.03, algorithm="gather", dense_below=1024
    ),
    "hpctrain powersgd-2": System(
        "hpctrain", tables={"exchange": {"kind": "powersgd", "matrix_rank": 2}}
    ),
    **{
        f"hpctrain local SGD, every {every}": replicas({"kind": "average", "every": every})
        for every in (4, 16, 32, 64, 100)
    },
    **{
        f"hpctrain Leader SGD, every {every}, pull {pull}": replicas(
            {"kind": "leader", "every": every, "pull": pull}
        )
        for every, pull in ((4, 0.5), (16, 0.5), (16, 1.0), (32, 0.5), (64, 0.5), (64, 1.0))
    },
    **{
        f"hpctrain dense in nodes, local SGD between, every {every}": replicas(
            {"kind": "average", "every": every}, exchange=NODES
        )
        for every in (16, 32, 100)
    },
    "hpctrain local SGD, every 30, 60, 100, 200": replicas(
        {"kind": "average", "schedule": [[0, 30], [0.25, 60], [0.5, 100], [1.0, 200]]}
    ),
    ALONE_FOR_EVER: replicas({"kind": "average", "every": 1_000_000}),
    **{
        f"hpctrain SlowMo, every {every}": replicas(
            {"kind": "average", "every": every, "outer": {"kind": "slowmo", "momentum": 0.5}}
        )
        for every in (32, 64, 100)
    },
    **{
        f"hpctrain EASGD, every {every}": replicas({"kind": "elastic", "every": every})
        for every in (4, 16, 64)
    },
    **{
        f"hpctrain Qsparse {100 * density:g} %, every {every}": replicas(
            {"kind": "qsparse", "every": every, "density": density}
        )
        for density, every in ((0.03, 4), (0.03, 8), (0.06, 16))
    },
    **{
        f"hpctrain Qsparse 3 %, every {every}, between nodes": replicas(
            {"kind": "qsparse", "every": every, "density": 0.03}, exchange=NODES
        )
        for every in (4, 8)
    },
    "hpctrain gossip, one peer": replicas({"kind": "gossip"}),
}
"""A name in a log stands for one definition: another definition is another run."""
