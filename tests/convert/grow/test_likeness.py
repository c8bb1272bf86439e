"""What small layers tell about large ones, before a weight is read: factors, promises, and what they rest on."""

import math
from dataclasses import replace

import pytest
import torch

from moesaic.convert.checkpoint.source import open_source
from moesaic.convert.grow.likeness import filled_layer, given, likeness, neat, unit
from moesaic.convert.grow.target import rounding_of, target
from moesaic.convert.layout.dense import networks
from moesaic.convert.layout.room import SMALL_HIDDEN, Filled, Room, network_tensors, shapes_of
from moesaic.convert.weights.parts import copies, scaled
from moesaic.convert.weights.stack import DenseFFN
from moesaic.core.errors import ConfigError
from tests.hf.tiny import build


def room_for(recipe, family="llama", *, num_experts=8, top_k=2, **options):
    changes = {"feed_forward_proj": "relu"} if family == "t5" else {}
    made = target(
        open_source(build(family, **changes)),
        recipe,
        layers=[0],
        hidden=lambda network: network.hidden,
        num_experts=num_experts,
        top_k=top_k,
        seed=0,
        **options,
    )
    return made.rooms[0]


def same(room):
    return lambda ffn: Filled(experts=copies(ffn, room.num_experts))


def test_copies_of_one_network_give_what_the_weights_add_up_to():
    for recipe, total in (("mixtral", 1.0), ("deepseek-v3", 2.5), ("llama-moe", 4.0)):
        room = room_for(recipe)
        alike = likeness(room, same(room), SMALL_HIDDEN, {})
        assert alike.multiple == pytest.approx(total, abs=1e-12)
        assert alike.is_even
        assert alike.is_parallel
        assert alike.cosine == pytest.approx(1, abs=1e-12)
        assert unit(room, {}) == neat(1 / total)


def test_raw_scores_are_parallel_and_not_even():
    room = room_for("olmoe")
    alike = likeness(room, same(room), SMALL_HIDDEN, {})
    assert (alike.is_even, alike.is_parallel) == (False, True)
    assert 2 / 8 < alike.multiple < 1


def test_a_router_that_says_nothing_is_even_again():
    room = room_for("olmoe")
    alike = likeness(room, same(room), SMALL_HIDDEN, {"router.weight": torch.zeros(8, 16)})
    assert alike.is_even
    assert alike.multiple == pytest.approx(2 / 8, abs=1e-12)


def test_an_input_that_is_weighed_is_neither():
    room = room_for("llama4", top_k=1)
    alike = likeness(room, same(room), SMALL_HIDDEN, {})
    assert (alike.is_even, alike.is_parallel) == (False, False)
    assert alike.cosine > 0.9


def test_many_equal_tokens_betray_a_capacity_and_one_with_room_passes():
    tight, wide = (
        room_for("gshard", "t5", capacity_factor=factor, eval_capacity_factor=factor) for factor in (1.0, 8.0)
    )
    for room, is_even in ((tight, False), (wide, True)):
        alike = likeness(room, same(room), SMALL_HIDDEN, {})
        assert alike.is_even == is_even
        # Over the tokens that experts serve it is one all the same.
        assert alike.multiple == pytest.approx(1, abs=1e-9)


def test_slots_that_mix_tokens_have_no_factor():
    room = room_for("soft-moe", "t5", top_k=None)
    assert unit(room, {}) == 1.0


def test_a_wrong_factor_is_seen():
    room = room_for("mixtral")
    for factor in (1.0, 1 + 1e-6):
        alike = likeness(room, lambda ffn, by=factor: Filled(experts=scaled(copies(ffn, 8), by)), SMALL_HIDDEN, {})
        assert alike.is_even
        assert (abs(alike.multiple - 1) < 1e-9) == (factor == 1.0)


@pytest.mark.parametrize(
    ("factor", "near"), [(2 + 1e-12, 2.0), (1 / 3 + 1e-13, 1 / 3), (0.4, 0.4), (2.7182, 2.7182), (1e-4 + 1e-15, 1e-4)]
)
def test_factors_are_rounded_to_what_they_are(factor, near):
    assert neat(factor) == near


def test_large_layers_have_the_router_of_the_small_ones():
    room = room_for("mixtral")
    ffn = networks(build("llama"), [0])[0].read(build("llama").state_dict())
    layer = filled_layer(room, same(room), ffn, {}, hidden=room.hidden)
    small = room.fresh(torch.float32)
    assert torch.equal(layer.router.weight, small["router.weight"])
    assert given(room, layer, torch.randn(5, 16)).shape == (5, 16)
    assert set(small) == {"router.weight"}


def test_every_tensor_of_a_layer_is_drawn_or_filled():
    for recipe in ("mixtral", "deepseek-v3", "qwen1.5-moe", "st-moe", "gpt-oss", "llama-moe", "skywork"):
        room = room_for(recipe)
        ffn = DenseFFN(gate_DF=torch.randn(16, 24), up_DF=torch.randn(16, 24), down_FD=torch.randn(24, 16))
        filled = network_tensors(room.shapes, Filled(experts=copies(ffn, 8)), ffn)
        assert set(filled) & set(room.fresh(torch.float32)) == set()
        assert {**filled, **room.fresh(torch.float32)}.keys() == room.shapes.keys()
        assert all(tuple(tensor.shape) == room.shapes[name] for name, tensor in filled.items())
        assert shapes_of(room.built("cpu", room.hidden)) == room.shapes


@pytest.mark.parametrize(
    ("factor", "dtype", "expected"),
    [
        (1.0, torch.bfloat16, 1.0),
        (4.0, torch.bfloat16, 1.0),
        (0.25, torch.float16, 1.0),
        (3.0, torch.float64, 1.0),
        (3.0, torch.float32, 10.0),
        (0.4, torch.bfloat16, math.inf),
    ],
)
def test_a_promise_is_as_wide_as_weights_are_rounded(factor, dtype, expected):
    source = open_source(build("llama").to(dtype))
    network = networks(source.blueprint.model)[0]
    assert rounding_of(factor, source, network) == expected
    biased = replace(network, up=replace(network.up, has_bias=True))
    assert rounding_of(1.0, source, biased) == (
        1.0 if dtype == torch.float64 else 10.0 if dtype == torch.float32 else math.inf
    )


def test_networks_of_two_activations_do_not_share_a_recipe():
    model = build("llama")
    model.model.layers[1].mlp.act_fn = torch.nn.ReLU()
    with pytest.raises(ConfigError) as error:
        target(open_source(model), "mixtral", layers="all", hidden=lambda _: 8, num_experts=4, top_k=2, seed=0)
    assert str(error.value) == (
        "All networks that become experts must have one activation, got relu and silu. Name the layers of one of them."
    )


def test_a_room_says_what_does_not_fit():
    with pytest.raises(ConfigError, match="has biases"):
        room_for("shazeer-2017", "gpt2")
    assert isinstance(room_for("mixtral"), Room)
