"""Laws of routing, for every recipe: who is chosen, by what, and what never changes it."""

import math
from dataclasses import replace

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from moesaic import Routing, balance
from moesaic.routers import GroupLimit, TopKRouter
from moesaic.telemetry.summary import RoutingSummary
from tests.laws.settings import TOKEN_CHOICE, WIDTH, Setting, every_setting, gradients, rows, some_padding, tokens
from tests.oracle.router import in_best_groups
from tests.tolerances import assert_close

BIASED = [setting for setting in TOKEN_CHOICE if setting.layer().router.bias_E is not None]
GROUPED = [setting for setting in TOKEN_CHOICE if setting.layer().router.groups is not None]


def _counted(loss, routing: Routing) -> list[float]:
    """The share of rows that a loss takes each expert to have: losses are linear in the probabilities."""
    shares = []
    for e in range(routing.num_experts):
        all_on_e_TE = torch.zeros_like(routing.scores_TE)
        all_on_e_TE[:, e] = 1
        shares.append(float(loss(replace(routing, scores_TE=all_on_e_TE)).detach()) / routing.num_experts)
    return shares


@every_setting()
def test_the_rows_that_a_loss_counts_are_the_rows_that_dispatch_uses(setting):
    """Trap 1. Rows that capacity drops are counted, as GShard and Switch count them; dispatch got them all."""
    layer = setting.layer()
    _, routing = layer(tokens(40), some_padding(40))
    dropped_E = torch.zeros(setting.num_experts)
    dropped_E.index_add_(0, routing.expert_N, (routing.valid_N & ~routing.kept_N).float())
    got_E = layer.dispatch(routing).load_E + dropped_E
    counting = [term for term in setting.losses if term.loss is not balance.z_loss]
    assert counting
    for term in counting:
        assert _counted(term.loss, routing) == pytest.approx((got_E / got_E.sum()).tolist(), abs=1e-5)


@every_setting(*BIASED)
def test_a_second_top_k_over_the_logits_would_count_other_rows(setting):
    """Trap 1: the law above could not fail where bias and groups change nothing."""
    routing = setting.layer()(tokens(40))[1]
    again_TK = routing.logits_TE.topk(setting.top_k, dim=-1).indices
    assert set(enumerate(map(frozenset, again_TK.tolist()))) != set(
        enumerate(map(frozenset, routing.expert_N.view(40, -1).tolist()))
    )


def _check_padding_takes_nothing(setting: Setting) -> None:
    layer = setting.deterministic_layer()
    valid_T = some_padding(30)
    x_TD = tokens(30)
    x_TD[~valid_T] *= 100
    alone_TD, alone = layer(x_TD[valid_T])
    (alone_TD.square().sum() + setting.aux_loss(alone)).backward()
    alone_gradients = gradients(layer)
    layer.zero_grad()
    y_TD, routing = layer(x_TD, valid_T)
    (y_TD[valid_T].square().sum() + setting.aux_loss(routing)).backward()

    assert torch.equal(routing.load_E, alone.load_E), "load"
    assert torch.equal(routing.kept_N[routing.valid_N], alone.kept_N), "capacity"
    assert not routing.kept_N[~routing.valid_N].any(), "rows of padding are kept"
    assert_close(y_TD[valid_T], alone_TD, "outputs")
    for term in [*setting.losses, balance.LossTerm(name="z", loss=balance.z_loss, coefficient=1.0)]:
        assert_close(term.loss(routing), term.loss(alone), term.name)
    for name, gradient in gradients(layer).items():
        assert_close(gradient, alone_gradients[name], f"gradient of {name}", torch.bfloat16)
    summary, alone_summary = RoutingSummary.of(routing), RoutingSummary.of(alone)
    assert summary.num_tokens == alone_summary.num_tokens
    assert summary.entropy == pytest.approx(alone_summary.entropy)
    if layer.shared is None:
        assert y_TD[~valid_T].abs().sum() == 0, "padding was worked on"


@every_setting()
def test_padding_takes_no_capacity_no_load_no_expert_and_no_loss(setting):
    """Trap 2."""
    _check_padding_takes_nothing(setting)


@every_setting()
def test_the_padding_law_fails_when_padding_is_counted(setting, monkeypatch):
    """Trap 2, the mutant."""
    monkeypatch.setattr(Routing, "valid_N", property(lambda routing: torch.ones_like(routing.kept_N)))
    with pytest.raises(AssertionError, match="load"):
        _check_padding_takes_nothing(setting)


