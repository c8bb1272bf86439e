"""The tiny models that other tests use: that none is missing, that they run, and that their choices differ."""

from __future__ import annotations

import inspect
import re
from functools import cache
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor
from transformers.utils import ModelOutput

from moesaic.hf.native.rows import ROWS
from tests.hf.families import ALSO, FAMILIES, TRIED, Tiny, choices, tiny, written_for_this_transformers
from tests.hf.families.build import built
from tests.hf.families.variants import SAME_ROUTER

pytestmark = written_for_this_transformers

# Experts that transformers' interface for experts does not reach; found by reading, there is nothing to search for.
WITHOUT_THE_INTERFACE = {
    "dbrx",
    "doge",
    "jetmoe",
    "llama4",
    "longcat_flash",
    "nllb_moe",
    "step3p7",
    "switch_transformers",
    "vitpose_backbone",
}
WITHOUT_TOKENS = ("vitpose", "vitpose_backbone", "qwen3_omni_moe/talker")
# A norm follows the experts and hides a factor that all of a token's weights have in common.
NORMALIZED_AFTERWARDS = ("beam/not-normalized", "muse_spark/scaled")


@cache
def made(name: str) -> Tiny:
    """Built once for all the tests here, none of which changes it."""
    return tiny(name)


def outputs(model: Tiny) -> list[Tensor]:
    """All floating tensors that a forward returns, caches left out."""
    with torch.no_grad():
        returned = model.model(**model.inputs)
    assert isinstance(returned, ModelOutput)
    tensors = [value for value in returned.values() if isinstance(value, Tensor)]
    tensors += [part for value in returned.values() if isinstance(value, tuple) for part in value]
    return [tensor for tensor in tensors if isinstance(tensor, Tensor) and tensor.is_floating_point()]


def test_no_family_of_transformers_is_missing() -> None:
    package = Path(transformers.__file__).parent / "models"
    with_the_interface = {
        path.parent.name
        for path in package.glob("*/modeling_*.py")
        if "@use_experts_implementation" in path.read_text(encoding="utf-8")
    }
    assert sorted(with_the_interface | WITHOUT_THE_INTERFACE) == list(FAMILIES)
    assert len(FAMILIES) == 73


@pytest.mark.parametrize("name", [*FAMILIES, *ALSO])
def test_it_runs_finite_and_twice_the_same(name: str) -> None:
    model = made(name)
    first, again = outputs(model), outputs(model)
    assert first
    assert all(bool(tensor.isfinite().all()) for tensor in first)
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    assert first[0].std() > 0.01


@pytest.mark.parametrize("name", [*FAMILIES[::8], *ALSO])
def test_the_seed_decides_the_model_and_nothing_else_does(name: str) -> None:
    before = torch.random.get_rng_state()
    torch.rand(3)  # the numbers that are drawn next are others
    between = torch.random.get_rng_state()
    same, other = built(name, 0), built(name, 1)
    assert torch.equal(torch.random.get_rng_state(), between)
    assert not torch.equal(before, between)
    states = [model.model.state_dict() for model in (made(name), same, other)]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert not all(torch.equal(states[0][key], states[2][key]) for key in states[0])
    assert all(torch.equal(made(name).inputs[key], same.inputs[key]) for key in same.inputs)


def test_a_model_that_was_changed_is_not_handed_out_again() -> None:
    first, inputs = tiny("mixtral"), tiny("mixtral").inputs
    with torch.no_grad():
        first.model.lm_head.weight.zero_()
    first.inputs["input_ids"].zero_()
    again = tiny("mixtral")
    assert again.model.lm_head.weight.std() > 0
    assert torch.equal(again.inputs["input_ids"], inputs["input_ids"])


@pytest.mark.parametrize("name", [*FAMILIES, *ALSO])
def test_it_is_small_in_evaluation_mode_and_of_float32(name: str) -> None:
    model = made(name).model
    assert not any(module.training for module in model.modules())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert sum(parameter.numel() for parameter in model.parameters()) < 250_000


@pytest.mark.parametrize("name", [*FAMILIES, *ALSO])
def test_no_weight_and_no_selection_bias_is_constant(name: str) -> None:
    model = made(name).model
    tensors = dict(model.named_parameters())
    tensors |= {key: buffer for key, buffer in model.named_buffers() if "bias" in key}
    constant = [key for key, tensor in tensors.items() if tensor.numel() > 1 and tensor.float().std() == 0]
    assert constant == []


