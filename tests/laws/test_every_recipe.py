"""The laws of the traps, each tried on every recipe that it can be tried on (see law.py)."""

from __future__ import annotations

import copy
import io
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moesaic import ConfigError, Context, MoELayer, recipes
from moesaic.telemetry.summary import RoutingSummary
from tests.laws.balanced import VALUE_AT_BALANCE, balanced, loss_name
from tests.laws.law import LAWS, NOT_FOR, every_recipe, why_not
from tests.laws.settings import WIDTH, Setting, context_for, gradients, some_padding, tokens
from tests.tolerances import assert_close

T = 40


def _run(setting: Setting, layer: MoELayer, x_TD: Tensor, valid_T: Tensor | None, context: Context, seed: int = 3):
    """Outputs, table, and the sum that a training step would go down; noise is the same for the same seed."""
    torch.manual_seed(seed)
    y_TD, routing = layer(x_TD, valid_T, context)
    probe_TD = torch.linspace(-1, 2, y_TD.numel(), dtype=y_TD.dtype).view_as(y_TD)
    if valid_T is not None:
        probe_TD = probe_TD * valid_T[:, None]
    return y_TD, routing, (y_TD * probe_TD).sum() + setting.aux_loss(routing)


def _select(context: Context, keep_T: Tensor) -> Context:
    """What is known of some of the tokens."""
    return Context(
        sequence_T=context.sequence_T[keep_T],
        id_T=context.id_T[keep_T],
        domain_T=context.domain_T[keep_T],
        below_TE=context.below_TE[keep_T],
    )


@every_recipe(1)
def test_the_rows_that_a_loss_counts_are_the_rows_that_dispatch_gets(setting):
    layer = setting.layer()
    for training in (True, False):
        _, routing = layer.train(training)(tokens(T), some_padding(T), context_for(T, setting))
        plan = layer.train(training).dispatch(routing)
        dropped_E = torch.bincount(routing.expert_N[routing.valid_N & ~plan.kept_N], minlength=setting.num_experts)
        assert torch.equal(routing.load_E, plan.load_E + dropped_E)
        assert torch.equal(routing.kept_N, plan.kept_N)


@every_recipe(2)
def test_what_padding_holds_changes_nothing(setting):
    """The tokens of padding get other vectors, ids and logits from below, a hundred times as large."""
    valid_T, context, x_TD = some_padding(T), context_for(T, setting), tokens(T)
    other_TD = torch.where(valid_T[:, None], x_TD, 100 * tokens(T))
    other = Context(
        sequence_T=context.sequence_T,
        id_T=torch.where(valid_T, context.id_T, context.id_T.flip(0)),
        domain_T=context.domain_T,
        below_TE=torch.where(valid_T[:, None], context.below_TE, 100 * context.below_TE),
    )
    for training in (True, False):
        layer, seen = setting.layer().train(training), []
        for batch_TD, known in ((x_TD, context), (other_TD, other)):
            layer.zero_grad()
            y_TD, routing, loss = _run(setting, layer, batch_TD, valid_T, known)
            if loss.requires_grad:
                loss.backward()
            kept_N = routing.kept_N
            assert not kept_N[~routing.valid_N].any(), "rows of padding are kept"
            kept = sorted(zip(routing.token_N[kept_N].tolist(), routing.expert_N[kept_N].tolist(), strict=True))
            losses = [float(term.loss(setting.rewarded(routing)).detach()) for term in setting.losses]
            seen.append((y_TD[valid_T].detach(), kept, routing.load_E.tolist(), losses, gradients(layer)))
        (y_TD, kept, load, losses, grads), (other_y_TD, other_kept, other_load, other_losses, other_grads) = seen
        assert_close(other_y_TD, y_TD, "outputs")
        assert other_kept == kept
        assert other_load == load
        assert other_losses == pytest.approx(losses, rel=1e-5)
        for name, gradient in grads.items():
            if gradient is not None:
                assert_close(other_grads[name], gradient, f"gradient of {name}")


