import importlib
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from moesaic import BackendError, ConfigError, MoELayer
from moesaic.experts import GatedExperts
from moesaic.kernels.grouped_ffn import KERNELS, Kernel, choose, grouped_ffn_reference
from moesaic.kernels.grouped_ffn import triton as triton_module
from moesaic.routers import TopKRouter

CPU = torch.device("cpu")
NAMED = {kernel.name: kernel for kernel in KERNELS}
NOT_COMPILED = "native: it is not compiled on this machine: run `moesaic native`"
ON_CPU = "fastest that runs on cpu in {dtype} (passed over: " + NOT_COMPILED + ")"
# The package's name `choose` is the function; this is the module.
module = importlib.import_module("moesaic.kernels.grouped_ffn.choose")


def _only_bfloat16(_device: torch.device, dtype: torch.dtype) -> str | None:
    return None if dtype == torch.bfloat16 else "it multiplies bfloat16 only"


PICKY = Kernel(name="picky", run=grouped_ffn_reference, what="a test's", cannot=_only_bfloat16)


def test_auto_takes_the_first_kernel_that_can_run_and_says_why():
    choice = choose("auto", CPU, torch.float32)
    assert choice.kernel is NAMED["torch"]
    assert choice.reason == ON_CPU.format(dtype="torch.float32")


def test_auto_takes_the_very_first_kernel_where_it_does_not_yield(monkeypatch):
    monkeypatch.setattr(module, "KERNELS", (replace(PICKY, cannot=lambda _device, _dtype: None), *KERNELS))
    assert choose("auto", CPU, torch.float32).reason == "fastest that runs on cpu in torch.float32"


def test_auto_names_every_kernel_that_it_passed_over_and_the_reason(monkeypatch):
    monkeypatch.setattr(module, "KERNELS", (PICKY, *KERNELS))
    choice = choose("auto", CPU, torch.float32)
    assert choice.kernel is NAMED["torch"]
    assert choice.reason == (
        f"fastest that runs on cpu in torch.float32 (passed over: picky: it multiplies bfloat16 only; {NOT_COMPILED})"
    )
    assert choose("auto", CPU, torch.bfloat16).kernel is PICKY


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_a_kernel_asked_for_by_name_is_that_kernel(kernel):
    why_not = kernel.cannot(CPU, torch.float32)
    if why_not is not None:
        pytest.skip(f"kernel {kernel.name} cannot run here: {why_not}")
    choice = choose(kernel.name, CPU, torch.float32)
    assert (choice.kernel, choice.reason) == (kernel, "asked for by name")


def test_a_kernel_that_cannot_run_is_refused_and_never_replaced(monkeypatch):
    monkeypatch.setattr(module, "KERNELS", (*KERNELS, PICKY))
    with pytest.raises(BackendError) as error:
        choose("picky", CPU, torch.float16)
    assert str(error.value) == (
        "kernel 'picky' must be able to run on cpu in torch.float16, but it multiplies bfloat16 only. "
        "Use kernel='auto'."
    )


def test_an_unknown_kernel_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError) as error:
        choose("cuda", CPU, torch.float32)
    assert (
        str(error.value)
        == "kernel must be auto or one of grouped_mm, triton, native, torch, reference, got 'cuda'. Use auto if unsure."
    )


def test_the_last_kernel_runs_anywhere_so_that_auto_always_finds_one():
    for device in ("cpu", "cuda", "mps", "meta"):
        for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            assert KERNELS[-1].cannot(torch.device(device), dtype) is None


def _stacks(num_experts: int, width: int, hidden: int, dtype: torch.dtype = torch.bfloat16):
    with torch.device("meta"):
        up_EDF = torch.empty(num_experts, width, hidden, dtype=dtype)
        return torch.empty_like(up_EDF), up_EDF, torch.empty(num_experts, hidden, width, dtype=dtype)


