"""The limit of decoding: how fast this machine reads memory that no cache holds."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from moesaic.bench.machine import last_cache_bytes
from moesaic.bench.timing import Work

CACHES = 12
"""What is read is this many times as large as the last cache: nothing of it is left there from the pass before."""
CUDA_BYTES = 4 * 2**30

ABOUT = (
    "Bandwidth is measured in the same rounds: one pass over an array at least 12 times as large as the last cache "
    "(4 GiB on a GPU), by each of sum, aminmax and dot, on all threads; of each round the fastest counts."
)


def cold_bytes(device: torch.device) -> int:
    """So much must be read between two uses of a weight for it to come from memory again."""
    return CUDA_BYTES if device.type == "cuda" else CACHES * max(last_cache_bytes(), 32 * 2**20)


def readers(device: torch.device, num_bytes: int | None = None) -> tuple[dict[str, Work], int]:
    """Works that do nothing but read, and how many bytes each reads.

    Args:
        device: whose memory.
        num_bytes: to read; by default as :data:`ABOUT` says.
    """
    values = torch.ones((num_bytes or cold_bytes(device)) // 4, device=device)
    works = {
        "read: sum": Work(run=values.sum),
        "read: aminmax": Work(run=values.aminmax),
        "read: dot": Work(run=lambda: torch.dot(values, values)),
    }
    return works, values.numel() * 4


def best(times: Mapping[str, tuple[float, ...]], num_bytes: int) -> tuple[float, ...]:
    """Bytes per second in each round, by the reader that was fastest in it.

    Args:
        times: of :func:`readers`, by name; others are passed over.
        num_bytes: that each read.
    """
    columns = zip(*(values for name, values in times.items() if name.startswith("read: ")), strict=True)
    return tuple(num_bytes / min(column) for column in columns)