@every_setting(*BIASED)
def test_padding_does_not_move_a_bias(setting):
    """Trap 2."""
    valid_T = some_padding(30)
    x_TD = tokens(30)
    moved = []
    for batch in ((x_TD, valid_T), (x_TD[valid_T], None)):
        layer = setting.layer()
        layer.router.weight.data.copy_(torch.linspace(-1, 1, layer.router.weight.numel()).view_as(layer.router.weight))
        (rule,) = [term for term in setting.recipe.balance if isinstance(term, balance.BiasRule)]
        rule.build([layer])[0].step(layer(*batch)[1].load_E)
        moved.append(layer.router.bias_E)
    assert torch.equal(*moved)


@every_setting()
def test_evaluation_is_deterministic_and_draws_no_random_number(setting):
    """Trap 3."""
    layer = setting.layer().eval()
    x_TD = tokens(25)
    state = torch.get_rng_state()
    first_TD, first = layer(x_TD)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    again_TD, again = layer(x_TD)
    assert torch.equal(first_TD, again_TD)
    assert torch.equal(first.expert_N, again.expert_N)
    assert torch.equal(first.weight_N, again.weight_N)


@every_setting(*[setting for setting in TOKEN_CHOICE if setting.layer().router.jitter > 0])
def test_training_with_jitter_is_noisy_so_that_the_law_of_evaluation_can_fail(setting):
    """Trap 3."""
    layer = setting.layer()
    x_TD = tokens(25)
    assert not torch.equal(layer(x_TD)[1].logits_TE, layer(x_TD)[1].logits_TE)


@every_setting(*BIASED)
def test_selection_bias_moves_which_experts_are_chosen_and_never_the_weights(setting):
    """Trap 4."""
    router = setting.layer().router
    x_TD = tokens(25)
    favoured = list(range(setting.top_k))  # within one group, or within the groups kept
    router.bias_E.zero_()
    free = router(x_TD)
    router.bias_E[favoured] = 50.0
    some = router(x_TD)
    router.bias_E[favoured] = torch.linspace(90.0, 60.0, setting.top_k)
    other = router(x_TD)
    assert rows(some) == rows(other) == {(t, e) for t in range(25) for e in favoured}
    assert rows(free) != rows(some)
    weight_TE = []
    for routing in (some, other):
        dense_TE = torch.zeros(25, setting.num_experts)
        weight_TE.append(dense_TE.index_put((routing.token_N, routing.expert_N), routing.weight_N))
    assert_close(*weight_TE, "weights")
    assert torch.equal(some.scores_TE, free.scores_TE)
    assert not router.bias_E.requires_grad


