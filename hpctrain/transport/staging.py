"""The way of a bucket to host memory and back: nothing on the CPU, pinned copies for CUDA.

CUDA: on a stream of its own, after the work that produced the bucket, values are rounded to the
wire's precision if it has one and copied to pinned memory; an event says when the copy is complete.
After the sum the copy back runs on the same stream, and the caller's stream waits for it, so no
host thread blocks the GPU's queue.
"""

from __future__ import annotations

from typing import Protocol

import torch

from hpctrain.transport.wire import TORCH_DTYPES, BucketSum, WireDtype


class Staged(Protocol):
    """One bucket on its way."""

    def sum_with(self, bucket_sum: BucketSum) -> None:
        """Sum the host side over ranks; blocks; may run in another thread. Collective."""
        ...

    def arrive(self) -> None:
        """Make the bucket usable for the caller's stream. Local, by the caller's thread."""
        ...


class Staging:
    """Makes `Staged` buckets and keeps their buffers between steps.

    Args:
        wire_dtype: What travels; CUDA buckets are rounded on the GPU before the copy.
    """

    def __init__(self, wire_dtype: WireDtype) -> None:
        self._wire = TORCH_DTYPES.get(wire_dtype)
        self._buffers: dict[int, tuple[torch.Tensor | None, torch.Tensor]] = {}
        self._stream: torch.cuda.Stream | None = None

    def leave(self, index: int, bucket: torch.Tensor) -> Staged:
        """Begin the way to the host. Local, by the thread whose stream made the bucket."""
        if bucket.device.type == "cpu":
            return _OnHost(bucket)
        if self._stream is None:
            self._stream = torch.cuda.Stream(bucket.device)
        wire = self._wire or bucket.dtype
        buffers = self._buffers.get(index)
        if buffers is None or buffers[1].shape != bucket.shape or buffers[1].dtype != wire:
            buffers = (
                None if wire == bucket.dtype else torch.empty_like(bucket, dtype=wire),
                torch.empty(bucket.shape, dtype=wire, pin_memory=True),
            )
            self._buffers[index] = buffers
        return _FromCuda(bucket, *buffers, self._stream)


class _OnHost:
    def __init__(self, bucket: torch.Tensor) -> None:
        self._bucket = bucket

    def sum_with(self, bucket_sum: BucketSum) -> None:
        bucket_sum.run(self._bucket)

    def arrive(self) -> None:
        pass


class _FromCuda:
    def __init__(
        self,
        bucket: torch.Tensor,
        rounded: torch.Tensor | None,
        on_host: torch.Tensor,
        stream: torch.cuda.Stream,
    ) -> None:
        self._bucket, self._rounded, self._on_host = bucket, rounded, on_host
        self._stream = stream
        self._copied, self._returned = torch.cuda.Event(), torch.cuda.Event()
        stream.wait_stream(torch.cuda.current_stream(bucket.device))
        with torch.cuda.stream(stream):
            if rounded is not None:
                rounded.copy_(bucket)
            on_host.copy_(bucket if rounded is None else rounded, non_blocking=True)
            self._copied.record(stream)
        # The allocator must not hand the bucket's memory out while the side stream reads it.
        bucket.record_stream(stream)

    def sum_with(self, bucket_sum: BucketSum) -> None:
        self._copied.synchronize()
        bucket_sum.run(self._on_host)
        with torch.cuda.stream(self._stream):
            if self._rounded is None:
                self._bucket.copy_(self._on_host, non_blocking=True)
            else:
                self._rounded.copy_(self._on_host, non_blocking=True)
                self._bucket.copy_(self._rounded)
            self._returned.record(self._stream)

    def arrive(self) -> None:
        torch.cuda.current_stream(self._bucket.device).wait_event(self._returned)
