"""A model with experts planted: one serves the tokens of one domain, one serves nobody, the others share the rest."""

from __future__ import annotations

import torch

from moesaic.hf import moe_layers
from moesaic.probe import HeldOut
from tests.hf.test_forward import sparse

FIRST, SECOND = range(3, 30), range(30, 57)
"""Token ids of the domain that has an expert of its own, and of the other."""


@torch.no_grad()
def planted_model():
    """One layer, top-2 of 4: expert 0 is for tokens of the first domain, 3 is for none.

    Tokens of the second domain visit experts 1 and 2; those of the first, 0 and 1.
    """
    torch.manual_seed(0)
    model = sparse("llama", num_hidden_layers=1).eval()
    layer = next(iter(moe_layers(model).values()))
    embedding = model.get_input_embeddings().weight
    # The first feature tells the domain, to the router too: attention adds nothing to what it reads.
    embedding[:, 0] = 0
    embedding[list(FIRST), 0], embedding[list(SECOND), 0] = 4.0, -4.0
    model.model.layers[0].self_attn.o_proj.weight.zero_()
    layer.router.weight.zero_()
    for expert, (slope, order) in enumerate([(1.0, 0.0), (0.0, 0.5), (-1.0, 0.0), (0.0, -50.0)]):
        layer.router.weight[expert, 0] = 10 * slope
        layer.router.weight[expert, 1] = order
    # What decides between 1 and 3 must not change its sign.
    embedding[:, 1] = embedding[:, 1].abs() + 1
    for name in ("gate_EDF", "up_EDF", "down_EFD"):
        getattr(layer.experts, name).mul_(4)
    return model


def planted_text(sequences: int = 12, length: int = 20, seed: int = 1) -> HeldOut:
    """Random tokens of both domains, half and half."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(ids: range) -> list[torch.Tensor]:
        return [
            torch.randint(ids.start, ids.stop, (length + index % 3,), generator=generator) for index in range(sequences)
        ]

    return HeldOut.from_ids({"first": drawn(FIRST), "second": drawn(SECOND)})
