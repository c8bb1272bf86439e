"""Documents as blocks of equal length, ready for a language model."""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast

from moesaic.core.errors import ConfigError, DataError
from moesaic.data.corpus import Document

# Texts go to the tokenizer in batches of about this many characters: enough to keep it busy, little memory.
_BATCH_CHARACTERS = 1 << 20
IGNORED = -100
"""The label that language-model losses leave out."""


class TokenBlocks(Dataset[dict[str, Tensor]]):
    """Documents of one domain after another, each closed by an end-of-text token, cut into blocks.

    A block holds one domain only and starts with the begin-of-text token, so that every token of the text is
    predicted exactly once. The last block of a domain is filled up with padding. Text that spells a special token is
    read as text. Token ids rest in one array of 2 or 4 bytes each; tensors are made on access.

    Args:
        documents: what to pack; each domain keeps its documents' order.
        tokenizer: with begin-of-text, end-of-text and padding tokens.
        block_size: P, tokens per block, the first included; at least 2.
        domains: names by index; by default those of the documents, sorted. Give the corpus's so that several data
            sets count alike.
    Shape:
        A block is `input_ids`, `attention_mask` and `labels` of `(P,)` and a scalar `domain`, all int64. Labels are
        the inputs (the model shifts them), -100 on padding.
    Raises:
        ConfigError: if `block_size` is below 2, the tokenizer lacks a token, or `domains` lacks a domain.
        DataError: if the documents do not fill a single block.
    """

    def __init__(
        self,
        documents: Iterable[Document],
        tokenizer: PreTrainedTokenizerFast,
        block_size: int,
        *,
        domains: Sequence[str] | None = None,
    ):
        if block_size < 2:
            raise ConfigError(f"block_size must be at least 2, got {block_size}. Use 256.")
        documents = tuple(documents)
        present = sorted({document.domain for document in documents})
        self.domains = tuple(present if domains is None else domains)
        for domain in present:
            if domain not in self.domains:
                raise ConfigError(f"domains must have every document's domain, got none called {domain!r}. Add it.")
        self.block_size = block_size
        self._bos, self._eos, self._pad = _special_ids(tokenizer)
        self.num_bytes_per_domain = dict.fromkeys(self.domains, 0)
        streams = []
        for domain in self.domains:
            texts = [document.text for document in documents if document.domain == domain]
            streams.append(self._stream(texts, tokenizer))
            self.num_bytes_per_domain[domain] = sum(len(text.encode()) for text in texts)
        self.num_tokens = sum(map(len, streams))
        """Tokens that are predicted: those of the text and one end-of-text per document."""
        if self.num_tokens < block_size - 1:
            raise DataError(
                f"Needed at least {block_size - 1} tokens to fill one block of {block_size}, got {self.num_tokens} "
                f"from {len(documents)} documents. Give more text, or lower block_size (--context)."
            )
        self._tokens = np.concatenate(streams)
        self._start_B, self._end_B, self.domain_B = self._cut([len(stream) for stream in streams])

    def _stream(self, texts: Sequence[str], tokenizer: PreTrainedTokenizerFast) -> NDArray[np.unsignedinteger]:
        dtype = np.uint16 if len(tokenizer) <= 1 << 16 else np.uint32
        parts: list[NDArray[np.unsignedinteger]] = []
        for batch in _batches(texts):
            encoded = tokenizer(
                batch,
                add_special_tokens=False,
                split_special_tokens=True,
                return_attention_mask=False,
                return_token_type_ids=False,
                verbose=False,
            )
            parts.extend(np.array([*ids, self._eos], dtype=dtype) for ids in encoded["input_ids"])
        return np.concatenate(parts) if parts else np.zeros(0, dtype=dtype)

    def _cut(self, lengths: Sequence[int]) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Where each block's text starts and ends in the array, and its domain's index."""
        step = self.block_size - 1  # the first place is the begin-of-text token's
        starts, ends, domains = [], [], []
        offset = 0
        for index, length in enumerate(lengths):
            start = np.arange(offset, offset + length, step)
            starts.append(start)
            ends.append(np.minimum(start + step, offset + length))
            domains.append(np.full(len(start), index))
            offset += length
        return np.concatenate(starts), np.concatenate(ends), np.concatenate(domains)

    def __len__(self) -> int:
        return len(self._start_B)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"block {index} of {len(self)}")
        text = self._tokens[self._start_B[index] : self._end_B[index]].astype(np.int64)
        used = len(text) + 1
        input_ids = np.full(self.block_size, self._pad, dtype=np.int64)
        input_ids[0] = self._bos
        input_ids[1:used] = text
        labels = input_ids.copy()
        labels[used:] = IGNORED
        attention_mask = np.zeros(self.block_size, dtype=np.int64)
        attention_mask[:used] = 1
        return {
            "input_ids": torch.from_numpy(input_ids),
            "attention_mask": torch.from_numpy(attention_mask),
            "labels": torch.from_numpy(labels),
            "domain": torch.tensor(int(self.domain_B[index])),
        }


def _special_ids(tokenizer: PreTrainedTokenizerFast) -> tuple[int, int, int]:
    ids = {"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id, "pad": tokenizer.pad_token_id}
    for name, value in ids.items():
        if value is None:
            raise ConfigError(
                f"The tokenizer needs a {name}_token, got none. "
                f"Set tokenizer.{name}_token, or read it with load_tokenizer, which fills it in."
            )
    return ids["bos"], ids["eos"], ids["pad"]


def _batches(texts: Sequence[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
