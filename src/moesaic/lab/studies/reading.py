"""Let a model read texts of known domains, and keep every choice of its routers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch

from moesaic.hf import record, trace_domain

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from moesaic.telemetry.trace import RoutingTrace

Text = tuple[str, str]
"""(domain, what is read)."""


def trace_of(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[Text],
    *,
    batch_size: int = 8,
    most_tokens: int = 256,
    done: Callable[[int], None] = lambda _read: None,
) -> RoutingTrace:
    """The routing trace of some texts, each a sequence of its own.

    The head that predicts tokens does not run: no choice depends on it.

    Args:
        model: a causal language model with MoE layers.
        tokenizer: its own.
        texts: in any order; short beside short is read fastest.
        batch_size: texts of one forward.
        most_tokens: longer texts are cut.
        done: told how many texts have been read.
    """
    names = list(dict.fromkeys(domain for domain, _ in texts))
    body = cast(Any, model).get_decoder()
    pad = cast(int, tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id)
    with torch.inference_mode(), record(model, tokenizer=cast(Any, tokenizer), domains=names) as trace:
        for start in range(0, len(texts), batch_size):
            batch = texts[start : start + batch_size]
            ids = [tokenizer(text)["input_ids"][:most_tokens] for _, text in batch]
            longest = max(map(len, ids))
            ids_BP = torch.tensor([one + [pad] * (longest - len(one)) for one in ids])
            mask_BP = torch.tensor([[1] * len(one) + [0] * (longest - len(one)) for one in ids])
            with trace_domain([domain for domain, _ in batch]):
                body(input_ids=ids_BP, attention_mask=mask_BP, use_cache=False)
            done(min(start + batch_size, len(texts)))
    return trace
