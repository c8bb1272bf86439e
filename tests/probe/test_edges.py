"""Margins are what sorting by hand gives, and rounding turns those choices that were close."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from moesaic import hf
from moesaic.core.errors import ConfigError
from moesaic.hf import moe_layers, sparsify
from moesaic.probe import HeldOut, margins
from moesaic.probe.rounding import bfloat16, int8
from tests.hf.families import tiny, written_for_this_transformers
from tests.hf.test_forward import sparse
from tests.hf.tiny import OPTIONS, build
from tests.probe.planted import planted_text


def reads(model, text):
    """What the router of the first layer reads, and the choices that it makes."""
    router = next(iter(moe_layers(model).values())).router
    seen = []
    handle = router.register_forward_hook(lambda _module, args, routing: seen.append((args[0], routing)))
    with torch.no_grad():
        model(input_ids=text.input_ids_BP, attention_mask=text.valid_BP.long())
    handle.remove()
    real = (text.text_BP >= 0).reshape(-1)
    return router, seen[0][0][real], seen[0][1].expert_N.view(-1, router.top_k)[real]


@pytest.fixture(scope="module")
def measured():
    torch.manual_seed(0)
    model, text = sparse("llama"), planted_text()
    return model, text, margins(model, text, batch_size=100)


def test_the_margin_is_between_the_last_chosen_and_the_first_left_out(measured):
    model, text, found = measured
    router, x_TD, expert_TK = reads(model, text)
    logits = (x_TD.double() @ router.weight.double().T).detach().numpy()
    wanted = []
    for line, chosen in zip(logits, expert_TK.tolist(), strict=True):
        others = [value for expert, value in enumerate(line) if expert not in chosen]
        wanted.append(min(line[expert] for expert in chosen) - max(others))
    first = found.layers[0]
    assert first.scale == "logits"
    assert first.num_tokens == len(wanted)
    for share, value in first.quantiles.items():
        assert value == pytest.approx(np.quantile(wanted, share), abs=1e-6)


def test_flips_are_what_rounded_products_choose(measured):
    model, text, found = measured
    router, x_TD, expert_TK = reads(model, text)
    weight = router.weight.detach()
    products = {
        "router in bfloat16": (x_TD.bfloat16() @ weight.bfloat16().T).float(),
        "router weights in bfloat16": x_TD @ weight.bfloat16().float().T,
        "router weights in int8": x_TD @ by_hand_int8(weight).T,
        "router weights and inputs in int8": by_hand_int8(x_TD) @ by_hand_int8(weight).T,
    }
    told = {one.what: one for one in found.layers[0].flips}
    for name, logits in products.items():
        chosen = logits.argsort(dim=-1, descending=True)[:, :2].sort(dim=-1).values
        share = float((chosen != expert_TK.sort(dim=-1).values).any(dim=-1).double().mean())
        assert told[name].share == pytest.approx(share, abs=2.5 / len(x_TD)), name
        assert told[name].low <= told[name].share <= told[name].high
        assert not told[name].end_to_end
    assert told["model in bfloat16"].end_to_end


def by_hand_int8(x):
    rows = []
    for row in x:
        scale = 127 / float(row.abs().max())
        rows.append(torch.tensor([round(float(value) * scale) / scale for value in row]))
    return torch.stack(rows)


def test_coarser_numbers_turn_more_choices():
    torch.manual_seed(0)
    model, text = sparse("llama"), planted_text(40, 30)
    for layer in margins(model, text, end_to_end=False).layers:
        told = {one.what: one.share for one in layer.flips}
        assert 0 < told["router in bfloat16"] < told["router weights and inputs in int8"] < 0.5
        assert told["router weights in int8"] <= 1.5 * told["router weights and inputs in int8"]


def test_choices_far_apart_do_not_turn_and_ties_have_no_margin():
    torch.manual_seed(0)
    model, text = sparse("llama", "deepseek-v3"), planted_text()
    for layer in moe_layers(model).values():
        layer.router.bias_E.copy_(torch.tensor([9.0, 6.0, 3.0, 0.0]))
    for layer in margins(model, text).layers:
        assert layer.scale == "scores plus bias"
        assert layer.quantiles[0.001] > 2
        assert all(one.share == 0 for one in layer.flips)
    with torch.no_grad():
        for layer in moe_layers(model).values():
            layer.router.weight.zero_()
            layer.router.bias_E.zero_()
    assert margins(model, text, end_to_end=False).layers[0].quantiles[0.75] == 0


def test_end_to_end_is_the_model_loaded_in_bfloat16(measured, tmp_path):
    model, text, found = measured
    model.save_pretrained(tmp_path)
    other = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    _, _, here = reads(model, text)
    _, _, there = reads(other.eval(), text)
    share = float((here.sort(dim=-1).values != there.sort(dim=-1).values).any(dim=-1).double().mean())
    told = {one.what: one for one in found.layers[0].flips}
    assert told["model in bfloat16"].share == pytest.approx(share)


@written_for_this_transformers
@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3/groups", "gpt_oss", "jetmoe", "dbrx", "llama4", "gemma4"])
def test_families_of_transformers_are_measured_and_stay_as_they_were(name):
    made = tiny(name)
    kinds = [type(part) for part in made.model.modules()]
    text = HeldOut.from_ids({"a": list(torch.randint(3, 60, (3, 9))), "b": list(torch.randint(3, 60, (3, 7)))})
    found = margins(made.model, text, batch_size=2)
    assert [type(part) for part in made.model.modules()] == kinds
    with torch.no_grad(), hf.record(made.model) as trace:
        made.model(input_ids=text.input_ids_BP, attention_mask=text.valid_BP.long())
    assert len(found.layers) == trace.num_layers
    for layer in found.layers:
        assert layer.num_tokens == 3 * 8 + 3 * 6
        assert layer.quantiles[0.001] >= 0
        assert [one.what for one in layer.flips][-1] == "model in bfloat16"


def test_everything_is_told_as_json_and_as_a_table(measured):
    _, _, found = measured
    told = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert told["layers"][0]["quantiles"]["0.5"] == found.layers[0].quantiles[0.5]
    assert len(found.rows()) == 2 * 5


def test_numbers_are_rounded_as_quantisation_does():
    x = torch.tensor([[1.0, -0.5, 0.0], [0.0, 0.0, 0.0]])
    assert torch.allclose(int8(x), torch.tensor([[1.0, -64 / 127, 0.0], [0.0, 0.0, 0.0]]))
    assert bfloat16(torch.tensor([1.001]))[0] == 1.0
    assert not math.isnan(float(int8(x).sum()))


def test_routers_without_a_choice_of_k_are_refused():
    text = planted_text(2, 5)
    top_p = sparsify(build("llama"), "top-p", layers="all", **OPTIONS["top-p"])
    with pytest.raises(ConfigError, match=r"Margins need a router .* got TopPRouter at model.layers.0.mlp"):
        margins(top_p, text)
    with pytest.raises(ConfigError, match="MoE layers"):
        margins(build("llama"), text)
