"""One rank's part of a checkpoint: the copy in host memory, and the files made of it."""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from hpctrain.runs.durable import sync_file, write_durably
from hpctrain.runs.manifest import REPLICATED, STATE, fingerprint, rank_name
from hpctrain.state import Counter, Placed, State

_SUMMABLE = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int32, torch.int64)


@dataclass(frozen=True)
class Entry:
    """What a checkpoint's tensor table says of one tensor. `shape` is the writing rank's."""

    placement: str
    resize: str
    dtype: str
    shape: list[int]
    pieces: dict[str, Any] | None = None
    """Of `state.Pieces`, as JSON has it."""
    owner: int | None = None
    """The rank whose file holds a replica's tensor."""


@dataclass(frozen=True)
class Snapshot:
    """What one rank writes of one step; nothing in it aliases the training's memory."""

    step: int
    rank: int
    size: int
    replicated: dict[str, torch.Tensor]
    """By "part/name". Empty on all ranks but 0, which writes for all."""
    own: dict[str, torch.Tensor]
    """By "part/name": tensors placed per_rank, shard or pieces, and a replica's on its owner."""
    table: dict[str, Entry]
    counters: dict[str, dict[str, Counter]]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors this rank writes."""
        tensors = [*self.replicated.values(), *self.own.values()]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


class HostCopy:
    """Copies states into host memory that is kept and reused from save to save.

    Costs this rank one copy of what it writes, for the whole run. Fresh memory at each save would
    make the stall many times longer (160 MB on CPU: 0.43 s against 0.008 s, most of it the system
    clearing pages) and rule out pinned copies on CUDA.
    """

    def __init__(self, rank: int, size: int) -> None:
        self.rank = rank
        self.size = size
        self._buffers: dict[str, torch.Tensor] = {}

    def take(self, step: int, parts: dict[str, State]) -> Snapshot:
        """Copy what this rank writes of `parts`. Local; overwrites the previous snapshot.

        Raises:
            ValueError: a name, placement, resize rule or counter that cannot be stored.
        """
        replicated: dict[str, torch.Tensor] = {}
        own: dict[str, torch.Tensor] = {}
        table: dict[str, Entry] = {}
        for part, state in parts.items():
            if "/" in part:
                raise ValueError(f'"{part}": the name of a part must not contain "/"')
            for name, placed in state.tensors.items():
                key = f"{part}/{name}"
                check_placed(key, placed)
                tensor = placed.tensor
                if placed.placement == "replicated" and self.rank != 0:
                    continue
                dtype = str(tensor.dtype).removeprefix("torch.")
                pieces = None if placed.pieces is None else asdict(placed.pieces)
                table[key] = Entry(
                    placed.placement, placed.resize, dtype, list(tensor.shape), pieces, placed.owner
                )
                if placed.owner not in (None, self.rank):
                    continue
                (replicated if placed.placement == "replicated" else own)[key] = self._copy(
                    key, tensor
                )
        self._buffers = {**replicated, **own}
        if any(buffer.is_pinned() for buffer in self._buffers.values()):
            torch.cuda.synchronize()
        counters = {part: dict(state.counters) for part, state in parts.items()}
        return Snapshot(step, self.rank, self.size, replicated, own, table, counters)

    def _copy(self, key: str, tensor: torch.Tensor) -> torch.Tensor:
        buffer = self._buffers.get(key)
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        return buffer.copy_(tensor.detach(), non_blocking=tensor.is_cuda)


def check_placed(key: str, placed: Placed) -> None:
    """Refuse a tensor that could not be placed again at another number of ranks. Local.

    Raises:
        ValueError: names the tensor and what is allowed.
    """
    tensor = placed.tensor
    if placed.placement in ("replicated", "shard") and placed.resize not in ("keep", "reset"):
        raise ValueError(f"{key}: {placed.placement} takes keep or reset; got {placed.resize}")
    if placed.placement == "shard" and tensor.dim() != 1:
        raise ValueError(f"{key}: a shard is a 1-D piece of a flat vector; got {tensor.dim()}-D")
    if placed.resize == "sum" and tensor.dtype not in _SUMMABLE:
        raise ValueError(f"{key}: sum needs a float or a 32/64-bit int; got {tensor.dtype}")
    if placed.resize == "mean" and not tensor.dtype.is_floating_point:
        raise ValueError(f"{key}: mean needs a floating-point tensor; got {tensor.dtype}")


def write_files(snapshot: Snapshot, folder: Path) -> None:
    """Write and flush this rank's files into the temporary `folder`. Local; no communication.

    `rank-XXXXX.json` comes last and holds the fingerprints of the others.

    Raises:
        OSError, safetensors.SafetensorError: the disk is full or the folder is not writable.
    """
    folder.mkdir(parents=True, exist_ok=True)
    stem = rank_name(snapshot.rank)
    written = []
    if snapshot.rank == 0:
        write_durably(folder / STATE, _state_json(snapshot))
        written.append(STATE)
    if snapshot.replicated:
        _write_tensors(folder / REPLICATED, snapshot.replicated)
        written.append(REPLICATED)
    if snapshot.own:
        _write_tensors(folder / f"{stem}.safetensors", snapshot.own)
        written.append(f"{stem}.safetensors")
    own = {
        key: _as_json(entry)
        for key, entry in snapshot.table.items()
        if key in snapshot.own or entry.owner is not None
    }
    files = {name: fingerprint(folder / name) for name in written}
    content = {"rank": snapshot.rank, "step": snapshot.step, "files": files, "tensors": own}
    write_durably(folder / f"{stem}.json", json.dumps(content, indent=1).encode())


def _write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, path)
    # safetensors makes files only their owner can read; a run folder is often shared by a group.
    # The folder's mode tells what the user's umask allows.
    os.chmod(path, path.parent.stat().st_mode & 0o666)
    sync_file(path)


def _state_json(snapshot: Snapshot) -> bytes:
    parts: dict[str, Any] = {}
    for part, counters in snapshot.counters.items():
        coded = {name: encode(f"{part}/{name}", value) for name, value in counters.items()}
        parts[part] = {"counters": coded, "tensors": {}}
    for key, entry in snapshot.table.items():
        part, name = key.split("/", 1)
        parts[part]["tensors"][name] = _as_json(entry)
    content = {"step": snapshot.step, "size": snapshot.size, "parts": parts}
    return json.dumps(content, indent=1, allow_nan=False).encode()


def _as_json(entry: Entry) -> dict[str, Any]:
    return {name: value for name, value in asdict(entry).items() if value is not None}


def encode(key: str, value: Counter) -> Any:
    """A counter as JSON that reads back equal, type included (JSON has no inf and no nan). Local.

    Raises:
        ValueError: not an int, float, str, bool or None.
    """
    if type(value) not in (int, float, str, bool, type(None)):
        raise ValueError(
            f"counter {key}: got a {type(value).__name__}; int, float, str, bool, None"
        )
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    return value


def decode(value: Any) -> Counter:
    """The inverse of `encode`. Local."""
    return float(value["float"]) if isinstance(value, dict) else value