@pytest.mark.parametrize("name", [*FAMILIES, *ALSO])
def test_tokens_go_to_different_experts_in_each_layer(name: str) -> None:
    model = made(name)
    chosen = choices(model)
    assert len(chosen) == model.num_layers_moe >= 2
    for expert_TK, weight_TK in chosen.values():
        assert expert_TK.shape == weight_TK.shape
        assert bool(weight_TK.isfinite().all())
        assert len(expert_TK.sort(dim=-1).values.unique(dim=0)) >= 2


@pytest.mark.parametrize("name", [name for name in (*FAMILIES, *ALSO) if name not in WITHOUT_TOKENS])
def test_one_of_two_sequences_is_padded(name: str) -> None:
    inputs = made(name).inputs
    assert inputs["attention_mask"].shape == inputs["input_ids"].shape == (2, 7)
    assert inputs["attention_mask"].sum(dim=1).tolist() == [7, 5]


@pytest.mark.parametrize(("first", "family"), [(one, other) for one in SAME_ROUTER for other in SAME_ROUTER[one]])
def test_routers_that_are_said_to_be_the_same_are(first: str, family: str) -> None:
    one, other = router_of(first), router_of(family)
    assert code(other) == code(one)
    assert ROWS[other.__name__] == ROWS[one.__name__]


def router_of(family: str) -> type:
    (kind,) = {type(part) for part in made(family).model.modules() if type(part).__name__ in ROWS}
    return kind


def code(kind: type) -> list[str]:
    """The source of a router, without its family's name and comments."""
    family = re.split("Top[kK]Router|MoEGate|Moe$|MoE$", kind.__name__)[0]
    lines = [line.split("#")[0].strip() for line in inspect.getsource(kind).replace(family, "").splitlines()]
    return " ".join(lines).split()


@pytest.mark.parametrize("name", TRIED)
def test_a_variant_runs_and_is_another_model(name: str) -> None:
    family, _, _ = name.partition("/")
    [variant, *_], [plain, *_] = outputs(made(name)), outputs(made(family))
    assert bool(variant.isfinite().all())
    if name not in NORMALIZED_AFTERWARDS:
        assert (variant - plain).abs().max() > 1e-3
    chosen, chosen_plainly = choices(made(name)), choices(made(family))
    assert len(chosen) == made(name).num_layers_moe
    assert not all(
        torch.equal(part, plain_part)
        for rows, plain_rows in zip(chosen.values(), chosen_plainly.values(), strict=True)
        for part, plain_part in zip(rows, plain_rows, strict=True)
    )


def test_the_choices_that_lead_to_no_expert_of_weights_occur() -> None:
    zero_experts = torch.cat([expert_TK.flatten() for expert_TK, _ in choices(made("longcat_flash")).values()])
    assert (zero_experts >= 8).any()
    skipped = torch.cat([weight_TK.flatten() for _, weight_TK in choices(made("zaya")).values()])
    assert (skipped == 0).any()
    dropped = torch.cat([weight_TK.flatten() for _, weight_TK in choices(made("switch_transformers/drops")).values()])
    assert (dropped == 0).any()


def test_transformers_gives_nllb_tokens_to_the_first_two_experts_only() -> None:
    # Its experts read the mask of the first choice as expert numbers: 1 where it is set, 0 elsewhere. So the first
    # gate weighs expert 1 and the second expert 0, whatever was chosen. The day this fails, transformers is right.
    block = made("nllb_moe").model.model.encoder.layers[0].ffn
    x_TD = torch.randn(9, 32)
    with torch.no_grad():
        first_TE, gate_TE, _ = block.router(x_TD)
        y_TD = block.experts(x_TD, first_TE, gate_TE)
        outputs = [block.experts[f"expert_{number}"](x_TD) for number in range(8)]
    kept = 1 - block.experts.moe_token_dropout
    chosen_TD = kept * sum(gate_TE[:, number, None] * output_TD for number, output_TD in enumerate(outputs))
    first_T1 = (gate_TE * first_TE).sum(dim=1, keepdim=True)
    done_TD = kept * (first_T1 * outputs[1] + (gate_TE.sum(dim=1, keepdim=True) - first_T1) * outputs[0])
    torch.testing.assert_close(y_TD, done_TD)
    assert (y_TD - chosen_TD).abs().max() > 0.01
