"""Which tensors are alive: every storage from the operation that first shows it to the moment it is freed."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Living(TorchDispatchMode):
    """Counts the bytes of tensors, however they were made: by an operation, from mapped memory, in secret.

    Scratch that an operation makes and drops inside is not seen.

    Args:
        before: tensors that were there before and do not count.

    Attributes:
        live_bytes: now.
        peak_bytes: the most so far.
    """

    def __init__(self, before: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live_bytes = 0
        self.peak_bytes = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in before}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operation, and see what it was given and what it gave."""
        self._see(args)
        result = func(*args, **(kwargs or {}))
        self._see((kwargs or {}, result))
        return result

    def _see(self, tree: Any) -> None:
        for leaf in tree_leaves(tree):
            if not isinstance(leaf, Tensor):
                continue
            storage = leaf.untyped_storage()
            key = storage._cdata
            if key in self._known or not storage.nbytes():
                continue
            size = storage.nbytes()
            self._known.add(key)
            self.live_bytes += size
            self.peak_bytes = max(self.peak_bytes, self.live_bytes)
            weakref.finalize(storage, self._freed, key, size).atexit = False

    def _freed(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live_bytes -= size
