"""A float32 router in a model of half precision sends tokens where the float32 model does."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

import moesaic as mz
from moesaic import hf
from moesaic.core.errors import ConfigError
from tests.hf.families import tiny, written_for_this_transformers
from tests.hf.test_adopt_training_losses import labelled

pytestmark = written_for_this_transformers

SIXTY_FOUR = {"num_hidden_layers": 1, "num_experts_per_tok": 8}
CASES = {
    "qwen3_moe": SIXTY_FOUR | {"num_experts": 64},
    "olmoe": SIXTY_FOUR | {"num_experts": 64},
    "mixtral": SIXTY_FOUR | {"num_local_experts": 64},
    "gemma4": {"num_experts": 64, "top_k_experts": 8},
}


def routed(layer, x_TD: Tensor) -> tuple[Tensor, Tensor]:
    """Choices, sorted, and weights of an adopted router for tokens."""
    with torch.no_grad():
        _, weight_TK, expert_TK = layer.reporter(x_TD)
    return expert_TK.sort(dim=-1).values, weight_TK


@pytest.mark.parametrize("name", CASES)
def test_tokens_go_where_the_float32_model_sends_them(name):
    half = tiny(name, **CASES[name]).model.to(torch.bfloat16)
    first = {
        kind: next(iter(hf.moe_layers(mz.adopt(model, float32_router=kind == "ours")).values()))
        for kind, model in (
            ("wide", copy.deepcopy(half).float()),  # the same numbers, in float32
            ("native", copy.deepcopy(half)),
            ("ours", copy.deepcopy(half)),
        )
    }
    x_TD = torch.randn(4096, half.get_decoder().config.hidden_size, generator=torch.Generator().manual_seed(0))
    x_TD = x_TD.to(torch.bfloat16)
    wanted_TK, weight_TK = routed(first["wide"], x_TD.float())
    assert wanted_TK.shape == (4096, 8)
    moved = {kind: (routed(first[kind], x_TD)[0] != wanted_TK).any(dim=-1).sum().item() for kind in ("native", "ours")}
    # Of 4,096 tokens the router in bfloat16 sends about 2 % elsewhere.
    assert 40 <= moved["native"] <= 200, moved
    assert moved["ours"] <= 1, moved
    found_TK, found_weight_TK = routed(first["ours"], x_TD)
    assert found_weight_TK.dtype == torch.float32
    same_T = (found_TK == wanted_TK).all(dim=-1)
    torch.testing.assert_close(found_weight_TK[same_T], weight_TK[same_T], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "family", ["qwen3_moe", "deepseek_v3", "gpt_oss", "gemma4", "dbrx", "llama4", "jetmoe", "laguna"]
)
def test_a_half_precision_model_with_float32_routers_trains(family):
    made = tiny(family)
    for weight in made.model.parameters():  # Llama 4 has a complex buffer, of which a cast would leave a half
        weight.data = weight.data.to(torch.bfloat16)
    model = mz.adopt(made.model, balance={"switch": 0.1}, float32_router=True).train()
    seen: list[hf.Seen] = []
    with hf.observe(model, seen.append):
        output = model(**labelled(made))
    assert output.logits.dtype == torch.bfloat16
    assert bool(output.logits.isfinite().all())
    assert {one.routing.logits_TE.dtype for one in seen} == {torch.float32}
    for one in seen:  # numbers that bfloat16 does not have
        assert not torch.equal(one.routing.logits_TE, one.routing.logits_TE.bfloat16().float())
    output.loss.backward()
    for layer in hf.moe_layers(model).values():
        name = layer.reporter.adoption.row.weight
        holder = layer.reporter if hasattr(layer.reporter, name.partition(".")[0]) else layer.reporter.router
        gradient = holder.get_parameter(name).grad
        assert gradient.dtype == torch.bfloat16
        assert bool(gradient.isfinite().all())
        assert gradient.any()


@pytest.mark.parametrize("family", ["qwen3_moe", "gemma4", "dbrx"])
def test_autocast_does_not_reach_a_float32_router(family):
    made = tiny(family)
    model, logits = mz.adopt(made.model, float32_router=True), {}
    for enabled in (False, True):
        seen: list[hf.Seen] = []
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=enabled), hf.observe(model, seen.append):
            model(**made.inputs)
        logits[enabled] = seen[0].routing.logits_TE
    apart = (logits[True] - logits[False]).abs().max()
    assert 0 < float(apart) < 0.3  # what the layers below round to
    assert not torch.equal(logits[True], logits[True].bfloat16().float())


def test_a_router_in_float32_already_is_as_it_was():
    made = tiny("deepseek_v3")
    with torch.no_grad():
        before = made.model(**made.inputs).logits
        after = mz.adopt(made.model, float32_router=True)(**made.inputs).logits
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("family", "message"),
    [
        (
            "zaya",
            "float32_router needs a router that Moesaic computes itself, got ZayaRouter at model.layers.0.mlp.gate, "
            "whose own code routes. Leave float32_router out.",
        ),
        (
            "switch_transformers",
            "float32_router is what SwitchTransformersSparseMLP at encoder.block.0.layer.1.mlp has already: its "
            "router_dtype says so. Leave float32_router out.",
        ),
    ],
)
def test_a_router_that_only_its_family_computes_is_refused(family, message):
    model = tiny(family).model
    with pytest.raises(ConfigError) as error:
        mz.adopt(model, float32_router=True)
    assert str(error.value) == message
    assert not hf.is_sparse(model)
