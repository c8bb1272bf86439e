"""Held-out text to measure on: blocks of tokens that remember which text each token is from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from moesaic.core.errors import ConfigError, DataError, ShapeError
from moesaic.data.corpus import Document

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Of a long text, at least so many tokens are read before others are left out for it.
_LEAST_TOKENS = 128
NO_TEXT = -1
"""The text of a token that nobody predicts: padding, or the first of a block."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class HeldOut:
    """Token blocks, and which text each predicted token belongs to.

    What is measured is compared text by text: tokens of one text resemble each other, and are no independent evidence.

    Attributes:
        domains: names of the domains.
        input_ids_BP: what the model reads; a block may hold several texts, one after another.
        valid_BP: False on padding.
        text_BP: number of the text that the token is from, counted from 0; ``NO_TEXT`` where it is not predicted.
        domain_of_text: the domain of each text, by index.
        num_bytes_of_text: UTF-8 bytes of what is predicted of each text; NaN where nobody knows.
    Raises:
        ShapeError: if the tensors are not of one shape.
        DataError: if there is nothing to predict.
        ConfigError: if a text has no domain or no number of bytes.
    """

    domains: tuple[str, ...]
    input_ids_BP: Tensor
    valid_BP: Tensor
    text_BP: Tensor
    domain_of_text: tuple[int, ...]
    num_bytes_of_text: tuple[float, ...]

    def __post_init__(self) -> None:
        shapes = {tuple(one.shape) for one in (self.input_ids_BP, self.valid_BP, self.text_BP)}
        if len(shapes) > 1 or self.input_ids_BP.ndim != 2:
            raise ShapeError(
                f"input_ids_BP, valid_BP and text_BP must all be (blocks, positions), got {sorted(shapes)}. "
                "Give one entry for each token."
            )
        if not bool((self.text_BP[:, 1:] != NO_TEXT).any()):
            raise DataError("Needed at least one token to predict, got none. Give more text.")
        count = len(self.domain_of_text)
        if int(self.text_BP.max()) >= count or len(self.num_bytes_of_text) != count:
            raise ConfigError(
                f"Each of {int(self.text_BP.max()) + 1} texts needs a domain and a number of bytes, got {count} and "
                f"{len(self.num_bytes_of_text)}. Give one of each for a text."
            )

    @classmethod
    def from_documents(
        cls,
        documents: Iterable[Document],
        tokenizer: PreTrainedTokenizerBase,
        *,
        context: int = 256,
        tokens: int = 16384,
    ) -> HeldOut:
        """Pack documents into blocks, domain by domain; the beginnings of many are read rather than few whole.

        Args:
            documents: with their domains.
            tokenizer: closes each whole document with its end-of-text token, and opens each block with its
                begin-of-text token, where it has them.
            context: P, tokens of a block.
            tokens: to read of each domain, at most.
        Raises:
            ConfigError: if a block would hold nothing.
            DataError: if there is no text.
        """
        if context < 2:
            raise ConfigError(f"context must be at least 2 tokens, got {context}. Use 256.")
        by_domain: dict[str, list[Document]] = {}
        for document in documents:
            by_domain.setdefault(document.domain, []).append(document)
        domains = tuple(sorted(by_domain))
        packer = _Packer(tokenizer, context)
        for index, domain in enumerate(domains):
            packer.add(by_domain[domain], index, tokens)
        return packer.packed(domains)

    @classmethod
    def from_ids(cls, sequences: Mapping[str, Sequence[Tensor]]) -> HeldOut:
        """Sequences of token ids by domain, each a text of its own, of unknown bytes."""
        flat = [(index, ids) for index, many in enumerate(sequences.values()) for ids in many]
        if not flat:
            raise DataError("Needed at least one sequence of token ids, got none. Give more text.")
        shape = (len(flat), max(len(ids) for _, ids in flat))
        input_ids_BP, text_BP = torch.zeros(shape, dtype=torch.int64), torch.full(shape, NO_TEXT)
        valid_BP = torch.zeros(shape, dtype=torch.bool)
        for text, (_, ids) in enumerate(flat):
            input_ids_BP[text, : len(ids)] = ids
            valid_BP[text, : len(ids)] = True
            text_BP[text, 1 : len(ids)] = text
        return cls(
            domains=tuple(sequences),
            input_ids_BP=input_ids_BP,
            valid_BP=valid_BP,
            text_BP=text_BP,
            domain_of_text=tuple(index for index, _ in flat),
            num_bytes_of_text=(float("nan"),) * len(flat),
        ).mixed()

    @property
    def num_texts(self) -> int:
        """Texts of all domains."""
        return len(self.domain_of_text)

    @property
    def tokens_of_text(self) -> npt.NDArray[np.int64]:
        """How many tokens of each text are predicted."""
        text = self.text_BP[:, 1:]
        return np.bincount(text[text != NO_TEXT].numpy(), minlength=self.num_texts).astype(np.int64)

    def mixed(self) -> HeldOut:
        """The same blocks in an order in which the domains take turns, evenly, so that no batch is of one alone."""
        first_B = self.text_BP.max(dim=1).values
        domain_B = [self.domain_of_text[text] if text >= 0 else 0 for text in first_B.tolist()]
        count = [domain_B.count(index) for index in range(len(self.domains))]
        seen = [0] * len(self.domains)
        place_B = []
        for domain in domain_B:
            seen[domain] += 1
            place_B.append((seen[domain] - 0.5) / count[domain])
        order = torch.tensor(sorted(range(len(place_B)), key=lambda block: (place_B[block], domain_B[block])))
        return replace(
            self,
            input_ids_BP=self.input_ids_BP[order],
            valid_BP=self.valid_BP[order],
            text_BP=self.text_BP[order],
        )

    def batches(self, size: int) -> Iterator[HeldOut]:
        """So many blocks at a time; texts keep their numbers."""
        for start in range(0, len(self.input_ids_BP), size):
            part = slice(start, start + size)
            yield replace(
                self,
                input_ids_BP=self.input_ids_BP[part],
                valid_BP=self.valid_BP[part],
                text_BP=self.text_BP[part],
            )


