"""Builds what reconciles replicas: scopes, probe and rules, from the configuration."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict

import numpy as np
import torch

from hpctrain.config import Run
from hpctrain.data.reserve import reserve
from hpctrain.data.spec import DataSets, Samples, Spec
from hpctrain.errors import ConfigError
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
from hpctrain.transport.levels import (
    Address,
    Switches,
    check_groups,
    find_switches,
    group_ranks,
)
from hpctrain.transport.numa import numa_ranks, own_domain


def find_scopes(run: Run, comm: Communicator) -> Scopes:
    """Collective. What each scope of the configuration means on these ranks.

    Raises:
        UsageError: the groups do not fit the ranks, or the switches are unknown.
    """
    topology, groups = comm.topology, run.topology.groups
    named = {run.exchange.scope, *(rule.scope for rule in run.sync)}
    switches = Switches(None, "not asked for")
    if "switch" in named or groups == "switch":
        address = Address.of(topology.hosts[comm.rank], os.environ)
        told = comm.allgather_bytes(json.dumps(asdict(address)).encode())
        switches = find_switches([Address(**json.loads(text)) for text in told], topology)

    domains: list[int | None] = []
    if "numa" in named:
        domains = [
            json.loads(text) for text in comm.allgather_bytes(json.dumps(own_domain()).encode())
        ]

    def ranks_in(scope: str) -> tuple[int, ...]:
        if scope == "numa":
            return numa_ranks(domains, topology)
        if scope == "rank":
            return tuple(range(comm.size))
        if scope == "group":
            if isinstance(groups, str):
                return group_ranks(groups, topology, switches)
            return check_groups(groups, comm.size)
        return group_ranks(scope, topology, switches)

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
        if config.own_pace and max(map(replicas.of_rank.count, replicas.of_rank)) > 1:
            raise ConfigError(
                f"sync.{number} lets ranks go at their own pace, and the ranks of a replica must "
                'stay equal at every step; use exchange.kind = "none", or drop asynchronous and '
                'unit = "total_steps" or "seconds"'
            )
        payload = Payload(flat, optimiser.vectors, config.buffers, config.momentum)
        members = Members(comm, replicas.of_rank, group_of, payload.size)
        forward = None
        if isinstance(config, Leader) and config.score == "probe":
            assert probe is not None
            forward = probe_forward(flat, spec, probe, config.probe_samples, replicas.inside)
        ground = Ground(
            members, payload, flat.grad_norm, forward, lr_base=run.lr.base, seed=run.seed
        )
        rule = config.build(ground)
        running.append(Running(f"{number}_{config.kind}", rule, payload, replicas.inside))
    return Rules(running)


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
