import copy
import io

import pytest
import torch

from moesaic import ConfigError, Context, ShapeError, SoftMoE
from moesaic.experts import MLPExperts, SequentialExperts
from tests.laws.settings import some_padding, tokens
from tests.tolerances import assert_close

WIDTH, NUM_EXPERTS = 6, 4


def _wide(weight: torch.Tensor, _fan_in: int) -> None:
    torch.nn.init.normal_(weight, std=0.5)


def _layer(**options) -> SoftMoE:
    experts = MLPExperts(NUM_EXPERTS, WIDTH, 5, init=_wide)
    return SoftMoE(WIDTH, experts, **({"slots_per_expert": 2, "init": _wide} | options)).double()


class Linear(SequentialExperts):
    """Linear experts, all the same if told so."""

    def __init__(self, *, same: bool) -> None:
        maps = [torch.nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(NUM_EXPERTS)]
        super().__init__([maps[0]] * NUM_EXPERTS if same else maps)


def _dispatch_and_combine(layer: SoftMoE, x_TD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    phi = layer.slot_DES.flatten(1)
    unit_TD = x_TD / (x_TD.square().sum(dim=1, keepdim=True) + 1e-6).sqrt()
    logits = unit_TD @ (layer.scale * phi / (phi.square().sum(dim=0) + 1e-6).sqrt())
    return logits.softmax(dim=0), logits.softmax(dim=1)


def test_linear_experts_that_are_all_the_same_are_one_linear_map_of_the_mixtures():
    """Reference 11.1: Y = C D^T X W."""
    layer = SoftMoE(WIDTH, Linear(same=True), slots_per_expert=2, init=_wide).double()
    x_TD = tokens(9, WIDTH, torch.float64)
    dispatch, combine = _dispatch_and_combine(layer, x_TD)
    expected_TD = combine @ dispatch.T @ x_TD @ layer.experts[0].weight.T
    assert_close(layer(x_TD)[0], expected_TD, "outputs")


def test_slots_take_the_tokens_as_they_are_and_not_their_unit_vectors():
    """Reference 11.1: un-normalised X enters the slots. Twice as long tokens: the same mixtures of longer vectors."""
    layer = SoftMoE(WIDTH, Linear(same=False), init=_wide).double()
    x_TD = 10 * tokens(9, WIDTH, torch.float64)
    twice_TD = layer(2 * x_TD)[0]
    assert float((twice_TD - 2 * layer(x_TD)[0]).detach().abs().max() / twice_TD.detach().abs().max()) < 1e-6


def test_one_token_alone_fills_every_slot():
    """Reference 11.1: m = 1 gives D = 1 and Y = sum_i C_i f_i(x)."""
    layer = SoftMoE(WIDTH, Linear(same=False), slots_per_expert=1, init=_wide).double()
    x_TD = tokens(1, WIDTH, torch.float64)
    y_TD, routing = layer(x_TD)
    expected_TD = sum(
        weight * layer.experts[e](x_TD)
        for e, weight in zip(routing.expert_N.tolist(), routing.weight_N.tolist(), strict=True)
    )
    assert_close(y_TD, expected_TD, "outputs")


def test_weights_add_up_to_one_and_every_token_is_in_every_expert():
    layer = _layer()
    x_TD, valid_T = tokens(20, WIDTH, torch.float64), some_padding(20)
    _, routing = layer(x_TD, valid_T, Context(sequence_T=torch.arange(20) // 7))
    assert routing.num_rows == 20 * NUM_EXPERTS
    sum_T = routing.weight_N.detach().view(20, -1).sum(dim=1)
    assert_close(sum_T, valid_T.double(), "sums of weights")
    assert_close(routing.scores_TE, routing.logits_TE.softmax(dim=-1), "scores")
    assert routing.load_E.tolist() == [int(valid_T.sum())] * NUM_EXPERTS


def test_permuting_the_tokens_of_a_sequence_permutes_the_outputs():
    layer, x_TD, order_T = _layer(), tokens(11, WIDTH, torch.float64), torch.randperm(11)
    assert_close(layer(x_TD[order_T])[0], layer(x_TD)[0][order_T], "outputs")


def test_sequences_do_not_see_each_other_and_may_lie_in_any_order():
    layer, x_TD = _layer(), tokens(12, WIDTH, torch.float64)
    sequence_T = torch.tensor([4, 9, 4, 4, 9, 9, 4, 2, 9, 2, 4, 2])
    y_TD, _ = layer(x_TD, None, Context(sequence_T=sequence_T))
    for name in (2, 4, 9):
        assert_close(y_TD[sequence_T == name], layer(x_TD[sequence_T == name])[0], f"sequence {name}")


def test_every_token_sees_later_ones_so_that_it_is_not_causal():
    layer, x_TD = _layer(), tokens(9, WIDTH, torch.float64)
    other_TD = x_TD.clone()
    other_TD[8] += 1
    assert (layer(x_TD)[0] - layer(other_TD)[0])[0].abs().max() > 1e-3


def test_padding_enters_no_slot_and_gets_zeros():
    layer, x_TD, valid_T = _layer(), tokens(20, WIDTH, torch.float64), some_padding(20)
    x_TD[~valid_T] = float("nan")
    context = Context(sequence_T=torch.arange(20) // 7)
    y_TD, routing = layer(x_TD, valid_T, context)
    alone_TD, _ = layer(x_TD[valid_T], None, Context(sequence_T=context.sequence_T[valid_T]))
    assert_close(y_TD[valid_T], alone_TD, "outputs")
    assert y_TD[~valid_T].abs().sum() == 0
    assert not routing.kept_N[~routing.valid_N].any()


@pytest.mark.parametrize("valid", [True, False])
@pytest.mark.parametrize("num_tokens", [0, 1, 4096])
def test_any_number_of_tokens_runs_forward_and_backward(num_tokens, valid):
    layer = _layer().float()
    x_TD = tokens(num_tokens, WIDTH).requires_grad_()
    context = Context(sequence_T=torch.arange(num_tokens) // 100)
    y_TD, _ = layer(x_TD, torch.full((num_tokens,), valid), context)
    y_TD.square().sum().backward()
    assert y_TD.isfinite().all()
    assert x_TD.grad.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())


def test_every_expert_gets_a_gradient_from_every_batch():
    layer = _layer()
    layer(tokens(3, WIDTH, torch.float64))[0].square().sum().backward()
    assert (layer.experts.down_EFD.grad.abs().sum(dim=(1, 2)) > 0).all()
    assert layer.scale.grad.abs() > 0


def test_zeros_and_huge_tokens_give_finite_outputs_and_gradients():
    """The norms are what keeps the softmax from collapsing; their epsilon what keeps zeros from dividing by zero."""
    for scale in (0.0, 1e-20, 1e4, 1e15):
        layer = _layer().float()
        x_TD = (scale * tokens(9, WIDTH)).requires_grad_()
        y_TD, routing = layer(x_TD)
        (y_TD / max(scale, 1)).sum().backward()
        assert y_TD.isfinite().all()
        assert routing.weight_N.isfinite().all()
        assert x_TD.grad.isfinite().all()


def test_noise_is_drawn_in_training_only_once_for_each_token_and_slot():
    layer, x_TD = _layer(noise_std=0.5), tokens(9, WIDTH, torch.float64)
    torch.manual_seed(3)
    _, routing = layer(x_TD)
    torch.manual_seed(3)
    noise_TES = 0.5 * torch.randn(9, NUM_EXPERTS, 2, dtype=torch.float64)
    unit_TD = x_TD / (x_TD.square().sum(dim=1, keepdim=True) + 1e-6).sqrt()
    phi = layer.slot_DES / (layer.slot_DES.square().sum(dim=0) + 1e-6).sqrt()
    logits_TES = torch.einsum("td,des->tes", unit_TD, layer.scale * phi) + noise_TES
    assert_close(routing.logits_TE, logits_TES.logsumexp(dim=-1), "logits")
    assert torch.equal(layer.eval()(x_TD)[0], layer(x_TD)[0])


def test_bfloat16_mixes_in_float32():
    layer = _layer().bfloat16()
    x_TD = tokens(30, WIDTH, torch.bfloat16)
    y_TD, routing = layer(x_TD)
    assert y_TD.dtype == torch.bfloat16
    assert routing.weight_N.dtype == torch.float32
    assert_close(y_TD, layer.double()(x_TD.double())[0], "bfloat16")
    layer.float()
    with torch.autocast("cpu", torch.bfloat16):
        cast_TD, cast = layer(x_TD.float())
    assert cast_TD.dtype == torch.float32
    assert cast.logits_TE.dtype == torch.float32
    assert_close(cast_TD, y_TD, "autocast", torch.bfloat16)


def test_a_state_dict_goes_there_and_back():
    layer, file = _layer(), io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other = _layer()
    other.load_state_dict(torch.load(file, weights_only=True))
    x_TD = tokens(9, WIDTH, torch.float64)
    assert torch.equal(other(x_TD)[0], layer(x_TD)[0])
    assert torch.equal(copy.deepcopy(layer)(x_TD)[0], layer(x_TD)[0])


def test_parameters_and_kernel_are_reported():
    layer = _layer()
    assert layer.num_experts == NUM_EXPERTS
    assert layer.num_params == layer.num_active_params == WIDTH * NUM_EXPERTS * 2 + 1 + NUM_EXPERTS * 2 * WIDTH * 5
    assert layer.kernel_report().startswith("torch: ")


def test_impossible_numbers_and_shapes_are_refused():
    for options, message in (
        ({"slots_per_expert": 0}, "slots_per_expert must be at least 1, got 0. Soft MoE uses 1."),
        ({"noise_std": -0.5}, "noise_std must be at least 0, got -0.5. Soft MoE uses 0."),
    ):
        with pytest.raises(ConfigError) as error:
            _layer(**options)
        assert str(error.value) == message
    with pytest.raises(ShapeError, match=r"x_TD must be \(tokens, 6\), got \(3, 5\)"):
        _layer()(torch.zeros(3, 5))
    with pytest.raises(ShapeError, match=r"Context.sequence_T must have one entry for each of 3 tokens"):
        _layer()(torch.zeros(3, 6), None, Context(sequence_T=torch.zeros(2)))
