"""Write a checkpoint shard by shard, in files that everybody reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
DEFAULT_SHARD_BYTES = 5 * 10**9


class ShardWriter:
    """Gathers tensors into files of a bounded size.

    Args:
        folder: to write to.
        shard_bytes: largest size of a file; a larger tensor has one to itself.
    """

    def __init__(self, folder: Path, shard_bytes: int) -> None:
        self.folder = folder
        self.shard_bytes = shard_bytes
        self._waiting: dict[str, Tensor] = {}
        self._waiting_bytes = 0
        self._held: list[tuple[str, ...]] = []
        self.total_bytes = 0
        self.num_tensors = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Take in one tensor."""
        size = tensor.numel() * tensor.element_size()
        if self._waiting and self._waiting_bytes + size > self.shard_bytes:
            self._flush()
        self._waiting[name] = tensor.detach().cpu().contiguous()
        self._waiting_bytes += size
        self.total_bytes += size
        self.num_tensors += 1

    def close(self) -> None:
        """Write what is left, and the index if there are several files."""
        self._flush()
        count = len(self._held)
        if count == 1:
            self._file(0).rename(self.folder / SINGLE)
            return
        weight_map: dict[str, str] = {}
        for index, names in enumerate(self._held):
            file = f"model-{index + 1:05d}-of-{count:05d}.safetensors"
            self._file(index).rename(self.folder / file)
            weight_map |= dict.fromkeys(names, file)
        content: dict[str, Any] = {
            "metadata": {"total_size": self.total_bytes},
            "weight_map": dict(sorted(weight_map.items())),
        }
        (self.folder / INDEX).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    def _flush(self) -> None:
        if not self._waiting and self._held:
            return
        safetensors.torch.save_file(self._waiting, self._file(len(self._held)), metadata={"format": "pt"})
        self._held.append(tuple(self._waiting))
        self._waiting, self._waiting_bytes = {}, 0

    def _file(self, index: int) -> Path:
        # How many there will be is known at the end only.
        return self.folder / f"model-{index + 1:05d}.safetensors"
