"""Checkpoint folders as files: names, manifest, verification, choice of the newest good one.

    checkpoints/step-00000100/            complete: only ever appears by a rename
        replicated.safetensors            tensors equal on all ranks, written by rank 0
        rank-00002.safetensors            rank 2's own tensors (absent when it has none)
        rank-00002.json                   rank 2's tensor table, sizes and hashes of its files
        state.json                        step, number of ranks, counters, tensor table
        manifest.json                     written last: size and sha256 of every file above
    checkpoints/step-00000200.tmp-3/      being written by attempt 3, or left over from a dead one
    checkpoints/step-00000100.old-3/      being replaced by attempt 3 (counts if alone)
    checkpoints/step-00000050.del-3/      being deleted by attempt 3

A checkpoint is judged by this module before anything of it is used: every file must be in the
manifest and of this format (safetensors and JSON), with the right size and sha256. Other files, a
pickle above all, make it refused; nothing in hpctrain unpickles. Needs neither torch nor MPI.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpctrain.errors import DataError, UsageError
from hpctrain.runs.durable import reason, sync_folder, write_durably

log = logging.getLogger(__name__)

FORMAT = "hpctrain-checkpoint"
VERSION = 1
MANIFEST = "manifest.json"
STATE = "state.json"
REPLICATED = "replicated.safetensors"

_COMPLETE = re.compile(r"step-(\d{8,})(\.old-\d+)?")
_LEFTOVER = re.compile(r"step-\d{8,}\.(tmp|del)-\d+")
_MEMBER = re.compile(r"state\.json|replicated\.safetensors|rank-\d{5,}\.(json|safetensors)")
_PICKLES = {".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".bin", ".joblib"}
_CHUNK_BYTES = 1 << 22


@dataclass(frozen=True)
class Refusal:
    """A checkpoint that is not used, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Found:
    """A verified checkpoint; `refused` are the newer ones that were passed over."""

    path: Path
    step: int
    size: int
    """Number of ranks that wrote it."""
    refused: tuple[Refusal, ...] = ()


def folder_name(step: int) -> str:
    """Name of the complete checkpoint of `step`. Local."""
    return f"step-{step:08d}"


