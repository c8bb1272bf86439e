"""A layer in one call of C: what its steps give, and only where nobody needs the steps."""

import copy
import pickle
import warnings
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

import moesaic.layer as layer_module
from moesaic import ConfigError, Context, MoELayer, Routing, ShapeError
from moesaic.dispatch import Capacity
from moesaic.experts import GatedExperts, MLPExperts, SharedExpert
from moesaic.kernels.activations import gelu, relu, silu
from moesaic.kernels.native import build as build_module
from moesaic.kernels.whole_layer import ExpertStacks, TopKChoice, whole_layer
from moesaic.routers import GroupLimit, TopKRouter, sigmoid, softmax
from moesaic.routers.scores import Score
from tests.laws.settings import SETTINGS, context_for, tokens
from tests.oracle import experts as expert_oracle
from tests.oracle import router as router_oracle
from tests.tolerances import assert_close

D, E, F, K = 40, 7, 24, 3
FIELDS = ("expert_N", "token_N", "choice_N", "valid_T", "kept_N", "weight_N", "logits_TE", "scores_TE")


@pytest.fixture
def calls_of_c(compiled, monkeypatch) -> list[bool]:
    """Whether each call of a layer that came so far was one call of C."""
    found = []

    def watched(*arguments):
        answer = whole_layer(*arguments)
        found.append(answer is not None)
        return answer

    monkeypatch.setattr(layer_module, "whole_layer", watched)
    return found


def build(*, experts=None, dispatch=None, **router) -> MoELayer:
    experts = experts or GatedExperts(E, D, F)
    layer = MoELayer(TopKRouter(D, E, **{"top_k": K, **router}), experts, dispatch=dispatch)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
        if layer.router.bias_E is not None:
            layer.router.bias_E.copy_(torch.randn(E) * 0.2)
    return layer.eval()


def both(layer: MoELayer, x_TD, valid_T=None, context=None):
    """What a layer gives in one call and what it gives in steps, which it takes in training."""
    context = context or Context()
    with torch.no_grad():
        in_one = layer.eval()(x_TD, valid_T, context)
        in_steps = layer.train()(x_TD, valid_T, context)
    layer.eval()
    return in_one, in_steps


