"""In which order training reads its sequences, and how they become a batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor
from torch.utils.data import Sampler


class SeededOrder(Sampler[int]):
    """Every sequence once in a random order, then again in another one, until ``length`` are given.

    The order depends on the seed alone, so that a resumed run finds its place by counting, and MoE and twin read the
    same tokens at the same step. Every step gets a full batch: passes over the data run into each other.

    Args:
        num_sequences: sequences of the data.
        length: sequences to give in all.
        seed: of the order.
    """

    def __init__(self, num_sequences: int, *, length: int, seed: int):
        self.num_sequences = num_sequences
        self.length = length
        self.seed = seed

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        given = 0
        generator = torch.Generator()
        while given < self.length:
            generator.manual_seed(self.seed * 1_000_003 + given // self.num_sequences)
            order = torch.randperm(self.num_sequences, generator=generator).tolist()
            yield from order[: self.length - given]
            given += self.num_sequences


def collate_with_domains(items: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """As :func:`collate`, and which domain each sequence belongs to as ``domain``, where the sequences say so."""
    batch = collate(items)
    return batch | {"domain": torch.stack([item["domain"] for item in items])} if "domain" in items[0] else batch


def collate(items: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Stack sequences into a batch for a language model, with a decoder of its own or without.

    A mask is left out where nothing is padded: attention then takes its fast causal path.
    """
    batch = {name: torch.stack([item[name] for item in items]) for name in items[0] if name != "domain"}
    return {name: tensor for name, tensor in batch.items() if not name.endswith("mask") or not bool(tensor.all())}
