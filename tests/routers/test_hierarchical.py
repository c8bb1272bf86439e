import math

import pytest
import torch

from moesaic import ConfigError
from moesaic.balance import importance_cv2, load_cv2
from moesaic.core.init import normal
from moesaic.routers import HierarchicalRouter


def router_of(num_groups=4, per_group=3, width=5, std=0.7, **options) -> HierarchicalRouter:
    return HierarchicalRouter(width, num_groups, per_group, init=normal(std), noise_init=normal(std), **options)


def test_a_token_visits_two_groups_and_two_experts_in_each_at_the_product_of_their_weights():
    torch.manual_seed(0)
    router, x_TD = router_of().eval(), torch.randn(20, 5)
    routing = router(x_TD)
    assert router.experts_per_token == 4.0
    assert routing.expert_N.shape == (80,)
    groups = [set(line) for line in (routing.expert_N.view(20, 4) // 3).tolist()]
    assert {len(line) for line in groups} == {2}
    assert routing.weight_N.view(20, 4).sum(dim=-1).tolist() == pytest.approx([1.0] * 20)
    best_TG = (x_TD @ router.group_GD.t()).topk(2, dim=-1)
    for t in range(20):
        assert groups[t] == set(best_TG.indices[t].tolist())
        group_weight = dict(zip(best_TG.indices[t].tolist(), best_TG.values[t].softmax(dim=0).tolist(), strict=True))
        for g, share in group_weight.items():
            rows = [r for r in range(4 * t, 4 * t + 4) if int(routing.expert_N[r]) // 3 == g]
            assert sum(float(routing.weight_N[r].detach()) for r in rows) == pytest.approx(share)
            logits = x_TD[t] @ router.weight[3 * g : 3 * g + 3].t()
            assert {int(routing.expert_N[r]) - 3 * g for r in rows} == set(logits.topk(2).indices.tolist())


def test_probabilities_are_products_and_logits_their_logarithms_up_to_a_constant():
    torch.manual_seed(0)
    routing = router_of().eval()(torch.randn(9, 5))
    assert torch.allclose(routing.logits_TE.softmax(dim=-1), routing.scores_TE, atol=1e-6)
    assert routing.scores_TE.sum(dim=-1).tolist() == pytest.approx([1.0] * 9)


def test_in_evaluation_the_load_is_a_count():
    torch.manual_seed(0)
    routing = router_of().eval()(torch.randn(40, 5), torch.rand(40) > 0.3)
    assert routing.extras["smooth_load_E"].tolist() == pytest.approx(routing.load_E.tolist())


def test_the_load_reaches_both_gates_and_both_noises():
    """Reference 3.3: without the product the gate over groups would get no gradient."""
    torch.manual_seed(0)
    router = router_of()
    load_cv2(router(torch.randn(60, 5))).backward()
    for name, parameter in router.named_parameters():
        assert parameter.grad.abs().max() > 1e-5, name


def test_an_undecided_router_expects_the_same_load_everywhere():
    torch.manual_seed(1)
    routing = HierarchicalRouter(4, 4, 4)(torch.randn(8000, 4))
    assert routing.extras["smooth_load_E"].tolist() == pytest.approx([2000] * 16, rel=0.05)
    assert float(importance_cv2(routing).detach()) < 1e-2


def test_the_load_is_the_product_of_its_two_levels():
    """Reference 3.3, by hand: all tokens alike, and no noise to speak of, so that every P is 0 or 1."""
    router = HierarchicalRouter(1, 3, 3, init=normal(0), noise_init=normal(0))
    with torch.no_grad():
        router.group_GD.copy_(torch.tensor([[30.0], [20.0], [10.0]]))
        router.weight.copy_(torch.tensor([30.0, 20.0, 10.0, 10.0, 20.0, 30.0, 30.0, 20.0, 10.0])[:, None])
        router.group_noise_GD.fill_(-20.0)
        router.noise_ED.fill_(-20.0)
    routing = router(torch.ones(7, 1), torch.arange(7) < 5)
    assert routing.extras["smooth_load_E"].tolist() == pytest.approx([5, 5, 0, 0, 5, 5, 0, 0, 0], abs=1e-5)


def test_the_noise_of_groups_is_drawn_before_that_of_experts():
    router, x_TD = router_of(), torch.randn(9, 5)
    torch.manual_seed(3)
    router(x_TD)
    after = torch.get_rng_state()
    torch.manual_seed(3)
    torch.randn(9, 4), torch.randn(9, 12)
    assert torch.equal(torch.get_rng_state(), after)


def test_one_group_is_a_flat_gate():
    router = HierarchicalRouter(5, 1, 6, groups_per_token=1, init=normal(0.7)).eval()
    routing = router(torch.randn(9, 5))
    assert routing.num_rows == 18
    assert torch.allclose(routing.scores_TE, routing.logits_TE.softmax(dim=-1))


@pytest.mark.parametrize("value", [1e4, -1e4, 0.0])
@pytest.mark.parametrize(("num_tokens", "training"), [(0, True), (8, True), (8, False)])
def test_extreme_weights_give_numbers_and_numbers_as_gradients(value, num_tokens, training):
    router = router_of().train(training)
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.copy_(torch.randint(-1, 2, parameter.shape) * value)
    routing = router(torch.ones(num_tokens, 5))
    (load_cv2(routing) + importance_cv2(routing) + routing.weight_N.square().sum()).backward()
    assert routing.weight_N.isfinite().all()
    for name, parameter in router.named_parameters():
        assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"groups_per_token": 5},
            "groups_per_token must be between 1 and 4, got 5. Lower groups_per_token, or cut the experts otherwise.",
        ),
        (
            {"members_per_token": 0},
            "members_per_token must be between 1 and 3, got 0. Lower members_per_token, or cut the experts otherwise.",
        ),
        (
            {"groups_per_token": 1, "members_per_token": 1},
            "top_k=1 needs weights that depend on the router, got a softmax over 1 of 12 experts, which is always 1. "
            "Use top_k=2.",
        ),
        ({"noise_epsilon": -2.0}, "noise_epsilon must be at least 0, got -2.0. tensor2tensor uses 0.01."),
    ],
)
def test_a_router_that_cannot_be_is_refused(options, message):
    with pytest.raises(ConfigError) as error:
        router_of(**options)
    assert str(error.value) == message


def test_undecided_gates_start_with_noise_of_ln_2_at_both_levels():
    torch.manual_seed(1)
    router = HierarchicalRouter(4, 4, 4)
    assert all(parameter.abs().sum() == 0 for parameter in router.parameters())
    logs = router(torch.randn(20_000, 4)).scores_TE.detach().log().view(-1, 4, 4)
    within = logs - logs.mean(dim=-1, keepdim=True)
    assert float(within.std()) == pytest.approx(math.log(2) * math.sqrt(3 / 4), rel=0.01)