@every_recipe(2)
def test_padding_may_as_well_not_be_there(setting):
    """In evaluation, where no noise depends on the shape of the batch: the valid tokens alone give the same."""
    layer = setting.layer().double().eval()
    x_TD, context = tokens(T, dtype=torch.float64), context_for(T, setting)
    valid_T = torch.arange(T) % 5 < 3  # the last two of each sequence
    y_TD, routing, _ = _run(setting, layer, x_TD, valid_T, context)
    alone_TD, alone, _ = _run(setting, layer, x_TD[valid_T], None, _select(context, valid_T))
    assert torch.equal(routing.load_E, alone.load_E)
    assert int(routing.kept_N.sum()) == int(alone.kept_N.sum())
    assert_close(y_TD[valid_T], alone_TD, "outputs")
    for term in setting.losses:
        if not term.rewarded:  # the rewards that tests give are those of places in the batch
            assert_close(term.loss(routing), term.loss(alone), term.name)


@every_recipe(3)
def test_evaluation_is_deterministic_and_draws_no_random_number(setting):
    layer, x_TD, context = setting.layer().eval(), tokens(T), context_for(T, setting)
    before = torch.get_rng_state()
    first_TD, first = layer(x_TD, None, context)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    again_TD, again = layer(x_TD, None, context)
    assert torch.equal(first_TD, again_TD)
    assert torch.equal(first.expert_N, again.expert_N)
    assert torch.equal(first.weight_N, again.weight_N)


@every_recipe(4)
def test_a_selection_bias_moves_choices_and_never_weights(setting):
    layer, x_TD, context = setting.layer().eval(), tokens(T), context_for(T, setting)
    layer.router.add_selection_bias()
    favoured = list(range(setting.top_k))
    dense = []
    for lift in (torch.full((setting.top_k,), 50.0), torch.linspace(90.0, 60.0, setting.top_k)):
        layer.router.bias_E.zero_()
        layer.router.bias_E[favoured] = lift
        _, routing = layer(x_TD, None, context)
        assert set(routing.expert_N.tolist()) == set(favoured)
        weight_TE = torch.zeros(T, setting.num_experts)
        dense.append(weight_TE.index_put((routing.token_N, routing.expert_N), routing.weight_N))
    assert_close(*dense, "weights")


@every_recipe(5)
def test_ties_break_the_same_way_every_time(setting):
    """All tokens alike, so that whoever chooses among tokens or experts has nothing to go by."""
    layer = setting.layer().eval()
    x_TD = torch.zeros(T, WIDTH)
    context = Context(
        sequence_T=torch.zeros(T, dtype=torch.int64),
        id_T=torch.zeros(T, dtype=torch.int64),
        domain_T=torch.zeros(T, dtype=torch.int64),
        below_TE=torch.zeros(T, setting.num_experts),
    )
    tables = [layer(x_TD, None, context)[1] for _ in range(3)]
    for table in tables[1:]:
        assert torch.equal(table.expert_N, tables[0].expert_N)
        assert torch.equal(table.kept_N, tables[0].kept_N)
    first = tables[0]
    for expert in range(setting.num_experts):  # whoever does not take all alike takes the earliest
        taken = sorted(first.token_N[(first.expert_N == expert) & first.kept_N].tolist())
        assert taken == list(range(len(taken)))
    tied = first.logits_TE.std(dim=-1) == 0
    for token in first.token_N[tied[first.token_N]].unique().tolist():
        chosen = sorted(first.expert_N[first.token_N == token].tolist())
        assert chosen == list(range(len(chosen))), "a tie did not go to the lowest expert"


@every_recipe(6)
def test_one_choice_trains_the_router_or_is_refused(setting):
    options = {"top_k": 1} if "top_k" in setting.recipe.options else {}
    try:
        layer = setting.layer(**options)
    except ConfigError as error:
        assert "top_k" in str(error)  # noqa: PT017
        return
    x_TD, valid_T = tokens(T), some_padding(T)
    _, _, loss = _run(setting, layer, x_TD, valid_T, context_for(T, setting))
    learnt = {name: p for name, p in layer.named_parameters() if _is_router(name) and p.requires_grad}
    assert learnt
    loss.backward()
    assert max(float(p.grad.abs().max()) for p in learnt.values()) > 1e-6


