import math

import pytest
import torch

from moesaic import ConfigError, Routing
from moesaic.balance import reinforce_loss
from moesaic.routers import PolicyRouter

PROBABILITIES = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)


def _routing(
    experts: list[list[int]], rewards: list[float] | None, valid_T: torch.Tensor | None = None
) -> tuple[torch.Tensor, Routing]:
    expert_TK = torch.tensor(experts)
    logits_TE = PROBABILITIES.log().expand(len(experts), -1).clone().requires_grad_()
    weight_TK = torch.ones(expert_TK.shape, dtype=torch.float64)
    routing = Routing.from_choices(expert_TK, weight_TK, logits_TE, logits_TE.softmax(dim=-1), valid_T)
    if rewards is None:
        return logits_TE, routing
    return logits_TE, routing.__class__(
        **{name: getattr(routing, name) for name in Routing.__slots__} | {"extras": {"reward_T": torch.tensor(rewards)}}
    )


def test_a_worked_example_of_single_draws():
    """Rewards -1 and -3 about their mean of -2: advantages 1 and -1."""
    logits_TE, routing = _routing([[0], [2]], [-1.0, -3.0])
    loss = reinforce_loss(routing)
    assert float(loss.detach()) == pytest.approx(-(math.log(0.5) - math.log(0.2)) / 2)
    loss.backward()
    # The slope of -log p at the drawn expert is p - 1, elsewhere p.
    assert logits_TE.grad[0].tolist() == pytest.approx([-0.25, 0.15, 0.1])
    assert logits_TE.grad[1].tolist() == pytest.approx([-0.25, -0.15, 0.4])


def test_a_worked_example_of_draws_without_replacement():
    _, routing = _routing([[0, 2], [1, 0]], [1.0, -1.0])
    first = math.log(0.5) + math.log(0.2 / 0.5)
    second = math.log(0.3) + math.log(0.5 / 0.7)
    assert float(reinforce_loss(routing).detach()) == pytest.approx(-(first - second) / 2)


def test_drawing_every_expert_is_certain_but_for_its_order():
    total = 0.0
    for order in ([0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]):
        # Advantages 1 and -1: the second token's draw takes away what the first would have in the order 0, 1, 2.
        _, routing = _routing([order, [0, 1, 2]], [1.0, -1.0])
        _, reference = _routing([[0, 1, 2], [0, 1, 2]], [1.0, -1.0])
        base = math.log(0.5) + math.log(0.3 / 0.5)
        total += math.exp(-2 * float(reinforce_loss(routing).detach()) + base)
        assert float(reinforce_loss(reference).detach()) == pytest.approx(0)
    assert total == pytest.approx(1)


def test_equal_rewards_teach_nothing():
    logits_TE, routing = _routing([[0], [2], [1]], [-2.0, -2.0, -2.0])
    loss = reinforce_loss(routing)
    loss.backward()
    assert float(loss.detach()) == 0
    assert logits_TE.grad.abs().max() == 0


def test_padding_is_neither_rewarded_nor_in_the_baseline():
    valid_T = torch.tensor([True, False, True])
    logits_TE, padded = _routing([[0], [1], [2]], [-1.0, 1e6, -3.0], valid_T)
    _, alone = _routing([[0], [2]], [-1.0, -3.0])
    loss = reinforce_loss(padded)
    assert float(loss.detach()) == pytest.approx(float(reinforce_loss(alone).detach()))
    loss.backward()
    assert logits_TE.grad[1].abs().max() == 0


def test_no_token_gives_zero_attached():
    logits_TE, routing = _routing([[0]], [-1.0], torch.tensor([False]))
    loss = reinforce_loss(routing)
    loss.backward()
    assert float(loss.detach()) == 0
    assert logits_TE.grad is not None


def test_a_missing_reward_is_named():
    _, routing = _routing([[0]], None)
    with pytest.raises(ConfigError) as error:
        reinforce_loss(routing)
    assert str(error.value) == (
        "The REINFORCE loss needs routing.extras['reward_T'], which this routing does not have. It comes from a model "
        "of moesaic.sparsify that is given labels, when its loss is known: use the two together, or another loss."
    )


@pytest.mark.parametrize("top_k", [1, 2])
def test_the_average_gradient_is_the_slope_of_the_expected_reward(top_k):
    """What policy gradients are for: over many draws, minus the loss's slope is that of the mean reward."""
    value_E = torch.tensor([1.0, -2.0, 0.5, 3.0])
    router = PolicyRouter(1, 4, top_k=top_k)
    with torch.no_grad():
        router.weight.copy_(torch.tensor([0.3, -0.2, 0.5, 0.0])[:, None])
    routing = router(torch.ones(60_000, 1))
    reward_T = value_E[routing.expert_N].view(-1, top_k).sum(dim=-1)
    rewarded = Routing(
        **{name: getattr(routing, name) for name in Routing.__slots__} | {"extras": {"reward_T": reward_T}}
    )
    reinforce_loss(rewarded).backward()

    logits_E = router.weight.detach()[:, 0].clone().requires_grad_()
    p_E = logits_E.softmax(dim=0)
    if top_k == 1:
        expected = (p_E * value_E).sum()
    else:
        pairs_EE = p_E[:, None] * p_E[None, :] / (1 - p_E[:, None]) * (1 - torch.eye(4))
        expected = (pairs_EE * (value_E[:, None] + value_E[None, :])).sum()
    expected.backward()
    assert (-router.weight.grad[:, 0]).tolist() == pytest.approx(logits_E.grad.tolist(), abs=0.03)


def test_a_policy_learns_which_expert_is_rewarded():
    router = PolicyRouter(2, 4, top_k=1)
    best_T = torch.arange(200) % 2
    x_TD = torch.nn.functional.one_hot(best_T, 2).float()
    optimizer = torch.optim.Adam(router.parameters(), lr=0.1)
    for _ in range(60):
        routing = router(x_TD)
        reward_T = (routing.expert_N == 3 * best_T).float()
        extras = {"reward_T": reward_T}
        loss = reinforce_loss(
            Routing(**{name: getattr(routing, name) for name in Routing.__slots__} | {"extras": extras})
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert router.eval()(x_TD).expert_N.tolist() == (3 * best_T).tolist()
