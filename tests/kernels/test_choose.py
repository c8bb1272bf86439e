import importlib

import pytest
import torch

from moesaic import BackendError, ConfigError
from moesaic.kernels.grouped_ffn import KERNELS, Kernel, choose, grouped_ffn_reference

CPU = torch.device("cpu")
# The package's name `choose` is the function; this is the module.
module = importlib.import_module("moesaic.kernels.grouped_ffn.choose")


def _only_bfloat16(_device: torch.device, dtype: torch.dtype) -> str | None:
    return None if dtype == torch.bfloat16 else "it multiplies bfloat16 only"


PICKY = Kernel(name="picky", run=grouped_ffn_reference, what="a test's", cannot=_only_bfloat16)


def test_auto_takes_the_first_kernel_that_can_run_and_says_why():
    choice = choose("auto", CPU, torch.float32)
    assert choice.kernel is KERNELS[0]
    assert choice.reason == "fastest that runs on cpu in torch.float32"


def test_auto_names_every_kernel_that_it_passed_over_and_the_reason(monkeypatch):
    monkeypatch.setattr(module, "KERNELS", (PICKY, *KERNELS))
    choice = choose("auto", CPU, torch.float32)
    assert choice.kernel is KERNELS[0]
    assert choice.reason == (
        "fastest that runs on cpu in torch.float32 (passed over: picky: it multiplies bfloat16 only)"
    )
    assert choose("auto", CPU, torch.bfloat16).kernel is PICKY


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_a_kernel_asked_for_by_name_is_that_kernel(kernel):
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
    assert str(error.value) == "kernel must be auto or one of torch, reference, got 'cuda'. Use auto if unsure."


def test_the_last_kernel_runs_anywhere_so_that_auto_always_finds_one():
    for device in ("cpu", "cuda", "mps", "meta"):
        for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            assert KERNELS[-1].cannot(torch.device(device), dtype) is None
