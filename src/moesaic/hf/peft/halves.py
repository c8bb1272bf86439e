"""Which half of a fused weight is the gate's and which is the up projection's."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from moesaic.core.errors import ConfigError

# Classes of transformers without a function of their own for it: read in their forward, gate first.
_GATE_FIRST = ("Llama4TextExperts", "LongcatFlashExperts", "JetMoeMoE")


def halves(experts: nn.Module, weight: Tensor, dim: int) -> Mapping[str, slice]:
    """The places of gate and up along ``dim`` of a fused weight.

    Found by running the family's own gating function on a few numbers: it is affine in the up projection and not in
    the gate, whatever the family calls its layout.

    Raises:
        ConfigError: if the function fits no layout, or the class is unknown.
    """
    size = weight.shape[dim]
    apply_gate = getattr(experts, "_apply_gate", None)
    if apply_gate is None:
        if type(experts).__name__.removeprefix("Parametrized") in _GATE_FIRST:
            return {"gate": slice(0, size // 2), "up": slice(size // 2, size)}
        raise ConfigError(
            f"{type(experts).__name__} fuses gate and up into one weight of {size} and has no _apply_gate that tells "
            f"which half is which; known without it are {', '.join(_GATE_FIRST)}. Give its class such a function."
        )
    probe = torch.full((1, size), 0.3, device=weight.device)
    concatenated, interleaved = (slice(0, size // 2), slice(size // 2, size)), (slice(0, size, 2), slice(1, size, 2))
    for first, second in (concatenated, interleaved):
        for gate, up in ((first, second), (second, first)):
            if _is_affine(apply_gate, probe, up) and not _is_affine(apply_gate, probe, gate):
                return {"gate": gate, "up": up}
    raise ConfigError(
        f"{type(experts).__name__}._apply_gate must be affine in one half of its {size} inputs, the up projection, and "
        "not in the other, the gate; it is not, for halves side by side or interleaved. Adapt gate and up of another "
        "model."
    )


@torch.no_grad()
def _is_affine(function: Callable[[Tensor], Tensor], probe: Tensor, places: slice) -> bool:
    # On both sides of 0, where a ReLU bends; small, below the bounds that some families clamp at.
    low, middle, high = (_moved(probe, places, value) for value in (-0.4, 0.1, 0.6))
    before, between, after = (function(one).double() for one in (low, middle, high))
    bend = (after - 2 * between + before).abs().max()
    return bool(bend < 1e-4) and bool((after - before).abs().max() > 1e-3)


def _moved(probe: Tensor, places: slice, value: float) -> Tensor:
    moved = probe.clone()
    moved[:, places] = value
    return moved
