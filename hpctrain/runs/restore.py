"""From a verified checkpoint back to states, at the same or at another number of ranks."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open

from hpctrain.errors import ConfigError, DataError
from hpctrain.runs.manifest import REPLICATED, STATE, rank_name
from hpctrain.runs.snapshot import decode
from hpctrain.state import Counter, Pieces, Placed, Placement, Resize, Span, State, shard_bounds


def load(
    folder: Path, rank: int, size: int, own: dict[str, State] | None = None
) -> dict[str, State]:
    """The states of all parts for `rank` of `size` ranks. Local: every rank reads for itself.

    `own` are the parts as they start afresh: which pieces of flat vectors this rank has now, and in
    the counters of "replicas" which ranks hold equal parameters.

    `folder` is a checkpoint that rank 0 has verified (`manifest.latest`). At the number of ranks
    that wrote it every tensor comes back bitwise equal; at another number, by its resize rule
    (hpctrain/state.py). Sums and means over old ranks are taken in rank order, floats in float64
    and rounded once. Tensors are fresh host memory, in no way tied to the files.

    Raises:
        DataError: the old ranks' tensors do not fit together; names the tensor.
        ConfigError: it holds less than this hpctrain needs.
    """
    state = json.loads((folder / STATE).read_bytes())
    same = size == state["size"]
    parts = {part: _replicated(folder, part, c, same) for part, c in state["parts"].items()}
    own = own or {}
    if missing := sorted(own.keys() - parts.keys()):
        raise ConfigError(
            f"{folder}: holds no state of {', '.join(missing)}: an earlier hpctrain wrote it. "
            "Continue with that one, or start a new run"
        )
    before, now = (held.get("replicas", State()).counters for held in (parts, own))
    if size != state["size"]:
        found = _resized(folder, state["size"], rank, size)
    else:
        found = _same_size(folder, rank, size, same_replicas=now == before)
    found |= _repieced(folder, state["size"], rank, own, _count(now) / _count(before))
    for key, placed in found.items():
        part, name = key.split("/", 1)
        parts.setdefault(part, State()).tensors[name] = placed
    return parts


def load_part(folder: Path, part: str) -> State:
    """One part alone, as a single rank would take it: the mean where replicas differ. Local.

    `folder` as for `load`. Nothing else of the checkpoint is read.

    Raises:
        DataError: it has no such part, or the old ranks' tensors do not fit together.
    """
    written = json.loads((folder / STATE).read_bytes())
    if part not in written["parts"]:
        raise DataError(f"{folder / STATE}: has no part {part!r}: {', '.join(written['parts'])}")
    state = _replicated(folder, part, written["parts"][part], same_size=written["size"] == 1)
    for key, placed in _resized(folder, written["size"], 0, 1, part=part).items():
        state.tensors[key.split("/", 1)[1]] = placed
    return state


def _replicated(folder: Path, part: str, content: dict[str, Any], same_size: bool) -> State:
    """What rank 0 wrote of a part: its counters, and the tensors equal on all ranks."""
    state = State(counters={name: decode(v) for name, v in content["counters"].items()})
    for name, entry in content["tensors"].items():
        if entry["placement"] == "replicated" and (same_size or entry["resize"] == "keep"):
            tensor = _read(folder / REPLICATED, f"{part}/{name}")
            state.tensors[name] = _placed(tensor, entry)
    return state


def _same_size(folder: Path, rank: int, size: int, *, same_replicas: bool) -> dict[str, Placed]:
    table = _table(folder, rank)
    found = {}
    for key, entry in table.items():
        if entry["placement"] == "pieces" or (entry.get("owner") is not None and not same_replicas):
            continue
        path = folder / f"{rank_name(entry.get('owner', rank))}.safetensors"
        found[key] = _placed(_read(path, key), entry)
    if not same_replicas:
        found |= _resized(folder, size, rank, size, only="replica")
    return found


def _count(replicas: Mapping[str, Counter]) -> int:
    """How many replicas there are, by the counters of "replicas"; 1 where there are none."""
    return len(set(str(replicas.get("of_rank", "0")).split()))


def _repieced(
    folder: Path, old_size: int, rank: int, own: dict[str, State], share: float
) -> dict[str, Placed]:
    """The pieces this rank has now, of the sum of the old parties that come to its party.

    `share` are new replicas over old ones: what waits in a replica is an update of its own
    parameters, and these start at the old replicas' mean.
    """
    result = {}
    for part, state in own.items():
        for name, placed in state.tensors.items():
            if placed.pieces is not None:
                key = f"{part}/{name}"
                tables = [pieces_of(_table(folder, old).get(key, {})) for old in range(old_size)]
                tensor = _assembled(folder, key, tables, rank, placed.pieces, share)
                if tensor is not None:
                    result[key] = Placed(tensor, "pieces", "sum", placed.pieces)
    return result


def _assembled(
    folder: Path, key: str, old: list[Pieces | None], rank: int, pieces: Pieces, share: float
) -> torch.Tensor | None:
    if share == 1.0 and rank < len(old) and old[rank] == pieces:
        return _read(folder / f"{rank_name(rank)}.safetensors", key)
    if not any(old):
        return None
    length = max(
        (span.stop for held in (*old, pieces) if held is not None for span in held.spans),
        default=0,
    )
    total = torch.zeros(length, dtype=torch.float64)
    for writer, held in enumerate(old):
        if held is None or held.party % pieces.parties != pieces.party:
            continue
        values = _read(folder / f"{rank_name(writer)}.safetensors", key)
        at = 0
        for span in held.spans:
            where = span.indices()
            total[where] += values[at : at + len(where)]
            at += len(where)
    total *= share
    kept = len(pieces.spans) - pieces.spare
    parts = [total[span.indices()] for span in pieces.spans[:kept]]
    parts += [torch.zeros(len(span.indices())) for span in pieces.spans[kept:]]
    return torch.cat([torch.empty(0), *parts]).to(torch.float32)


def pieces_of(entry: dict[str, Any]) -> Pieces | None:
    """The pieces that a checkpoint's table tells of a tensor; None for one placed otherwise."""
    if entry.get("placement") != "pieces":
        return None
    held = entry["pieces"]
    spans = tuple(Span(**span) for span in held["spans"])
    return Pieces(held["party"], held["parties"], spans, held["spare"])


