"""Taking the K best of a row, with ties broken the same way on every device: the lowest index wins."""

from __future__ import annotations

import torch
from torch import Tensor

from moesaic.kernels.native import calls

FEW_SCORES = 1024
"""Up to so many, sorting them all is faster than packing them."""


def select_top_k(score_TE: Tensor, top_k: int) -> Tensor:
    """Return the indices of the K largest scores of each row, best first; among equals the lowest index comes first.

    ``torch.topk`` leaves the order of ties open: on CPU it gives indices 10, 11, 12, 9 for sixteen equal scores. Here a
    float32 score and its index are packed into one integer, so that no two keys are equal.

    Shape:
        ``(T, E)`` -> ``(T, K)``, int64.
    """
    in_c_TK = calls.top_k(score_TE, top_k)
    if in_c_TK is not None:
        return in_c_TK
    # No integer is wide enough for 64 bits of score and an index; and few rows are sorted in 5 us, packed in 20.
    if score_TE.dtype == torch.float64 or score_TE.numel() <= FEW_SCORES:
        return torch.sort(score_TE, dim=-1, descending=True, stable=True).indices[:, :top_k]
    # Adding 0 makes -0.0 equal to 0.0. Negative floats order backwards as integers: flip all bits but the sign.
    bits_TE = (score_TE.detach().float() + 0.0).contiguous().view(torch.int32)
    # In place, as fresh memory takes longer to get than to fill.
    key_TE = (bits_TE >> 31).bitwise_and_(0x7FFFFFFF).bitwise_xor_(bits_TE).to(torch.int64)
    num_experts = score_TE.shape[-1]
    last_first_E = torch.arange(num_experts - 1, -1, -1, device=score_TE.device)
    return torch.topk(key_TE.mul_(num_experts).add_(last_first_E), top_k, dim=-1).indices
