"""`hpctrain diversity`: equal on any number of ranks, at checkpoints, and its complaints."""

from __future__ import annotations

import io
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, outside_any_launch
from rich.console import Console

from hpctrain import census
from hpctrain.api import run_on
from hpctrain.appraisal import Appraisal, appraise
from hpctrain.assemble import Options, World
from hpctrain.cli import run_command_line
from hpctrain.commands.diversity_table import meaning, show
from hpctrain.config import from_mapping
from hpctrain.data.spec import Spec
from hpctrain.errors import ConfigError, DataError, NonFinite, UsageError
from hpctrain.models.flat import FlatModel
from hpctrain.models.logistic import Logistic
from hpctrain.stats import glm
from hpctrain.stats.diversity import of_matrix
from hpctrain.transport.communicator import Communicator
from hpctrain.transport.threads import RankError, run_threads

TREE: dict[str, Any] = {
    "name": "small",
    "data": {"kind": "synthetic", "n_train": 150, "features": 8, "n_test": 10},
    "model": {"kind": "mlp", "widths": [6], "dropout": 0.3},
    "batch": {"batch_global": 16},
    "lr": {"base": 0.1},
    "train": {"steps": 12, "dtype": "float64"},
    "checkpoint": {"every_steps": 6},
    "record": {"progress": "none"},
}
LOCAL_SGD = TREE | {
    "exchange": {"kind": "none"},
    "sync": [{"kind": "average", "every": 100}],
    "train": {"steps": 12, "dtype": "float64"},
}


def appraised(tree: dict[str, Any], ranks: int = 1, **options: Any) -> list[Appraisal]:
    loaded = from_mapping(tree)
    return run_threads(ranks, lambda comm: appraise(loaded, World(comm), **options))


def trained(tree: dict[str, Any], folder: Path, ranks: int = 1) -> Path:
    loaded = from_mapping(tree)
    run_threads(ranks, lambda comm: run_on(World(comm), loaded, Options(out=folder)))
    return folder


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(TREE, tmp_path_factory.mktemp("runs") / "small")


class Rows:
    """Samples that are rows; remembers what was asked for."""

    nbytes = 0

    def __init__(self, x_ND: np.ndarray, y_N: np.ndarray) -> None:
        self.x_ND, self.y_N = x_ND, y_N
        self.asked: list[int] = []

    def __len__(self) -> int:
        return len(self.x_ND)

    def batch(self, indices: np.ndarray, epoch: int) -> tuple[torch.Tensor, torch.Tensor]:
        self.asked += indices.tolist()
        return torch.from_numpy(self.x_ND[indices]), torch.from_numpy(self.y_N[indices])

    def labels(self) -> None:
        return None


