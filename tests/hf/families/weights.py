"""Random weights in which nothing is zero by accident and every token has its own favourite experts."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

# Router logits of about standard deviation 2, so that choices are well apart; biases that change some of them.
ROUTER = re.compile(r"(router|\.gate\.|classifier)", re.IGNORECASE)
SELECTION_BIAS = re.compile(r"(correction_bias|expert_bias|expert_biases|balancing_biases|moe_statics)")
EMBEDDING = re.compile(r"(embed_tokens|\.wte|shared)\.weight$")  # large, so that tokens differ by more than the biases
TABLE_OF_EXPERTS = re.compile(r"tid2eid$")
ROUTER_STD, BIAS_STD, EMBEDDING_STD, OTHER_STD = 0.4, 0.1, 0.5, 0.1


def random_model(make: Callable[[], PreTrainedModel], seed: int) -> PreTrainedModel:
    """Make the model and add noise to all that it starts with; the global random numbers stay where they are.

    Norms stay near the 1 (or the 0, where 1 is added later) that they start at. A tensor that the model leaves
    unwritten starts at 0 here, not at what lies in memory.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        with unwritten_is_nan():
            model = make()
        with torch.no_grad():
            for name, tensor in model.named_parameters():
                draw(name, tensor)
            for name, tensor in model.named_buffers():
                if SELECTION_BIAS.search(name):
                    draw(name, tensor)
                elif TABLE_OF_EXPERTS.search(name):
                    choose(tensor, model.config.get_text_config().num_local_experts)
    return model.eval()


@contextmanager
def unwritten_is_nan() -> Iterator[None]:
    """What ``torch.empty`` returns inside is NaN, which tells it from what somebody wrote."""
    before = torch.get_deterministic_debug_mode()
    torch.use_deterministic_algorithms(True)  # torch fills under this flag alone, which is on from the start
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(before)


def draw(name: str, tensor: Tensor) -> None:
    """Add noise of the size that the tensor's part calls for."""
    tensor.nan_to_num_(0.0)
    if SELECTION_BIAS.search(name):
        std = BIAS_STD
    elif ROUTER.search(name) and tensor.ndim > 1:
        std = ROUTER_STD
    elif EMBEDDING.search(name):
        std = EMBEDDING_STD
    else:
        std = OTHER_STD
    tensor.add_(torch.randn(tensor.shape) * std)
    if name.endswith("balancing_biases"):
        # zaya's last class skips the experts; transformers sets its bias to -1, whatever a checkpoint says. With the
        # others about there too, it is chosen now and then. A bias that all have in common chooses nothing.
        tensor[:-1].sub_(1.0)
        tensor[-1] = -1.0


def choose(experts_of_token: Tensor, num_experts: int) -> None:
    """Give each token id different experts of its own (deepseek_v4's hash layers look them up)."""
    tokens, top_k = experts_of_token.shape
    experts_of_token.copy_(torch.rand(tokens, num_experts).topk(top_k, dim=-1).indices)
