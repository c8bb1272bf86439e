"""Large memory: what a tensor has let go of is used again, and nothing that a tensor still holds."""

import gc
import mmap
import os

import pytest
import torch

from moesaic.kernels.memory import LARGE_BYTES, large_empty

CPU = torch.device("cpu")
ROWS = LARGE_BYTES // (4 * 1024)
needs_large_pages = pytest.mark.skipif(
    not hasattr(mmap, "MADV_HUGEPAGE"), reason="this system has no large pages to ask for"
)


def _large(rows: int = ROWS) -> torch.Tensor:
    return large_empty((rows, 1024), torch.float32, CPU)


def test_small_memory_is_torchs_own():
    tensor = large_empty((3, 5), torch.bfloat16, CPU)
    assert tensor.shape == (3, 5)
    assert tensor.dtype == torch.bfloat16
    assert tensor.untyped_storage().resizable()


@needs_large_pages
def test_memory_that_was_let_go_is_used_again():
    first = _large(2 * ROWS)
    first.fill_(3)
    place = first.data_ptr()
    del first
    gc.collect()
    # A little less is of the same kind: loads, and with them sizes, differ from step to step.
    again = _large(2 * ROWS - 1)
    assert again.data_ptr() == place
    assert again.shape == (2 * ROWS - 1, 1024)


@needs_large_pages
def test_memory_that_a_view_still_holds_is_not_used_again():
    first = _large()
    view = first.view(-1)[5:9]
    view.fill_(7)
    place = first.data_ptr()
    del first
    gc.collect()
    other = _large()
    other.fill_(1)
    assert other.data_ptr() != place
    assert view.tolist() == [7] * 4


@needs_large_pages
def test_a_gradient_in_such_memory_is_kept_as_it_is_and_can_be_saved(tmp_path):
    class Sum(torch.autograd.Function):
        @staticmethod
        def forward(ctx, weight):
            return weight.sum()

        @staticmethod
        def backward(ctx, grad):
            made = _large().fill_(grad.item())
            places.append(made.data_ptr())
            return made

    places: list[int] = []
    weight = torch.zeros(ROWS, 1024, requires_grad=True)
    Sum.apply(weight).backward()
    assert weight.grad.data_ptr() == places[0]
    Sum.apply(weight).backward()
    assert weight.grad.unique().tolist() == [2]
    torch.save(weight.grad, tmp_path / "grad.pt")
    assert torch.equal(torch.load(tmp_path / "grad.pt"), weight.grad)


@needs_large_pages
def test_a_system_that_refuses_large_pages_gives_small_ones(monkeypatch):
    monkeypatch.setattr(mmap, "MADV_HUGEPAGE", 9_999)  # no kernel knows it
    monkeypatch.setattr(mmap, "MADV_FREE", 9_999)
    tensor = _large(5 * ROWS).fill_(3)
    assert tensor.sum(dtype=torch.float64) == 3 * tensor.numel()
    del tensor


@needs_large_pages
def test_a_forked_process_shares_nothing_that_is_written():
    tensor = _large().fill_(1)
    child = os.fork()
    if child == 0:
        tensor.fill_(2)
        os._exit(0 if _large().data_ptr() != tensor.data_ptr() else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert tensor.unique().tolist() == [1]
