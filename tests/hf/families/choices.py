"""The experts that a model itself chooses, and their weights: taken from the calls inside it, not computed again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tests.hf.families.build import Tiny

Rows = tuple[Tensor, Tensor]  # expert_TK and weight_TK


def choices(made: Tiny, also: Callable[[Any], Any] | None = None) -> Any:
    """One forward of the model: for each module that routes, what it chose for each token (padding included).

    Args:
        made: the model and its inputs.
        also: gives what else is wanted of the forward's output, which is returned beside the choices.
    Returns:
        The name of the module that holds the experts (for jetmoe, llama4 and nllb_moe the router, which alone
        knows), to ``expert_TK`` and ``weight_TK``. The weight is what the module's call is given; some families
        scale the sum of the experts afterwards.
    """
    seen: dict[str, Rows] = {}
    handles = []
    for name, module in made.model.named_modules():
        reader = READERS.get(type(module).__name__, given if holds_experts(module) else None)
        if reader is not None and "self_attention" not in name:  # jetmoe's attention routes to heads

            def look(
                module: nn.Module, args: Any, kwargs: Any, out: Any, name: str = name, reader: Reader = reader
            ) -> None:
                seen[name] = reader(module, (*args, *kwargs.values()), out)

            handles.append(module.register_forward_hook(look, with_kwargs=True))
    try:
        with torch.no_grad():
            output = made.model(**made.inputs)
    finally:
        for handle in handles:
            handle.remove()
    return seen if also is None else (seen, also(output))


Reader = Callable[[nn.Module, tuple[Any, ...], Any], Rows]


def holds_experts(module: nn.Module) -> bool:
    """Whether it is called as ``experts(hidden_states, top_k_index, top_k_weights)``."""
    return hasattr(module, "_is_expert_parallel") or type(module).__name__ in (
        "DbrxExperts",
        "LongcatFlashExperts",
        "Step3p7Experts",
    )


def given(module: nn.Module, args: tuple[Any, ...], out: Any) -> Rows:
    """What the call was given."""
    return args[1], args[2]


def of_scores(module: nn.Module, args: tuple[Any, ...], out: Any) -> Rows:
    """llama4's router returns a score per expert, 0 for those not chosen."""
    weight_TK, expert_TK = out[0].topk(module.top_k, dim=-1)
    return expert_TK, weight_TK


def of_two_gates(module: nn.Module, args: tuple[Any, ...], out: Any) -> Rows:
    """nllb_moe's router returns a gate per expert, 0 for those not chosen or dropped.

    This is what the router means. The experts of transformers 5.23 take its mask of 0 and 1 for the experts' numbers
    and do another thing, which a test of these families writes down.
    """
    weight_TK, expert_TK = out[1].topk(2, dim=-1)
    return expert_TK, weight_TK


def of_one_hot(module: nn.Module, args: tuple[Any, ...], out: Any) -> Rows:
    """switch_transformers' experts are called with a mask of (tokens, 1, experts); a dropped token has no weight."""
    mask, weight_TK = args[1], args[2]
    return mask.argmax(dim=-1), weight_TK * mask.sum(dim=-1)


def of_sorted_rows(module: nn.Module, args: tuple[Any, ...], out: Any) -> Rows:
    """jetmoe's router returns rows sorted by expert, and how many rows each expert has."""
    order, _, weights, sizes, _ = out
    experts = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    back = order.argsort()
    return experts[back].view(-1, module.top_k), weights[back].view(-1, module.top_k)


def of_product_keys(module: nn.Module, args: tuple[Any, ...], out: Any) -> Rows:
    """doge returns the logits of its two halves of keys; an expert's logit is the sum of its two keys'."""
    first, second = out[1]
    logits_TE = (first[:, :, None] + second[:, None, :]).flatten(1)
    logits_TK, expert_TK = logits_TE.topk(module.top_k, dim=-1)
    return expert_TK, logits_TK.softmax(dim=-1)


def of_data_sets(module: nn.Module, args: tuple[Any, ...], out: Any) -> Rows:
    """vitpose_backbone's expert is the number of the image's data set."""
    expert_TK = args[1].reshape(-1, 1)
    return expert_TK, torch.ones(expert_TK.shape)


READERS: dict[str, Reader] = {
    "DogeCDMoE": of_product_keys,
    "JetMoeTopKGating": of_sorted_rows,
    "Llama4Router": of_scores,
    "NllbMoeTop2Router": of_two_gates,
    "SwitchTransformersExperts": of_one_hot,
    "VitPoseNaiveMoe": of_data_sets,
}


def valid(made: Tiny, path: str, num_tokens: int) -> Tensor:
    """Tokens that are no padding, of those that a layer read: all, or the text or the vision tokens of ERNIE."""
    inside = "decoder" if made.model.config.is_encoder_decoder and "decoder." in path else ""
    for name in ("decoder_attention_mask",) if inside else ("attention_mask", "decoder_attention_mask"):
        mask = made.inputs.get(name)
        if mask is None or mask.ndim != 2:
            continue
        if mask.numel() == num_tokens:
            return mask.reshape(-1).bool()
        kinds = made.inputs.get("moe_mm_token_type_ids", made.inputs.get("mm_token_type_ids"))
        if kinds is not None:
            mine = kinds.reshape(-1).bool() == ("vision_moe" in path)
            return mask.reshape(-1).bool()[mine]
    return torch.ones(num_tokens, dtype=torch.bool)
