"""Draws: the planted router chooses as drawn, loads are as skewed as asked for, weights are shared."""

from dataclasses import replace

import pytest
import torch

from moesaic.bench.case import Case
from moesaic.bench.draw import draw
from moesaic.bench.ours import router_of

from .conftest import CPU, TINY


@pytest.mark.parametrize("zipf", [0.0, 1.0])
def test_a_router_with_the_drawn_weights_makes_the_drawn_choices(zipf):
    one = draw(replace(TINY, num_tokens=300, zipf=zipf), dtype=torch.float32, device=CPU)
    routing = router_of(one)(one.x_TD)
    assert torch.equal(routing.expert_N.view(-1, 2), one.expert_TK)
    torch.testing.assert_close(routing.logits_TE, one.logits_TE, rtol=1e-4, atol=1e-4)
    # The draw's are rounded to nothing in float32: the same softmax over the chosen.
    torch.testing.assert_close(routing.weight_N.view(-1, 2), one.weight_TK, rtol=1e-4, atol=1e-5)


def test_balanced_load_is_balanced_and_zipf_is_not():
    case = Case(name="x", num_experts=16, top_k=2, hidden=4, width=16, num_tokens=4000)
    even = draw(case, dtype=torch.float32, device=CPU)
    skewed = draw(replace(case, zipf=1.0), dtype=torch.float32, device=CPU)
    assert even.max_over_mean < 1.2
    # Two draws without replacement with shares 1/r over H(16) = 3.38: the first expert gets 30 % of first choices and
    # close to 50 % of tokens, 16 experts at 12.5 % being the mean.
    assert 3.5 < skewed.max_over_mean < 4.5
    assert all(len(set(row)) == 2 for row in skewed.expert_TK.tolist())


def test_a_token_chooses_among_the_experts_that_it_may():
    among_TE = torch.zeros(40, 6, dtype=torch.bool)
    among_TE[:, [1, 4]] = True
    one = draw(TINY, dtype=torch.float32, device=CPU, among_TE=among_TE)
    assert set(one.expert_TK.flatten().tolist()) == {1, 4}
    assert torch.equal(router_of(one)(one.x_TD).expert_N.view(-1, 2), one.expert_TK)


def test_routing_weights_are_ones_that_half_precision_has():
    one = draw(TINY, dtype=torch.bfloat16, device=CPU)
    assert one.weight_TK.dtype == torch.float32
    assert torch.equal(one.weight_TK, one.weight_TK.bfloat16().float())
    assert one.weight_TK.is_leaf
    assert one.weight_TK.requires_grad


def test_a_draw_can_share_the_weights_of_another_and_the_same_seed_draws_the_same():
    first = draw(TINY.with_shared(), dtype=torch.float32, device=CPU)
    second = draw(TINY.with_shared(), dtype=torch.float32, device=CPU, seed=7, weights=first)
    again = draw(TINY.with_shared(), dtype=torch.float32, device=CPU)
    assert second.experts is first.experts
    assert second.shared is first.shared
    assert not torch.equal(second.expert_TK, first.expert_TK)
    assert torch.equal(again.x_TD, first.x_TD)
    assert torch.equal(again.experts.up_EDF, first.experts.up_EDF)
