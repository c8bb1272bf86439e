"""Routers that know which expert serves a token."""

import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from moesaic.convert.weights import gates
from moesaic.convert.weights.gates import Gate
from moesaic.convert.weights.stack import DenseFFN, ExpertStack
from moesaic.core.errors import ConfigError

D, E, T = 12, 4, 400


def planted():
    """Tokens, and targets that a linear map of them gives, with a little noise."""
    torch.manual_seed(0)
    truth_ED, x_TD = torch.randn(E, D), torch.randn(T, D)
    return x_TD, x_TD @ truth_ED.T + 0.01 * torch.randn(T, E)


def hits(gate, x_TD, target_TE):
    return float((gate.logits(x_TD).argmax(dim=1) == target_TE.argmax(dim=1)).double().mean())


def loss(gate, x_TD, target_TE):
    """What the training lowers."""
    return float(binary_cross_entropy_with_logits(gate.logits(x_TD), target_TE / target_TE.max()))


def test_a_linear_gate_finds_the_map_that_is_there_up_to_what_all_experts_share():
    x_TD, target_TE = planted()
    gate = gates.fit_linear(x_TD, target_TE, ridge=1e-6)
    apart_TE = target_TE - target_TE.mean(dim=1, keepdim=True)
    torch.testing.assert_close(gate.logits(x_TD), apart_TE, rtol=0, atol=0.05)
    assert hits(gate, x_TD, target_TE) > 0.97
    assert gate.bias_E is None


def test_it_solves_the_normal_equations():
    x_TD, target_TE = planted()
    gate = gates.fit_linear(x_TD, target_TE, ridge=0.1)
    x, t = x_TD.double(), (target_TE - target_TE.mean(dim=1, keepdim=True)).double()
    penalty = 0.1 * x.square().sum(dim=0).mean()
    slope = x.T @ (x @ gate.weight_ED.T.double() - t) + penalty * gate.weight_ED.T.double()
    assert float(slope.abs().max()) < 1e-4 * float((x.T @ t).abs().max())


def test_a_router_with_a_bias_gets_one_and_needs_it_where_tokens_say_nothing():
    x_TD = torch.randn(T, D)
    target_TE = torch.tensor([3.0, 1.0, 0.0, 0.0]).expand(T, E)
    gate = gates.fit_linear(x_TD, target_TE, bias=True)
    torch.testing.assert_close(gate.bias_E, torch.tensor([2.0, 0.0, -1.0, -1.0]), rtol=0, atol=1e-5)
    torch.testing.assert_close(gate.weight_ED, torch.zeros(E, D), rtol=0, atol=1e-5)
    assert hits(gate, x_TD, target_TE) == 1.0


def test_more_dimensions_than_tokens_do_not_break_the_fit():
    gate = gates.fit_linear(torch.randn(3, D), torch.randn(3, E))
    assert gate.weight_ED.isfinite().all()
    assert gates.fit_linear(torch.zeros(3, D), torch.zeros(3, E)).weight_ED.isfinite().all()


@pytest.mark.parametrize("hidden_layer", [False, True])
def test_training_learns_who_is_active_and_beats_where_it_started(hidden_layer):
    torch.manual_seed(0)
    truth_ED, x_TD = torch.randn(E, D), torch.randn(T, D)
    target_TE = (x_TD @ truth_ED.T).clamp_min(0)
    start = Gate(weight_ED=torch.randn(E, D))
    gate = gates.train_gate(x_TD[:300], target_TE[:300], start, hidden_layer=hidden_layer, seed=0, epochs=200)
    # Of a choice of one in four at random a quarter would be right.
    assert hits(gate, x_TD[300:], target_TE[300:]) > 2 * hits(start, x_TD[300:], target_TE[300:])
    assert loss(gate, x_TD[300:], target_TE[300:]) < 0.8 * loss(start, x_TD[300:], target_TE[300:])
    assert (gate.mix_EE is not None) == hidden_layer
    again = gates.train_gate(x_TD[:300], target_TE[:300], start, hidden_layer=hidden_layer, seed=0, epochs=200)
    assert torch.equal(again.weight_ED, gate.weight_ED)
    assert not gate.weight_ED.requires_grad


