from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from moesaic.convert.checkpoint.source import open_source
from moesaic.convert.layout.counts import shrinkable
from moesaic.convert.run import convert
from moesaic.convert.shrink.calibration import calibrate
from moesaic.convert.shrink.fewer import fewer_choices
from moesaic.convert.shrink.prune import pruned
from moesaic.core.errors import ConfigError
from moesaic.hf import sparsify
from tests.convert.plain import VOCABULARY, native
from tests.hf.families import FAMILIES, tiny, written_for_this_transformers
from tests.hf.tiny import build

# Who cannot lose an expert: no experts or no rows of their own, tables, choices that are no experts.
WHOLE = {
    *("deepseek_v4", "diffusion_gemma", "doge", "inkling", "jetmoe", "longcat_flash", "muse_spark", "nllb_moe"),
    *("vitpose_backbone", "zaya"),
}


def logits(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "gpt_oss", "deepseek_v3"])
def test_each_token_visits_fewer_experts_and_the_gap_is_told(family, tmp_path):
    model = native(family).float()
    converted = fewer_choices(model, 2, out=tmp_path / "new")
    ids = torch.randint(3, VOCABULARY, (2, 6))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "new")
    stats = calibrate(loaded, [ids])
    assert {int(one.count_E.sum()) for one in stats.values()} == {2 * 12}
    assert converted.receipt.largest_logit_difference > 0
    assert converted.receipt.notes == ("each token visits 2 experts instead of 3",)
    assert (converted.receipt.consumed, converted.receipt.made) == (0, 0)
    assert torch.allclose(logits(loaded, ids), logits(converted.model, ids), atol=1e-4)
    before = model.state_dict()
    assert all(torch.equal(before[name], tensor) for name, tensor in loaded.state_dict().items())


def test_our_models_can_do_with_fewer_choices():
    model = sparsify(build("llama"), "deepseek-v3", num_experts=4, top_k=3).eval()
    converted = fewer_choices(model, 2, probe=torch.randint(3, VOCABULARY, (2, 6)))
    assert [block.mlp.moe.router.top_k for block in converted.model.model.layers] == [2, 2]
    assert [block.mlp.moe.router.top_k for block in model.model.layers] == [3, 3]


def test_what_is_not_fewer_or_cannot_be_built_is_refused():
    for top_k in (3, 0):
        with pytest.raises(ConfigError) as error:
            fewer_choices(native("mixtral"), top_k)
        assert f"below what it is now, 3 at model.layers.0.mlp.experts, got {top_k}" in str(error.value)
    with pytest.raises(ConfigError, match="top_k=1 needs weights that depend on the router"):
        fewer_choices(sparsify(build("llama"), "mixtral", num_experts=4, top_k=2), 1)
    with pytest.raises(ConfigError, match="below what it is now, None at"):
        fewer_choices(sparsify(build("llama"), "top-p", num_experts=4), 1)


@written_for_this_transformers
@pytest.mark.parametrize("family", sorted(set(FAMILIES) - WHOLE))
def test_renaming_experts_changes_nothing_in_any_family(family):
    """Experts in another order, each with its row, bias and scale: a tensor that stayed behind would be noticed."""
    made = tiny(family)
    source = open_source(made.model)
    order = {}
    for path, layout in shrinkable(source.blueprint).items():
        each = layout.num_experts // layout.groups
        order[path] = torch.cat([torch.randperm(each) + group * each for group in range(layout.groups)])
    converted = convert(source, pruned(source, order), None, probe=made.inputs)
    assert converted.receipt.largest_logit_difference < 1e-5


@written_for_this_transformers
@pytest.mark.parametrize("family", sorted(WHOLE - {"diffusion_gemma", "nllb_moe"}))
def test_families_that_cannot_lose_an_expert_are_refused(family):
    source = open_source(tiny(family).model)
    with pytest.raises(ConfigError, match=r"cannot be made smaller|has no MoE layers whose experts can be taken apart"):
        pruned(source, {path: torch.arange(2) for path in shrinkable(source.blueprint)})