def rank_name(rank: int) -> str:
    """Stem of the files of one rank. Local."""
    return f"rank-{rank:05d}"


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints, newest first, not verified; [] if there is no folder. Local."""
    if not folder.is_dir():
        return []
    named = [(path, _COMPLETE.fullmatch(path.name)) for path in folder.iterdir()]
    # Of two of the same step the one without ".old" comes first: it is the newer.
    order = [(int(match[1]), match[2] is None, path) for path, match in named if match]
    return [path for _, _, path in sorted(order, reverse=True)]


def fingerprint(path: Path) -> dict[str, Any]:
    """`{"bytes": size, "sha256": hex digest}` of a file. Local."""
    digest = hashlib.sha256()
    size_bytes = 0
    with open(path, "rb", buffering=0) as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
            size_bytes += len(chunk)
    return {"bytes": size_bytes, "sha256": digest.hexdigest()}


def write_manifest(folder: Path, step: int, size: int, files: dict[str, Any]) -> None:
    """Write the manifest, durably. Local. Raises OSError."""
    body = {"format": FORMAT, "version": VERSION, "step": step, "size": size, "files": files}
    text = json.dumps({**body, "sha256": _own_sha256(body)}, indent=1)
    write_durably(folder / MANIFEST, text.encode())


def verify(folder: Path) -> Found:
    """Check a checkpoint folder file by file. Local; reads everything once.

    Raises:
        DataError: names the first file that is missing, truncated, changed or foreign.
    """
    manifest = _read_manifest(folder / MANIFEST)
    files: dict[str, Any] = manifest["files"]
    for path in sorted(folder.iterdir()):
        if path.name != MANIFEST and path.name not in files:
            _refuse_foreign(path)
    needed = {STATE, *(f"{rank_name(rank)}.json" for rank in range(manifest["size"]))}
    for name in sorted(needed | set(files)):
        if not _MEMBER.fullmatch(name):
            raise DataError(f"{folder / MANIFEST}: lists {name!r}, which is no part of the format")
        if name not in files:
            raise DataError(f"{folder / MANIFEST}: does not list {name}")
        _check_file(folder / name, files[name])
    return Found(folder, manifest["step"], manifest["size"])


def latest(folder: Path) -> Found | None:
    """The newest good checkpoint, or None if there is none at all. Local (rank 0 only).

    A bad one is reported with file and reason, and the next older is tried.

    Raises:
        DataError: there are checkpoints, and every one is bad; lists them.
    """
    refused: list[Refusal] = []
    for path in checkpoints(folder):
        try:
            found = verify(path)
        except DataError as error:
            refused.append(Refusal(path.name, str(error)))
        except OSError as error:
            refused.append(Refusal(path.name, f"{error.filename or path}: {reason(error)}"))
        else:
            return Found(found.path, found.step, found.size, tuple(refused))
        log.warning("checkpoint %s is not used: %s", path.name, refused[-1].reason)
    if refused:
        listing = "\n".join(f"  {entry.name}: {entry.reason}" for entry in refused)
        raise DataError(
            f"{folder}: none of its {len(refused)} checkpoints can be used:\n{listing}\n"
            "Restore one of them, or start anew in another folder (--resume never --out DIR)."
        )
    return None


def named(path: Path) -> Found:
    """The checkpoint that a person points at: a step's folder, or a run's newest. Local.

    Raises:
        UsageError: the path holds no checkpoint.
        DataError: what is there cannot be used.
    """
    if path.is_dir() and (_COMPLETE.fullmatch(path.name) or (path / MANIFEST).is_file()):
        return verify(path)
    for folder in (path / "checkpoints", path):
        found = latest(folder)
        if found is not None:
            return found
    what = "holds no checkpoint" if path.is_dir() else "is no folder"
    raise UsageError(
        f"{path} {what}; give a run folder, whose newest checkpoint is taken, or a checkpoint, "
        f"such as {Path('runs') / 'a' / 'checkpoints' / folder_name(100)}"
    )


def clean(folder: Path) -> list[str]:
    """Remove what dead attempts left half written or half deleted; its names. Local (rank 0 only).

    Only when no rank of this run is writing and no other process uses the folder.
    """
    removed = []
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        match = _COMPLETE.fullmatch(path.name)
        replaced = match and match[2] and (folder / folder_name(int(match[1]))).exists()
        if _LEFTOVER.fullmatch(path.name) or replaced:
            shutil.rmtree(path, ignore_errors=True)
            removed.append(path.name)
    return removed


def publish(temporary: Path, step: int, attempt: int) -> Path:
    """Give a complete temporary folder its final name, durably. Local (rank 0). Raises OSError.

    An older checkpoint of the same step (one that was refused, say) is replaced.
    """
    sync_folder(temporary)
    final = temporary.with_name(folder_name(step))
    if final.exists():
        aside = final.with_name(f"{final.name}.old-{attempt}")
        final.rename(aside)
        temporary.rename(final)
        _delete(aside, attempt)
    else:
        temporary.rename(final)
    sync_folder(final.parent)
    return final


def prune(folder: Path, keep: int, attempt: int, refused: frozenset[str] = frozenset()) -> None:
    """Delete all but the newest `keep` checkpoints. Local (rank 0). Raises OSError.

    Those in `refused` neither count nor go: a person may want to look at them.
    """
    good = [path for path in checkpoints(folder) if path.name not in refused]
    for path in good[max(keep, 1) :]:
        _delete(path, attempt)


def _delete(path: Path, attempt: int) -> None:
    # Renamed first: a kill half-way through must not leave a checkpoint that looks damaged.
    step = path.name.split(".")[0]
    doomed = path.with_name(f"{step}.del-{attempt}")
    shutil.rmtree(doomed, ignore_errors=True)
    path.rename(doomed)
    shutil.rmtree(doomed)


def _own_sha256(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads(path.read_bytes())
        written = manifest.pop("sha256")
        kind, version = manifest["format"], manifest["version"]
    except FileNotFoundError:
        raise DataError(f"{path}: is missing, so the checkpoint is not complete") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{path}: is damaged ({error})") from None
    if written != _own_sha256(manifest):
        raise DataError(f"{path}: is damaged (its sha256 does not match)")
    if kind != FORMAT or version != VERSION:
        raise DataError(
            f"{path}: format {kind!r} version {version!r}; this hpctrain reads {FORMAT!r} "
            f"version {VERSION}. Use the hpctrain that wrote it"
        )
    return dict(manifest)


def _refuse_foreign(path: Path) -> None:
    if path.suffix.lower() in _PICKLES:
        raise DataError(
            f"{path}: looks like a pickle. Checkpoints hold safetensors and JSON only, and pickles "
            "are never opened: they can run any program. Remove it if you trust the rest"
        )
    raise DataError(f"{path}: is not in the manifest. Remove it if you trust the rest")


def _check_file(path: Path, stated: dict[str, Any]) -> None:
    if path.is_symlink() or not path.is_file():
        raise DataError(f"{path}: is missing or not a plain file")
    size_bytes = path.stat().st_size
    if size_bytes != stated["bytes"]:
        raise DataError(f"{path}: has {size_bytes} bytes; the manifest says {stated['bytes']}")
    if fingerprint(path)["sha256"] != stated["sha256"]:
        raise DataError(f"{path}: is damaged (its sha256 does not match the manifest)")
