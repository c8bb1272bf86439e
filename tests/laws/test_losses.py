"""Laws of losses and controllers, for every recipe."""

import itertools
import math
from dataclasses import replace

import pytest
import torch

from moesaic import Routing, balance
from moesaic.telemetry.summary import RoutingSummary
from tests.laws.settings import TOKEN_CHOICE, every_setting, some_padding, tokens
from tests.tolerances import assert_close

STEERED = [s for s in TOKEN_CHOICE if any(isinstance(term, balance.BiasRule) for term in s.recipe.balance)]


def _rule(setting) -> balance.BiasRule:
    return next(term for term in setting.recipe.balance if isinstance(term, balance.BiasRule))


def _part(routing: Routing, start: int, end: int) -> Routing:
    """The table of some of the tokens alone."""
    row_N = (routing.token_N >= start) & (routing.token_N < end)
    top_k = routing.num_rows // routing.num_tokens
    return Routing.from_choices(
        routing.expert_N[row_N].view(-1, top_k),
        routing.weight_N[row_N].view(-1, top_k),
        routing.logits_TE[start:end],
        routing.scores_TE[start:end],
        routing.valid_T[start:end],
    )


@every_setting(*[setting for setting in TOKEN_CHOICE if setting.top_k < setting.num_experts])
def test_every_loss_is_attached_to_the_router_s_weights(setting):
    """Trap 9. With K = E every load is equal and a balance loss has nothing to push."""
    assert setting.recipe.balance
    for term in setting.losses:
        layer = setting.layer()
        term(layer(tokens(40), some_padding(40))[1]).backward()
        assert layer.router.weight.grad.abs().max() > 1e-3 * term.coefficient, term.name
        assert all(p.grad is None for p in layer.experts.parameters())


@every_setting()
def test_z_loss_of_parts_weighted_by_their_tokens_is_that_of_the_whole(setting):
    """Trap 10, a loss per token: exact however the batch is cut."""
    whole = setting.layer().router(tokens(40), some_padding(40))
    for cuts in ([0, 20, 40], [0, 1, 7, 39, 40], [0, 0, 40]):
        parts = [_part(whole, start, end) for start, end in itertools.pairwise(cuts)]
        weighted = sum(balance.z_loss(part) * part.valid_T.sum() for part in parts) / whole.valid_T.sum()
        assert_close(weighted, balance.z_loss(whole), "z_loss")


@every_setting()
def test_switch_loss_is_the_statistic_of_exactly_the_tokens_it_is_given(setting):
    """Trap 10, a batch statistic: share of rows times mean probability, of these tokens and no others."""
    whole = setting.layer().router(tokens(40), some_padding(40))
    for routing in (whole, _part(whole, 0, 11), _part(whole, 11, 40)):
        share_E = routing.load_E / routing.load_E.sum()
        mean_E = routing.probability_TE[routing.valid_T].mean(dim=0)
        assert_close(balance.switch_loss(routing), setting.num_experts * (share_E * mean_E).sum(), "switch_loss")
    loads = [_part(whole, start, end).load_E for start, end in ((0, 11), (11, 40))]
    assert torch.equal(sum(loads), whole.load_E)


