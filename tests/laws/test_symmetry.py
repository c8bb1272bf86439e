"""Laws before examples (house style, rule 14), for every recipe: symmetries, limits, and there-and-back."""

import copy
import io
import itertools
import pickle
from dataclasses import replace

import pytest
import torch
from torch.utils import _pytree as pytree

from moesaic import MoELayer, Routing
from moesaic.dispatch import Capacity, Sort
from tests.laws.settings import (
    TOKEN_CHOICE,
    TOKEN_CHOICE_NAMES,
    Setting,
    every_setting,
    gradients,
    rows,
    some_padding,
    tokens,
)
from tests.tolerances import assert_close


@every_setting()
def test_loads_sum_to_the_valid_rows(setting):
    for valid_T in (None, some_padding(40), torch.zeros(40, dtype=torch.bool)):
        layer = setting.layer()
        _, routing = layer(tokens(40), valid_T)
        num_valid = 40 if valid_T is None else int(valid_T.sum())
        assert int(routing.load_E.sum()) == num_valid * setting.top_k == int(routing.valid_N.sum())
        plan = layer.dispatch(routing)
        assert int(plan.load_E.sum()) == int(plan.offset_E[-1]) == int(routing.kept_N.sum())
        assert torch.equal(plan.kept_N, routing.kept_N)
        assert sorted(plan.row_N.tolist()) == list(range(40 * setting.top_k))
        sorted_N = routing.expert_N[plan.row_N][: plan.offset_E[-1]]
        assert sorted_N.tolist() == sorted(sorted_N.tolist())


@every_setting(*[setting for setting in TOKEN_CHOICE if setting.is_dropless])
def test_permuting_tokens_permutes_outputs(setting):
    layer, x_TD, valid_T = setting.deterministic_layer().double(), tokens(40, dtype=torch.float64), some_padding(40)
    order_T = torch.randperm(40)
    y_TD, routing = layer(x_TD, valid_T)
    moved_TD, moved = layer(x_TD[order_T], valid_T[order_T])
    assert_close(moved_TD, y_TD[order_T], "outputs")
    assert torch.equal(moved.load_E, routing.load_E)
    assert rows(routing) == {(int(order_T[t]), e) for t, e in rows(moved)}


@every_setting(*[setting for setting in TOKEN_CHOICE if not setting.is_dropless])
def test_permuting_tokens_under_a_capacity_changes_only_who_is_dropped(setting):
    layer, x_TD = setting.deterministic_layer().double(), tokens(60, dtype=torch.float64)
    order_T = torch.randperm(60)
    _, routing = layer(x_TD)
    _, moved = layer(x_TD[order_T])
    back_T = order_T.argsort()
    assert torch.equal(routing.expert_N.view(60, -1), moved.expert_N.view(60, -1)[back_T])
    assert torch.equal(layer.dispatch(routing).load_E, layer.dispatch(moved).load_E)
    layer = setting.layer(capacity_factor=0.25, min_capacity=1)
    kept_N, moved_N = layer(x_TD.float())[1].kept_N, layer(x_TD[order_T].float())[1].kept_N
    assert not torch.equal(kept_N.view(60, -1), moved_N.view(60, -1)[back_T])


def _renamed(layer: MoELayer, order: list[int]) -> MoELayer:
    """The same layer, its experts in another order."""
    renamed = copy.deepcopy(layer)
    with torch.no_grad():
        for parameter in (renamed.router.weight, *renamed.experts.parameters()):
            parameter.copy_(parameter[order])
        if renamed.router.bias_E is not None:
            renamed.router.bias_E.copy_(renamed.router.bias_E[order])
    return renamed


def _an_order(setting) -> list[int]:
    """Any order of experts; whole groups, and experts within their groups, where there are groups."""
    groups = setting.layer().router.groups
    num_groups = 1 if groups is None else groups.num_groups
    size = setting.num_experts // num_groups
    return [g * size + e for g in torch.randperm(num_groups).tolist() for e in torch.randperm(size).tolist()]


@every_setting()
def test_renaming_experts_changes_nothing(setting):
    layer, x_TD = setting.deterministic_layer().double(), tokens(40, dtype=torch.float64)
    order = _an_order(setting)
    renamed = _renamed(layer, order)
    y_TD, routing = layer(x_TD)
    renamed_TD, other = renamed(x_TD)
    assert_close(renamed_TD, y_TD, "outputs")
    assert [order[e] for e in other.expert_N.tolist()] == routing.expert_N.tolist()
    assert torch.equal(other.load_E, routing.load_E[order])
    for term in setting.losses:
        assert_close(term(other), term(routing), term.name)
    (y_TD.square().sum() + setting.aux_loss(routing)).backward()
    (renamed_TD.square().sum() + setting.aux_loss(other)).backward()
    assert_close(renamed.router.weight.grad, layer.router.weight.grad[order], "gradient of the router")


