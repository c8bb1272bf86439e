import copy
import io
from typing import Any

import pytest
import torch

from moesaic import ConfigError, Context, MergedMoE
from moesaic.experts import GatedExperts, MLPExperts, SharedExpert
from moesaic.kernels.activations import Activation
from moesaic.routers import PooledRouter
from tests.laws.settings import some_padding, tokens
from tests.tolerances import assert_close

WIDTH, NUM_EXPERTS = 6, 3
IDENTITY = Activation("relu", lambda x: x * 1, lambda grad, x: grad * 1)


def _wide(weight: torch.Tensor, _fan_in: int) -> None:
    torch.nn.init.normal_(weight, std=0.7)


def _layer(*, normalized: bool = False, **options: Any) -> MergedMoE:
    router = PooledRouter(WIDTH, NUM_EXPERTS, normalized=normalized, init=_wide)
    return MergedMoE(router, GatedExperts(NUM_EXPERTS, WIDTH, 5, init=_wide), **options).double()


def test_a_one_hot_router_runs_that_expert():
    """Reference 11.2."""
    layer = _layer()
    x_TD = tokens(8, WIDTH, torch.float64)
    with torch.no_grad():
        layer.router.weight.zero_()
        layer.router.weight[1] = 1e4 * x_TD.mean(dim=0)
    expert = SharedExpert(WIDTH, 5).double()
    with torch.no_grad():
        for name in ("gate_DF", "up_DF", "down_FD"):
            getattr(expert, name).copy_(getattr(layer.experts, name.replace("_", "_E"))[1])
    assert_close(layer(x_TD)[0], expert(x_TD), "outputs")


def test_where_only_the_last_map_differs_merging_is_averaging_outputs():
    """Reference 11.2: for linear experts merging is the ensemble. Here the second map alone is the expert."""
    experts = MLPExperts(NUM_EXPERTS, WIDTH, 5, activation=IDENTITY, kernel="reference", init=_wide)
    with torch.no_grad():
        experts.up_EDF.copy_(experts.up_EDF[:1].clone().expand_as(experts.up_EDF))
    layer = MergedMoE(PooledRouter(WIDTH, NUM_EXPERTS, init=_wide), experts).double()
    x_TD = tokens(8, WIDTH, torch.float64)
    weight_E = (layer.router.weight @ x_TD.mean(dim=0)).softmax(dim=0)
    each = [x_TD @ experts.up_EDF[e] @ experts.down_EFD[e] for e in range(NUM_EXPERTS)]
    assert_close(layer(x_TD)[0], sum(w * y for w, y in zip(weight_E, each, strict=True)), "outputs")


def test_every_expert_gets_a_gradient():
    """Reference 11.2."""
    layer = _layer(normalized=True)
    layer(tokens(5, WIDTH, torch.float64))[0].square().sum().backward()
    for stack in layer.experts.parameters():
        assert (stack.grad.abs().sum(dim=(1, 2)) > 0).all()
    assert all(p.grad.abs().sum() > 0 for p in layer.router.parameters())


def test_each_sequence_has_a_network_of_its_own_and_sees_no_other():
    layer, x_TD = _layer(normalized=True), tokens(12, WIDTH, torch.float64)
    sequence_T = torch.tensor([4, 9, 4, 4, 9, 9, 4, 2, 9, 2, 4, 2])
    y_TD, routing = layer(x_TD, None, Context(sequence_T=sequence_T))
    for name in (2, 4, 9):
        assert_close(y_TD[sequence_T == name], layer(x_TD[sequence_T == name])[0], f"sequence {name}")
    weight_TE = routing.weight_N.detach().view(12, -1)
    assert torch.equal(weight_TE[0], weight_TE[2])
    assert not torch.equal(weight_TE[0], weight_TE[1])


def test_padding_enters_no_mean_and_gets_zeros():
    for layer in (_layer(normalized=True), _layer(segment=3)):
        x_TD, valid_T = tokens(20, WIDTH, torch.float64), some_padding(20)
        x_TD[~valid_T] = float("nan")
        sequence_T = torch.arange(20) // 9
        y_TD, routing = layer(x_TD, valid_T, Context(sequence_T=sequence_T))
        alone_TD, _ = layer(x_TD[valid_T], None, Context(sequence_T=sequence_T[valid_T]))
        assert_close(y_TD[valid_T], alone_TD, "outputs")
        assert y_TD[~valid_T].abs().sum() == 0
        assert routing.weight_N[~routing.valid_N].abs().sum() == 0