@every_setting()
def test_sequence_loss_is_the_mean_over_sequences_however_they_are_batched(setting):
    """Trap 10."""
    whole = setting.layer().router(tokens(40), torch.arange(40) % 10 < 7)
    whole = replace(whole, sequence_T=torch.arange(40) // 10)
    parts = [balance.switch_loss(_part(whole, start, start + 10)) for start in range(0, 40, 10)]
    assert_close(balance.sequence_loss(whole), torch.stack(parts).mean(), "sequence_loss")


@every_setting(*[setting for setting in TOKEN_CHOICE if setting.is_dropless])
def test_the_gradient_of_the_outputs_is_the_same_however_the_batch_is_cut(setting):
    """Trap 10. Capacity is a rule about one batch: there the law holds only where nothing is dropped."""
    layer = setting.deterministic_layer()
    x_TD = tokens(40)
    summed = []
    for size in (40, 10, 7):
        layer.zero_grad()
        for part_TD in x_TD.split(size):
            layer(part_TD)[0].square().sum().backward()
        summed.append([p.grad.clone() for p in layer.parameters()])
    for cut in summed[1:]:
        for ours, whole in zip(cut, summed[0], strict=True):
            assert_close(ours, whole, "gradient")


@every_setting()
def test_imbalance_in_one_layer_cannot_be_cancelled_by_another(setting):
    """Trap 11: two layers that each send everything to other experts look balanced when concatenated."""
    num_experts, top_k = setting.num_experts, setting.top_k
    halves = []
    for first in (0, num_experts // 2):
        expert_TK = (first + torch.arange(top_k)).remainder(num_experts).expand(10, -1)
        scores_TE = torch.full((10, num_experts), 1e-6).scatter(1, expert_TK, 1 / top_k)
        halves.append(Routing.from_choices(expert_TK, torch.ones(10, top_k), scores_TE.log(), scores_TE))
    for term in setting.losses:
        if term.loss is not balance.z_loss:
            summed = sum(float(term.loss(routing)) for routing in halves)
            assert summed == pytest.approx(2 * num_experts / top_k, rel=1e-3)


@every_setting()
def test_every_balance_loss_is_one_at_perfect_balance(setting):
    """Trap 12. Each expert has the same mean probability, whatever each token prefers."""
    num_experts = setting.num_experts
    layer = setting.layer(width=num_experts).double()
    with torch.no_grad():
        layer.router.weight.copy_(torch.eye(num_experts))
    layer.router.jitter = 0.0
    preference = torch.randn(num_experts, dtype=torch.float64)
    routing = layer.router(torch.stack([preference.roll(t) for t in range(num_experts)]))
    assert routing.probability_TE.std() > 0.03 / num_experts
    for term in setting.losses:
        if term.loss is balance.z_loss:
            continue
        assert float(term.loss(routing).detach()) == pytest.approx(1.0, abs=1e-12), term.name


def test_z_loss_of_undecided_routers_is_the_squared_logarithm_of_the_number_of_experts():
    """Trap 12."""
    zeros_TE = torch.zeros(5, 16)
    routing = Routing.from_choices(torch.zeros(5, 1, dtype=torch.int64), torch.ones(5, 1), zeros_TE, zeros_TE)
    assert float(balance.z_loss(routing)) == pytest.approx(math.log(16) ** 2)


@every_setting(*STEERED)
def test_a_controller_steps_in_float32_by_zero_mean_and_only_when_told(setting):
    """Trap 13."""
    layer = setting.layer().bfloat16()
    before_E = layer.router.bias_E.clone()
    controller = _rule(setting).build([layer])[0]
    for training in (True, False):
        _, routing = layer.train(training)(tokens(40, dtype=torch.bfloat16))
        assert torch.equal(layer.router.bias_E, before_E)
    controller.step(routing.load_E)
    assert layer.router.bias_E.dtype == torch.float32
    step_E = layer.router.bias_E - before_E
    assert 0.5e-3 < float(step_E.abs().max()) < 2e-3
    assert abs(float(step_E.double().mean())) < 1e-7


@every_setting(*STEERED)
def test_a_controller_steps_once_on_the_load_of_all_micro_batches(setting):
    """Trap 13: a step on the sum is not the sum of steps."""
    layer, x_TD = setting.layer(), tokens(60)
    before_E = layer.router.bias_E.clone()
    loads = [layer(part_TD)[1].load_E for part_TD in x_TD.split(20)]
    assert torch.equal(sum(loads), layer(x_TD)[1].load_E)
    once, thrice = [], []
    for steps, moved in (([sum(loads)], once), (loads, thrice)):
        layer.router.bias_E.copy_(before_E)
        for load_E in steps:
            _rule(setting).build([layer])[0].step(load_E)
        moved.append(layer.router.bias_E.clone())
    assert not torch.equal(once[0], thrice[0])


@every_setting(*STEERED)
def test_a_controller_s_bias_is_saved_and_restored_with_the_model(setting):
    """Trap 13."""
    layer = setting.layer()
    _rule(setting).build([layer])[0].step(torch.arange(setting.num_experts))
    other = setting.layer()
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.router.bias_E, layer.router.bias_E)
    _rule(setting).build([other])[0].step(torch.arange(setting.num_experts).flip(0))
    assert not torch.equal(other.router.bias_E, layer.router.bias_E)


@every_setting(*STEERED)
def test_a_controller_balances_a_lopsided_router(setting):
    """Trap 13: it steers, and not away."""
    layer = setting.layer()
    layer.router.bias_E.zero_()
    layer.router.weight.data[0] = layer.router.weight.data[0] * 0 + 1.0
    x_TD = tokens(200) + 1
    controller = balance.BiasController(layer.router, rate=0.02)
    before = RoutingSummary.of(layer(x_TD)[1]).load_max_over_mean
    for _ in range(100):
        controller.step(layer(x_TD)[1].load_E)
    after = RoutingSummary.of(layer(x_TD)[1]).load_max_over_mean
    assert before > 1.5
    assert after < 1 + (before - 1) / 3


@every_setting()
def test_dead_experts_count_in_every_mean(setting):
    """Trap 22."""
    num_experts, top_k = setting.num_experts, setting.top_k
    if num_experts == top_k:
        num_experts += 1
    expert_TK = torch.arange(top_k).expand(12, -1)  # the others are dead
    scores_TE = torch.full((12, num_experts), 1e-9).scatter(1, expert_TK, 1 / top_k)
    routing = Routing.from_choices(expert_TK, torch.ones(12, top_k), scores_TE.log(), scores_TE)
    assert routing.load_E.shape == (num_experts,)
    assert RoutingSummary.of(routing).load_max_over_mean == pytest.approx(num_experts / top_k)
    assert float(balance.switch_loss(routing)) == pytest.approx(num_experts / top_k)
    for rule in [term for term in setting.recipe.balance if isinstance(term, balance.BiasRule)]:
        layer = setting.layer(**({} if num_experts == setting.num_experts else {"num_experts": num_experts}))
        before_E = layer.router.bias_E.clone()
        rule.build([layer])[0].step(routing.load_E)
        step_E = layer.router.bias_E - before_E
        assert (step_E[:top_k] < 0).all()
        assert (step_E[top_k:] > 0).all()
