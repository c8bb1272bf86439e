"""The GShard line against transformers: MiniMax's block, and NLLB-MoE's router, which is fairseq's top-2 gate.

NLLB's block is left out: in transformers 5.23 it hands a mask to code that wants indices, so that expert 0 gets nearly
every row. Its router alone is right.
"""

import math

import pytest
import torch
from torch import Tensor
from transformers import MiniMaxConfig, NllbMoeConfig
from transformers.models.minimax.modeling_minimax import MiniMaxSparseMoeBlock
from transformers.models.nllb_moe.modeling_nllb_moe import NllbMoeTop2Router

from moesaic import MoELayer, Routing, recipes
from tests.parity.test_transformers import DRAWS, IMPLEMENTATIONS, D, F, _assert_within_1e_5, _compare, sizes


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@sizes
def test_minimax_01_agrees_with_transformers_in_outputs_and_every_gradient(num_tokens, implementation):
    for draw in DRAWS:
        torch.manual_seed(draw)
        ours = recipes.get("minimax-01").layer(D, hidden=F, num_experts=8, top_k=2, init_std=0.4)
        config = MiniMaxConfig(hidden_size=D, intermediate_size=F, num_local_experts=8, num_experts_per_tok=2)
        config._experts_implementation = implementation
        _compare(ours, MiniMaxSparseMoeBlock(config), num_tokens)


def _gshard_pair(fraction: float, **options) -> tuple[MoELayer, NllbMoeTop2Router]:
    """Both in evaluation, with places for this fraction of the tokens in each of 6 experts, and one group."""
    ours = recipes.get("gshard").layer(
        D,
        hidden=F,
        num_experts=6,
        init_std=0.4,
        eval_capacity_factor=6 * fraction,
        min_capacity=0,
        group_size=1000,
    )
    config = NllbMoeConfig(
        d_model=D,
        num_experts=6,
        router_bias=False,
        moe_eval_capacity_token_fraction=fraction,
        normalize_router_prob_before_dropping=True,
        **options,
    )
    theirs = NllbMoeTop2Router(config).eval()
    with torch.no_grad():
        theirs.classifier.weight.copy_(ours.router.weight)
    return ours.eval(), theirs


def _dense(routing: Routing, value_N: Tensor) -> Tensor:
    return value_N.new_zeros(routing.logits_TE.shape).index_put((routing.token_N, routing.expert_N), value_N)


@pytest.mark.parametrize("fraction", [1.0, 0.4, 0.2, 0.1])
@pytest.mark.parametrize("num_tokens", [1, 7, 63])
def test_gshard_agrees_with_nllb_in_logits_rows_kept_and_combine_weights_and_their_gradient(num_tokens, fraction):
    dropped = 0
    for draw in DRAWS:
        torch.manual_seed(draw)
        ours, theirs = _gshard_pair(fraction, second_expert_policy="all")
        x_TD = torch.randn(num_tokens, D, requires_grad=True)
        x_theirs_TD = x_TD.detach().clone().requires_grad_()
        _, routing = ours(x_TD)
        first_TE, combine_TE, logits_TE = theirs(x_theirs_TD)
        _assert_within_1e_5(routing.logits_TE, logits_TE, "logits")
        ours_TE = _dense(routing, routing.weight_N * routing.kept_N)
        _assert_within_1e_5(ours_TE, combine_TE, "combine weights")
        assert torch.equal(_dense(routing, (routing.kept_N & (routing.choice_N == 0)).long()), first_TE)
        probe_TE = torch.randn(num_tokens, 6)
        ours_TE.backward(probe_TE)
        combine_TE.backward(probe_TE)
        _assert_within_1e_5(x_TD.grad, x_theirs_TD.grad, "gradient of the input")
        _assert_within_1e_5(ours.router.weight.grad, theirs.classifier.weight.grad, "gradient of the router")
        dropped += int((~routing.kept_N).sum())
    assert num_tokens < 63 or (dropped > 0) == (fraction < 1), "the fractions are here to drop rows"


def test_the_second_expert_is_used_as_often_as_nllb_s_random_policy_uses_it_with_two_experts():
    """With more than two experts they differ: NLLB compares the probability before it is renormalised over the two."""
    torch.manual_seed(0)
    ours = recipes.get("gshard").layer(D, hidden=F, num_experts=2, init_std=0.1, capacity_factor=100.0)
    config = NllbMoeConfig(
        d_model=D,
        num_experts=2,
        router_bias=False,
        second_expert_policy="random",
        normalize_router_prob_before_dropping=True,
        expert_capacity=10**6,
    )
    theirs = NllbMoeTop2Router(config)
    with torch.no_grad():
        theirs.classifier.weight.copy_(ours.router.weight * 5)
        ours.router.weight.mul_(5)
    x_TD = torch.randn(20_000, D)
    _, routing = ours(x_TD)
    used = (routing.num_rows - 20_000) / 20_000
    _, combine_TE, _ = theirs(x_TD)
    used_theirs = float((combine_TE > 0).sum() - 20_000) / 20_000
    chance = float((2 * routing.scores_TE.detach().min(dim=-1).values).clamp(max=1).mean())
    assert 0.2 < chance < 0.8
    for share in (used, used_theirs):
        assert abs(share - chance) < 4 * math.sqrt(0.25 / 20_000)
