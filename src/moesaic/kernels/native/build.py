"""The library of C kernels: compile it, find it, call it."""

from __future__ import annotations

import ctypes
import hashlib
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from moesaic.core.errors import BackendError
from moesaic.core.files import cache_folder

_HERE = Path(__file__).parent
_SOURCES = ("grouped.c", "few_rows.c", "table.c", "whole_layer.c")
_FLAGS = ("-std=gnu11", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-shared", "-fPIC")
COMPILERS = ("cc", "gcc", "clang")


class Stack(ctypes.Structure):
    """``struct stack`` of job.h: E matrices, and how far apart their elements lie."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("matrix", ctypes.c_int64),
        ("row", ctypes.c_int64),
        ("column", ctypes.c_int64),
    )

    @classmethod
    def of(cls, stack: Tensor | None) -> Stack:
        """Where a stack lies; nowhere if there is none."""
        return cls() if stack is None else cls(stack.data_ptr(), *stack.stride())


class Job(ctypes.Structure):
    """``struct job`` of job.h, field by field."""

    _fields_ = (
        ("num_experts", ctypes.c_int64),
        ("num_tokens", ctypes.c_int64),
        ("width", ctypes.c_int64),
        ("hidden", ctypes.c_int64),
        ("activation", ctypes.c_int32),
        ("is_gated", ctypes.c_int32),
        ("num_threads", ctypes.c_int32),
        ("is_bf16", ctypes.c_int32),
        ("x", ctypes.c_void_p),
        ("x_row", ctypes.c_int64),
        ("token", ctypes.c_void_p),
        ("end", ctypes.c_void_p),
        ("weight", ctypes.c_void_p),
        ("gate", Stack),
        ("up", Stack),
        ("down", Stack),
        ("y", ctypes.c_void_p),
        ("order", ctypes.c_void_p),
        ("num_order", ctypes.c_int64),
        ("num_together", ctypes.c_int64),
        ("gate_pre", ctypes.c_void_p),
        ("up_pre", ctypes.c_void_p),
        ("rows", ctypes.c_void_p),
        ("scratch", ctypes.c_void_p),
        ("grad_y", ctypes.c_void_p),
        ("grad_y_row", ctypes.c_int64),
        ("grad_weight", ctypes.c_void_p),
        ("grad_gate", Stack),
        ("grad_up", Stack),
        ("grad_down", Stack),
        ("wants_x", ctypes.c_int32),
        ("padding", ctypes.c_int32),
    )


class Layer(ctypes.Structure):
    """``struct layer`` of whole_layer.c, field by field."""

    _fields_ = (
        ("num_experts", ctypes.c_int64),
        ("num_tokens", ctypes.c_int64),
        ("width", ctypes.c_int64),
        ("hidden", ctypes.c_int64),
        ("top_k", ctypes.c_int64),
        ("x_row", ctypes.c_int64),
        ("activation", ctypes.c_int32),
        ("is_gated", ctypes.c_int32),
        ("num_threads", ctypes.c_int32),
        ("is_bf16", ctypes.c_int32),
        ("router_is_bf16", ctypes.c_int32),
        ("score", ctypes.c_int32),
        ("weights", ctypes.c_int32),
        ("scale", ctypes.c_float),
        ("x", ctypes.c_void_p),
        ("gate", ctypes.c_void_p),
        ("up", ctypes.c_void_p),
        ("down", ctypes.c_void_p),
        ("router", ctypes.c_void_p),
        ("logit_bias", ctypes.c_void_p),
        ("selection_bias", ctypes.c_void_p),
        ("valid", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
        ("table", ctypes.c_void_p),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Compiled:
    """The compiled kernels.

    Attributes:
        path: of the file.
        products: dtypes in which it takes many rows; others only in generation.
        few_rows: see few_rows.c.
        scratch_bytes: see grouped.c.
        grouped: see grouped.c; gives nothing.
        top_k: see table.c.
        sort_rows: see table.c.
        whole_layer: see whole_layer.c.
    """

    path: Path
    products: tuple[torch.dtype, ...]
    few_rows: Callable[..., int]
    scratch_bytes: Callable[..., int]
    grouped: Callable[..., int | None]
    top_k: Callable[..., int]
    sort_rows: Callable[..., int]
    whole_layer: Callable[..., int]


def compiled_path() -> Path:
    """Where the library of these sources, this processor and this PyTorch is, or would be, kept."""
    return cache_folder() / f"native-{_digest()}.so"


@cache
def _digest() -> str:
    seen = hashlib.sha256()
    for part in (*_FLAGS, torch.__version__, platform.machine(), _processor()):
        seen.update(part.encode())
    for source in sorted(_HERE.iterdir()):
        if source.suffix in (".c", ".h", ".inc"):
            seen.update(source.read_bytes())
    return seen.hexdigest()[:16]


def _processor() -> str:
    """What this processor can do: a library compiled for another may stop with an illegal instruction."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.lower().startswith(("flags", "features"))), platform.processor())


@cache
def compiled() -> Compiled | None:
    """The compiled kernels, if somebody has had them compiled on this machine; looked for once in a process.

    Raises:
        BackendError: if there is one that cannot be opened.
    """
    path = compiled_path()
    if not path.exists():
        return None
    try:
        return _opened(path)
    except OSError as error:
        raise BackendError(
            f"{path} must be a library that `moesaic native` has made, and cannot be opened: {error}. "
            "Run `moesaic native` to make it anew, or with --remove to do without."
        ) from None


def build(compiler: str | None = None) -> Compiled:
    """Compile the kernels for this machine, in seconds, and keep them for all processes to come.

    Args:
        compiler: of C, by name or path; by default the first of ``cc``, ``gcc`` and ``clang`` that is there.
    Raises:
        BackendError: if there is no compiler, or it fails; with what it said.
    """
    found = shutil.which(compiler) if compiler else next(filter(None, map(shutil.which, COMPILERS)), None)
    if found is None:
        wanted = compiler or ", ".join(COMPILERS)
        raise BackendError(
            f"a C compiler ({wanted}) must be there to build the native kernels, and none was found. Install gcc or "
            "clang, or go on without: kernel='auto' takes another kernel."
        )
    path = compiled_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder) / "native.so"
        sources = [str(_HERE / name) for name in _SOURCES]
        # The OpenMP runtime that PyTorch brings: two in one process would fight over the cores.
        threads = [str(one) for one in (Path(torch.__file__).parent / "lib").glob("libgomp*.so*")]
        done = subprocess.run(
            [found, *_FLAGS, *sources, "-o", str(made), "-Wl,--as-needed", *threads, "-lm"],
            capture_output=True,
            text=True,
        )
        if done.returncode != 0:
            said = (done.stderr or done.stdout).strip()[-800:] or "nothing"
            raise BackendError(
                f"{found} must compile the native kernels, but stopped with {done.returncode}. Try another compiler. "
                f"It said: {said}"
            )
        _opened(made)
        made.replace(path)
    compiled.cache_clear()
    return _opened(path)