def _is_router(name: str) -> bool:
    return not name.startswith(("experts.", "shared.", "after."))


@every_recipe(7)
@torch.no_grad()
def test_scaling_all_scores_down_lowers_no_balance_loss(setting):
    layer = setting.layer()
    _, routing = layer(tokens(T), None, context_for(T, setting))
    routing = setting.rewarded(routing)
    for term in setting.losses:
        value = float(term.loss(routing))
        for factor in (1e-5, 1e-20, 1e-35):
            shrunk = replace(routing, scores_TE=routing.scores_TE * factor)
            assert float(term.loss(shrunk)) >= value - 1e-4 * abs(value), f"{term.name} at {factor}"


@every_recipe(8)
def test_a_recomputed_forward_routes_as_the_first_did_and_counts_nothing_twice(setting):
    layer, x_TD, context = setting.layer(), tokens(T).requires_grad_(), context_for(T, setting)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    results = []
    for recompute in (False, True):
        layer.zero_grad()
        x_TD.grad = None
        torch.manual_seed(7)
        if recompute:
            y_TD, routing = checkpoint(layer, x_TD, None, context, use_reentrant=False)
        else:
            y_TD, routing = layer(x_TD, None, context)
        (y_TD.square().sum() + setting.aux_loss(routing)).backward()
        results.append([y_TD.detach(), x_TD.grad.clone(), *gradients(layer).values()])
    for ours, theirs in zip(*results, strict=True):
        assert (ours is None) == (theirs is None)
        assert ours is None or torch.equal(ours, theirs)
    assert all(torch.equal(before[name], value) for name, value in layer.state_dict().items())


@every_recipe(9)
def test_every_loss_reaches_the_router_s_weights(setting):
    for term in setting.losses:
        layer = setting.layer()
        _, routing = layer(tokens(T), some_padding(T), context_for(T, setting))
        term.loss(setting.rewarded(routing)).backward()
        reached = {n: p.grad for n, p in layer.named_parameters() if p.grad is not None and p.grad.abs().max() > 1e-6}
        assert any(_is_router(name) for name in reached), term.name


@every_recipe(10)
def test_the_gradient_is_the_same_however_the_batch_is_cut(setting):
    """Between sequences, in evaluation mode, where neither noise nor a rule for training looks at the whole batch."""
    layer, x_TD, context = setting.layer().double().eval(), tokens(T, dtype=torch.float64), context_for(T, setting)
    summed = []
    for size in (T, 20, 5):
        layer.zero_grad()
        for start in range(0, T, size):
            part_T = (torch.arange(T) >= start) & (torch.arange(T) < start + size)
            layer(x_TD[part_T], None, _select(context, part_T))[0].square().sum().backward()
        summed.append(gradients(layer))
    for cut in summed[1:]:
        for name, gradient in summed[0].items():
            if gradient is not None:
                assert_close(cut[name], gradient, name)


@every_recipe(11)
def test_a_layer_s_loss_knows_that_layer_alone(setting):
    """The loss of one layer is the same whatever another layer did in between, and losses of layers add up."""
    layers, context = [setting.layer(), setting.layer()], context_for(T, setting)
    x_TD = tokens(T)
    tables = []
    for layer in layers:
        torch.manual_seed(5)
        tables.append(setting.rewarded(layer(x_TD, None, context)[1]))
    for term in setting.losses:
        alone = [float(term(table).detach()) for table in tables]
        together = sum(term(table) for table in tables)
        assert float(together.detach()) == pytest.approx(sum(alone))
        assert [float(term(table).detach()) for table in reversed(tables)] == alone[::-1]
        assert alone[0] != alone[1]


@every_recipe(12)
def test_each_loss_has_the_value_at_balance_that_it_states(setting):
    for term in setting.losses:
        expected = VALUE_AT_BALANCE[loss_name(term)]
        routing = balanced(num_experts=8, top_k=2)
        if callable(expected):
            expected = expected(8, 2)
        if expected is None:
            continue
        assert float(term.loss(routing)) == pytest.approx(expected, abs=1e-6), term.name


