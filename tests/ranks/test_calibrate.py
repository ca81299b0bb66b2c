"""`hpctrain calibrate` through MPI and Horovod."""

from __future__ import annotations

from hpctrain.api import run_on
from hpctrain.assemble import Options, World
from hpctrain.calibrate import calibrate
from hpctrain.config import from_mapping, load
from hpctrain.runs.calibration import FILE, Wanted
from hpctrain.runs.manifest import folder_name
from tests.golden_run import MLP, step_losses


def test_the_first_branch_is_what_the_run_itself_did(comm, rank_tmp_path):
    folder = rank_tmp_path / "run"
    tree = MLP | {"checkpoint": {"every_steps": 10}, "train": {"steps": 18}, "lr": {"base": 0.05}}
    run_on(World(comm), from_mapping(tree), Options(out=folder))
    comm.barrier()
    loaded = load(folder / "config.toml")
    wanted = Wanted(most=4, samples=8 * 50)
    checkpoint = folder / "checkpoints" / folder_name(10)
    found = calibrate(World(comm), loaded, checkpoint, wanted, print)
    comm.barrier()
    assert found is not None
    assert found.branches[0].losses == step_losses(folder)[10:]
    assert (folder / FILE).read_text() == found.to_json()
    assert (found.noise is None) == (comm.size == 1)
