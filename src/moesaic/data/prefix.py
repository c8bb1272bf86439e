"""Documents as pairs for an encoder and a decoder: read what came before, write what comes next."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast

from moesaic.core.errors import ConfigError
from moesaic.data.blocks import IGNORED, TokenBlocks
from moesaic.data.corpus import Document


class PrefixBlocks(Dataset[dict[str, Tensor]]):
    """The same text as :class:`TokenBlocks`, for a model with an encoder and a decoder.

    Prefix language modelling (Raffel et al. 2020, section 3.3.1, arXiv:1910.10683): the encoder reads a piece of text,
    the decoder predicts the piece that follows. Each piece is predicted once and read once, so that every token of the
    text is predicted exactly once, and bits per byte are of the same text as those of a model without an encoder.

    Args:
        documents: as for :class:`TokenBlocks`.
        tokenizer: as for :class:`TokenBlocks`.
        block_size: P, positions of encoder and decoder together, an even number; each gets half.
        domains: as for :class:`TokenBlocks`.
    Shape:
        A block is ``input_ids`` and ``attention_mask`` of the encoder, ``labels`` and ``decoder_attention_mask`` of the
        decoder, each of ``(P / 2,)``, and a scalar ``domain``, all int64. The encoder's text begins with the
        begin-of-text token, alone where a domain begins. Labels are -100 on padding; the model shifts its own input.
    Raises:
        ConfigError: if ``block_size`` is odd, or as :class:`TokenBlocks` raises it.
        DataError: as :class:`TokenBlocks` raises it.
    """

    def __init__(
        self,
        documents: Iterable[Document],
        tokenizer: PreTrainedTokenizerFast,
        block_size: int,
        *,
        domains: Sequence[str] | None = None,
    ):
        if block_size < 2 or block_size % 2:
            raise ConfigError(
                f"block_size must be even, half of it for the encoder and half for the decoder, got {block_size}. "
                f"Use {max(2, block_size - block_size % 2)}."
            )
        self.block_size = block_size
        half = block_size // 2
        # Pieces of half the size, each after a begin-of-text token, in reading order and domain by domain.
        self._pieces = TokenBlocks(documents, tokenizer, half + 1, domains=domains)
        self.domains = self._pieces.domains
        self.domain_B = self._pieces.domain_B
        self.num_bytes_per_domain = self._pieces.num_bytes_per_domain
        self.num_tokens = self._pieces.num_tokens
        """Tokens that are predicted: those of the text and one end-of-text per document."""

    def __len__(self) -> int:
        return len(self._pieces)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"block {index} of {len(self)}")
        index %= len(self)
        piece = self._pieces[index]
        labels = piece["labels"][1:]
        input_ids, attention_mask = self._before(index)
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "labels": labels,
            "decoder_attention_mask": (labels != IGNORED).long(),
            "domain": piece["domain"],
        }

    def _before(self, index: int) -> tuple[Tensor, Tensor]:
        """What the encoder reads: the begin-of-text token, and as many tokens before the piece as there is room for."""
        half = self.block_size // 2
        if index == 0 or self.domain_B[index - 1] != self.domain_B[index]:
            first = self._pieces[index]["input_ids"][0]
            alone = (torch.arange(half) == 0).long()
            return first.repeat(half), alone
        before = self._pieces[index - 1]["input_ids"]
        input_ids = torch.cat([before[:1], before[2:]])
        return input_ids, torch.ones_like(input_ids)
