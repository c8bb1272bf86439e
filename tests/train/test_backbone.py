from dataclasses import replace

import pytest
import torch
from transformers import set_seed

from moesaic.core.errors import ConfigError
from moesaic.data import load_tokenizer
from moesaic.hf import active_params, moe_layers
from moesaic.train.backbone import FAMILIES, Backbone, twin_hidden
from moesaic.train.build import build_model

NUMBERS = {"width": 16, "layers": 2, "heads": 2, "hidden": 24, "context": 32, "vocab_size": 50, "end_token": 49}
MODEL_TYPES = {"lstm": "moesaic-lstm"}
# Of each family, matrices that are drawn with the spread that was asked for: T5 has its own, by fan-in.
DRAWN = {
    "llama": "q_proj.weight",
    "qwen3": "q_proj.weight",
    "gpt2": "c_attn.weight",
    "jamba": "in_proj.weight",
    "lstm": "weight_hh_l0",
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_backbone_is_built_from_its_numbers_alone(family):
    backbone = Backbone(family=family, init_std=0.1, **NUMBERS)
    set_seed(0)
    model = backbone.build()
    assert model.config.model_type == MODEL_TYPES.get(family, family)
    inputs = {"input_ids": torch.arange(20)[None]}
    if backbone.is_encoder_decoder:
        inputs["labels"] = torch.arange(17)[None]
    assert model(**inputs).logits.shape == (1, 17 if backbone.is_encoder_decoder else 20, 50)
    assert backbone.num_params() == sum(parameter.numel() for parameter in model.parameters())
    if family in DRAWN:
        matrices = [p.flatten() for name, p in model.named_parameters() if DRAWN[family] in name]
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
    config = tiny(backbone=family, recipe=recipe, top_k=2, heads=None)
    tokenizer = load_tokenizer("bytes")
    sparse, dense = (build_model(kind, config, tokenizer) for kind in ("moe", "dense"))
    active, total = active_params(sparse), active_params(dense)
    # One more hidden unit in every layer is the finest step there is: at most three vectors and a bias each.
    networks = {"t5": 4, "lstm": 1}.get(family, 2)
    assert active <= total < active + networks * (3 * config.width + 1)


def test_a_twin_that_cannot_be_small_enough_is_refused():
    backbone = Backbone(family="llama", init_std=0.1, **NUMBERS)
    with pytest.raises(ConfigError) as error:
        twin_hidden(backbone, 7)
    least = replace(backbone, hidden=1).num_params()
    assert str(error.value) == (
        f"a dense llama of width 16 has at least {least} parameters, but the sparse model has only 7 active ones. "
        "Raise hidden or top_k, or train without the twin."
    )


@pytest.mark.parametrize(
    ("layers", "pattern"),
    [(1, "a"), (2, "ma"), (4, "mmam"), (5, "mmmma"), (8, "mmmmammm"), (16, "mmmmammmmmmmammm")],
)
def test_a_hybrid_has_the_published_pattern_and_always_attention(layers, pattern):
    backbone = Backbone(family="jamba", init_std=0.1, **NUMBERS | {"layers": layers})
    assert "".join(kind[0] for kind in backbone.config().layers_block_type) == pattern


def test_t5_is_drawn_as_published_and_its_experts_as_asked(tiny):
    config = tiny(backbone="t5", width=64, init_std=0.3)
    model = build_model("moe", config, load_tokenizer("bytes"))
    query = model.encoder.block[0].layer[0].SelfAttention.q.weight
    assert float(query.detach().std()) == pytest.approx((64 * 32) ** -0.5, rel=0.1)
    for layer in moe_layers(model).values():
        assert float(layer.experts.up_EDF.detach().std()) == pytest.approx(0.3, rel=0.1)


@pytest.mark.parametrize(
    ("backbone", "moe_layers_", "expected"),
    [
        ("llama", "all", ["model.layers.0.mlp", "model.layers.1.mlp"]),
        ("jamba", "every-2", ["model.layers.1.feed_forward"]),
        ("gpt2", "0", ["transformer.h.0.mlp"]),
        ("t5", "1,2", ["encoder.block.1.layer.1.DenseReluDense", "decoder.block.0.layer.2.DenseReluDense"]),
    ],
)
def test_moe_layers_says_where_the_mixtures_stand(tiny, backbone, moe_layers_, expected):
    model = build_model("moe", tiny(backbone=backbone, moe_layers=moe_layers_), load_tokenizer("bytes"))
    assert list(moe_layers(model)) == expected