def _check_groups(setting: Setting) -> None:
    router = setting.layer().router
    limit = router.groups
    router.bias_E -= 3.0  # every biased score is negative: a masked 0 would beat them all
    routing = router(tokens(200))
    allowed_TE = [
        in_best_groups(line, limit.num_groups, limit.groups_kept, limit.best_per_group)
        for line in (routing.scores_TE + router.bias_E).tolist()
    ]
    for token, expert in rows(routing):
        assert allowed_TE[token][expert] > -math.inf, "an expert outside the best groups was chosen"
    group_TK = (routing.expert_N // (setting.num_experts // limit.num_groups)).view(200, -1)
    assert max(len(set(line)) for line in group_TK.tolist()) <= limit.groups_kept


@every_setting(*GROUPED)
def test_no_token_leaves_its_groups_even_where_every_biased_score_is_negative(setting):
    """Trap 4; reference 15.5, example 4."""
    _check_groups(setting)


@every_setting(*GROUPED)
def test_the_group_law_fails_when_masked_experts_score_zero(setting, monkeypatch):
    """Trap 4, the mutant."""
    mask = GroupLimit.mask
    monkeypatch.setattr(GroupLimit, "mask", lambda limit, score_TE: mask(limit, score_TE).nan_to_num(neginf=0.0))
    with pytest.raises(AssertionError, match="outside the best groups"):
        _check_groups(setting)


@every_setting()
def test_ties_go_to_the_lowest_expert_and_room_to_the_earliest_token(setting):
    """Trap 5."""
    layer = setting.deterministic_layer()
    torch.nn.init.zeros_(layer.router.weight)
    if layer.router.bias_E is not None:
        layer.router.bias_E.zero_()
    _, routing = layer(tokens(30))
    assert routing.expert_N.view(30, -1).tolist() == [list(range(setting.top_k))] * 30
    kept_TK = routing.kept_N.view(30, -1)
    for k in range(setting.top_k):
        kept = kept_TK[:, k].tolist()
        assert kept == sorted(kept, reverse=True)
    assert kept_TK.all() or not setting.is_dropless


def _check_shrinking_gains_nothing(setting: Setting) -> None:
    routing = setting.layer().router(tokens(40))
    for term in setting.losses:
        if term.loss is balance.z_loss:
            continue
        value = term.loss(routing)
        for factor in (1e-5, 1e-15, 1e-25, 1e-35):
            shrunk = replace(routing, scores_TE=routing.scores_TE * factor)
            assert float(term.loss(shrunk)) == pytest.approx(float(value), rel=1e-4), f"{term.name} at {factor}"
        # Logits so low that every sigmoid is 0 in float32: the value stays at its limit, and the gradient finite.
        far = [term.loss(_at_logits(routing, routing.logits_TE - shift)) for shift in (60.0, 95.0, 200.0)]
        assert [float(loss) for loss in far] == pytest.approx([float(far[0])] * 3, rel=1e-3)


def _at_logits(routing: Routing, logits_TE: torch.Tensor) -> Routing:
    return replace(routing, logits_TE=logits_TE, scores_TE=logits_TE.sigmoid())


@every_setting()
@torch.no_grad()
def test_scaling_all_scores_down_does_not_lower_a_balance_loss(setting):
    """Trap 7."""
    _check_shrinking_gains_nothing(setting)


@every_setting()
@torch.no_grad()
def test_the_shrinking_law_fails_when_an_epsilon_is_added_to_the_sum(setting, monkeypatch):
    """Trap 7, the mutant: the 1e-20 of well-known code."""
    with_epsilon = property(lambda r: r.scores_TE / (r.scores_TE.sum(dim=-1, keepdim=True) + 1e-20))
    monkeypatch.setattr(Routing, "probability_TE", with_epsilon)
    with pytest.raises(AssertionError, match="at 1e-25"):
        _check_shrinking_gains_nothing(setting)


def test_the_gradient_of_a_loss_is_finite_and_alive_where_every_score_has_underflowed():
    """Trap 7."""
    logits_TE = (torch.randn(20, 4) - 300).requires_grad_()
    routing = Routing.from_choices(
        torch.zeros(20, 1, dtype=torch.int64), torch.ones(20, 1), logits_TE, logits_TE.sigmoid()
    )
    balance.switch_loss(routing).backward()
    assert logits_TE.grad.isfinite().all()
    assert logits_TE.grad.abs().max() > 1e-3
    assert logits_TE.grad.sum(dim=-1).abs().max() < 1e-6, "pushing all logits down together must gain nothing"


@every_setting()
def test_a_checkpointed_forward_routes_as_the_first_did_and_counts_nothing_twice(setting):
    """Trap 8."""
    layer = setting.layer(**({"jitter": 0.4} if "jitter" in setting.recipe.options else {}))
    x_TD = tokens(30).requires_grad_()
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    seen: list[Routing] = []
    layer.router.register_forward_hook(lambda _module, _inputs, routing: seen.append(routing))

    def run(*, recomputed: bool) -> list[torch.Tensor]:
        seen.clear()
        layer.zero_grad()
        x_TD.grad = None
        torch.manual_seed(7)
        y_TD, routing = checkpoint(layer, x_TD, use_reentrant=False) if recomputed else layer(x_TD)
        (y_TD.square().sum() + setting.aux_loss(routing)).backward()
        return [y_TD.detach(), x_TD.grad.clone(), *gradients(layer).values()]

    plain = run(recomputed=False)
    assert len(seen) == 1
    recomputed = run(recomputed=True)
    assert len(seen) == 2
    assert torch.equal(seen[0].expert_N, seen[1].expert_N)
    assert torch.equal(seen[0].logits_TE, seen[1].logits_TE)
    for ours, theirs in zip(recomputed, plain, strict=True):
        assert torch.equal(ours, theirs)
    assert all(torch.equal(before[name], value) for name, value in layer.state_dict().items())


def test_recompute_without_the_first_forward_s_random_state_would_route_otherwise():
    """Trap 8: jitter this wide changes choices, so the law above could fail."""
    router = TopKRouter(WIDTH, 8, top_k=2, jitter=0.4)
    x_TD = tokens(30)
    assert not torch.equal(router(x_TD).expert_N, router(x_TD).expert_N)