class _Packer:
    """Tokenizes documents and lays them end to end."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, context: int) -> None:
        self.tokenizer = tokenizer
        self.context = context
        self.blocks: list[tuple[list[int], list[int]]] = []
        self.domain_of_text: list[int] = []
        self.num_bytes_of_text: list[float] = []

    def add(self, documents: Sequence[Document], domain: int, tokens: int) -> None:
        """Pack the documents of one domain."""
        encoded = self.tokenizer(
            [document.text for document in documents],
            add_special_tokens=False,
            split_special_tokens=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )["input_ids"]
        ids: list[int] = []
        texts: list[int] = []
        for index, length in taken([len(one) for one in encoded], tokens):
            part = list(encoded[index][:length])
            if not part:
                continue
            whole = length == len(encoded[index])
            self.num_bytes_of_text.append(documents[index].num_bytes * length / len(encoded[index]))
            if whole and self.tokenizer.eos_token_id is not None:
                part.append(int(self.tokenizer.eos_token_id))
            ids += part
            texts += [len(self.domain_of_text)] * len(part)
            self.domain_of_text.append(domain)
        opening = [] if self.tokenizer.bos_token_id is None else [int(self.tokenizer.bos_token_id)]
        step = self.context - len(opening)
        for start in range(0, len(ids), step):
            self.blocks.append(
                (opening + ids[start : start + step], [NO_TEXT] * len(opening) + texts[start : start + step])
            )

    def packed(self, domains: tuple[str, ...]) -> HeldOut:
        """All blocks, filled up with padding."""
        if not self.blocks:
            raise DataError("Needed at least one document of held-out text, got none. Hold out more text.")
        pad = self.tokenizer.pad_token_id
        shape = (len(self.blocks), self.context)
        input_ids_BP = torch.full(shape, 0 if pad is None else int(pad))
        valid_BP, text_BP = torch.zeros(shape, dtype=torch.bool), torch.full(shape, NO_TEXT)
        for block, (ids, texts) in enumerate(self.blocks):
            input_ids_BP[block, : len(ids)] = torch.tensor(ids)
            valid_BP[block, : len(ids)] = True
            text_BP[block, : len(texts)] = torch.tensor(texts)
        # What nothing stands before, nobody predicts.
        text_BP[:, 0] = NO_TEXT
        return HeldOut(
            domains=domains,
            input_ids_BP=input_ids_BP,
            valid_BP=valid_BP,
            text_BP=text_BP,
            domain_of_text=tuple(self.domain_of_text),
            num_bytes_of_text=tuple(self.num_bytes_of_text),
        ).mixed()


def taken(lengths: Sequence[int], limit: int) -> list[tuple[int, int]]:
    """How much of each text to read, ``limit`` tokens in all at most: of as many texts as fit, evenly spread.

    Returns:
        Index and tokens of each text that is read.
    """
    short = [min(length, _LEAST_TOKENS) for length in lengths]
    count = len(lengths)
    chosen = list(range(count))
    while count > 1 and sum(short[index] for index in chosen) > limit:
        count = max(1, min(count - 1, count * limit // max(1, sum(short[index] for index in chosen))))
        chosen = [place * len(lengths) // count for place in range(count)]
    # The largest cut that fits.
    low, high = 0, max((lengths[index] for index in chosen), default=0)
    while low < high:
        middle = (low + high + 1) // 2
        if sum(min(lengths[index], middle) for index in chosen) <= limit:
            low = middle
        else:
            high = middle - 1
    return [(index, min(lengths[index], low)) for index in chosen]