def logistic_problem(n: int = 60, d: int = 5) -> tuple[FlatModel, Spec, Rows]:
    rng = np.random.default_rng(0)
    rows = Rows(rng.standard_normal((n, d)).astype(np.float32), rng.integers(0, 2, n))
    spec = Spec("classification", (d,), "float32", 2)
    return FlatModel(Logistic(bias=False).build(spec).double()), spec, rows


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_known_answer_on_any_number_of_ranks(ranks):
    """At w = 0 the residual of logistic regression is 1/2 - label."""

    def body(comm: Communicator):
        flat, spec, rows = logistic_problem()
        found = census.measure_diversity(flat, spec, rows, comm, chunk=7)
        erank = census.measure_effective_rank(flat, spec, rows, comm, count=20, chunk=6)
        assert float(flat.grads_P.abs().sum()) == 0.0
        return found, erank, rows.asked

    _, _, rows = logistic_problem()
    expected = glm.b_s(rows.x_ND, 0.5 - rows.y_N)
    results = run_threads(ranks, body)
    for found, erank, _ in results:
        assert found == results[0][0]
        assert found.b_s == pytest.approx(expected, rel=1e-9)
        assert erank == results[0][1]
    chosen = census.choose_samples(60, 20, 0)
    g_MD = rows.x_ND[chosen] * (0.5 - rows.y_N[chosen])[:, None]
    sigma = np.linalg.svd(g_MD, compute_uv=False)
    p = sigma / sigma.sum()
    assert results[0][1] == pytest.approx(math.exp(-(p @ np.log(p))), rel=1e-6)
    assert sorted(sum((asked[: 60 // ranks] for _, _, asked in results), [])) == list(range(60))


def test_a_part_of_the_set():
    flat, spec, rows = logistic_problem(400)

    def body(comm: Communicator):
        return census.measure_diversity(flat, spec, rows, comm, count=100, seed=3)

    (found,) = run_threads(1, body)
    assert (found.samples, found.population) == (100, 400)
    chosen = census.choose_samples(400, 100, 3)
    assert rows.asked == chosen.tolist() == sorted(set(rows.asked))
    g = torch.from_numpy(rows.x_ND[chosen] * (0.5 - rows.y_N[chosen])[:, None])
    assert found.sum_sq == pytest.approx(of_matrix(g).sum_sq, rel=1e-6)
    assert len(census.choose_samples(5, None, 0)) == 5
    # More ranks than samples: some have none.
    assert run_threads(4, lambda comm: census.measure_diversity(flat, spec, rows, comm, count=2))
    for count in (1, 401):
        with pytest.raises(UsageError, match=f"{count} samples.*2 or more.*400"):
            census.choose_samples(400, count, 0)


def test_a_gradient_that_is_not_finite_is_said_on_all_ranks():
    def body(comm: Communicator) -> str:
        flat, spec, rows = logistic_problem()
        rows.x_ND[5, 0] = np.inf
        with pytest.raises(NonFinite, match="inf or NaN at these parameters"):
            census.measure_diversity(flat, spec, rows, comm)
        return "said"

    assert run_threads(2, body) == ["said", "said"]


def test_a_run_its_checkpoints_and_the_start(run_folder):
    start = appraised(TREE)[0]
    assert (start.checkpoint, start.step) == (None, 0)
    newest = appraised(TREE, checkpoint=run_folder)[0]
    assert newest.step == 12
    assert appraised(TREE, checkpoint=run_folder / "checkpoints")[0] == newest
    first = appraised(TREE, checkpoint=run_folder / "checkpoints" / "step-00000006")[0]
    assert first.step == 6
    assert len({one.diversity.b_s for one in (start, newest, first)}) == 3
    for one in appraised(TREE, ranks=2, checkpoint=run_folder, rank_samples=30):
        assert one.diversity.b_s == pytest.approx(newest.diversity.b_s, rel=1e-10)
        assert 1 < one.rank < 30


def test_the_average_of_replicas_is_measured(tmp_path):
    folder = trained(LOCAL_SGD, tmp_path / "local", ranks=2)
    found = [appraised(LOCAL_SGD, n, checkpoint=folder)[0].diversity.b_s for n in (1, 2, 3)]
    assert found[1:] == pytest.approx(found[:1] * 2, rel=1e-10)


def test_complaints(run_folder, tmp_path):
    def says(error: type[Exception], text: str, tree=TREE, **options: Any) -> None:
        with pytest.raises(RankError) as caught:
            appraised(tree, **options)
        assert isinstance(caught.value.__cause__, error)
        assert text in str(caught.value.__cause__)

    says(UsageError, "holds no checkpoint; give a run folder", checkpoint=tmp_path)
    says(UsageError, "is no folder", checkpoint=tmp_path / "none")
    other = TREE | {"model": {"kind": "mlp", "widths": [7]}}
    says(ConfigError, "step-00000012: param.hidden1.weight has shape", other, checkpoint=run_folder)
    says(ConfigError, "not this model's", TREE | {"model": {"kind": "logistic"}},
         checkpoint=run_folder)  # fmt: skip
    says(UsageError, "has 150", samples=151)
    says(ConfigError, "batch normalisation", TREE | {"model": {"kind": f"{__name__}:normed"}})
    damaged = tmp_path / "checkpoints" / "step-00000003"
    damaged.mkdir(parents=True)
    says(DataError, "is missing, so the checkpoint is not complete", checkpoint=damaged)


def normed(spec: Spec) -> torch.nn.Module:
    """A model of a user's own."""
    return torch.nn.Sequential(torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 2))


def test_from_the_command_line(run_folder, tmp_path):
    record = tmp_path / "found.json"
    done = subprocess.run(
        [sys.executable, "-m", "hpctrain", "diversity", "--checkpoint", run_folder / "checkpoints" /
         "step-00000012", "--layers", "--json", record],
        env=outside_any_launch(), cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    shown = " ".join(done.stdout.split())
    content = json.loads(record.read_text())
    assert content["checkpoint"].endswith("step-00000012")
    assert (content["samples"], content["grad_erank_samples"]) == (150, 150)
    assert content["b_s"] == pytest.approx(150 * content["sum_sq"] / content["sum_norm_sq"])
    assert sum(layer["s2"] for layer in content["layers"]) == pytest.approx(content["s2"])
    for word in ("Delta_S", "B_S alone", "grad_erank", "batch of 16", "(step 12)"):
        assert word in shown
    # Before anything is loaded.
    assert run_command_line(["diversity", "--json", str(tmp_path / "no" / "x.json")]) == 2


def test_meaning_never_promises_what_b_s_does_not_say():
    spread = of_matrix(torch.randn(50, 4, generator=torch.Generator().manual_seed(0)) + 1.0)
    text = " ".join(meaning(spread, 32))
    assert f"{1 + 31 / spread.b_s:.3g}" in text
    assert "nor about how well the model will do on new data" in text
    assert "All gradients are zero" in meaning(of_matrix(torch.zeros(3, 2)), 8)[0]
    cancelling = of_matrix(torch.tensor([[1.0], [-1.0]]))
    assert "cancel exactly" in meaning(cancelling, 8)[0]
    console = Console(width=100, record=True, file=io.StringIO())
    found = Appraisal("a.toml", None, 0, "1 rank on 1 node", 8, cancelling, None, 0)
    show(found, console, layers=True)
    assert "inf" in console.export_text()
    assert json.loads(found.to_json())["b_s"] is None


def test_an_unresolved_part_is_shown_as_a_lower_estimate():
    rng = np.random.default_rng(0)
    flat, spec, _ = logistic_problem(2000, 40)
    rows = Rows(rng.standard_normal((20000, 40)).astype(np.float32), rng.integers(0, 2, 20000))

    def body(comm: Communicator):
        return census.measure_diversity(flat, spec, rows, comm, count=30)

    (found,) = run_threads(1, body)
    assert not found.resolved
    assert meaning(found, 8)[0].startswith("Not resolved")
