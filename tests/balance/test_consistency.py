import math

import pytest
import torch

from moesaic import Context, MoELayer, ShapeError
from moesaic.balance import consistency_loss
from moesaic.experts import MLPExperts
from moesaic.routers import RandomRouter


def test_the_loss_of_two_known_distributions():
    """(0.75, 0.25) against (0.25, 0.75): both divergences are ln(3) / 2."""
    first_TV = torch.tensor([[0.75, 0.25]]).log() + 7
    second_TV = torch.tensor([[0.25, 0.75]]).log() - 3
    assert float(consistency_loss(first_TV, second_TV)) == pytest.approx(math.log(3) / 2)


def test_it_is_half_the_sum_of_both_divergences_at_least_zero_and_symmetric():
    torch.manual_seed(0)
    first_TV, second_TV = torch.randn(2, 20, 9, dtype=torch.float64) * 3
    p, q = first_TV.softmax(dim=-1), second_TV.softmax(dim=-1)
    both = torch.nn.functional.kl_div(p.log(), q, reduction="batchmean") + torch.nn.functional.kl_div(
        q.log(), p, reduction="batchmean"
    )
    loss = consistency_loss(first_TV, second_TV)
    torch.testing.assert_close(loss, both / 2)
    assert loss > 0
    torch.testing.assert_close(consistency_loss(second_TV, first_TV), loss)
    assert float(consistency_loss(first_TV, first_TV)) == 0


def test_padding_is_left_out_and_both_passes_are_taught():
    torch.manual_seed(0)
    passes = torch.randn(2, 10, 5, requires_grad=True)
    valid_T = torch.arange(10) % 3 > 0
    loss = consistency_loss(passes[0], passes[1], valid_T)
    torch.testing.assert_close(loss, consistency_loss(passes[0][valid_T], passes[1][valid_T]))
    loss.backward()
    assert (passes.grad[:, valid_T].abs().sum(dim=-1) > 0).all()
    assert passes.grad[:, ~valid_T].abs().sum() == 0


def test_forbidden_tokens_and_sure_predictions_give_no_nan():
    first_TV = torch.tensor([[0.0, 1e4, float("-inf")], [0.0, -1e4, float("-inf")]], requires_grad=True)
    second_TV = torch.tensor([[1.0, 2.0, float("-inf")], [0.0, -1e4, float("-inf")]])
    loss = consistency_loss(first_TV, second_TV)
    loss.backward()
    assert loss.isfinite()
    assert first_TV.grad.isfinite().all()


def test_no_tokens_give_zero():
    assert float(consistency_loss(torch.randn(0, 5), torch.randn(0, 5))) == 0
    assert float(consistency_loss(torch.randn(2, 5), torch.randn(2, 5), torch.zeros(2, dtype=torch.bool))) == 0


@torch.no_grad()
def test_identical_experts_agree_whatever_is_drawn():
    """Reference 10.4, invariants: and different ones do not, unless the same are drawn."""
    torch.manual_seed(0)
    layer = MoELayer(RandomRouter(4), MLPExperts(4, 6, 8, init=lambda weight, _: torch.nn.init.normal_(weight)))
    x_TD, context = torch.randn(12, 6), Context(sequence_T=torch.arange(12))
    assert float(consistency_loss(layer(x_TD, None, context)[0], layer(x_TD, None, context)[0])) > 0.1
    passes = []
    for _ in range(2):
        torch.manual_seed(1)
        passes.append(layer(x_TD, None, context)[0])
    assert float(consistency_loss(*passes)) == 0
    for stack in layer.experts.parameters():
        stack.copy_(stack[:1].expand_as(stack).clone())
    assert float(consistency_loss(layer(x_TD, None, context)[0], layer(x_TD, None, context)[0])) == pytest.approx(0)


def test_passes_over_other_tokens_are_refused():
    with pytest.raises(ShapeError) as error:
        consistency_loss(torch.randn(3, 5), torch.randn(4, 5))
    assert str(error.value) == (
        "both passes must give logits (tokens, vocabulary), got (3, 5) and (4, 5). Flatten batch and position, and "
        "run both passes on the same tokens."
    )