@pytest.mark.parametrize(
    ("stacks", "reason"),
    [
        (_stacks(4, 16, 24), None),
        (_stacks(1024, 8, 8), None),
        (_stacks(4, 6, 8, torch.float32), "rows of a multiple of 16 bytes and 6 numbers of 4 bytes are 24"),
        (_stacks(4, 16, 20), "rows of a multiple of 16 bytes and 20 numbers of 2 bytes are 40"),
        (_stacks(1025, 8, 8), "takes 1024 experts at most and there are 1025"),
    ],
    ids=["aligned", "many", "width", "hidden", "too many"],
)
def test_grouped_mm_says_which_weights_it_cannot_take(stacks, reason):
    found = NAMED["grouped_mm"].misfits(*stacks)
    assert (found is None) if reason is None else (reason in found)


def test_grouped_mm_takes_views_of_weights_and_refuses_strides_that_it_cannot_follow():
    misfits = NAMED["grouped_mm"].misfits
    _, up_EDF, down_EFD = _stacks(4, 16, 24)
    halves = torch.empty(4, 48, 16, dtype=torch.bfloat16, device="meta").transpose(1, 2).chunk(2, dim=-1)
    assert misfits(*halves, down_EFD) is None
    every_second = torch.empty(4, 16, 48, dtype=torch.bfloat16, device="meta")[:, :, ::2]
    assert misfits(every_second, up_EDF, down_EFD) == (
        "grouped_mm needs each expert's matrix row by row or column by column, on a multiple of 16 bytes, and gate has "
        "strides (768, 48, 2)"
    )
    apart = torch.empty(4, 16, 25, dtype=torch.bfloat16, device="meta")[:, :, :24]
    assert "up has strides (400, 25, 1)" in misfits(None, apart, down_EFD)


def test_a_kernel_asked_for_by_name_that_cannot_take_the_weights_is_refused():
    layer = MoELayer(TopKRouter(8, 4, top_k=2), GatedExperts(4, 8, 6, kernel="grouped_mm"))
    with pytest.raises(BackendError) as error:
        layer(torch.randn(3, 8))
    assert str(error.value) == (
        "kernel 'grouped_mm' must be able to run on cpu in torch.float32, but grouped_mm needs rows of a multiple of "
        "16 bytes and 6 numbers of 4 bytes are 24. Use kernel='auto'."
    )
    with pytest.raises(BackendError, match="6 numbers of 4 bytes are 24"):
        layer.kernel_report()
    layer.experts.kernel = NAMED["grouped_mm"]  # handed in: it looks for itself
    with pytest.raises(BackendError, match=r"must be able to take these weights, but .* 6 numbers of 4 bytes are 24"):
        layer(torch.randn(3, 8))


@pytest.mark.parametrize(
    ("major", "dtype", "hidden", "picked"),
    [
        (9, torch.bfloat16, 8, "grouped_mm"),
        (10, torch.bfloat16, 8, "grouped_mm"),
        (9, torch.bfloat16, 6, "triton"),
        (9, torch.float32, 8, "triton"),
        (8, torch.bfloat16, 8, "triton"),
        (12, torch.bfloat16, 8, "triton"),
        (7, torch.float16, 8, "torch"),
        (9, torch.float64, 8, "torch"),
    ],
)
def test_what_auto_takes_on_cuda(monkeypatch, major, dtype, hidden, picked):
    """As far as it can be told without a GPU: by what its properties would be."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _device: SimpleNamespace(major=major))
    monkeypatch.setattr(triton_module, "IS_INTERPRETED", False)
    monkeypatch.setattr(triton_module, "HAS_TRITON", True)
    choice = choose("auto", torch.device("cuda"), dtype, _stacks(4, 16, hidden, dtype))
    assert choice.kernel is NAMED[picked]
    monkeypatch.setattr(triton_module, "HAS_TRITON", False)
    if picked == "triton":
        choice = choose("auto", torch.device("cuda"), dtype, _stacks(4, 16, hidden, dtype))
        assert choice.kernel is NAMED["torch"]
        assert "triton: Triton is not installed; PyTorch's builds with CUDA bring it on Linux" in choice.reason


def test_triton_on_a_cpu_says_how_its_interpreter_is_switched_on(monkeypatch):
    monkeypatch.setattr(triton_module, "IS_INTERPRETED", False)
    monkeypatch.setattr(triton_module, "HAS_TRITON", True)
    with pytest.raises(BackendError, match="in its interpreter only: start with TRITON_INTERPRET=1"):
        choose("triton", CPU, torch.float32)
