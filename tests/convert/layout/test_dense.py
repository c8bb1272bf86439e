"""The networks of dense models: found by structure, their roles and activation by trying."""

import pytest
import torch
from transformers import Phi3Config, Phi3ForCausalLM

from moesaic.convert.layout.dense import hidden_of, networks, run_dense
from moesaic.convert.weights.stack import DenseFFN
from moesaic.core.errors import ConfigError
from moesaic.kernels.activations import activation
from tests.hf.tiny import FAMILIES, VOCABULARY, build

ACTIVATION = {"llama": "silu", "qwen3": "silu", "gpt2": "gelu_tanh", "jamba": "silu", "lstm": "relu", "vit": "gelu"}


def phi3(**changes):
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return Phi3ForCausalLM(Phi3Config(**sizes | ids | changes, num_key_value_heads=1)).eval()


def module_of(model, network):
    return model.base_model.get_submodule(network.path)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_read_computes_what_the_module_does(family):
    model = build(family)
    state = model.state_dict()
    found = networks(model)
    assert {network.activation for network in found} == {ACTIVATION.get(family, "gelu_tanh")}
    for network in found:
        assert set(network.names) <= set(state)
        x = torch.randn(1, 5, network.width)
        given = run_dense(network.read(state), x[0], activation(network.activation))
        torch.testing.assert_close(given, module_of(model, network)(x)[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_writing_back_is_bitwise(family):
    model = build(family)
    state = model.state_dict()
    for network in networks(model):
        back = network.write(network.read(state))
        assert set(back) == set(network.names)
        assert all(torch.equal(back[name], state[name]) for name in back)


def test_a_joined_gate_and_up_projection_is_told_apart_by_trying():
    model = phi3()
    (network, _) = networks(model)
    assert (network.gate.half, network.up.half) == (0, 1)
    x = torch.randn(1, 5, 16)
    given = run_dense(network.read(model.state_dict()), x[0], activation("silu"))
    torch.testing.assert_close(given, module_of(model, network)(x)[0], rtol=1e-5, atol=1e-6)
    back = network.write(network.read(model.state_dict()))
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in back.items())


@pytest.mark.parametrize(
    ("changes", "name"),
    [({"hidden_act": "gelu"}, "gelu"), ({"hidden_act": "relu2"}, "relu_squared"), ({"intermediate_size": 16}, "silu")],
)
def test_activations_are_told_by_their_values_and_square_maps_by_their_order(changes, name):
    model = build("llama", **changes)
    network = networks(model)[0]
    assert (network.activation, network.gate.name, network.up.name) == (name, "gate_proj", "up_proj")
    x = torch.randn(1, 5, 16)
    given = run_dense(network.read(model.state_dict()), x[0], activation(name))
    torch.testing.assert_close(given, module_of(model, network)(x)[0], rtol=1e-5, atol=1e-6)


def test_a_model_without_memory_tells_the_same():
    with torch.device("meta"):
        model = build("llama")
    assert networks(model, "every-2")[0].prefix == "model.layers.1.mlp"
    assert networks(build("t5"), [0, 3])[1].prefix == "decoder.block.1.layer.2.DenseReluDense"


def test_finding_out_draws_no_numbers_and_leaves_the_model_alone():
    model = build("gpt2")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    networks(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_network_of_another_kind_is_refused_by_name():
    with pytest.raises(ConfigError) as error:
        networks(build("llama", hidden_act="quick_gelu"))
    assert str(error.value) == (
        "A network that becomes experts must compute down(act(gate x) * up x) or down(act(up x)), with act one of "
        "silu, gelu, gelu_tanh, relu, relu_squared; LlamaMLP at layers.0.mlp gives something else. Convert another "
        "model, or build the mixture with moesaic.sparsify and train it from fresh weights."
    )


def test_biases_are_part_of_what_neurons_give():
    model = build("llama", mlp_bias=True)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_()
    network = networks(model)[0]
    assert [name.rpartition(".mlp.")[2] for name in network.biases] == [
        "gate_proj.bias",
        "up_proj.bias",
        "down_proj.bias",
    ]
    ffn, x = network.read(model.state_dict()), torch.randn(1, 5, 16)
    given = run_dense(ffn, x[0], activation("silu"))
    torch.testing.assert_close(given, module_of(model, network)(x)[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(hidden_of(ffn, x[0], activation("silu")) @ ffn.down_FD + ffn.down_D, given)


def test_weights_that_do_not_fit_are_refused():
    from moesaic.core.errors import ShapeError

    with pytest.raises(ShapeError, match=r"DenseFFN\.down_FD must be \(6, 4\)"):
        DenseFFN(gate_DF=None, up_DF=torch.zeros(4, 6), down_FD=torch.zeros(4, 6))
