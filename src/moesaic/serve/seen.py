"""From the tables of one forward to what each token did, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence

from moesaic.hf import Seen
from moesaic.serve.events import Choice, Routed


def routed_tokens(seen: Sequence[Seen], num_layers: int, num_tokens: int) -> list[Routed]:
    """The choices of each token that one forward read.

    Args:
        seen: what each layer of the forward did.
        num_layers: MoE layers of the model.
        num_tokens: that the forward read; a layer that reads others tells nothing about these.
    """
    by_token: list[list[list[tuple[int, Choice]]]] = [[[] for _ in range(num_layers)] for _ in range(num_tokens)]
    for one in seen:
        routing = one.routing
        if routing.num_tokens != num_tokens:
            continue
        columns = (routing.token_N, routing.choice_N, routing.expert_N, routing.weight_N.float(), routing.kept_N)
        for token, rank, expert, weight, kept in zip(*(column.tolist() for column in columns), strict=True):
            by_token[token][one.index].append((rank, (expert, weight, kept)))
    return [
        tuple(tuple(choice for _, choice in sorted(choices, key=lambda pair: pair[0])) for choices in layers)
        for layers in by_token
    ]
