"""State that a cast of the model must not touch: steps of 0.001 vanish in bfloat16."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


class ExactBuffers(nn.Module):
    """A module with buffers that keep their dtype through ``model.half()``, ``.to(dtype)`` and ``.double()``."""

    def __init__(self) -> None:
        super().__init__()
        self._exact: set[str] = set()

    def register_exact(self, name: str, value: Tensor | None) -> None:
        """Register a buffer that is saved with the model, moves between devices, and is never cast."""
        self.register_buffer(name, value)
        self._exact.add(name)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        before = {name: self._buffers[name] for name in self._exact}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, exact in before.items():
            cast = self._buffers[name]
            if exact is not None and cast is not None and cast.dtype != exact.dtype:
                self._buffers[name] = exact.to(cast.device)
        return self
