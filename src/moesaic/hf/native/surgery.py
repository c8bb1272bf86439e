"""Which modules of transformers change class when a model is adopted, and how their experts are run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from moesaic.hf.native import blocks, experts
from moesaic.hf.native.router import Adopted


@dataclass(frozen=True, kw_only=True, slots=True)
class Surgery:
    """How modules of one class are adopted whose family has no interface for it.

    Attributes:
        kind: the class that takes over the forward.
        reads: where the router is whose row describes the choices; empty for the module itself. None where the module
            reports nothing.
        form: how its experts are run; None where they are modules of their own, or not run by it.
        holder: where the experts are that keep the form; empty for the module itself.
        probe: inputs to compare with the module's own class on, from the module and tokens (T, D); None where its
            parts are checked.
    """

    kind: type[Adopted]
    reads: str | None = None
    form: Callable[[Any, str], experts.Form] | None = None
    holder: str = ""
    probe: Callable[[Any, Any], tuple[Any, ...]] | None = None


def _batch(_module: Any, x_TD: Any) -> tuple[Any, ...]:
    return (x_TD[None],)


def _choices(module: Any, x_TD: Any) -> tuple[Any, ...]:
    return (x_TD, *choices(module, x_TD))


def choices(module: Any, x_TD: Any) -> tuple[Any, Any]:
    """Two experts for each token, all in turn, and weights: for trying experts without their router."""
    import torch

    count = int(getattr(module, "total_experts", module.num_experts if hasattr(module, "num_experts") else 1))
    first_T = torch.arange(x_TD.shape[0], device=x_TD.device) % count
    expert_TK = torch.stack([first_T, (first_T + 1) % count], dim=-1)
    weight_TK = torch.linspace(0.1, 0.9, expert_TK.numel(), device=x_TD.device).view_as(expert_TK)
    return expert_TK, weight_TK.to(x_TD.dtype)


def _images(module: Any, x_TD: Any) -> tuple[Any, ...]:
    import torch

    return x_TD[:, None, :], torch.arange(x_TD.shape[0], device=x_TD.device) % module.num_experts


SURGERY: Mapping[str, Surgery] = {
    "DbrxFFN": Surgery(kind=blocks.DbrxBlock, reads="router", probe=_batch),
    "DbrxExperts": Surgery(kind=experts.AdoptedExperts, form=experts.dbrx_form),
    "DogeCDMoE": Surgery(kind=blocks.DogeBlock, reads="", probe=_batch),
    "Ernie4_5_VLMoeMoeBlock": Surgery(kind=blocks.ErnieVlBlock),
    "JetMoeMoE": Surgery(kind=blocks.JetMoeExperts, form=experts.jetmoe_form, probe=_batch),
    "JetMoeTopKGating": Surgery(kind=blocks.JetMoeGate, reads=""),
    "Llama4TextMoe": Surgery(
        kind=blocks.Llama4Block, reads="router", form=experts.llama4_form, holder="experts", probe=_batch
    ),
    "LongcatFlashExperts": Surgery(kind=experts.AdoptedExperts, form=experts.longcat_form, probe=_choices),
    "NllbMoeSparseMLP": Surgery(kind=blocks.NllbBlock, reads="router", probe=_batch),
    "Step3p7Experts": Surgery(kind=experts.AdoptedExperts, form=experts.interface_like_form, probe=_choices),
    "SwitchTransformersSparseMLP": Surgery(kind=blocks.SwitchBlock, reads="router", probe=_batch),
    "VitPoseBackboneMoeMLP": Surgery(kind=blocks.VitPoseBlock, reads="", probe=_images),
}
"""By the name of the class of transformers."""
