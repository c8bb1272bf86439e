import copy
import pickle

import pytest
import torch

from moesaic import ConfigError
from moesaic.kernels.activations import activation
from tests.oracle.experts import ACTIVATIONS
from tests.tolerances import assert_close


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_activation_and_its_derivative_agree_with_their_formulas(name):
    x = torch.linspace(-4, 4, 41, dtype=torch.float64) + 0.01  # away from the corner of relu
    x_oracle = x.clone().requires_grad_()
    expected = ACTIVATIONS[name](x_oracle)
    grad = torch.randn_like(x)
    expected.backward(grad)
    assert_close(activation(name).forward(x), expected, name)
    assert_close(activation(name).backward(grad, x), x_oracle.grad, f"derivative of {name}")


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_derivative_at_zero_is_what_autograd_says(name):
    x = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    activation(name).forward(x).backward()
    assert_close(activation(name).backward(torch.ones_like(x), x.detach()), x.grad, name)


def test_an_unknown_activation_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError) as error:
        activation("tanh")
    assert str(error.value) == (
        "activation must be one of silu, gelu, gelu_tanh, relu, relu_squared, got 'tanh'. Pick one of these."
    )


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_copies_of_an_activation_are_the_same_activation(name):
    assert copy.deepcopy(activation(name)) is activation(name)
    assert pickle.loads(pickle.dumps(activation(name))) is activation(name)