def _merge_weights(layer: MergedMoE, x_TD: torch.Tensor) -> torch.Tensor:
    """The weights of each token's network, expert by expert."""
    routing = layer(x_TD)[1]
    weight_TE = torch.zeros(len(x_TD), NUM_EXPERTS, dtype=torch.float64)
    return weight_TE.index_put((routing.token_N, routing.expert_N), routing.weight_N.detach())


@pytest.mark.parametrize("moved", range(12))
def test_a_token_moves_the_networks_of_its_own_segment_only_if_it_is_the_first_and_of_the_next(moved):
    """Reference 11.3."""
    layer, x_TD = _layer(segment=4), tokens(12, WIDTH, torch.float64)
    other_TD = x_TD.clone()
    other_TD[moved] += 3
    changed_T = (_merge_weights(layer, x_TD) != _merge_weights(layer, other_TD)).any(dim=1)
    segment = moved // 4
    expected = {segment + 1} | ({0} if segment == 0 else set())
    assert changed_T.tolist() == [t // 4 in expected for t in range(12)]


@pytest.mark.parametrize("moved", range(12))
def test_no_token_sees_later_segments(moved):
    """Reference 11.3, and that within the first segment it does: the layer says that it is not causal."""
    layer, x_TD = _layer(segment=4), tokens(12, WIDTH, torch.float64)
    other_TD = x_TD.clone()
    other_TD[moved] += 3
    changed_T = (layer(x_TD)[0] - layer(other_TD)[0]).detach().abs().amax(dim=1) > 0
    first = 0 if moved < 4 else moved
    assert changed_T.tolist()[:first] == [False] * first
    assert changed_T[0] == (moved < 4)


def test_the_first_segment_passes_no_gradient_to_the_router_and_later_ones_do():
    """Reference 11.3."""
    x_TD = tokens(8, WIDTH, torch.float64)
    for tokens_read, trains in ((4, False), (8, True)):
        layer = _layer(segment=4)
        layer(x_TD)[0][:tokens_read].square().sum().backward()
        assert (float(layer.router.weight.grad.abs().sum()) > 0) == trains
        assert layer.experts.up_EDF.grad.abs().sum() > 0


def test_a_sequence_no_longer_than_a_segment_is_routed_by_its_own_mean():
    x_TD = tokens(7, WIDTH, torch.float64)
    whole, segmented = _layer(), _layer(segment=256)
    segmented.load_state_dict(whole.state_dict())
    assert_close(segmented(x_TD)[0], whole(x_TD)[0], "outputs")


def test_expert_dropout_leaves_experts_out_and_the_rest_add_up_to_one():
    layer = _layer(expert_dropout=0.5)
    x_TD, context = tokens(400, WIDTH, torch.float64), Context(sequence_T=torch.arange(400))
    torch.manual_seed(5)
    weight_TE = torch.zeros(400, NUM_EXPERTS, dtype=torch.float64)
    _, routing = layer(x_TD, None, context)
    weight_TE = weight_TE.index_put((routing.token_N, routing.expert_N), routing.weight_N.detach())
    torch.manual_seed(5)
    left_out_TE = torch.rand(400, NUM_EXPERTS, dtype=torch.float64) < 0.5
    kept_TE = routing.scores_TE.detach() * ~left_out_TE
    total_T1 = kept_TE.sum(dim=1, keepdim=True)
    expected_TE = torch.where(total_T1 > 0, kept_TE / total_T1, 1 / 3)
    assert_close(weight_TE, expected_TE, "weights")
    assert left_out_TE.all(dim=1).any(), "some sequences lost every expert"
    assert torch.equal(layer.eval()(x_TD, None, context)[0], layer(x_TD, None, context)[0])


def test_a_prompt_is_routed_once_and_its_network_is_causal():
    """Reference 11.3: as the authors generate."""
    for layer in (_layer(segment=4), _layer(normalized=True)):
        prompt_TD, later_TD = tokens(9, WIDTH, torch.float64), tokens(5, WIDTH, torch.float64)
        network = layer.for_prompt(prompt_TD)
        whole = _layer(normalized=layer.segment is None)
        whole.load_state_dict(layer.state_dict())
        assert_close(network(prompt_TD), whole(prompt_TD)[0], "outputs on the prompt")
        assert_close(network(later_TD)[:1], network(later_TD[:1]), "outputs on later tokens")
    valid_T = torch.tensor([True] * 6 + [False] * 3)
    assert_close(layer.for_prompt(prompt_TD, valid_T)(later_TD), layer.for_prompt(prompt_TD[:6])(later_TD), "padded")


def test_a_prompt_is_routed_for_plain_experts_and_in_low_precision():
    experts = MLPExperts(NUM_EXPERTS, WIDTH, 5, init=_wide)
    layer = MergedMoE(PooledRouter(WIDTH, NUM_EXPERTS, init=_wide), experts).bfloat16()
    x_TD = tokens(9, WIDTH, torch.bfloat16)
    network = layer.for_prompt(x_TD)
    assert network.gate_DF is None
    assert network.up_DF.dtype == torch.bfloat16
    assert_close(network(x_TD), layer(x_TD)[0].detach(), "outputs")


@pytest.mark.parametrize("valid", [True, False])
@pytest.mark.parametrize("num_tokens", [0, 1, 4096])
@pytest.mark.parametrize("segment", [None, 50])
def test_any_number_of_tokens_runs_forward_and_backward(segment, num_tokens, valid):
    layer = _layer(segment=segment, expert_dropout=0.1).float()
    x_TD = tokens(num_tokens, WIDTH).requires_grad_()
    context = Context(sequence_T=torch.arange(num_tokens) // 100)
    y_TD, _ = layer(x_TD, torch.full((num_tokens,), valid), context)
    y_TD.square().sum().backward()
    assert y_TD.isfinite().all()
    assert x_TD.grad.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())


def test_huge_logits_merge_one_expert_and_give_no_nan():
    layer = _layer(segment=2).float()
    with torch.no_grad():
        layer.router.weight.mul_(1e4)
    x_TD = tokens(9, WIDTH).requires_grad_()
    y_TD, routing = layer(x_TD)
    y_TD.sum().backward()
    assert y_TD.isfinite().all()
    assert routing.weight_N.isfinite().all()
    assert x_TD.grad.isfinite().all()


def test_merging_in_bfloat16_adds_up_in_float32():
    """1 and sixteen times 2^-9: in bfloat16 each such step would be rounded away."""
    router = PooledRouter(1, 17, init=lambda weight, _: torch.nn.init.zeros_(weight))
    experts = MLPExperts(17, 1, 1)
    with torch.no_grad():
        experts.up_EDF.fill_(2.0**-9)
        experts.up_EDF[0] = 1
        experts.down_EFD.fill_(1)
    layer = MergedMoE(router, experts).bfloat16()
    y_TD, _ = layer(torch.full((2, 1), 17.0, dtype=torch.bfloat16))
    assert y_TD.flatten().tolist() == [1 + 16 * 2.0**-9] * 2


def test_outputs_under_autocast_stay_in_the_tokens_dtype_and_the_router_in_float32():
    layer, x_TD = _layer(normalized=True).float(), tokens(9, WIDTH)
    exact_TD, exact = layer(x_TD)
    with torch.autocast("cpu", torch.bfloat16):
        y_TD, routing = layer(x_TD)
    assert y_TD.dtype == torch.float32
    assert torch.equal(routing.logits_TE, exact.logits_TE)
    assert_close(y_TD, exact_TD, "outputs", torch.bfloat16)
    assert not torch.equal(y_TD, exact_TD)


def test_a_state_dict_goes_there_and_back():
    layer, file = _layer(normalized=True), io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other = _layer(normalized=True)
    other.load_state_dict(torch.load(file, weights_only=True))
    x_TD = tokens(9, WIDTH, torch.float64)
    assert torch.equal(other(x_TD)[0], layer(x_TD)[0])
    assert torch.equal(copy.deepcopy(layer)(x_TD)[0], layer(x_TD)[0])


def test_parameters_are_counted_whole_and_as_one_token_meets_them():
    layer = _layer()
    assert layer.num_params == NUM_EXPERTS * WIDTH + NUM_EXPERTS * 3 * WIDTH * 5
    assert layer.num_active_params == NUM_EXPERTS * WIDTH + 3 * WIDTH * 5
    assert layer.num_experts == NUM_EXPERTS
    assert layer.kernel_report().startswith("torch: ")


def test_impossible_numbers_are_refused():
    for options, message in (
        ({"segment": 0}, "segment must be at least 1 token, got 0. Lory uses 256."),
        ({"expert_dropout": 1.0}, "expert_dropout must be at least 0 and below 1, got 1.0. SMEAR uses 0.1."),
    ):
        with pytest.raises(ConfigError) as error:
            _layer(**options)
        assert str(error.value) == message
    with pytest.raises(ConfigError) as error:
        MergedMoE(PooledRouter(WIDTH, 4), MLPExperts(3, WIDTH, 5))
    assert str(error.value) == (
        "router and experts must agree on num_experts, got 4 and 3. Build both with the same number."
    )
