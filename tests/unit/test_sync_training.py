"""Whole trainings with [[sync]] rules, on threads: against synchronous SGD, resumed, resized."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hpctrain.api import Outcome, run_on
from hpctrain.assemble import Options, World, open_session
from hpctrain.config import from_mapping
from hpctrain.data.spec import Spec
from hpctrain.errors import ConfigError
from hpctrain.train import run_training
from hpctrain.transport.communicator import Communicator
from hpctrain.transport.threads import RankError, run_threads
from tests.golden_run import MLP

BASE: dict[str, Any] = MLP | {
    "batch": {"batch_global": 48},
    "train": {"steps": 40, "dtype": "float64"},
    "exchange": {"kind": "none"},
}

RULES: dict[str, list[dict[str, Any]]] = {
    "average": [{"kind": "average", "every": 4}],
    "average, mixed momentum": [{"kind": "average", "every": 4, "momentum": "mix"}],
    "slowmo": [{"kind": "average", "every": 4, "outer": {"kind": "slowmo", "momentum": 0.3}}],
    "diloco": [{"kind": "average", "every": 8, "outer": {"kind": "nesterov", "lr": 0.5}}],
    "post-local": [{"kind": "average", "schedule": [[0, 1], [0.5, 4]]}],
    "total steps": [{"kind": "average", "every": 4, "unit": "total_steps"}],
    "diversity": [{"kind": "average", "every": 3, "adapt": "diversity"}],
    "grawa": [{"kind": "average", "every": 2, "pull": 0.5, "weights": "inverse_gradient_norm"}],
    "leader": [{"kind": "leader", "every": 4, "pull": 0.3, "drip": 0.1}],
    "leader, probe": [{"kind": "leader", "every": 4, "score": "probe", "probe_samples": 32}],
    "multi-leader": [
        {"kind": "leader", "scope": "node", "every": 2, "pull": 0.3},
        {"kind": "leader", "every": 6, "pull": 0.3},
    ],
    "elastic": [{"kind": "elastic", "every": 3}],
    "gossip": [{"kind": "gossip", "graph": "ring"}],
    "fedaware": [{"kind": "fedaware", "every": 4}],
    "qsparse": [{"kind": "qsparse", "every": 4, "density": 0.1}],
    "downpour": [{"kind": "downpour", "every": 2}],
    "elastic, asynchronous": [{"kind": "elastic", "every": 3, "asynchronous": True}],
    "leader, asynchronous": [{"kind": "leader", "every": 4, "asynchronous": True}],
}


def batch_norm(spec: Spec) -> nn.Module:
    n_inputs, width = math.prod(spec.input_shape), 24
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(n_inputs, width),
        nn.BatchNorm1d(width),
        nn.ReLU(),
        nn.Linear(width, spec.n_outputs),
    )


def dtype_of(name: str) -> str:
    return "float32" if name == "qsparse" else "float64"


def train(
    tree: dict[str, Any], size: int, folder: Path, node_of: list[int] | None = None, **options: Any
) -> list[Outcome]:
    loaded = from_mapping(tree)
    return run_threads(
        size,
        lambda comm: run_on(World(comm), loaded, Options(out=folder, **options)),
        node_of=node_of,
    )


def lines(folder: Path, kind: str) -> list[dict[str, Any]]:
    text = (folder / "metrics.jsonl").read_text()
    return [line for line in map(json.loads, text.splitlines()) if line["kind"] == kind]


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_averaging_at_every_step_is_synchronous_sgd(size, tmp_path):
    tree = BASE | {"optimiser": {"momentum": 0.9}, "lr": {"base": 0.05}}
    tree["train"] = {"steps": 25, "dtype": "float64"}  # within an epoch, whose last batch is uneven
    whole = train(tree | {"exchange": {"kind": "dense"}}, 1, tmp_path / "dense")
    sync = [{"kind": "average", "every": 1}]
    parts = train(tree | {"sync": sync}, size, tmp_path / "average")
    assert parts[0].results["loss"] == pytest.approx(whole[0].results["loss"], rel=1e-10)


@pytest.mark.parametrize("name", RULES)
def test_trains_and_resumes_bitwise(name, tmp_path):
    tree = BASE | {"sync": RULES[name], "lr": {"base": 0.1}}
    tree["optimiser"] = {"momentum": 0.5}
    if name == "downpour":  # the steps of all ranks add up
        tree["lr"] = {"base": 0.03}
    tree["train"] = {"steps": 40, "dtype": dtype_of(name)}
    nodes = [0, 1, 0, 1]
    whole = train(tree, 4, tmp_path / "whole", nodes)
    assert whole[0].results["accuracy"] > 0.5
    short = {"steps": 21, "dtype": dtype_of(name)}
    train(tree | {"train": short}, 4, tmp_path / "parts", nodes)
    parts = train(tree, 4, tmp_path / "parts", nodes, resume="auto")
    if from_mapping(tree).run.sync[0].own_pace is False:
        assert parts[0].results == whole[0].results
    assert parts[0].results["accuracy"] > 0.5


@pytest.mark.parametrize(
    ("name", "size"), [("multi-leader", 1), ("slowmo", 2), *((name, 3) for name in RULES)]
)
def test_other_ranks_start_at_the_average(name, size, tmp_path):
    tree = BASE | {"sync": RULES[name], "train": {"steps": 40, "dtype": dtype_of(name)}}
    whole = train(tree, 4, tmp_path / "run")[0].results
    again = train(tree, size, tmp_path / "run", resume="auto")[0].results
    rel = 1e-9 if dtype_of(name) == "float64" else 1e-5
    assert again["loss"] == pytest.approx(whole["loss"], rel=rel)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_delayed_gradients(size, tmp_path):
    """One step behind: the last gradient is not applied, and the first step moves nothing."""
    exchange = {"kind": "delayed", "delay": 2}
    tree = BASE | {"exchange": exchange, "lr": {"base": 0.05}}
    whole = train(tree, size, tmp_path / "whole")
    one = train(tree, 1, tmp_path / "one")
    assert whole[0].results["loss"] == pytest.approx(one[0].results["loss"], rel=1e-10)
    losses = [line["loss"] for line in lines(tmp_path / "whole", "step")]
    assert losses[-1] < losses[0]
    train(tree | {"train": {"steps": 17, "dtype": "float64"}}, size, tmp_path / "parts")
    parts = train(tree, size, tmp_path / "parts", resume="auto")
    assert parts[0].results == whole[0].results


@pytest.mark.parametrize("form", ["ascent", "average"])
def test_sam(form, tmp_path):
    regulariser = [{"kind": "sam", "form": form, "rho": 0.1}]
    tree = BASE | {"exchange": {"kind": "dense"}, "regulariser": regulariser}
    plain = train(BASE | {"exchange": {"kind": "dense"}}, 2, tmp_path / "plain")
    sam = train(tree, 2, tmp_path / "sam")
    assert sam[0].results["accuracy"] > 0.5
    assert sam[0].results["loss"] != plain[0].results["loss"]


@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_node_is_one_replica(size, tmp_path):
    """Dense inside nodes and averaging between them at every step: synchronous SGD again."""
    exchange = {"kind": "dense", "scope": "node", "dense_backend": "mpi"}
    sync = [{"kind": "average", "every": 1}]
    tree = BASE | {"train": {"steps": 25, "dtype": "float64"}}
    whole = train(tree | {"exchange": {"kind": "dense"}}, 1, tmp_path / "dense")
    nodes = [rank % 2 for rank in range(size)]
    parts = train(tree | {"exchange": exchange, "sync": sync}, size, tmp_path / "node", nodes)
    assert parts[0].results["loss"] == pytest.approx(whole[0].results["loss"], rel=1e-10)


@pytest.mark.parametrize("node_of", [[0, 1], [0, 0, 1, 1], [0, 1, 1]], ids=str)
def test_qsparse_between_nodes(node_of, tmp_path):
    """All entries at every step: synchronous SGD. Some of them: resumed bitwise, memory and all."""
    exchange, size = {"kind": "dense", "scope": "node", "dense_backend": "mpi"}, len(node_of)
    rule = {"kind": "qsparse", "every": 1, "density": 1.0, "value": "float32"}
    tree = BASE | {"train": {"steps": 25}, "exchange": exchange}
    whole = train(tree | {"exchange": {"kind": "dense"}}, 1, tmp_path / "dense")
    parts = train(tree | {"sync": [rule]}, size, tmp_path / "node", node_of)
    # The mean of replicas is that of samples where nodes are equal; of unequal ones it only learns.
    if node_of.count(0) == node_of.count(1):
        assert parts[0].results["loss"] == pytest.approx(whole[0].results["loss"], rel=1e-4)
    tree |= {"sync": [{"kind": "qsparse", "every": 3, "density": 0.2}], "lr": {"base": 0.1}}
    straight = train(tree, size, tmp_path / "straight", node_of)[0].results
    train(tree | {"train": {"steps": 14}}, size, tmp_path / "cut", node_of)
    assert train(tree, size, tmp_path / "cut", node_of, resume="auto")[0].results == straight


def test_qsparse_refuses_what_is_not_finite(tmp_path):
    tree = BASE | {"train": {"steps": 8}, "lr": {"base": 1e30}, "sync": RULES["qsparse"]}
    with pytest.raises(RankError, match="inf or NaN"):
        train(tree, 2, tmp_path / "run")


@pytest.mark.parametrize("rule", ["leader, asynchronous", "elastic, asynchronous", "downpour"])
def test_ranks_of_a_replica_stay_equal_at_their_own_pace(rule, tmp_path):
    exchange = {"kind": "dense", "scope": "node", "dense_backend": "mpi"}
    tree = BASE | {
        "exchange": exchange,
        "sync": RULES[rule],
        "model": {"kind": f"{__name__}:batch_norm"},
    }
    loaded = from_mapping(tree | {"lr": {"base": 0.03}})

    def body(comm: Communicator) -> Tensor:
        options = Options(out=tmp_path / "run")
        with open_session(loaded, World(comm), options) as session:
            assert run_training(session) is None
            assert session.results["accuracy"] > 0.5
            return session.flat.params_P.clone()

    found = run_threads(4, body, node_of=[0, 0, 1, 1])
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[2], found[3])


def test_record_keeps_the_last_consensus_distance(tmp_path):
    """Distances are measured at steps 1, 8, 15, ..., and no line is written at one of these."""
    sync = [{"kind": "gossip", "graph": "ring", "measure_every": 7}]
    train(BASE | {"sync": sync}, 3, tmp_path / "run")
    steps = lines(tmp_path / "run", "step")
    assert all(line["step"] % 7 != 1 for line in steps)
    assert all(line["sync"]["0_gossip.consensus_distance"] > 0.0 for line in steps)


def test_record_names_who_leads(tmp_path):
    train(BASE | {"sync": RULES["multi-leader"]}, 4, tmp_path / "run", [0, 0, 1, 1])
    step = lines(tmp_path / "run", "step")[-1]
    assert {"0_leader.leader", "1_leader.leader", "1_leader.leader_share"} <= step["sync"].keys()
    last = lines(tmp_path / "run", "eval")[-1]
    assert last["replica_accuracy_min"] <= last["leader_accuracy"] <= last["replica_accuracy_max"]
    assert step["loss"] > 0


@pytest.mark.parametrize("score", ["train_loss", "probe"])
@pytest.mark.parametrize("partition", ["iid", "shard"])
def test_fixed_shards_meet_an_election_by_training_loss(partition, score, tmp_path, capfd):
    rule = {"kind": "leader", "score": score}
    data = MLP["data"] | {"partition": partition}
    tree = BASE | {"data": data, "record": {"progress": "plain"}, "train": {"steps": 1}}
    train(tree | {"sync": [rule]}, 2, tmp_path / "run")
    said = " ".join(capfd.readouterr().out.split())
    assert ("training losses say whose samples are easiest" in said) == (
        partition == "shard" and score == "train_loss"
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"exchange": {"kind": "dense"}, "sync": RULES["average"]}, "keeps one"),
        ({"sync": []}, "train apart for ever"),
        ({"exchange": {"kind": "dense", "scope": "node"}, "sync": RULES["average"]}, "Horovod"),
        ({"sync": [{"kind": "averag"}]}, 'did you mean "average"'),
        ({"sync": [{"kind": "average", "evry": 3}]}, "unknown key sync.0.evry"),
        ({"sync": [{"kind": "gossip", "matrix": [[0.5, 0.4], [0.5, 0.6]]}]}, "row 0"),
        ({"sync": [{"kind": "average", "every": 0}]}, "sync.0.every = 0"),
        ({"sync": [{"kind": "downpour", "unit": "seconds"}]}, "drop unit"),
    ],
)
def test_refusals(change, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        from_mapping(BASE | change)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([[0, 1], [1, 2, 3]], "rank 1 is in group 0 and in group 1"),
        ([[0, 1], [2]], "no group has rank"),
        ([[0, 1], [2, 3, 4]], "names rank 4"),
    ],
)
def test_groups_are_checked(groups, message, tmp_path):
    rule = {"kind": "average", "scope": "group"}
    with pytest.raises(RankError, match=message):
        train(BASE | {"sync": [rule], "topology": {"groups": groups}}, 4, tmp_path / "run")
