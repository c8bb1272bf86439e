"""The one operation of a layer that is worth a fast kernel: every expert's feed-forward network over its own rows.

``y_t = sum over t's rows of weight * FFN_e(x_t)``, where ``FFN_e(x) = (act(x gate_e) * (x up_e)) down_e`` if gated,
and ``act(x up_e) down_e`` if not. Gather, products, weighting and sum are one operation, so a kernel may fuse them.
"""

from moesaic.kernels.grouped_ffn.choose import KERNELS, Choice, Kernel, Stacks, choose, require_known
from moesaic.kernels.grouped_ffn.grouped import grouped_ffn_grouped_mm
from moesaic.kernels.grouped_ffn.native import grouped_ffn_native
from moesaic.kernels.grouped_ffn.reference import grouped_ffn_reference
from moesaic.kernels.grouped_ffn.torch import grouped_ffn_torch
from moesaic.kernels.grouped_ffn.triton import grouped_ffn_triton

__all__ = [
    "KERNELS",
    "Choice",
    "Kernel",
    "Stacks",
    "choose",
    "grouped_ffn_grouped_mm",
    "grouped_ffn_native",
    "grouped_ffn_reference",
    "grouped_ffn_torch",
    "grouped_ffn_triton",
    "require_known",
]