def test_a_hidden_layer_keeps_the_choices_of_a_linear_gate():
    x_TD, target_TE = planted()
    gate = gates.fit_linear(x_TD, target_TE)
    layered = gates.with_hidden_layer(gate, x_TD)
    assert torch.equal(layered.logits(x_TD).argsort(dim=1), gate.logits(x_TD).argsort(dim=1))
    assert torch.equal(layered.mix_EE, torch.eye(E))


@pytest.mark.parametrize("layered", [False, True])
def test_the_spread_of_logits_is_set_and_choices_stay(layered):
    x_TD, target_TE = planted()
    gate = gates.fit_linear(x_TD, target_TE, bias=not layered)
    gate = gates.with_hidden_layer(gate, x_TD) if layered else gate
    narrow = gate.with_spread(x_TD, 0.03)
    assert float(narrow.logits(x_TD).std(dim=1).mean()) == pytest.approx(0.03, rel=1e-4)
    assert torch.equal(narrow.logits(x_TD).argsort(dim=1), gate.logits(x_TD).argsort(dim=1))
    zero = gates.zero_gate(E, D).with_spread(x_TD, 0.03)
    assert not zero.weight_ED.any()


def test_centers_are_the_mean_of_the_rows_of_length_one_that_a_gated_network_gates_with():
    gate_DF, up_DF = torch.randn(D, 6), torch.randn(D, 6)
    neuron_EF = torch.tensor([[0, 3], [1, 2], [4, 5]])
    for ffn, first_DF in (
        (DenseFFN(gate_DF=gate_DF, up_DF=up_DF, down_FD=torch.randn(6, D)), gate_DF),
        (DenseFFN(gate_DF=None, up_DF=up_DF, down_FD=torch.randn(6, D)), up_DF),
    ):
        unit_FD = first_DF.T / first_DF.T.norm(dim=1, keepdim=True)
        torch.testing.assert_close(gates.centers(ffn, neuron_EF).weight_ED[0], (unit_FD[0] + unit_FD[3]) / 2)


def test_voices_are_lengths_of_outputs_and_every_token_counts_the_same():
    stack = ExpertStack(gate_EDF=None, up_EDF=torch.randn(2, D, 3), down_EFD=torch.randn(2, 3, D))
    hidden = [torch.randn(5, 3), torch.randn(5, 3)]
    voice_TE = gates.voices(stack, hidden)
    length_TE = torch.stack([(one @ stack.down_EFD[e]).norm(dim=1) for e, one in enumerate(hidden)], dim=1)
    torch.testing.assert_close(voice_TE.mean(dim=1), torch.ones(5))
    torch.testing.assert_close(voice_TE[:, 0] / voice_TE[:, 1], length_TE[:, 0] / length_TE[:, 1])
    torch.testing.assert_close(gates.voices(stack, [1000 * one for one in hidden]), voice_TE)


def test_prompts_give_rows_of_one_length_that_point_to_their_mean_less_that_of_negative_ones():
    wanted, unwanted = [torch.randn(5, D), torch.randn(7, D)], [None, torch.randn(2, D)]
    gate = gates.from_prompts(wanted, unwanted, scale=3.0)
    torch.testing.assert_close(gate.weight_ED.norm(dim=1), torch.tensor([3.0, 3.0]))
    row_D = wanted[1].mean(dim=0) - unwanted[1].mean(dim=0)
    torch.testing.assert_close(gate.weight_ED[1], 3 * row_D / row_D.norm())
    torch.testing.assert_close(gate.weight_ED[0], 3 * wanted[0].mean(dim=0) / wanted[0].mean(dim=0).norm())


def test_tensors_fit_the_router_or_are_refused():
    gate = Gate(weight_ED=torch.randn(E, D))
    assert set(gate.tensors({"router.weight": (E, D)})) == {"router.weight"}
    shapes = {"router.weight": (E, D), "router.mix_EE": (E, E), "router.logit_bias_E": (E,)}
    made = gate.tensors(shapes)
    assert torch.equal(made["router.mix_EE"], torch.eye(E))
    assert not made["router.logit_bias_E"].any()
    with pytest.raises(ConfigError) as error:
        gate.tensors({"router.weight": (3 * E, D)})
    assert str(error.value) == (
        "A fitted gate needs a router whose logits are one linear map of the token, of shape (4, 12), got (12, 12). "
        "Use gate='random', or a recipe as mixtral."
    )
