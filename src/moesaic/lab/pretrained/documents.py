"""Bits of each held-out document, so that two models can be compared document by document."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moesaic.data.blocks import IGNORED, TokenBlocks
from moesaic.data.corpus import Document
from moesaic.lab.pretrained.paired import Estimate, mean_of, paired_ratio
from moesaic.train.order import collate

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True, kw_only=True, slots=True)
class DocumentBits:
    """What a model needed for one document.

    Attributes:
        domain: of the document.
        num_bytes: of its text in UTF-8.
        bits: of all its tokens and of the token that ends it.
    """

    domain: str
    num_bytes: int
    bits: float


@torch.no_grad()
def bits_of_documents(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerFast,
    documents: Sequence[Document],
    *,
    context: int,
    batch_size: int = 8,
    autocast: AbstractContextManager[Any] | None = None,
) -> tuple[DocumentBits, ...]:
    """Run a model over documents, packed as in training, and give each its bits.

    Args:
        model: a causal language model; left in the mode that it came in.
        tokenizer: its tokenizer.
        documents: of any domains.
        context: tokens of a block.
        batch_size: blocks of one forward.
        autocast: to run it in.
    """
    blocks = TokenBlocks(documents, tokenizer, context)
    in_order = [document for domain in blocks.domains for document in documents if document.domain == domain]
    # The last place is for what belongs to no document: padding.
    bits = torch.zeros(len(in_order) + 1, dtype=torch.float64)
    device = next(model.parameters()).device
    document = 0
    was_training = model.training
    model.eval()
    try:
        with autocast or nullcontext():
            for start in range(0, len(blocks), batch_size):
                items = [blocks[index] for index in range(start, min(start + batch_size, len(blocks)))]
                owner_BP, document = _owners(items, document, int(tokenizer.eos_token_id), len(in_order))
                bits.index_add_(0, owner_BP.flatten(), _bits(model, items, device).flatten())
    finally:
        model.train(was_training)
    return tuple(
        DocumentBits(domain=one.domain, num_bytes=one.num_bytes, bits=float(value))
        for one, value in zip(in_order, bits[:-1], strict=True)
    )


def _owners(items: Sequence[Mapping[str, Tensor]], first: int, end: int, nobody: int) -> tuple[Tensor, int]:
    """Which document each predicted token belongs to (B, P - 1), and that of the next block's first token.

    Each document is closed by one end-of-text token, which text never holds.
    """
    owners = []
    for item in items:
        target_P = item["labels"][1:]
        ends_P = (target_P == end).long()
        owner_P = first + ends_P.cumsum(0) - ends_P
        owners.append(torch.where(target_P == IGNORED, nobody, owner_P))
        first += int(ends_P.sum())
    return torch.stack(owners), first


def _bits(model: nn.Module, items: Sequence[Mapping[str, Tensor]], device: torch.device) -> Tensor:
    """Bits of each predicted token (B, P - 1), 0 for padding."""
    batch = {name: tensor.to(device) for name, tensor in collate(items).items() if name != "labels"}
    target_BP = torch.stack([item["labels"][1:] for item in items]).to(device)
    logits_BPV = model(**batch, use_cache=False).logits[:, :-1].float()
    nats_BP = F.cross_entropy(logits_BPV.transpose(1, 2), target_BP, ignore_index=IGNORED, reduction="none")
    return nats_BP.double().cpu() / math.log(2)


def bits_per_byte(documents: Sequence[DocumentBits]) -> dict[str, float]:
    """By domain, and the mean over domains."""
    result = {}
    for domain in sorted({one.domain for one in documents}):
        mine = [one for one in documents if one.domain == domain]
        result[domain] = sum(one.bits for one in mine) / sum(one.num_bytes for one in mine)
    return result | {"mean": sum(result.values()) / len(result)}


def difference(these: Sequence[DocumentBits], those: Sequence[DocumentBits]) -> dict[str, Estimate]:
    """By how many bits per byte one model is above another on the same documents: by domain, and the mean over them.

    Standard errors take documents of a domain as drawn independently, and domains as fixed.
    """
    result = {}
    for domain in sorted({one.domain for one in these}):
        pairs = [(a, b) for a, b in zip(these, those, strict=True) if a.domain == domain]
        result[domain] = paired_ratio([a.bits - b.bits for a, b in pairs], [a.num_bytes for a, _ in pairs])
    return result | {"mean": mean_of(list(result.values()))}
