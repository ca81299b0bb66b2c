"""Gradient diversity of a whole set: every rank takes its share of the samples, sums are added up.

Exact, and a pass over the set at 4 to 60 times the cost of its plain gradient
(stats/per_sample.py); for the command `hpctrain diversity`, and for a policy that asks for the
exact value now and then. The module stays in its mode, and random layers count as what they are:
noise of each sample. Measured before weight decay, clipping and compression.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from hpctrain.data.spec import Samples, Spec
from hpctrain.errors import NonFinite, UsageError
from hpctrain.models.flat import FlatModel
from hpctrain.models.loss import per_sample_loss
from hpctrain.state import shard_bounds
from hpctrain.stats.diversity import Diversity, effective_rank, from_sums
from hpctrain.stats.per_sample import Gradients, PerSample, SampleLoss
from hpctrain.transport.communicator import Communicator


def measure_diversity(
    flat: FlatModel,
    spec: Spec,
    samples: Samples,
    comm: Communicator,
    *,
    count: int | None = None,
    seed: int = 0,
    epoch: int = 0,
    chunk: int | None = None,
) -> Diversity:
    """Delta_S and B_S at the present parameters, of the whole set or without bias from a part.

    Collective over `comm`; equal on all its ranks, and on any number of ranks up to rounding. All
    ranks must hold equal parameters. Nothing is overwritten, `.grad` neither. One all-reduce of
    P + L float64 numbers; each rank holds `chunk` x P numbers beside that.

    Args:
        flat: The model.
        spec: The data's description, for the loss.
        samples: The set.
        comm: The ranks that share the work.
        count: How many samples to take at random, without replacement; None: all.
        seed: Of that choice; equal on all ranks.
        epoch: Whose augmentation the samples have, where there is any.
        chunk: Samples at a time; None: as many as 64 MiB of float32 hold.

    Raises:
        ConfigError: batch normalisation, or a model torch.func cannot differentiate by sample.
        UsageError: fewer than 2 samples, or more than there are.
        NonFinite: on all ranks; a gradient is inf or NaN.
    """
    chosen = choose_samples(len(samples), count, seed)
    start, end = shard_bounds(len(chosen), comm.rank, comm.size)
    per_sample = PerSample(flat.module, _loss(spec))
    sizes = per_sample.sizes
    sums = torch.zeros(len(sizes) + sum(sizes), dtype=torch.float64)
    sq_L, sum_P = sums.split([len(sizes), sum(sizes)])
    device = flat.params_P.device
    for part in _gradients(per_sample, samples, chosen[start:end], epoch, chunk, device):
        sq_L += part.squares().sum(0).cpu()
        sum_P += part.total().cpu()
    comm.allreduce(sums.numpy())
    if not bool(torch.isfinite(sums).all()):
        raise NonFinite(
            "the gradient of a sample is inf or NaN at these parameters, so there is no diversity "
            "to measure. Take an earlier checkpoint, or check the data"
        )
    return from_sums(len(chosen), len(samples), per_sample.names, sizes, sq_L, sum_P)


def measure_effective_rank(
    flat: FlatModel,
    spec: Spec,
    samples: Samples,
    comm: Communicator,
    *,
    count: int,
    seed: int = 0,
    epoch: int = 0,
    chunk: int | None = None,
) -> float:
    """grad_erank: the effective rank of the gradients of `count` samples taken at random.

    Collective over `comm`; arguments and errors as `measure_diversity`. It needs the products of
    all pairs: blocks of `chunk` gradients are met in pairs, so that 2 x `chunk` x P numbers are
    held, and gradients are taken again instead of kept: up to count / (2 chunk) times each. The
    module must draw nothing at random (evaluation mode), or a sample would have several gradients.
    """
    chosen = choose_samples(len(samples), count, seed)
    per_sample = PerSample(flat.module, _loss(spec))
    size = chunk or per_sample.chunk()
    blocks = [slice(at, at + size) for at in range(0, count, size)]
    device = flat.params_P.device

    def take(block: slice) -> Gradients:
        (found,) = _gradients(per_sample, samples, chosen[block], epoch, size, device)
        return found

    gram_MM = torch.zeros(count, count, dtype=torch.float64)
    for first, rows in enumerate(blocks):
        if first % comm.size != comm.rank:
            continue
        left = take(rows)
        for columns in blocks[first:]:
            right = left if columns == rows else take(columns)
            products = left.products(right).cpu()
            gram_MM[rows, columns] = products
            gram_MM[columns, rows] = products.T
    comm.allreduce(gram_MM.numpy())
    return effective_rank(gram_MM)


def choose_samples(population: int, count: int | None, seed: int) -> np.ndarray:
    """Which samples are measured, ascending, (m,) int64. Local, equal on all ranks.

    Raises:
        UsageError: fewer than 2, or more than there are.
    """
    wanted = population if count is None else count
    if not 2 <= wanted <= population:
        raise UsageError(
            f"{wanted} samples: gradient diversity needs 2 or more, and the training set has "
            f"{population:,}"
        )
    if wanted == population:
        return np.arange(population)
    drawn = np.random.default_rng((seed, population)).choice(population, wanted, replace=False)
    return np.sort(drawn)


def _gradients(
    per_sample: PerSample,
    samples: Samples,
    indices: np.ndarray,
    epoch: int,
    chunk: int | None,
    device: torch.device,
) -> Iterator[Gradients]:
    size = chunk or per_sample.chunk()
    for at in range(0, len(indices), size):
        inputs, targets = samples.batch(indices[at : at + size], epoch)
        yield per_sample.gradients(inputs.to(device), targets.to(device))


def _loss(spec: Spec) -> SampleLoss:
    """`per_sample_loss` of one task, without the correctness."""

    def loss(module: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        return per_sample_loss(module, spec, inputs, targets)[0]

    return loss