def _opened(path: Path) -> Compiled:
    dll = ctypes.CDLL(str(path))
    for structure, size_in_c in ((Job, dll.moesaic_job_bytes), (Layer, dll.moesaic_layer_bytes)):
        size_in_c.restype = ctypes.c_int64
        if size_in_c() != ctypes.sizeof(structure):
            raise BackendError(
                f"{path} must take {structure.__name__} of {ctypes.sizeof(structure)} bytes and takes {size_in_c()}. "
                "Delete it and build it again."
            )
    products = tuple(
        dtype for dtype in (torch.float32, torch.bfloat16) if dll.moesaic_has_products(int(dtype == torch.bfloat16))
    )
    if products:
        dll.moesaic_scratch_bytes.restype = ctypes.c_int64
    address, size = ctypes.c_void_p, ctypes.c_int64
    dll.moesaic_top_k.argtypes = (address, size, size, size, size, address, ctypes.c_int32)
    dll.moesaic_sort_rows.argtypes = (size, size, *(address,) * 7)
    return Compiled(
        path=path,
        products=products,
        few_rows=dll.moesaic_few_rows,
        scratch_bytes=dll.moesaic_scratch_bytes if products else _none,
        grouped=dll.moesaic_grouped if products else _none,
        top_k=dll.moesaic_top_k,
        sort_rows=dll.moesaic_sort_rows,
        whole_layer=dll.moesaic_whole_layer,
    )


def _none(*_arguments: object) -> int:
    raise BackendError("these kernels were compiled for a processor without AVX512, and take no more than a few rows.")
