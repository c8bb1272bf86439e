import pytest
import torch

from moesaic.experts import SharedExpert
from moesaic.kernels.activations import gelu, silu
from tests.oracle import experts as oracle
from tests.tolerances import assert_close


@pytest.mark.parametrize("num_tokens", [0, 1, 7])
@pytest.mark.parametrize("token_gate", [False, True], ids=["always on", "token gate"])
@pytest.mark.parametrize("act", [silu, gelu], ids=lambda act: act.name)
def test_a_shared_expert_agrees_with_plain_loops_in_outputs_and_gradients(act, token_gate, num_tokens):
    expert = SharedExpert(5, 7, activation=act, token_gate=token_gate).double()
    for parameter in expert.parameters():
        torch.nn.init.normal_(parameter, std=0.6)
    x_TD = torch.randn(num_tokens, 5, dtype=torch.float64)
    truth = {name: p.detach().clone().requires_grad_() for name, p in expert.named_parameters()}
    y_TD = expert(x_TD)
    expected_TD = oracle.shared(
        x_TD, truth["gate_DF"], truth["up_DF"], truth["down_FD"], truth.get("token_gate_D"), act.name
    )
    assert_close(y_TD, expected_TD, "outputs")
    y_TD.square().sum().backward()
    if num_tokens:
        expected_TD.square().sum().backward()
    for name, parameter in expert.named_parameters():
        expected = truth[name].grad
        assert_close(parameter.grad, torch.zeros_like(parameter) if expected is None else expected, name)


def test_one_shared_expert_of_the_summed_width_is_several_added_up():
    """Reference 15.4."""
    first, second, both = SharedExpert(5, 3), SharedExpert(5, 4), SharedExpert(5, 7)
    with torch.no_grad():
        both.gate_DF.copy_(torch.cat([first.gate_DF, second.gate_DF], dim=1))
        both.up_DF.copy_(torch.cat([first.up_DF, second.up_DF], dim=1))
        both.down_FD.copy_(torch.cat([first.down_FD, second.down_FD], dim=0))
    x_TD = 30 * torch.randn(9, 5)
    assert_close(both(x_TD), first(x_TD) + second(x_TD), "outputs")


def test_the_shared_expert_gets_a_gradient_from_every_token():
    """Reference 15.5, example 6."""
    expert = SharedExpert(5, 3, init=lambda weight, _: torch.nn.init.normal_(weight))
    for x_D in torch.randn(6, 5):
        expert.zero_grad()
        expert(x_D[None]).sum().backward()
        assert all(p.grad.abs().sum() > 0 for p in expert.parameters())


@pytest.mark.parametrize("num_tokens", [0, 1, 7])
def test_a_plain_network_has_no_gate(num_tokens):
    network = SharedExpert(5, 7, activation=gelu, gated=False).double()
    assert network.gate_DF is None
    assert [name for name, _ in network.named_parameters()] == ["up_DF", "down_FD"]
    x_TD = torch.randn(num_tokens, 5, dtype=torch.float64)
    expected = [oracle.feed_forward(x_D, None, network.up_DF, network.down_FD, "gelu") for x_D in x_TD]
    assert_close(network(x_TD), torch.stack(expected) if expected else x_TD, "outputs")
