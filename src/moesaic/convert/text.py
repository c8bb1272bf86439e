"""Some text as batches that a model takes: to see what experts do on, and to distill on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from moesaic.core.errors import ConfigError
from moesaic.data import TokenBlocks, load_corpus

_READ = ("input_ids", "attention_mask")


def text_batches(
    data: str | Path,
    tokenizer: PreTrainedTokenizerFast,
    *,
    num_tokens: int = 65_536,
    context: int = 256,
    batch_size: int = 8,
) -> list[dict[str, Tensor]]:
    """Read text and cut out blocks of it, spread evenly over all that there is and so over its domains.

    Taken is the side of the text that training sees; what is held out stays unseen.

    Args:
        data: "builtin", a file or a folder; see :func:`moesaic.data.load_corpus`.
        tokenizer: the model's.
        num_tokens: to take, as many whole blocks; all of the text if it has fewer.
        context: tokens of a block.
        batch_size: blocks of a batch.
    Raises:
        ConfigError: if a number is below 1.
        DataError: if there is no text, or too little for one block.
    """
    if min(num_tokens, batch_size) < 1:
        raise ConfigError(f"num_tokens and batch_size must be at least 1, got {num_tokens} and {batch_size}.")
    corpus = load_corpus(data)
    blocks = TokenBlocks(corpus.train, tokenizer, context)
    count = min(len(blocks), max(1, round(num_tokens / context)))
    places = torch.linspace(0, len(blocks) - 1, count).long().tolist()
    taken: list[dict[str, Any]] = [blocks[place] for place in places]
    return [
        {name: torch.stack([block[name] for block in taken[start : start + batch_size]]) for name in _READ}
        for start in range(0, len(taken), batch_size)
    ]
