from dataclasses import replace

import pytest
import torch
from transformers import set_seed

from moesaic.core.errors import ConfigError
from moesaic.data import load_tokenizer
from moesaic.hf import active_params
from moesaic.train.backbone import Backbone, twin_hidden
from moesaic.train.build import build_model

NUMBERS = {"width": 16, "layers": 2, "heads": 2, "hidden": 24, "context": 32, "vocab_size": 50, "end_token": 49}
FAMILIES = ("llama", "qwen3", "gpt2")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_backbone_is_built_from_its_numbers_alone(family):
    backbone = Backbone(family=family, init_std=0.1, **NUMBERS)
    set_seed(0)
    model = backbone.build()
    assert model.config.model_type == family
    assert model(input_ids=torch.arange(20)[None]).logits.shape == (1, 20, 50)
    assert backbone.num_params() == sum(parameter.numel() for parameter in model.parameters())
    matrices = [
        p.flatten() for name, p in model.named_parameters() if "q_proj.weight" in name or "c_attn.weight" in name
    ]
    assert float(torch.cat(matrices).detach().std()) == pytest.approx(0.1, rel=0.1)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_twin_has_the_fewest_parameters_that_are_not_fewer_than_the_active_ones(family):
    backbone = Backbone(family=family, init_std=0.1, **NUMBERS)
    for active in (backbone.num_params(), backbone.num_params() + 1, backbone.num_params() + 12345):
        hidden = twin_hidden(backbone, active)
        assert replace(backbone, hidden=hidden).num_params() >= active
        assert replace(backbone, hidden=hidden - 1).num_params() < active


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("recipe", ["switch", "mixtral", "deepseek-v3"])
def test_the_comparison_is_not_tilted_towards_the_moe(tiny, family, recipe):
    config = tiny(backbone=family, recipe=recipe, top_k=2)
    tokenizer = load_tokenizer("bytes")
    sparse, dense = (build_model(kind, config, tokenizer) for kind in ("moe", "dense"))
    active, total = active_params(sparse), active_params(dense)
    # One more hidden unit in both layers is the finest step there is: at most three vectors and a bias each.
    assert active <= total < active + 2 * (3 * config.width + 1)


def test_a_twin_that_cannot_be_small_enough_is_refused():
    backbone = Backbone(family="llama", init_std=0.1, **NUMBERS)
    with pytest.raises(ConfigError) as error:
        twin_hidden(backbone, 7)
    least = replace(backbone, hidden=1).num_params()
    assert str(error.value) == (
        f"a dense llama of width 16 has at least {least} parameters, but the sparse model has only 7 active ones. "
        "Raise hidden or top_k, or train without the twin."
    )
