import pytest
import torch
from torch import nn

from moesaic import ConfigError, MoELayer, ShapeError, recipes
from moesaic.dispatch import Capacity, Sort
from moesaic.experts import GatedExperts, MLPExperts, SharedExpert
from moesaic.kernels.grouped_ffn import Kernel, grouped_ffn_reference
from moesaic.routers import GroupLimit, TopKRouter, sigmoid, softmax
from tests.laws.settings import context_for, plain
from tests.tolerances import assert_close


def _layer(**parts) -> MoELayer:
    return MoELayer(TopKRouter(8, 4, top_k=2), MLPExperts(4, 8, 6), **parts)


def test_a_layer_is_dropless_unless_told_otherwise():
    assert isinstance(_layer().dispatch, Sort)
    assert isinstance(_layer(dispatch=Capacity()).dispatch, Capacity)


def test_the_shared_expert_is_added_and_unscaled():
    """Reference 15.4: the routed scaling factor does not reach it."""
    layer = recipes.get("deepseek-v3").layer(8, hidden=6, num_experts=4, top_k=2, init_std=0.5)
    x_TD = torch.randn(5, 8)
    both_TD, _ = layer(x_TD)
    shared_TD = layer.shared(x_TD)
    layer.shared = None
    assert_close(both_TD - layer(x_TD)[0], shared_TD, "shared")


def test_the_table_that_comes_back_tells_what_dispatch_dropped():
    layer = _layer(dispatch=Capacity(0.5, minimum=0))
    _, routing = layer(torch.randn(20, 8))
    assert torch.equal(routing.kept_N, layer.dispatch(routing).kept_N)
    assert 0 < int((~routing.kept_N).sum()) < 40


def test_router_and_experts_of_different_numbers_are_refused():
    with pytest.raises(ConfigError) as error:
        MoELayer(TopKRouter(8, 4, top_k=2), MLPExperts(6, 8, 5))
    assert str(error.value) == (
        "router and experts must agree on num_experts, got 4 and 6. Build both with the same number."
    )


def test_a_batch_that_was_not_flattened_is_refused():
    with pytest.raises(ShapeError) as error:
        _layer()(torch.zeros(2, 3, 8))
    assert str(error.value) == (
        "x_TD must be (tokens, 8), got (2, 3, 8). Flatten batch and position into one dimension."
    )


def test_parameters_are_counted_whole_and_as_one_token_meets_them():
    layer = MoELayer(TopKRouter(8, 4, top_k=2), GatedExperts(4, 8, 6), shared=SharedExpert(8, 5))
    assert layer.num_params == 4 * 8 + 4 * 3 * 8 * 6 + 3 * 8 * 5
    assert layer.num_active_params == 4 * 8 + 2 * 3 * 8 * 6 + 3 * 8 * 5


def test_the_parameters_of_a_mixtral_layer_are_those_of_the_published_model():
    """Reference 13.2: 46.703B and 12.880B over 32 layers, less attention, norms and embeddings."""
    with torch.device("meta"):
        layer = recipes.get("mixtral").layer(4096, hidden=14336)
    assert layer.num_params == 8 * 3 * 4096 * 14336 + 8 * 4096
    rest = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 2 * 4096) + 2 * 32000 * 4096 + 4096
    assert round((32 * layer.num_params + rest) / 1e9, 3) == 46.703
    assert round((32 * layer.num_active_params + rest) / 1e9, 3) == 12.880


def test_the_kernel_report_names_the_kernel_and_the_reason():
    assert _layer().kernel_report() == (
        "torch: PyTorch, one graph node with a hand-written backward; fastest that runs on cpu in torch.float32 "
        "(passed over: native: it is not compiled on this machine: run `moesaic native`)"
    )
    layer = recipes.get("mixtral").layer(8, hidden=6, kernel="reference").bfloat16()
    assert layer.kernel_report() == (
        "reference: PyTorch by autograd, the truth that others are tested by; asked for by name"
    )


def test_a_kernel_of_one_s_own_can_be_handed_in():
    calls = []

    def run(*arguments):
        calls.append(len(arguments))
        return grouped_ffn_reference(*arguments)

    kernel = Kernel(name="mine", run=run, what="counts its calls")
    layer = MoELayer(TopKRouter(8, 4, top_k=2), GatedExperts(4, 8, 6, kernel=kernel))
    layer(torch.randn(3, 8))
    assert calls == [6]
    assert layer.kernel_report() == "mine: counts its calls; handed in"


def test_doubling_the_router_changes_switch_outputs_even_where_every_choice_stays():
    """Reference 5.6, example 4: the probability is part of the output."""
    layer = recipes.get("switch").layer(8, hidden=6, num_experts=4, init_std=0.5).eval()
    x_TD = torch.randn(9, 8)
    before_TD, before = layer(x_TD)
    layer.router.weight.data *= 2
    after_TD, after = layer(x_TD)
    assert torch.equal(before.expert_N, after.expert_N)
    assert not torch.allclose(before_TD, after_TD)


def _router_with(logits: list[float], **options) -> TopKRouter:
    """On the token (1,), these logits."""
    router = TopKRouter(1, len(logits), top_k=2, **options)
    with torch.no_grad():
        router.weight.copy_(torch.tensor(logits)[:, None])
    return router


def test_the_mixtral_gate_of_the_worked_example():
    """Reference 13.5, example 1."""
    for normalize in ("chosen", "logits"):
        routing = _router_with([2.0, 1.0, 0.0, -1.0], score=softmax, normalize=normalize)(torch.ones(1, 1))
        assert routing.expert_N.tolist() == [0, 1]
        assert routing.weight_N.tolist() == pytest.approx([0.7311, 0.2689], abs=5e-5)


def test_the_deepseek_v3_gate_of_the_worked_example():
    """Reference 15.5, example 1."""
    logits = torch.tensor([0.9, 0.8, 0.1, 0.2]).logit().tolist()
    router = _router_with(logits, score=sigmoid, normalize="chosen", scale=2.5, selection_bias=True)
    router.bias_E.copy_(torch.tensor([-0.75, 0.0, 0.0, 0.0]))
    routing = router(torch.ones(1, 1))
    assert routing.expert_N.tolist() == [1, 3]
    assert routing.weight_N.tolist() == pytest.approx([2.0, 0.5], abs=1e-6)


def test_the_deepseek_v2_gate_adds_up_to_less_than_its_scale_and_to_no_constant():
    """Reference 15.5, example 2: softmax, no renormalisation, scale 16, groups by their best expert."""
    groups = GroupLimit(num_groups=4, groups_kept=3, best_per_group=1)
    router = TopKRouter(8, 16, top_k=6, score=softmax, normalize="scores", scale=16.0, groups=groups)
    nn.init.normal_(router.weight, std=0.5)
    sum_T = router(torch.randn(50, 8)).weight_N.detach().view(50, 6).sum(dim=-1)
    assert float(sum_T.max()) < 16
    assert float(sum_T.std()) > 0.3


@pytest.mark.parametrize("name", recipes.names())
def test_no_token_at_all_gives_nothing_and_losses_of_zero(name):
    setting = plain(name)
    y_TD, routing = setting.layer()(torch.empty(0, 8), torch.empty(0, dtype=torch.bool), context_for(0, setting))
    assert y_TD.shape == (0, 8)
    assert routing.load_E.tolist() == [0] * setting.num_experts
    assert [float(term(setting.rewarded(routing)).detach()) for term in setting.losses] == [0] * len(setting.losses)
