"""When C may be called, and its operations on the table of rows."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from moesaic.core.living import Living
from moesaic.kernels.native import build

MOST_CHOICES = 64
"""Among more the best are found faster by sorting all."""

DONE, NO_MEMORY = 0, 2
"""What C answers."""


def callable_on(*tensors: Tensor) -> build.Compiled | None:
    """The compiled kernels, if they can be called on these tensors: C reads memory, and is seen by nobody.

    None where nothing is compiled, on other devices, on tensors that stand for something else, and while operations are
    compiled, traced, counted or mapped over.
    """
    if are_operations_watched():  # asked first: compilers of PyTorch look no further
        return None
    kernels = build.compiled()
    if kernels is None:
        return None
    for tensor in tensors:
        if not tensor.is_cpu or type(tensor) not in (Tensor, nn.Parameter):
            return None
    return kernels


def are_operations_watched() -> bool:
    """Whether somebody compiles, traces, counts or maps operations. What is alive, C shows as all do."""
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return True
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return True
    if torch._C._len_torch_dispatch_stack() == 0:
        return False
    return any(not isinstance(mode, Living) for mode in _get_current_dispatch_mode_stack())


def top_k(score_TE: Tensor, num_best: int) -> Tensor | None:
    """The K best of each row, best first, among equals the lowest index first (T, K); None where C cannot.

    Args:
        score_TE: float32; NaN counts as better than any number.
        num_best: K.
    """
    kernels = callable_on(score_TE)
    if kernels is None or score_TE.ndim != 2 or score_TE.dtype != torch.float32 or score_TE.stride(1) != 1:
        return None
    num_tokens, num_experts = score_TE.shape
    if not 1 <= num_best <= min(MOST_CHOICES, num_experts):
        return None
    expert_TK = torch.empty((num_tokens, num_best), dtype=torch.int64)
    done = kernels.top_k(
        score_TE.data_ptr(),
        score_TE.stride(0),
        num_tokens,
        num_experts,
        num_best,
        expert_TK.data_ptr(),
        torch.get_num_threads(),
    )
    return expert_TK if done == DONE else None


def sort_rows(
    expert_N: Tensor, token_N: Tensor, kept_N: Tensor, num_experts: int
) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    """Row and token of each place (N,), load and end of each expert (E,); None where C cannot.

    See :class:`~moesaic.core.plan.Plan` for what they are.
    """
    kernels = callable_on(expert_N, token_N, kept_N)
    if kernels is None or not (
        expert_N.dtype == token_N.dtype == torch.int64
        and kept_N.dtype == torch.bool
        and expert_N.shape == token_N.shape == kept_N.shape
        and expert_N.is_contiguous()
        and token_N.is_contiguous()
        and kept_N.is_contiguous()
    ):
        return None
    row_N, place_token_N = torch.empty_like(expert_N), torch.empty_like(expert_N)
    load_E, offset_E = expert_N.new_empty(num_experts), expert_N.new_empty(num_experts)
    done = kernels.sort_rows(
        len(expert_N),
        num_experts,
        expert_N.data_ptr(),
        token_N.data_ptr(),
        kept_N.data_ptr(),
        row_N.data_ptr(),
        place_token_N.data_ptr(),
        load_E.data_ptr(),
        offset_E.data_ptr(),
    )
    return (row_N, place_token_N, load_E, offset_E) if done == DONE else None