@pytest.mark.parametrize("name", TOKEN_CHOICE_NAMES)
def test_choosing_every_expert_is_the_dense_mixture(name):
    layer = Setting(name, {"num_experts": 5, "top_k": 5}).layer().double().eval()
    x_TD = tokens(20, dtype=torch.float64)
    y_TD, routing = layer(x_TD)
    experts, act = layer.experts, layer.experts.activation.forward
    up_TEF = torch.einsum("td,edf->tef", x_TD, experts.up_EDF)
    gate = getattr(experts, "gate_EDF", None)
    hidden_TEF = act(up_TEF) if gate is None else act(torch.einsum("td,edf->tef", x_TD, gate)) * up_TEF
    out_TED = torch.einsum("tef,efd->ted", hidden_TEF, experts.down_EFD)
    weight_TE = torch.zeros(20, 5, dtype=torch.float64)
    weight_TE = weight_TE.index_put((routing.token_N, routing.expert_N), routing.weight_N)
    total_T1 = routing.scores_TE.sum(dim=-1, keepdim=True)
    assert_close(weight_TE, layer.router.scale * routing.scores_TE / total_T1, "weights")
    dense_TD = (weight_TE[:, :, None] * out_TED).sum(dim=1)
    if layer.shared is not None:
        dense_TD = dense_TD + layer.shared(x_TD)
    assert_close(y_TD, dense_TD, "outputs")


@every_setting()
def test_a_capacity_of_all_tokens_is_the_same_as_no_capacity(setting):
    layer = setting.deterministic_layer()
    x_TD, valid_T = tokens(40), some_padding(40)
    results = []
    for dispatch in (Sort(), Capacity(1.0, minimum=40), Capacity(1.0, minimum=40, drop="score")):
        layer.dispatch = dispatch
        layer.zero_grad()
        y_TD, routing = layer(x_TD, valid_T)
        y_TD.square().sum().backward()
        results.append([y_TD.detach(), routing.kept_N, *gradients(layer).values()])
    for capped in results[1:]:
        assert all(torch.equal(ours, free) for ours, free in zip(capped, results[0], strict=True))


@every_setting()
def test_a_state_dict_goes_there_and_back_bitwise(setting):
    layer = setting.layer()
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    torch.manual_seed(1)
    other = setting.layer()
    assert not torch.equal(other.router.weight, layer.router.weight)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert list(other.state_dict()) == list(layer.state_dict())
    for name, value in layer.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name
    x_TD = tokens(30)
    assert torch.equal(other.eval()(x_TD)[0], layer.eval()(x_TD)[0])


@every_setting()
def test_a_layer_copied_or_pickled_is_the_same_layer(setting):
    layer = setting.layer().eval()
    x_TD = tokens(30)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x_TD)[0], layer(x_TD)[0])


@every_setting()
def test_a_routing_survives_flattening_mapping_and_unflattening_as_a_pytree(setting):
    _, routing = setting.layer()(tokens(20), some_padding(20))
    for table in (routing, replace(routing, sequence_T=torch.arange(20) // 5)):
        leaves, spec = pytree.tree_flatten(table)
        again = pytree.tree_unflatten(leaves, spec)
        assert isinstance(again, Routing)
        for name in Routing.__slots__:
            ours, theirs = getattr(again, name), getattr(table, name)
            assert ours == theirs if isinstance(theirs, dict) else ours is theirs, name
        detached = pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, table)
        assert isinstance(detached, Routing)
        assert not detached.weight_N.requires_grad
        assert torch.equal(detached.expert_N, table.expert_N)


# What a token's weights add up to: reference, section 24. "below" is below 1 unless every expert is chosen.
WEIGHTS_ADD_UP_TO = {
    **dict.fromkeys(("switch", "residual-moe", "pr-moe", "deepseek-moe", "grok-1"), "below"),
    **dict.fromkeys(("qwen1.5-moe", "jamba", "olmoe", "openmoe"), "below"),
    **dict.fromkeys(("mixtral", "dbrx", "arctic", "minimax-01", "qwen3-moe"), 1.0),
    "deepseek-v3": 2.5,
}


def test_what_weights_add_up_to_is_written_down_for_every_recipe():
    assert sorted(WEIGHTS_ADD_UP_TO) == sorted(TOKEN_CHOICE_NAMES)


@every_setting()
def test_weights_add_up_to_what_the_recipe_published(setting):
    layer = setting.layer().double()
    sum_T = layer(tokens(40, dtype=torch.float64))[1].weight_N.detach().view(40, -1).sum(dim=-1)
    expected = WEIGHTS_ADD_UP_TO[setting.recipe_name]
    if expected == "below":
        assert (sum_T < 1).all()
        assert (sum_T > 0).all()
        assert sum_T.std() > 0.01
    else:
        expected = setting.options.get("scale", expected)
        assert sum_T.tolist() == pytest.approx([expected] * 40, abs=1e-12)


@every_setting(*[setting for setting in TOKEN_CHOICE if setting.is_dropless])
def test_a_token_s_output_depends_on_no_other_token(setting):
    """Reference, section 24: token choice without capacity is causal."""
    layer, x_TD = setting.deterministic_layer().double(), tokens(20, dtype=torch.float64)
    y_TD, _ = layer(x_TD)
    other_TD = x_TD.clone()
    other_TD[13] += 5
    moved_TD, _ = layer(other_TD)
    same_T = torch.arange(20) != 13
    assert_close(moved_TD[same_T], y_TD[same_T], "outputs of the other tokens")
    assert (moved_TD[13] - y_TD[13]).abs().max() > 0.1


@every_setting()
def test_two_layers_used_in_turns_do_not_know_of_each_other(setting):
    """Trap 23: no state is shared."""
    first, second = setting.layer().eval(), setting.layer().eval()
    batches = [tokens(9), tokens(17)]
    alone = [[layer(x_TD)[0] for x_TD in batches] for layer in (first, second)]
    in_turns = [[layer(x_TD)[0] for layer in (first, second)] for x_TD in batches]
    for i, j in itertools.product(range(2), range(2)):
        assert torch.equal(alone[i][j], in_turns[j][i])