@every_recipe(13)
def test_controllers_step_once_in_float32_and_are_saved(setting):
    layer, context = setting.layer().bfloat16(), context_for(T, setting)
    before = copy.deepcopy(layer.state_dict())
    for training in (True, False):
        layer.train(training)(tokens(T, dtype=torch.bfloat16), None, context)
        assert all(torch.equal(before[name], value) for name, value in layer.state_dict().items())
    for rule in setting.recipe.rules:
        for controller in rule.build([layer]):
            load_E = torch.arange(setting.num_experts) * 100 + 100
            controller.step(load_E, kept_E=load_E * 98 // 100, num_tokens=T)
    moved = [name for name, value in layer.state_dict().items() if not torch.equal(before[name], value)]
    assert moved
    assert all(not layer.state_dict()[name].requires_grad for name in moved)
    assert {layer.state_dict()[name].dtype for name in moved} <= {torch.float32, torch.int64, torch.float64}
    other = setting.layer().bfloat16()
    other.load_state_dict(layer.state_dict())
    assert all(torch.equal(other.state_dict()[name], layer.state_dict()[name]) for name in moved)


@every_recipe(14)
def test_dropped_rows_are_known_one_by_one_and_reported(setting):
    """Everything goes to one expert, so that some rows must go; the oracle says which (tests/oracle)."""
    layer, x_TD, context = setting.layer(), tokens(1, WIDTH).expand(200, -1).clone(), context_for(200, setting)
    y_TD, routing = layer(x_TD, None, context)
    dropped_N = routing.valid_N & ~routing.kept_N
    assert dropped_N.any()
    assert RoutingSummary.of(routing).drop_rate == pytest.approx(int(dropped_N.sum()) / int(routing.valid_N.sum()))
    reached_T = torch.zeros(200, dtype=torch.bool).index_put((routing.token_N[routing.kept_N],), torch.tensor(True))
    every = torch.zeros_like(y_TD)
    if layer.shared is not None:
        every = layer.shared(x_TD)
    if layer.after is not None:
        every = every + layer.after(x_TD + every)
    if (~reached_T).any():
        assert_close(y_TD[~reached_T], every[~reached_T], "outputs of tokens that lost all their rows")


@pytest.mark.parametrize("num_tokens", [0, 1])
@every_recipe(15)
def test_an_idle_expert_has_zero_gradients_and_not_none(setting, num_tokens):
    layer, x_TD = setting.layer(), tokens(num_tokens).requires_grad_()
    y_TD, routing = layer(x_TD, None, context_for(num_tokens, setting))
    (y_TD.sum() + setting.aux_loss(routing)).backward()
    for name, parameter in layer.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
    assert x_TD.grad.shape == (num_tokens, WIDTH)


@every_recipe(16)
def test_indices_are_64_bits_wide(setting):
    _, routing = setting.layer()(tokens(T), None, context_for(T, setting))
    for name in ("expert_N", "token_N", "choice_N", "load_E"):
        assert getattr(routing, name).dtype == torch.int64, name


@every_recipe(17)
def test_sums_are_deterministic_bit_by_bit(setting):
    layer, x_TD, context = setting.layer(), tokens(60).requires_grad_(), context_for(60, setting)
    results = []
    for _ in range(3):
        layer.zero_grad()
        x_TD.grad = None
        y_TD, _, loss = _run(setting, layer, x_TD, None, context)
        loss.backward()
        results.append([y_TD.detach(), x_TD.grad, *(g for g in gradients(layer).values() if g is not None)])
    for again in results[1:]:
        assert all(torch.equal(ours, first) for ours, first in zip(again, results[0], strict=True))


@every_recipe(18)
def test_a_state_dict_is_used_up_exactly_or_refused(setting):
    layer, context, x_TD = setting.layer(), context_for(T, setting), tokens(T)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    torch.manual_seed(1)
    other = setting.layer()
    other.load_state_dict(state)
    assert torch.equal(other.eval()(x_TD, None, context)[0], layer.eval()(x_TD, None, context)[0])
    for name in state:
        with pytest.raises(RuntimeError, match="Missing key"):
            setting.layer().load_state_dict({key: value for key, value in state.items() if key != name})


@every_recipe(20)
def test_training_resumes_bit_by_bit(setting):
    def start():
        torch.manual_seed(2)
        layer = setting.layer()
        learnt = [p for p in layer.parameters() if p.requires_grad]
        return layer, torch.optim.AdamW(learnt, lr=1e-2), [c for r in setting.recipe.rules for c in r.build([layer])]

    batches = [(tokens(T), context_for(T, setting)) for _ in range(4)]

    def steps(layer, optimizer, controllers, some):
        for x_TD, context in some:
            optimizer.zero_grad()
            y_TD, routing = layer(x_TD, None, context)
            (y_TD.square().mean() + setting.aux_loss(routing)).backward()
            optimizer.step()
            kept_E = torch.bincount(routing.expert_N[routing.kept_N], minlength=setting.num_experts)
            for controller in controllers:
                controller.step(routing.load_E, kept_E=kept_E, num_tokens=T)

    whole = start()
    steps(*whole, batches[:2])
    saved, saved_optimizer, noise = (
        copy.deepcopy(whole[0].state_dict()),
        copy.deepcopy(whole[1].state_dict()),
        torch.get_rng_state(),
    )
    steps(*whole, batches[2:])
    resumed = start()
    resumed[0].load_state_dict(saved)
    resumed[1].load_state_dict(saved_optimizer)
    torch.set_rng_state(noise)
    steps(*resumed, batches[2:])
    for name, value in whole[0].state_dict().items():
        assert torch.equal(resumed[0].state_dict()[name], value), name


@every_recipe(21)
def test_statistics_come_from_the_router_s_own_rows(setting):
    layer, valid_T = setting.layer(), some_padding(T)
    _, routing = layer(tokens(T), valid_T, context_for(T, setting))
    counted_E = torch.bincount(routing.expert_N[valid_T[routing.token_N]], minlength=setting.num_experts)
    summary = RoutingSummary.of(routing)
    assert torch.equal(summary.load_E, counted_E)
    assert torch.equal(routing.load_E, counted_E)
    assert int(summary.num_tokens) == int(valid_T.sum())


@every_recipe(22)
def test_dead_experts_count_in_every_mean(setting):
    """One token cannot keep eight experts busy, unless the design sends it to all."""
    _, routing = setting.layer().eval()(tokens(1), None, context_for(1, setting))
    busy = len(set(routing.expert_N[routing.valid_N].tolist()))
    summary = RoutingSummary.of(routing)
    assert summary.load_E.shape == (setting.num_experts,)
    if busy:
        assert summary.load_max_over_mean == pytest.approx(setting.num_experts / busy)


@every_recipe(23)
def test_two_layers_used_in_turns_do_not_know_of_each_other(setting):
    first, second = setting.layer().eval(), setting.layer().eval()
    batches = [(tokens(n), None, context_for(n, setting)) for n in (9, 17)]
    alone = [[layer(*batch)[0] for batch in batches] for layer in (first, second)]
    in_turns = [[layer(*batch)[0] for layer in (first, second)] for batch in batches]
    for i in range(2):
        for j in range(2):
            assert torch.equal(alone[i][j], in_turns[j][i])


def test_every_reason_why_a_law_does_not_apply_is_about_a_recipe_that_exists():
    assert set(NOT_FOR) <= set(LAWS)
    for law, reasons in NOT_FOR.items():
        assert set(reasons) <= set(recipes.names()), law
    assert why_not(2, recipes.get("switch")) == ""


def test_every_loss_of_every_recipe_has_a_stated_value_at_balance():
    used = {loss_name(term) for name in recipes.names() for term in recipes.get(name).losses}
    assert used <= set(VALUE_AT_BALANCE)
    assert VALUE_AT_BALANCE["z_loss"](8, 2) == pytest.approx(math.log(8) ** 2)
