"""The one table of tolerances: how far a result may be from the float64 truth, by the dtype it was computed in."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tolerance:
    """``|actual - expected| <= absolute + relative * max|expected|`` of the whole tensor."""

    relative: float
    absolute: float


# float64 differs only by the order of sums. float32 and bfloat16 carry 24 and 8 bits through three products; gradients
# of weights add up to 63 rows. Scaled by the largest entry: small entries of a sum are as wrong as large ones.
TOLERANCES = {
    torch.float64: Tolerance(relative=1e-12, absolute=1e-12),
    torch.float32: Tolerance(relative=3e-6, absolute=1e-6),
    torch.bfloat16: Tolerance(relative=3e-2, absolute=1e-2),
}


def assert_close(actual: Tensor, expected: Tensor, what: str, dtype: torch.dtype | None = None) -> None:
    """Compare with the tolerance of ``dtype``, the one that ``actual`` was computed in."""
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    if actual.numel() == 0:
        return
    tolerance = TOLERANCES[dtype or actual.dtype]
    actual, expected = actual.detach().double(), expected.detach().double()
    assert actual.isfinite().all(), f"{what} is not finite"
    error = float((actual - expected).abs().max())
    allowed = tolerance.absolute + tolerance.relative * float(expected.abs().max())
    assert error <= allowed, f"{what} is off by {error:.2e}, allowed {allowed:.2e}"
