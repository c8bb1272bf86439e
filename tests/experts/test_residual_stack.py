import pytest
import torch

from moesaic import ConfigError
from moesaic.core.init import normal
from moesaic.experts import ResidualStack
from tests.laws.settings import Setting


def test_the_stack_gives_what_its_sublayers_add_to_the_input():
    torch.manual_seed(0)
    stack = ResidualStack(6, 5, sublayers=3, init=normal(0.5), out_init=normal(0.5)).double()
    x_MD = h_MD = torch.randn(7, 6, dtype=torch.float64)
    for sublayer in stack.sublayers:  # fairseq's BaseSublayer, which returns its input as well
        h_MD = h_MD + sublayer.down(torch.relu(sublayer.up(sublayer.norm(h_MD))))
    torch.testing.assert_close(stack(x_MD), h_MD - x_MD)


def test_the_layer_in_a_block_is_fairseq_s_mix_of_input_and_expert():
    """Reference 10.1: alpha F(h) + (1 - alpha) h is h plus the layer."""
    torch.manual_seed(0)
    layer = Setting("base", {"num_experts": 3, "sublayers": 2}).layer(6).double()
    assert layer.experts[0].sublayers[1].down.weight.abs().sum() > 1
    x_TD = torch.randn(9, 6, dtype=torch.float64)
    y_TD, routing = layer(x_TD)
    for t, e in zip(routing.token_N.tolist(), routing.expert_N.tolist(), strict=True):
        h_D = x_TD[t]
        for sublayer in layer.experts[e].sublayers:
            h_D = h_D + sublayer.down(torch.relu(sublayer.up(sublayer.norm(h_D))))
        alpha = torch.sigmoid(x_TD[t] @ layer.router.weight[e])
        torch.testing.assert_close(x_TD[t] + y_TD[t], alpha * h_D + (1 - alpha) * x_TD[t])


def test_a_fresh_stack_adds_only_its_bias():
    stack = ResidualStack(6, 5)
    assert stack.sublayers[0].down.weight.abs().sum() == 0
    bias_D = stack.sublayers[0].down.bias
    torch.testing.assert_close(stack(torch.randn(4, 6)), bias_D.expand(4, -1))
    assert stack.sublayers[0].up.weight.abs().max() <= 1 / 6**0.5


def test_lower_precision_goes_in_and_out():
    stack = ResidualStack(6, 5, sublayers=2, init=normal(0.5), out_init=normal(0.5))
    x_MD = torch.randn(4, 6)
    exact_MD = stack(x_MD)
    torch.testing.assert_close(stack.bfloat16()(x_MD.bfloat16()).float(), exact_MD, rtol=0.05, atol=0.1)


def test_no_sublayers_are_refused():
    with pytest.raises(ConfigError) as error:
        ResidualStack(6, 5, sublayers=0)
    assert str(error.value) == "sublayers must be at least 1, got 0. BASE's largest models use 10."