def assert_same(in_one, in_steps, dtype) -> None:
    (y_TD, routing), (expected_TD, expected) = in_one, in_steps
    assert (y_TD.dtype, y_TD.shape) == (dtype, expected_TD.shape)
    torch.testing.assert_close(y_TD, expected_TD, rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)
    for name in FIELDS:
        mine, theirs = getattr(routing, name), getattr(expected, name)
        assert (mine.dtype, mine.shape) == (theirs.dtype, theirs.shape), name
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6, msg=name)
    assert routing.sequence_T is expected.sequence_T
    assert routing.extras == expected.extras == {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("score", [softmax, sigmoid], ids=lambda one: one.name)
@pytest.mark.parametrize("normalize", ["scores", "chosen", "logits"])
@pytest.mark.parametrize("biases", [(False, False), (True, False), (False, True), (True, True)], ids=str)
def test_it_is_what_the_steps_give(calls_of_c, dtype, score, normalize, biases):
    selection_bias, logit_bias = biases
    options = {"selection_bias": selection_bias, "logit_bias": logit_bias, "scale": 2.5}
    layer = build(score=score, normalize=normalize, **options).to(dtype)
    assert_same(*both(layer, torch.randn(4, D).to(dtype)), dtype)
    assert calls_of_c == [True]


@pytest.mark.parametrize("experts", [GatedExperts(E, D, F, activation=gelu), MLPExperts(E, D, F, activation=relu)])
@pytest.mark.parametrize("num_tokens", [0, 1, 2, 9])
def test_experts_of_either_kind_and_any_few_tokens(calls_of_c, experts, num_tokens):
    layer = build(experts=experts)
    x_TD = torch.randn(2 * num_tokens, 2 * D)[::2, :D]
    assert_same(*both(layer, x_TD), torch.float32)
    assert calls_of_c == [True]


def test_a_router_in_float32_above_experts_in_bfloat16_and_the_other_way_round(calls_of_c):
    layer = build()
    layer.experts.bfloat16()
    assert_same(*both(layer, torch.randn(2, D).bfloat16()), torch.bfloat16)
    layer = build()
    layer.router.bfloat16()
    assert_same(*both(layer, torch.randn(2, D)), torch.float32)
    assert calls_of_c == [True, True]


def test_padding_reaches_no_expert_and_sequences_stay_in_the_table(calls_of_c):
    layer = build()
    x_TD, valid_T = torch.randn(5, D), torch.tensor([1, 0, 1, 1, 0])
    x_TD[1] = float("nan")
    context = Context(sequence_T=torch.tensor([0, 0, 1, 1, 1]))
    (y_TD, routing), (expected_TD, expected) = both(layer, x_TD, valid_T, context)
    assert calls_of_c == [True]
    torch.testing.assert_close(y_TD, expected_TD, rtol=1e-5, atol=1e-6)
    assert y_TD[1].tolist() == y_TD[4].tolist() == [0] * D
    assert torch.equal(routing.kept_N, expected.kept_N)
    assert torch.equal(routing.load_E, expected.load_E)
    assert routing.sequence_T is context.sequence_T
    both(layer, x_TD, torch.zeros(5, dtype=torch.bool))
    assert calls_of_c == [True, True]


def test_it_agrees_with_plain_loops_in_float64(calls_of_c):
    layer, x_TD = build(normalize="chosen", selection_bias=True, scale=1.5), torch.randn(3, D)
    with torch.no_grad():
        y_TD, routing = layer(x_TD)
    assert calls_of_c == [True]
    wide = {name: one.detach().double() for name, one in layer.named_parameters()}
    table = router_oracle.route(
        x_TD.double(),
        wide["router.weight"],
        top_k=K,
        score="softmax",
        normalize="chosen",
        scale=1.5,
        bias=layer.router.bias_E.tolist(),
    )
    assert routing.expert_N.tolist() == [row.expert for row in table.rows]
    weights = torch.stack([row.weight for row in table.rows])
    torch.testing.assert_close(routing.weight_N.double(), weights, rtol=1e-5, atol=1e-7)
    stacks = [wide[f"experts.{name}"] for name in ("gate_EDF", "up_EDF", "down_EFD")]
    expected_TD = expert_oracle.combine(x_TD.double(), table, [True] * len(table.rows), *stacks, "silu")
    torch.testing.assert_close(y_TD.double(), expected_TD, rtol=1e-5, atol=1e-6)


def test_an_expert_without_a_chance_has_none_and_what_is_no_number_is_seen(calls_of_c):
    layer, x_TD = build(logit_bias=True, normalize="scores"), torch.randn(2, D)
    with torch.no_grad():
        layer.router.logit_bias_E[2] = -float("inf")
    in_one, in_steps = both(layer, x_TD)
    assert_same(in_one, in_steps, torch.float32)
    assert in_one[1].scores_TE[:, 2].tolist() == [0, 0]
    x_TD[1, 3] = float("nan")
    (y_TD, routing), (expected_TD, expected) = both(layer, x_TD)
    assert y_TD.isnan().any(1).tolist() == expected_TD.isnan().any(1).tolist() == [False, True]
    assert torch.equal(routing.scores_TE.isnan(), expected.scores_TE.isnan())
    assert calls_of_c == [True, True]


@pytest.mark.parametrize("first", [*FIELDS, "extras", "sequence_T", "load_E"])
def test_the_table_can_be_read_from_any_field_on_copied_and_changed(calls_of_c, first):
    layer, x_TD = build(), torch.randn(3, D)
    context = Context(sequence_T=torch.tensor([0, 1, 1]))

    def table() -> Routing:
        with torch.no_grad():
            return layer(x_TD, None, context)[1]

    expected = both(layer, x_TD, None, context)[1][1]
    read = table()
    if first != "extras":
        torch.testing.assert_close(getattr(read, first), getattr(expected, first), rtol=1e-5, atol=1e-6)
    changed = replace(table(), **({first: getattr(read, first)} if first != "load_E" else {}))
    through = pytree.tree_map(lambda tensor: tensor, table())
    assert type(through) is Routing
    for other in (read, changed, through, copy.deepcopy(table()), pickle.loads(pickle.dumps(table()))):
        assert isinstance(other, Routing)
        for name in (*FIELDS, "sequence_T"):
            torch.testing.assert_close(getattr(other, name), getattr(expected, name), rtol=1e-5, atol=1e-6, msg=name)
        assert other.extras == {}
    with pytest.raises(AttributeError, match="has no attribute 'experts'"):
        _ = table().experts
    assert all(calls_of_c)


def test_the_same_bits_on_any_number_of_threads(calls_of_c):
    layer, x_TD = build(experts=GatedExperts(E, D, 900)), torch.randn(3, D)
    before = torch.get_num_threads()
    found = []
    try:
        for num_threads in (1, 2, 3):
            torch.set_num_threads(num_threads)
            with torch.no_grad():
                y_TD, routing = layer(x_TD)
            found.append((y_TD, routing.logits_TE, routing.weight_N))
    finally:
        torch.set_num_threads(before)
    assert calls_of_c == [True] * 3
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


class _OwnRouter(TopKRouter):
    def forward(self, *arguments):
        return super().forward(*arguments)


def _hooked(layer: MoELayer) -> MoELayer:
    layer.experts.register_forward_hook(lambda *_: None)
    return layer


def _patched(layer: MoELayer) -> MoELayer:
    layer.router.forward = layer.router.forward
    return layer


def _parametrized(layer: MoELayer) -> MoELayer:
    nn.utils.parametrize.register_parametrization(layer.experts, "up_EDF", nn.Identity())
    return layer


HALF = Score("softmax", lambda logits: (logits / 2).softmax(-1), lambda logits: (logits / 2).log_softmax(-1))


IN_STEPS = {
    "training": lambda: build().train(),
    "capacity": lambda: build(dispatch=Capacity(1.0)),
    "groups": lambda: build(groups=GroupLimit(num_groups=7, groups_kept=3, best_per_group=1)),
    "another score": lambda: build(score=HALF),
    "weighed inputs": lambda: build(experts=GatedExperts(E, D, F, weigh="input")),
    "another kernel": lambda: build(experts=GatedExperts(E, D, F, kernel="torch")),
    "derived router": lambda: MoELayer(_OwnRouter(D, E, top_k=K), GatedExperts(E, D, F)).eval(),
    "coefficient": lambda: MoELayer(TopKRouter(D, E, top_k=K), GatedExperts(E, D, F), coefficient=0.1).eval(),
    "hook": lambda: _hooked(build()),
    "patch": lambda: _patched(build()),
    "parametrization": lambda: _parametrized(build()),
}


@pytest.mark.parametrize("make", IN_STEPS.values(), ids=IN_STEPS.keys())
def test_who_does_more_than_c_can_or_is_looked_at_goes_in_steps(calls_of_c, make):
    layer = make()
    with torch.no_grad():
        layer(torch.randn(2, D))
    assert True not in calls_of_c


def test_graphs_autocast_known_choices_other_dtypes_and_many_tokens_go_in_steps(calls_of_c):
    layer, x_TD = build(), torch.randn(2, D)
    layer(x_TD)[0].sum().backward()
    assert layer.router.weight.grad is not None
    with torch.no_grad():
        with torch.autocast("cpu"):
            layer(x_TD)
        _, routing = layer(x_TD, None, Context(choice_TK=torch.tensor([[0, 1, 2], [3, 4, 5]])))
        assert routing.expert_N.tolist() == [0, 1, 2, 3, 4, 5]
        build().double()(x_TD.double())
        layer(torch.randn(40, D))
        with FlopCounterMode(display=False) as counter:
            layer(x_TD)
        assert counter.get_total_flops() > 0
        with nn.modules.module.register_module_forward_hook(lambda *_: None):
            layer(x_TD)
    assert True not in calls_of_c
    with torch.no_grad():
        layer(x_TD)
    assert calls_of_c[-1]


def test_what_is_compiled_is_what_compilers_can_see(calls_of_c):
    layer, x_TD = build(), torch.randn(2, D)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's own
        y_TD, _ = torch.compile(layer, backend="eager")(x_TD)
        assert not calls_of_c
        torch.testing.assert_close(y_TD, layer(x_TD)[0], rtol=1e-5, atol=1e-6)
    assert calls_of_c == [True]


def test_wrong_tokens_get_the_errors_of_the_steps(calls_of_c):
    layer = build()
    with torch.no_grad():
        for wrong in (torch.randn(2, D + 1), torch.randn(2, D, 1)):
            with pytest.raises(ShapeError, match="x_TD must be"):
                layer(wrong)
        with pytest.raises(ShapeError, match="valid_T must be"):
            layer(torch.randn(2, D), torch.ones(3, dtype=torch.bool))
        with pytest.raises(ConfigError, match="valid_T must be"):
            layer(torch.randn(2, D), torch.ones(2))
    assert True not in calls_of_c


def test_c_refuses_what_does_not_fit_together(compiled):
    def given(**changed):
        parts = {"x_TD": torch.randn(2, D), "weight_ED": torch.randn(E, D), "gate": torch.randn(E, D, F)}
        parts |= {"up": torch.randn(E, D, F), "down": torch.randn(E, F, D), "top_k": K} | changed
        biases = parts.get("logit_bias_E"), parts.get("selection_bias_E")
        choice = TopKChoice(parts["weight_ED"], *biases, "softmax", "chosen", parts["top_k"], 1.0)
        stacks = ExpertStacks(parts["gate"], parts["up"], parts["down"], silu)
        return whole_layer(parts["x_TD"], None, None, choice, stacks)

    assert given() is not None
    assert given(gate=None) is not None
    assert given(logit_bias_E=torch.zeros(E), selection_bias_E=torch.zeros(E)) is not None
    for changed in (
        {"x_TD": torch.randn(2, D + 1)},
        {"x_TD": torch.randn(D, 2).t()},
        {"x_TD": torch.randn(2, D).bfloat16()},
        {"weight_ED": torch.randn(E + 1, D)},
        {"weight_ED": torch.randn(D, E).t()},
        {"weight_ED": torch.randn(E, D).double()},
        {"logit_bias_E": torch.zeros(E - 1)},
        {"logit_bias_E": torch.zeros(2 * E)[::2]},
        {"logit_bias_E": torch.zeros(E).bfloat16()},
        {"selection_bias_E": torch.zeros(E).bfloat16()},
        {"selection_bias_E": torch.zeros(E + 1)},
        {"top_k": 0},
        {"top_k": E + 1},
        {"gate": torch.randn(E, D, F + 1)},
        {"down": torch.randn(E, F, D + 1)},
        {"down": torch.randn(E, F, D).bfloat16()},
        {"up": torch.randn(E, D, 2 * F)[..., ::2]},
        {"up": torch.randn(E, D, F, device="meta")},
    ):
        assert given(**changed) is None, changed.keys()


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_every_design_decodes_with_c_as_without(calls_of_c, monkeypatch, setting):
    layer, x_TD = setting.layer().eval(), tokens(4)
    context = context_for(4, setting, torch.float32)
    found = []
    for with_c in (False, True):
        with monkeypatch.context() as patch, torch.no_grad():
            if not with_c:
                patch.setattr(build_module, "compiled", lambda: None)
            torch.manual_seed(4)
            found.append(layer(x_TD, None, context))
    (expected_TD, expected), (y_TD, routing) = found
    assert_close(y_TD, expected_TD, "outputs")
    assert torch.equal(routing.expert_N, expected.expert_N)
    assert_close(routing.weight_N, expected.weight_N, "weights")
    if setting.recipe_name in ("mixtral", "olmoe", "qwen3-moe", "arctic", "grok-1"):
        assert calls_of_c == [True]


def test_a_shared_expert_is_added(calls_of_c):
    layer = MoELayer(TopKRouter(D, E, top_k=K), GatedExperts(E, D, F), shared=SharedExpert(D, F)).eval()
    assert_same(*both(layer, torch.randn(2, D)), torch.float32)
    assert calls_of_c == [True]
