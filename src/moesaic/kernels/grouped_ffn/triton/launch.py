"""How kernels are started: block sizes, tuned on the device for each shape, and the number of programs.

In Triton's interpreter, which runs a program at a time in numpy, blocks are the smallest that a product takes, and
nothing is tuned.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from moesaic.kernels.grouped_ffn.triton import IS_INTERPRETED
from moesaic.kernels.grouped_ffn.triton.backward import hidden_gradient_kernel, weight_gradient_kernel
from moesaic.kernels.grouped_ffn.triton.forward import hidden_kernel, rows_kernel
from moesaic.kernels.grouped_ffn.triton.tiles import list_tiles_kernel, most_tiles

Grid = Callable[[dict[str, Any]], tuple[int, ...]]

# Programs of one launch on each multiprocessor: two hide the ends of each other's tiles where both fit.
PROGRAMS_PER_PROCESSOR = 2
PART = 16 if IS_INTERPRETED else 64
GROUP = 8

_Blocks = tuple[int, int, int, int]  # BLOCK_N, BLOCK_K, warps, stages


@dataclass(frozen=True, kw_only=True, slots=True)
class Tuned:
    """A kernel whose blocks are tuned, for each shape and dtype once in a process.

    Attributes:
        kernel: as Triton compiles it.
        configs: what is tried; the last fits in the shared memory of every device.
        key: arguments that a tuning is good for.
        small: blocks for the interpreter.
    """

    kernel: Any
    configs: tuple[Any, ...]
    key: tuple[str, ...]
    small: dict[str, int]

    def start(self, grid: Grid, *args: Any, **constants: Any) -> None:
        """Run it, on the device of its first argument."""
        with on_device_of(args[0]):
            if IS_INTERPRETED:
                self.kernel[grid({**constants, **self.small})](*args, **constants, **self.small)
            else:
                _tuner(self)[grid](*args, **constants)


@functools.cache
def _tuner(tuned: Tuned) -> Any:
    return triton.autotune(configs=list(tuned.configs), key=list(tuned.key))(tuned.kernel)


def _configs(*blocks: _Blocks, **more: int) -> tuple[Any, ...]:
    return tuple(
        triton.Config({"BLOCK_N": n, "BLOCK_K": k, **more}, num_warps=warps, num_stages=stages)
        for n, k, warps, stages in blocks
    )


_SIZES = ("inner", "columns", "BLOCK_M")
_SMALL = {"BLOCK_N": 16, "BLOCK_K": 16}
hidden_rows = Tuned(
    kernel=hidden_kernel,
    configs=_configs((128, 64, 8, 3), (128, 32, 8, 4), (64, 64, 4, 3), (64, 32, 4, 3)),
    key=(*_SIZES, "GATED", "SAVED"),
    small=_SMALL,
)
expert_rows = Tuned(
    kernel=rows_kernel,
    configs=_configs((256, 64, 8, 3), (128, 64, 8, 3), (128, 64, 4, 4), (128, 32, 4, 4), (64, 32, 4, 3)),
    key=(*_SIZES, "SECOND"),
    small=_SMALL,
)
hidden_gradients = Tuned(
    kernel=hidden_gradient_kernel,
    configs=_configs((128, 64, 8, 3), (128, 64, 4, 4), (128, 32, 8, 4), (64, 32, 4, 3)),
    key=(*_SIZES, "GATED"),
    small=_SMALL,
)
weight_gradients = Tuned(
    kernel=weight_gradient_kernel,
    configs=(
        *_configs((128, 64, 8, 3), (128, 32, 8, 4), (64, 64, 4, 3), BLOCK_M=128),
        *_configs((64, 32, 4, 3), BLOCK_M=64),
    ),
    key=("width", "columns", "IN_BY_TOKEN", "SECOND"),
    small={"BLOCK_M": 16, **_SMALL},
)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Tiles:
    """The rows of a plan in tiles.

    Attributes:
        list_ptr: what ``list_tiles_kernel`` wrote.
        most: length of its lists.
        block: rows of a tile.
    """

    list_ptr: Tensor
    most: int
    block: int

    @classmethod
    def of(cls, offset_E: Tensor, num_rows: int) -> Tiles:
        """Cut the rows of each expert, without asking the device for a number.

        Args:
            offset_E: where each expert's rows end.
            num_rows: N, those counted that reach no expert.
        """
        num_experts = offset_E.shape[0]
        block = _rows_of_a_tile(num_rows // num_experts)
        most = most_tiles(num_rows, num_experts, block)
        list_ptr = torch.empty(3 * most + 1, dtype=torch.int32, device=offset_E.device)
        # Each program compares all experts with each tile that it lists.
        experts = triton.next_power_of_2(num_experts)
        listed = max(1, min(32, 2**15 // experts))
        with on_device_of(offset_E):
            list_tiles_kernel[(triton.cdiv(most, listed),)](
                offset_E,
                list_ptr,
                num_experts,
                most,
                BLOCK_M=block,
                EXPERTS=experts,
                BLOCK=listed,
            )
        return cls(list_ptr=list_ptr, most=most, block=block)

    def grid(self, columns: int) -> Grid:
        """Programs for a product with so many columns: as many as run at once, or fewer where there is less to do."""
        if IS_INTERPRETED:
            together = 3
        else:
            processors = torch.cuda.get_device_properties(self.list_ptr.device).multi_processor_count
            together = PROGRAMS_PER_PROCESSOR * processors
        return lambda meta: (min(self.most * triton.cdiv(columns, meta["BLOCK_N"]), together),)


def _rows_of_a_tile(average: int) -> int:
    """Few rows of an expert in a large tile would multiply zeros."""
    if IS_INTERPRETED or average <= 16:
        return 16
    return 32 if average <= 32 else 64 if average <= 64 else 128


def precision(dtype: torch.dtype) -> str:
    """What ``tl.dot`` may round float32 to, as ``torch.backends`` allows it."""
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def is_even(inner: int) -> bool:
    """Whether sums over ``inner`` numbers come in whole blocks, whichever is tuned."""
    return inner % (16 if IS_INTERPRETED else 64) == 0


def on_device_of(tensor: Tensor) -> Any:
    """Triton starts kernels on the current device: make it the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.device.type == "cuda" else nullcontext()