def _resized(
    folder: Path,
    old_size: int,
    rank: int,
    size: int,
    only: str | None = None,
    part: str | None = None,
) -> dict[str, Placed]:
    tables = [_table(folder, old) for old in range(old_size)]
    keys = dict.fromkeys(key for table in tables for key in table)
    result = {}
    for key in keys:
        entries = {old: table[key] for old, table in enumerate(tables) if key in table}
        entry = next(iter(entries.values()))
        if entry["resize"] == "reset" or entry["placement"] == "pieces":
            continue
        if only is not None and entry["placement"] != only:
            continue
        if part is not None and not key.startswith(f"{part}/"):
            continue
        if entry["placement"] == "shard":
            tensor = _recut(folder, key, entries, rank, size)
        else:
            tensor = _combined(folder, key, entries, len(tables), rank, size)
        result[key] = _placed(tensor, entry)
    return result


def _recut(folder: Path, key: str, entries: dict[int, Any], rank: int, size: int) -> torch.Tensor:
    lengths = {old: int(entry["shape"][0]) for old, entry in entries.items()}
    start, end = shard_bounds(sum(lengths.values()), rank, size)
    pieces = []
    offset = 0
    for old, length in lengths.items():
        first, last = max(start - offset, 0), min(end - offset, length)
        if first < last:
            path = folder / f"{rank_name(old)}.safetensors"
            pieces.append(_read(path, key)[first:last])
        offset += length
    if pieces:
        return torch.cat(pieces)
    dtype = next(iter(entries.values()))["dtype"]
    return torch.empty(0, dtype=getattr(torch, dtype))


def _combined(
    folder: Path, key: str, entries: dict[int, Any], old_size: int, rank: int, size: int
) -> torch.Tensor:
    entry = next(iter(entries.values()))
    shapes = {(tuple(other["shape"]), other["dtype"]) for other in entries.values()}
    mean = entry["resize"] == "mean"
    if len(shapes) > 1 or (mean and len(entries) < old_size):
        raise DataError(
            f"{folder}: {key} differs in shape between the {old_size} ranks that wrote it, so it "
            f"has no {entry['resize']}. Resume at {old_size} ranks"
        )
    dtype: torch.dtype = getattr(torch, entry["dtype"])
    total_dtype = torch.float64 if dtype.is_floating_point else dtype
    sources = [
        old
        for old, held in entries.items()
        if held.get("owner", old) == old and (mean or old % size == rank)
    ]
    if len(sources) == 1 and not mean:
        return _read(folder / f"{rank_name(sources[0])}.safetensors", key)
    total = torch.zeros(entry["shape"], dtype=total_dtype)
    for old in sources:
        total += _read(folder / f"{rank_name(old)}.safetensors", key)
    return (total / len(sources) if mean else total).to(dtype)


def _table(folder: Path, rank: int) -> dict[str, Any]:
    table = json.loads((folder / f"{rank_name(rank)}.json").read_bytes())["tensors"]
    return cast("dict[str, Any]", table)


def _read(path: Path, key: str) -> torch.Tensor:
    with safe_open(path, framework="pt") as file:
        # Copied: a mapped tensor would crash its reader when the checkpoint is pruned on NFS.
        return cast("torch.Tensor", file.get_tensor(key)).clone()


def _placed(tensor: torch.Tensor, entry: dict[str, Any]) -> Placed:
    placement, resize = cast("Placement", entry["placement"]), cast("Resize", entry["resize"])
    return Placed(tensor, placement, resize, owner=entry.get("owner"))
