from dataclasses import replace

import pytest
import torch

from moesaic import ConfigError, Routing
from moesaic.balance import communication_loss, device_loss, sequence_loss
from moesaic.dispatch import DeviceCapacity
from moesaic.routers import GroupLimit, TopKRouter

LOSSES = [device_loss, communication_loss]
every_loss = pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.__name__)


def routing_of(expert_TK, scores_TE, device_E, devices_per_token, **more) -> Routing:
    expert_TK, scores_TE = torch.tensor(expert_TK), torch.tensor(scores_TE, dtype=torch.float64)
    routing = Routing.from_choices(expert_TK, torch.ones(expert_TK.shape), scores_TE.log(), scores_TE)
    extras = {"device_E": torch.tensor(device_E), "devices_per_token": torch.tensor(devices_per_token)}
    return replace(routing, extras=extras, **more)


def test_two_tokens_on_one_of_two_devices_cost_1_6():
    """Reference 15.5, example 5: f'' = [2, 0], P'' = [0.8, 0.2]."""
    routing = routing_of([[0], [0]], [[0.5, 0.3, 0.1, 0.1], [0.6, 0.2, 0.1, 0.1]], [0, 0, 1, 1], 1)
    assert float(communication_loss(routing)) == pytest.approx(1.6)
    # The rows: f = [4, 0, 0, 0], so f' = [2, 0].
    assert float(device_loss(routing)) == pytest.approx(1.6)


def test_a_token_with_two_experts_of_a_device_is_sent_there_once_and_worked_on_twice():
    routing = routing_of([[0, 1], [0, 2]], [[0.4, 0.3, 0.2, 0.1]] * 2, [0, 0, 1, 1], 2)
    # Sent: device 0 gets both tokens, device 1 one. f'' = 2 / (2 * 2) * [2, 1]; P'' = [0.7, 0.3].
    assert float(communication_loss(routing)) == pytest.approx(1.0 * 0.7 + 0.5 * 0.3)
    # Rows: f = 4 / 4 * [2, 1, 1, 0], so f' = [1.5, 0.5].
    assert float(device_loss(routing)) == pytest.approx(1.5 * 0.7 + 0.5 * 0.3)


def test_unequal_devices_count_the_mean_of_their_experts():
    routing = routing_of([[0], [1], [2]], [[0.2, 0.3, 0.5]] * 3, [0, 0, 1], 1)
    assert float(device_loss(routing)) == pytest.approx(1.0)
    assert float(communication_loss(routing)) == pytest.approx(2 / 3 * (2 * 0.5 + 1 * 0.5))


@every_loss
def test_each_is_one_at_perfect_balance(loss):
    """Reference 15.5, example 5."""
    expert_TK = [[0, 2], [1, 3], [4, 6], [5, 7]]
    routing = routing_of(expert_TK, [[1 / 8] * 8] * 4, [0, 0, 1, 1, 2, 2, 3, 3], 2)
    assert float(loss(routing)) == pytest.approx(1.0, abs=1e-12)


def test_communication_costs_less_where_tokens_visit_fewer_devices_than_they_may():
    routing = routing_of([[0, 1], [2, 3]], [[1 / 4] * 4] * 2, [0, 0, 1, 1], 2)
    assert float(communication_loss(routing)) == pytest.approx(0.5)


@every_loss
def test_sequences_are_averaged_and_those_of_padding_left_out(loss):
    first = ([[0], [1], [2]], [[0.5, 0.2, 0.2, 0.1]] * 3)
    second = ([[3], [3]], [[0.1, 0.1, 0.1, 0.7]] * 2)
    device_E = [0, 0, 1, 1]
    alone = [float(loss(routing_of(*part, device_E, 1))) for part in (first, second)]
    expert_TK, scores_TE = first[0] + second[0] + [[0]], first[1] + second[1] + [[0.25] * 4]
    valid_T = torch.tensor([True] * 5 + [False])
    both = routing_of(expert_TK, scores_TE, device_E, 1, sequence_T=torch.tensor([0, 0, 0, 1, 1, 2]), valid_T=valid_T)
    assert float(loss(both)) == pytest.approx(sum(alone) / 2)
    assert alone[0] != pytest.approx(alone[1], rel=0.1)


@every_loss
def test_the_gradient_flows_through_the_probabilities_alone(loss):
    router = TopKRouter(4, 8, top_k=2, groups=GroupLimit(num_groups=4, groups_kept=2, best_per_group=1)).double()
    torch.nn.init.normal_(router.weight)
    routing = router(torch.randn(30, 4, dtype=torch.float64))
    loss(routing).backward()
    assert router.weight.grad.abs().max() > 1e-4
    fixed = replace(routing, scores_TE=routing.scores_TE.detach(), logits_TE=routing.logits_TE.detach())
    assert not loss(fixed).requires_grad


@every_loss
def test_no_tokens_cost_nothing_and_stay_attached(loss):
    router = TopKRouter(4, 8, top_k=2, groups=GroupLimit(num_groups=4, groups_kept=2, best_per_group=1))
    value = loss(router(torch.zeros(0, 4)))
    assert value == 0
    value.backward()
    assert router.weight.grad.abs().sum() == 0


def test_with_one_expert_to_a_device_the_device_loss_is_the_expert_loss():
    router = TopKRouter(4, 6, top_k=2, groups=GroupLimit(num_groups=6, groups_kept=6, best_per_group=1)).double()
    routing = router(torch.randn(12, 4, dtype=torch.float64))
    routing = replace(routing, sequence_T=torch.arange(12) // 5)
    assert float(device_loss(routing).detach()) == pytest.approx(float(sequence_loss(routing).detach()))
    assert float(communication_loss(routing).detach()) == pytest.approx(float(sequence_loss(routing).detach()))


@pytest.mark.parametrize(
    ("reader", "who"),
    [(device_loss, "device_loss"), (communication_loss, "communication_loss"), (DeviceCapacity(), "DeviceCapacity")],
    ids=["device_loss", "communication_loss", "DeviceCapacity"],
)
def test_a_router_without_groups_does_not_say_where_experts_live(reader, who):
    with pytest.raises(ConfigError) as error:
        reader(TopKRouter(4, 8, top_k=2)(torch.zeros(3, 4)))
    assert str(error.value) == (
        f"{who} needs routing.extras['device_E'], which this routing does not have. It comes from a router with "
        "groups, such as TopKRouter(groups=GroupLimit(...)): use the two together, or another loss."
    )


@every_loss
def test_what_padding_chose_counts_for_no_device(loss):
    """The last token is padding, and the only one on device 1."""
    scores_TE = [[0.5, 0.3, 0.1, 0.1], [0.6, 0.2, 0.1, 0.1], [0.1, 0.1, 0.1, 0.7]]
    routing = routing_of([[0], [1], [3]], scores_TE, [0, 0, 1, 1], 1)
    routing = replace(routing, valid_T=torch.tensor([True, True, False]))
    assert float(loss(routing)) == pytest.approx(2 * 0.8)
