import math

import pytest
import torch

from moesaic.balance import depth_loss
from moesaic.core.routing import Routing
from moesaic.routers import DepthRouter


def _routing(logits_TE: torch.Tensor, chosen_TE: torch.Tensor, valid_T: torch.Tensor | None = None) -> Routing:
    return Routing.from_mask(chosen_TE, logits_TE, logits_TE, logits_TE.sigmoid(), valid_T)


def test_a_router_that_knows_nothing_loses_ln_2_and_one_that_is_right_loses_nothing():
    chosen_TE = torch.tensor([[True], [False], [False]])
    assert float(depth_loss(_routing(torch.zeros(3, 1), chosen_TE))) == pytest.approx(math.log(2))
    sure_TE = torch.tensor([[50.0], [-50.0], [-50.0]])
    assert float(depth_loss(_routing(sure_TE, chosen_TE))) == pytest.approx(0, abs=1e-12)
    assert float(depth_loss(_routing(-sure_TE, chosen_TE))) == pytest.approx(50)


def test_the_gradient_pulls_the_chosen_up_and_the_others_down():
    logits_TE = torch.randn(6, 2, dtype=torch.float64, requires_grad=True)
    chosen_TE = torch.rand(6, 2) > 0.5
    depth_loss(_routing(logits_TE, chosen_TE)).backward()
    torch.testing.assert_close(logits_TE.grad, (logits_TE.detach().sigmoid() - chosen_TE.double()) / 12)


def test_padding_counts_neither_as_chosen_nor_as_left():
    logits_TE, valid_T = torch.randn(10, 1), torch.arange(10) % 3 > 0
    chosen_TE = (torch.rand(10, 1) > 0.5) & valid_T[:, None]
    whole = depth_loss(_routing(logits_TE, chosen_TE, valid_T))
    alone = depth_loss(_routing(logits_TE[valid_T], chosen_TE[valid_T]))
    torch.testing.assert_close(whole, alone)
    logits_TE[~valid_T] = float("inf")
    torch.testing.assert_close(depth_loss(_routing(logits_TE, chosen_TE, valid_T)), alone)


def test_no_tokens_give_a_zero_that_is_attached():
    router = DepthRouter(4)
    loss = depth_loss(router(torch.randn(0, 4)))
    loss.backward()
    assert float(loss.detach()) == 0
    assert router.weight.grad.abs().sum() == 0


def test_a_trained_router_chooses_in_evaluation_nearly_what_it_chose_in_training():
    """What the loss is for: sequences whose largest first entries are to be found without comparing."""
    torch.manual_seed(0)
    router = DepthRouter(4, capacity=0.25)
    with torch.no_grad():
        router.weight.copy_(torch.tensor([[1.0, 0.0, 0.0, 0.0]]))
    x_TD = torch.randn(400, 4)
    x_TD[:, 3] = 1.0  # so that the threshold can be learned
    optimizer = torch.optim.Adam(router.parameters(), lr=0.05)

    def share_of_equal_choices() -> float:
        trained = set(router.train()(x_TD).token_N.tolist())
        return 1 - len(trained ^ set(router.eval()(x_TD).token_N.tolist())) / 400

    before = share_of_equal_choices()
    for _ in range(200):
        optimizer.zero_grad()
        depth_loss(router.train()(x_TD)).backward()
        optimizer.step()
    assert before < 0.8
    assert share_of_equal_choices() > 0.97
