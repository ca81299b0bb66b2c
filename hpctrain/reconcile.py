"""Builds what reconciles replicas: scopes, probe and rules, from the configuration."""

from __future__ import annotations

import os
from collections.abc import Callable

import numpy as np
import torch

from hpctrain.config import Run
from hpctrain.data.reserve import reserve
from hpctrain.data.spec import DataSets, Samples, Spec
from hpctrain.models.flat import FlatModel
from hpctrain.models.loss import per_sample_loss
from hpctrain.optimiser import AppliedUpdate, Optimiser
from hpctrain.replicas import Replicas, Scopes, cross_groups, require_nested
from hpctrain.state import shard_bounds
from hpctrain.sync.leader import Leader
from hpctrain.sync.members import Members
from hpctrain.sync.payload import Payload
from hpctrain.sync.rule import Ground
from hpctrain.sync.rules import Rules, Running
from hpctrain.transport.communicator import Communicator
from hpctrain.transport.levels import Levels, check_groups


def find_scopes(run: Run, comm: Communicator) -> Scopes:
    """Collective. What each scope of the configuration means on these ranks.

    Raises:
        UsageError: the groups do not fit the ranks, or the switches are unknown.
    """
    groups, levels = run.topology.groups, Levels.of(comm, os.environ)

    def ranks_in(scope: str) -> tuple[int, ...]:
        if scope == "rank":
            return tuple(range(comm.size))
        if scope != "group":
            return levels.groups(scope)
        if isinstance(groups, str):
            return levels.groups(groups)
        return check_groups(groups, comm.size)

    return ranks_in


def make_rules(
    run: Run,
    replicas: Replicas,
    scopes: Scopes,
    comm: Communicator,
    flat: FlatModel,
    optimiser: Optimiser | AppliedUpdate,
    spec: Spec,
    probe: Samples | None,
) -> Rules:
    """Collective. The [[sync]] rules at work.

    Raises:
        ConfigError: a rule's scope cuts a replica.
    """
    running = []
    for number, config in enumerate(run.sync):
        if config.scope == "cross":
            group_of = cross_groups(comm.topology, replicas.of_rank)
        else:
            group_of = scopes(config.scope)
        require_nested(replicas.of_rank, group_of, config.scope)
        payload = Payload(flat, optimiser.vectors, replicas.inside, config.buffers, config.momentum)
        members = Members(comm, replicas.of_rank, group_of, payload.size)
        forward = None
        if isinstance(config, Leader) and config.score == "probe":
            assert probe is not None
            forward = probe_forward(flat, spec, probe, config.probe_samples, replicas.inside)
        ground = Ground(
            members, payload, flat.grad_norm, forward, lr_base=run.lr.base, seed=run.seed
        )
        rule = config.build(ground)
        running.append(Running(f"{number}_{config.kind}", rule, payload))
    return Rules(running)


def caution(run: Run) -> str:
    """Local. What is wrong with these rules on these data, in words; "" where nothing is."""
    by_loss = any(isinstance(r, Leader) and r.score == "train_loss" for r in run.sync)
    if not by_loss or run.data.partition == "iid":
        return ""
    return (
        f'with data.partition = "{run.data.partition}" training losses say whose samples are '
        'easiest, not which replica is best; elect with score = "probe"'
    )


def hold_probe(run: Run, data: DataSets) -> tuple[Samples, Samples | None]:
    """Local. The samples to train on, and those set aside to compare replicas on, if a rule asks.

    Raises:
        ConfigError: nothing would be left to train on.
    """
    wanted = [r.probe_samples for r in run.sync if isinstance(r, Leader) and r.score == "probe"]
    if not wanted:
        return data.train, None
    return reserve(data.train, max(wanted), run.seed)


def probe_forward(
    flat: FlatModel, spec: Spec, probe: Samples, count: int, inside: Communicator
) -> Callable[[], tuple[float, int]]:
    """Local. This rank's share of a pass over the first `count` probe samples: losses, samples."""
    start, stop = shard_bounds(count, inside.rank, inside.size)
    inputs, targets = probe.batch(np.arange(start, stop), epoch=0)
    device = flat.params_P.device
    inputs, targets = inputs.to(device), targets.to(device)

    @torch.no_grad()
    def forward() -> tuple[float, int]:
        if not len(targets):
            return 0.0, 0
        flat.module.eval()
        loss_B, _ = per_sample_loss(flat.module, spec, inputs, targets)
        flat.module.train()
        return float(loss_B.double().sum()), len(targets)

    return forward
