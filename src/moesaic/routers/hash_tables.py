"""Tables from token ids to experts: at random, balanced over a corpus, or by likeness of embeddings."""

from __future__ import annotations

import heapq

import torch
from torch import Tensor

from moesaic.core.errors import ConfigError


def random_table(vocab_size: int, num_experts: int, seed: int) -> Tensor:
    """Each id's expert drawn uniformly, int64 (V,), on the CPU; the same for the same seed on every machine.

    Raises:
        ConfigError: if ``vocab_size`` or ``num_experts`` is below 1.

    Source: Roller et al. 2021, "Random Hash".
    """
    if vocab_size < 1 or num_experts < 1:
        raise ConfigError(
            f"a table needs at least 1 token id and 1 expert, got vocab_size={vocab_size} and "
            f"num_experts={num_experts}. Pass the size of the tokenizer's vocabulary."
        )
    generator = torch.Generator(device="cpu").manual_seed(seed)
    return torch.randint(num_experts, (vocab_size,), generator=generator, device="cpu")


def balanced_table(counts_V: Tensor, num_experts: int) -> Tensor:
    """Ids from the most to the least frequent, each to the expert with least load so far, int64 (V,).

    Among equal loads the expert with fewest ids takes it, so that ids never seen are shared out too, then the lowest.
    No expert's load exceeds the mean by more than one id's count.

    Args:
        counts_V: how often each id stands in the corpus.
        num_experts: E.
    Raises:
        ConfigError: if a count is negative, or ``num_experts`` below 1.

    Source: Roller et al. 2021, "Balanced Assignment".
    """
    if num_experts < 1 or (counts_V.numel() and float(counts_V.min()) < 0):
        raise ConfigError(
            f"a balanced table needs counts of at least 0 and 1 expert, got counts from "
            f"{counts_V.min().item() if counts_V.numel() else 0} and num_experts={num_experts}. "
            "Count the token ids of the training text."
        )
    table_V = torch.zeros(counts_V.shape[0], dtype=torch.int64)
    counts = counts_V.tolist()
    lightest: list[tuple[float, int, int]] = [(0, 0, expert) for expert in range(num_experts)]
    for token_id in sorted(range(len(counts)), key=lambda v: -counts[v]):
        load, num_ids, expert = lightest[0]
        table_V[token_id] = expert
        heapq.heapreplace(lightest, (load + counts[token_id], num_ids + 1, expert))
    return table_V


@torch.no_grad()
def clustered_table(embedding_VD: Tensor, num_experts: int, seed: int, *, max_steps: int = 100) -> Tensor:
    """Ids with like embeddings to the same expert, by k-means, int64 (V,).

    Lloyd's algorithm from E different ids drawn at random. A cluster that lost all its ids starts again from the id
    that lies farthest from its own centre. Clusters are as uneven as the embeddings: the paper found this worse than
    a random table, 23.99 against 23.22 perplexity.

    Args:
        embedding_VD: of a trained model.
        num_experts: E.
        seed: of the first centres.
        max_steps: rounds of moving centres, fewer if no id changes its cluster.
    Raises:
        ConfigError: if there are fewer ids than experts.

    Source: Roller et al. 2021, "Clustered Hash".
    """
    vocab_size = embedding_VD.shape[0]
    if not 1 <= num_experts <= vocab_size:
        raise ConfigError(
            f"a clustered table needs between 1 and {vocab_size} experts, one id for each, got {num_experts}. "
            "Use fewer experts."
        )
    points_VD = embedding_VD.detach().double().cpu()
    first = torch.randperm(vocab_size, generator=torch.Generator(device="cpu").manual_seed(seed), device="cpu")
    centre_ED = points_VD[first[:num_experts]]
    table_V = torch.full((vocab_size,), -1, dtype=torch.int64)
    for _ in range(max_steps):
        distance_V, nearest_V = torch.cdist(points_VD, centre_ED).min(dim=1)
        for expert in (torch.bincount(nearest_V, minlength=num_experts) == 0).nonzero()[:, 0].tolist():
            farthest = int(distance_V.argmax())
            nearest_V[farthest], distance_V[farthest] = expert, 0.0
        if torch.equal(nearest_V, table_V):
            break
        table_V = nearest_V
        count_E1 = torch.bincount(table_V, minlength=num_experts)[:, None].clamp_min(1)
        centre_ED = torch.zeros_like(centre_ED).index_add(0, table_V, points_VD) / count_E1
    return table_V
