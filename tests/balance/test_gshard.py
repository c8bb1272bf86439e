from dataclasses import replace

import pytest
import torch

from moesaic import Routing
from moesaic.balance import gshard_loss, switch_loss
from tests.oracle import balance as oracle
from tests.oracle.router import route
from tests.tolerances import assert_close


def routing_of(probability_TE, expert_TK, valid_T=None) -> Routing:
    probability_TE = torch.tensor(probability_TE, dtype=torch.float64)
    expert_TK = torch.tensor(expert_TK)
    return Routing.from_choices(expert_TK, torch.ones(expert_TK.shape), probability_TE.log(), probability_TE, valid_T)


def test_the_loss_of_the_worked_example():
    """Reference 4.5, example 1: f = (1, 0), m = (0.8, 0.2)."""
    loss = float(gshard_loss(routing_of([[0.8, 0.2]] * 4, [[0, 1]] * 4)))
    assert loss == pytest.approx(1.6)  # Mesh TensorFlow and DeepSpeed
    assert loss / 2**2 == pytest.approx(0.4)  # the paper


@pytest.mark.parametrize("num_experts", [2, 4, 9])
def test_uniform_routing_costs_1_and_by_the_paper_s_measure_1_over_e_squared(num_experts):
    """Reference 4.5, example 4."""
    scores = [[1 / num_experts] * num_experts] * num_experts
    loss = float(gshard_loss(routing_of(scores, [[t, (t + 1) % num_experts] for t in range(num_experts)])))
    assert loss == pytest.approx(1.0)
    by_the_paper = sum(1 / num_experts * 1 / num_experts for _ in range(num_experts)) / num_experts
    assert loss / num_experts**2 == pytest.approx(by_the_paper)


def test_second_choices_do_not_count():
    scores = [[0.6, 0.3, 0.1]] * 3
    lopsided = routing_of(scores, [[0, 1]] * 3)
    assert float(gshard_loss(lopsided)) == pytest.approx(float(gshard_loss(routing_of(scores, [[0, 2]] * 3))))
    assert float(gshard_loss(lopsided)) == pytest.approx(3 * 0.6)
    assert float(switch_loss(lopsided)) == pytest.approx(3 * (0.5 * 0.6 + 0.5 * 0.3))


def test_dropping_rows_does_not_change_the_loss():
    """Traps: counted before capacity."""
    routing = routing_of([[0.8, 0.2]] * 4, [[0, 1]] * 4)
    assert float(gshard_loss(replace(routing, kept_N=torch.zeros(8, dtype=torch.bool)))) == pytest.approx(1.6)


@pytest.mark.parametrize("num_tokens", [0, 1, 7, 23])
def test_it_agrees_with_plain_loops_in_value_and_gradient(num_tokens):
    for seed in range(3):
        torch.manual_seed(seed)
        logits_TE = torch.randn(num_tokens, 6, dtype=torch.float64, requires_grad=True)
        truth_TE = logits_TE.detach().clone().requires_grad_()
        valid_T = torch.rand(num_tokens) > 0.3
        table = route(truth_TE, torch.eye(6, dtype=torch.float64), top_k=2, score="softmax", normalize="chosen")
        expert_TK = torch.tensor([row.expert for row in table.rows], dtype=torch.int64).view(num_tokens, 2)
        routing = Routing.from_choices(
            expert_TK, torch.ones(num_tokens, 2), logits_TE, logits_TE.softmax(dim=-1), valid_T
        )
        tokens = [t for t in range(num_tokens) if valid_T[t]]
        ours, theirs = gshard_loss(routing), oracle.gshard(table, tokens)
        assert_close(ours, theirs, "loss")
        ours.backward()
        if tokens:
            theirs.backward()
            assert_close(logits_TE.grad, truth_TE.grad, "gradient")
        assert tokens or logits_TE.grad.abs().sum() == 0
