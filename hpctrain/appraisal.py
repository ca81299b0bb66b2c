"""What `hpctrain diversity` finds out: data and model of a configuration, at rest, at a checkpoint.

Nothing is trained and no run folder is touched. The module is in evaluation mode: dropout would add
its own noise to every sample's gradient and so raise B_S (Yin et al. 2018, section 5).
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpctrain.assemble import World, build_model
from hpctrain.census import choose_samples, measure_diversity, measure_effective_rank
from hpctrain.config import Loaded
from hpctrain.data.spec import DataSets
from hpctrain.errors import ConfigError
from hpctrain.hardware import choose_device, choose_threads
from hpctrain.models.flat import FlatModel
from hpctrain.place import agree_on
from hpctrain.randomness import RandomState
from hpctrain.runs import manifest, restore
from hpctrain.stats.diversity import Diversity, Moments
from hpctrain.stats.per_sample import refuse_batch_norm
from hpctrain.transport.communicator import Communicator


@dataclass(frozen=True)
class Appraisal:
    """Gradient diversity of one model at one place."""

    source: str
    """The configuration."""
    checkpoint: str | None
    """None: the initial parameters of the configuration's seed."""
    step: int
    ranks: str
    batch_global: int
    """The batch that the configuration starts with."""
    diversity: Diversity
    rank: float | None
    """grad_erank; None where it was not asked for."""
    rank_samples: int

    def to_json(self) -> str:
        """Local. Every number; null for what is not finite."""
        whole = self.diversity
        content = {
            "source": self.source,
            "checkpoint": self.checkpoint,
            "step": self.step,
            "ranks": self.ranks,
            "batch_global": self.batch_global,
            "samples": whole.samples,
            "population": whole.population,
            **_numbers(whole),
            "grad_erank": _finite(self.rank),
            "grad_erank_samples": self.rank_samples,
            "layers": [{"name": name, **_numbers(layer)} for name, layer in whole.layers],
        }
        return json.dumps(content, indent=1)


def appraise(
    loaded: Loaded,
    world: World,
    *,
    checkpoint: Path | None = None,
    samples: int | None = None,
    rank_samples: int = 0,
) -> Appraisal:
    """Collective. Measure the training set's gradient diversity; equal on all ranks.

    Args:
        loaded: Data, model, seed and device.
        world: The ranks that share the work.
        checkpoint: A run or one of its checkpoints; None: the initial parameters.
        samples: How many to take, at random; None: all.
        rank_samples: How many the effective rank is taken of, at most; 0: none.

    Raises:
        UsageError: no such checkpoint, or too few or too many samples.
        ConfigError: batch normalisation, or the checkpoint of another model.
        DataError: a checkpoint that is damaged.
        NonFinite: a gradient is inf or NaN.
    """
    run, comm = loaded.run, world.comm
    found = None if checkpoint is None else agree_on(checkpoint, comm)
    device = choose_device(run.train.device, comm)
    choose_threads(run.train.threads, comm)
    data = run.data.load(comm.node(), run.seed)
    flat = build_model(run, data, device, RandomState(run.seed, comm.rank), comm)
    if found is not None:
        _restore(flat, found)
    flat.module.eval()
    return _measured(loaded, comm, data, flat, found, samples, rank_samples)


def _measured(
    loaded: Loaded,
    comm: Communicator,
    data: DataSets,
    flat: FlatModel,
    found: manifest.Found | None,
    samples: int | None,
    rank_samples: int,
) -> Appraisal:
    seed, spec = loaded.run.seed, data.spec
    # Before the long part, for what can be known to fail.
    choose_samples(len(data.train), samples, seed)
    refuse_batch_norm(flat.module)
    diversity = measure_diversity(flat, spec, data.train, comm, count=samples, seed=seed)
    of_rank = min(rank_samples, diversity.samples)
    rank = None
    if of_rank >= 2:
        rank = measure_effective_rank(flat, spec, data.train, comm, count=of_rank, seed=seed)
    data.close()
    return Appraisal(
        source=loaded.source,
        checkpoint=str(found.path) if found else None,
        step=found.step if found else 0,
        ranks=comm.topology.describe(),
        batch_global=loaded.run.batch.batch_global,
        diversity=diversity,
        rank=rank,
        rank_samples=of_rank if rank is not None else 0,
    )


def _restore(flat: FlatModel, found: manifest.Found) -> None:
    try:
        flat.load_state(restore.load_part(found.path, "model"))
    except ConfigError as error:
        raise ConfigError(f"{found.path}: {error}") from None


def _numbers(moments: Moments) -> dict[str, Any]:
    return {
        "sum_sq": moments.sum_sq,
        "sum_norm_sq": moments.sum_norm_sq,
        "delta_s": _finite(moments.delta_s),
        "b_s": _finite(moments.b_s),
        "resolved": moments.resolved,
        "s2": moments.s2,
        "mu2": moments.mu2,
    }


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
