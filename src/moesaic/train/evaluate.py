"""Held-out bits per byte, by domain: a figure that does not depend on the tokenizer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from moesaic.core.errors import DataError
from moesaic.data.blocks import IGNORED
from moesaic.train import ranks
from moesaic.train.meter import RoutingMeter
from moesaic.train.order import collate


class Blocks(Protocol):
    """Token blocks labelled by domain, as ``moesaic.data.TokenBlocks`` or ``moesaic.data.PrefixBlocks``."""

    @property
    def domains(self) -> Sequence[str]:
        """Names of the domains, by index."""

    @property
    def num_bytes_per_domain(self) -> Any:
        """UTF-8 bytes of the predicted text, by name or index of the domain."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Mapping[str, Tensor]: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """What a model scored on held-out text.

    Attributes:
        bits_per_byte: by domain, and ``mean``: the unweighted mean over domains.
        load_max_over_mean: the fullest expert's load over the mean load, averaged over layers; None without MoE.
        drop_rate: share of rows that capacity dropped, averaged over layers; None without MoE.
    """

    bits_per_byte: Mapping[str, float]
    load_max_over_mean: float | None
    drop_rate: float | None


class Evaluator:
    """Measures bits per byte on held-out blocks.

    The bits of every predicted token are summed in float64 and divided by the UTF-8 bytes of the text, exactly over
    the set. Nothing random is drawn and no controller is moved. Batches mix the domains evenly, as in training: where
    a capacity drops rows, a batch of one domain alone would overfill that domain's experts. A dropless model scores
    the same in any batch. Under ``torch.distributed`` each rank reads its share.

    Args:
        blocks: held-out text.
        batch_size: blocks of one forward.
        max_tokens: read no more than about this many tokens of each domain, evenly spread; the bytes of the part are
            then reckoned from the domain's mean bytes per token.
    Raises:
        DataError: if there is no held-out text.
    """

    def __init__(self, blocks: Blocks, *, batch_size: int = 16, max_tokens: int | None = None):
        if not len(blocks):
            raise DataError("an evaluation needs at least one block of held-out text, got none. Hold out more text.")
        self.blocks = blocks
        self.batch_size = batch_size
        self.domains = tuple(blocks.domains)
        in_domain: list[list[int]] = [[] for _ in self.domains]
        tokens = [[0] for _ in self.domains]
        for index in range(len(blocks)):
            block = blocks[index]
            domain = int(block["domain"])
            in_domain[domain].append(index)
            tokens[domain].append(int((_targets(block) != IGNORED).sum()))
        self._chosen = _interleave(
            [_spread(indices, max_tokens, sum(tokens[domain])) for domain, indices in enumerate(in_domain)]
        )
        self._num_tokens = [sum(counts) for counts in tokens]
        self._num_bytes = [_bytes_of(blocks, index) for index in range(len(self.domains))]

    @torch.no_grad()
    def __call__(self, model: nn.Module, *, autocast: AbstractContextManager[Any] | None = None) -> Evaluation:
        """Evaluate; the model is left in the mode it came in."""
        # Some routers ask which domain a sequence belongs to.
        from moesaic.hf import domains as telling

        device = next(model.parameters()).device
        totals = torch.zeros(len(self.domains), 2, dtype=torch.float64, device=device)
        mine = self._chosen[ranks.own() :: ranks.count()]
        was_training = model.training
        model.eval()
        try:
            with RoutingMeter(model, training=False) as meter, autocast or nullcontext():
                for start in range(0, len(mine), self.batch_size):
                    items = [self.blocks[index] for index in mine[start : start + self.batch_size]]
                    domain_B = torch.stack([item["domain"].reshape(()) for item in items]).to(device)
                    with telling(domain_B):
                        totals.index_add_(0, domain_B, _bits_and_tokens(model, items, device))
                load_max_over_mean, drop_rate = meter.means()
        finally:
            model.train(was_training)
        if ranks.count() > 1:
            dist.all_reduce(totals)
        return Evaluation(
            bits_per_byte=self._per_byte(totals.tolist()), load_max_over_mean=load_max_over_mean, drop_rate=drop_rate
        )

    def _per_byte(self, totals: list[list[float]]) -> dict[str, float]:
        result: dict[str, float] = {}
        for index, name in enumerate(self.domains):
            bits, tokens = totals[index]
            if tokens:
                share = tokens / self._num_tokens[index]
                result[name] = bits / (self._num_bytes[index] * share)
        result["mean"] = sum(result.values()) / len(result)
        return result


def _bits_and_tokens(model: nn.Module, items: Sequence[Mapping[str, Tensor]], device: torch.device) -> Tensor:
    """Give each block's bits and predicted tokens, float64 (B, 2)."""
    batch = {name: tensor.to(device) for name, tensor in collate(items).items()}
    target_BP = torch.stack([_targets(item) for item in items]).to(device)
    if not _has_encoder(items[0]):
        # The last position predicts what is in no block; an encoder-decoder shifts its labels to be its input.
        del batch["labels"]
    logits_BPV = model(**batch, use_cache=False).logits[:, : target_BP.shape[1]].float()
    nats_BP = F.cross_entropy(logits_BPV.transpose(1, 2), target_BP, ignore_index=IGNORED, reduction="none")
    bits_B = nats_BP.double().sum(dim=1) / math.log(2)
    return torch.stack([bits_B, (target_BP != IGNORED).sum(dim=1).double()], dim=1)


def _has_encoder(block: Mapping[str, Tensor]) -> bool:
    return "decoder_attention_mask" in block


def _targets(block: Mapping[str, Tensor]) -> Tensor:
    """What a model's first logits, and those after them, predict: from its own first token on, the second."""
    return block["labels"] if _has_encoder(block) else block["labels"][1:]


def _spread(indices: list[int], max_tokens: int | None, num_tokens: int) -> list[int]:
    """Take evenly spread blocks that hold about ``max_tokens`` of ``num_tokens``."""
    if max_tokens is None or num_tokens <= max_tokens:
        return indices
    count = max(1, round(len(indices) * max_tokens / num_tokens))
    return [indices[position * len(indices) // count] for position in range(count)]


def _interleave(lists: Sequence[Sequence[int]]) -> list[int]:
    """One list in which each of the given ones is spread evenly, in its own order."""
    places = [((place + 0.5) / len(items), item) for items in lists for place, item in enumerate(items)]
    return [item for _, item in sorted(places)]


def _bytes_of(blocks: Blocks, index: int) -> int:
    sizes = blocks.num_bytes_per_domain
    return int(sizes[blocks.domains[index]] if isinstance(sizes, Mapping) else sizes[index])
