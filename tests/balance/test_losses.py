import math
from dataclasses import replace

import pytest
import torch

from moesaic import Routing
from moesaic.balance import sequence_loss, switch_loss, z_loss
from tests.oracle import balance as oracle
from tests.oracle.router import route
from tests.tolerances import assert_close


def _routing(probability_TE, expert_TK, valid_T=None) -> Routing:
    probability_TE = torch.tensor(probability_TE)
    expert_TK = torch.tensor(expert_TK)
    return Routing.from_choices(expert_TK, torch.ones(expert_TK.shape), probability_TE.log(), probability_TE, valid_T)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize(("num_tokens", "top_k"), [(0, 2), (1, 2), (7, 1), (23, 3)])
def test_every_loss_agrees_with_plain_loops_in_value_and_gradient(num_tokens, top_k, score):
    for seed in range(3):
        torch.manual_seed(seed)
        logits_TE = torch.randn(num_tokens, 6, dtype=torch.float64, requires_grad=True)
        truth_TE = logits_TE.detach().clone().requires_grad_()
        valid_T = torch.rand(num_tokens) > 0.3
        sequence_T = torch.randint(0, 4, (num_tokens,))
        table = route(truth_TE, torch.eye(6, dtype=torch.float64), top_k=top_k, score=score, normalize="scores")
        routing = Routing.from_choices(
            torch.tensor([row.expert for row in table.rows], dtype=torch.int64).view(num_tokens, top_k),
            torch.ones(num_tokens, top_k),
            logits_TE,
            logits_TE.softmax(dim=-1) if score == "softmax" else logits_TE.sigmoid(),
            valid_T,
        )
        routing = replace(routing, sequence_T=sequence_T)
        taken = [t for t in range(num_tokens) if valid_T[t]]
        for ours, theirs in (
            (switch_loss(routing), oracle.switch(table, taken)),
            (sequence_loss(routing), oracle.sequence(table, taken, sequence_T.tolist())),
            (z_loss(routing), oracle.z(table, taken)),
        ):
            assert_close(ours, theirs, "loss")
            if taken:
                (grad_TE,) = torch.autograd.grad(ours, logits_TE, retain_graph=True)
                (truth_grad_TE,) = torch.autograd.grad(theirs, truth_TE, retain_graph=True)
                assert_close(grad_TE, truth_grad_TE, "gradient")


def test_the_switch_loss_of_the_worked_example():
    """Reference 5.6, example 1: f = (0.75, 0.25), P = (0.6, 0.4)."""
    routing = _routing([[0.6, 0.4]] * 4, [[0], [0], [0], [1]])
    assert float(switch_loss(routing)) == pytest.approx(1.10)
    assert 0.01 * float(switch_loss(routing)) == pytest.approx(0.011)
    assert float(switch_loss(_routing([[0.5, 0.5]] * 4, [[0], [0], [0], [1]]))) == pytest.approx(1.0)


def test_the_gradient_of_the_switch_loss_is_e_times_the_share_over_tokens():
    """Reference 5.6, example 2: f is constant, so dL/dp[t, e] = E f_e / T; probabilities are scores here."""
    scores_TE = torch.tensor([[0.6, 0.4]] * 4, requires_grad=True)
    routing = Routing.from_choices(torch.tensor([[0], [0], [0], [1]]), torch.ones(4, 1), scores_TE.log(), scores_TE)
    (grad_TE,) = torch.autograd.grad(switch_loss(routing), scores_TE)
    flat = torch.tensor([2 * 0.75 / 4, 2 * 0.25 / 4])
    # Through the division by the sum, what is common to a token's experts falls out.
    expected = flat - (flat * torch.tensor([0.6, 0.4])).sum()
    assert grad_TE.tolist() == [pytest.approx(expected.tolist())] * 4


def test_the_switch_loss_lies_between_its_balance_and_the_number_of_experts():
    collapsed = _routing([[1.0 - 3e-7, 1e-7, 1e-7, 1e-7]] * 5, [[0]] * 5)
    assert float(switch_loss(collapsed)) == pytest.approx(4.0, abs=1e-5)


def test_a_sequence_loss_sees_what_averages_out_over_the_batch():
    probabilities = [[1 - 1e-6, 1e-6]] * 3 + [[1e-6, 1 - 1e-6]] * 3
    routing = _routing(probabilities, [[0]] * 3 + [[1]] * 3)
    assert float(switch_loss(routing)) == pytest.approx(1.0)
    assert float(sequence_loss(routing)) == pytest.approx(1.0)
    apart = replace(routing, sequence_T=torch.tensor([0, 0, 0, 1, 1, 1]))
    assert float(sequence_loss(apart)) == pytest.approx(2.0, abs=1e-4)


def test_a_sequence_of_nothing_but_padding_does_not_dilute_the_others():
    probabilities = [[0.9, 0.1]] * 2 + [[0.5, 0.5]] * 2
    routing = _routing(probabilities, [[0]] * 4, torch.tensor([True, True, False, False]))
    routing = replace(routing, sequence_T=torch.tensor([0, 0, 1, 1]))
    assert float(sequence_loss(routing)) == pytest.approx(1.8)


def test_sequences_may_have_gaps_in_their_numbers_and_any_order():
    probabilities, experts = [[0.9, 0.1], [0.3, 0.7], [0.8, 0.2]], [[0], [1], [0]]
    routing = _routing(probabilities, experts)
    near = replace(routing, sequence_T=torch.tensor([0, 1, 0]))
    far = replace(routing, sequence_T=torch.tensor([7, 2, 7]))
    assert float(sequence_loss(near)) == pytest.approx(float(sequence_loss(far)))


@pytest.mark.parametrize("loss", [switch_loss, sequence_loss, z_loss], ids=lambda loss: loss.__name__)
def test_a_batch_of_nothing_but_padding_costs_nothing(loss):
    logits_TE = torch.randn(3, 4, requires_grad=True)
    routing = Routing.from_choices(
        torch.zeros(3, 1, dtype=torch.int64),
        torch.ones(3, 1),
        logits_TE,
        logits_TE.softmax(dim=-1),
        torch.zeros(3, dtype=torch.bool),
    )
    value = loss(replace(routing, sequence_T=torch.tensor([0, 0, 1])))
    value.backward()
    assert float(value.detach()) == 0
    assert logits_TE.grad.abs().sum() == 0


def test_z_loss_is_the_mean_square_of_the_log_of_the_sum_of_exponentials():
    routing = _routing([[math.e**2 / 4, math.e**2 * 3 / 4], [0.25, 0.75]], [[0], [0]])
    assert float(z_loss(routing)) == pytest.approx((2**2 + 0**2) / 2, abs=1e-6)


def test_losses_of_logits_that_rule_an_expert_out_are_finite_with_finite_gradients():
    """Minus infinity is how a mask in front of a softmax says never."""
    logits_TE = torch.tensor([[0.0, 1.0, -math.inf], [2.0, -math.inf, 0.0]], requires_grad=True)
    routing = Routing.from_choices(torch.tensor([[1], [0]]), torch.ones(2, 1), logits_TE, logits_TE.softmax(dim=-1))
    total = switch_loss(routing) + sequence_loss(routing) + z_loss(routing)
    total.backward()
    assert total.isfinite()
    assert logits_TE.grad.isfinite().all()
