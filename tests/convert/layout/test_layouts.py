"""Where the experts of any family stand, and that they come out and go back bit for bit."""

import pytest
import torch

import moesaic as mz
from moesaic import recipes
from moesaic.convert.checkpoint.blueprint import Blueprint
from moesaic.convert.checkpoint.source import open_source
from moesaic.convert.layout.forms import form_of
from moesaic.convert.layout.layouts import moe_layouts
from moesaic.convert.weights.stack import ExpertStack
from tests.hf.families import FAMILIES, tiny, written_for_this_transformers
from tests.hf.tiny import OPTIONS, build

# Experts that are no networks of their own (product keys, one per data set), attention experts, or with norms inside.
OTHER = {"doge", "jetmoe", "muse_spark", "vitpose_backbone", "longcat_flash"}


def check_layouts(model):
    state = model.state_dict()
    layouts = moe_layouts(open_source(model).blueprint)
    for block, layout in layouts.items():
        assert model.get_submodule(block) is not None
        stack = layout.read(state)
        assert stack.num_experts == layout.num_experts
        written = layout.write(stack)
        assert set(written) == set(layout.weights) == set(layout.written(layout.num_experts))
        assert all(torch.equal(tensor, state[name]) for name, tensor in written.items())
        assert all(state[name].shape[dim] == layout.num_experts for name, dims in layout.rows.items() for dim in dims)
        fewer = ExpertStack(
            **{
                field: None if (tensor := getattr(stack, field)) is None else tensor[:3]
                for field in ExpertStack.__slots__
            }
        )
        assert set(layout.write(fewer)) == set(layout.written(3))
    return layouts


@written_for_this_transformers
@pytest.mark.parametrize("family", sorted(set(FAMILIES) - OTHER))
def test_experts_of_every_family_come_out_and_go_back(family):
    case = tiny(family)
    layouts = check_layouts(case.model)
    assert len(layouts) >= case.num_layers_moe
    assert {layout.num_experts for layout in layouts.values()} == {4 if family in ("dbrx", "zaya") else 8}


@written_for_this_transformers
@pytest.mark.parametrize("family", sorted(OTHER))
def test_experts_of_another_kind_are_not_taken_for_networks(family):
    assert moe_layouts(open_source(tiny(family).model).blueprint) == {}


@pytest.mark.parametrize("recipe", recipes.names())
@pytest.mark.filterwarnings("ignore:In recipe .* a token's experts depend on later tokens:UserWarning")
def test_experts_of_every_recipe_come_out_and_go_back(recipe):
    model = mz.sparsify(build("llama"), recipe, **OPTIONS[recipe])
    layouts = check_layouts(model)
    # Of one kind and stacked, or of several kinds, low rank or deep.
    assert len(layouts) == (0 if recipe in {"base", "lora-moe", "mole", "mixlora", "moe++"} else 2)


@written_for_this_transformers
@pytest.mark.parametrize(
    ("name", "rows", "shared", "groups"),
    [
        ("mixtral", {".gate.weight": (0,)}, None, 1),
        ("gpt_oss", {".router.weight": (0,), ".router.bias": (0,)}, None, 1),
        (
            "ernie4_5_moe",
            {".gate.weight": (0,), ".gate.moe_statics.e_score_correction_bias": (1,)},
            ".shared_experts",
            1,
        ),
        ("deepseek_v3", {".gate.weight": (0,), ".gate.e_score_correction_bias": (0,)}, ".shared_experts", 1),
        ("deepseek_v3/groups", {".gate.weight": (0,), ".gate.e_score_correction_bias": (0,)}, ".shared_experts", 4),
        ("qwen2_moe", {".gate.weight": (0,)}, ".shared_expert", 1),
        ("minimax_m2", {".gate.weight": (0,), ".e_score_correction_bias": (0,)}, None, 1),
    ],
)
def test_what_a_router_has_for_each_expert_is_found_without_a_table_of_names(name, rows, shared, groups):
    layouts = moe_layouts(open_source(tiny(name).model).blueprint)
    block, layout = next(iter(layouts.items()))
    assert {row.removeprefix(block): dims for row, dims in layout.rows.items()} == rows
    assert (layout.shared and layout.shared.path.removeprefix(block)) == shared
    assert layout.groups == groups
    assert layout.top_k == (3 if "/" in name else 2)
    assert layout.entangled == ()


@pytest.mark.parametrize(
    ("recipe", "name"),
    [("hierarchical-2017", "group_GD"), ("attention", "weight"), ("cosine", "embedding_ER")],
)
def test_what_depends_on_the_number_of_experts_in_another_way_is_told_apart(recipe, name):
    model = mz.sparsify(build("llama"), recipe, **OPTIONS[recipe])
    layout = next(iter(moe_layouts(open_source(model).blueprint).values()))
    assert f"{layout.block}.moe.router.{name}" in layout.entangled
    assert f"{layout.block}.moe.router.{name}" not in layout.rows


@written_for_this_transformers
def test_a_class_that_is_no_expert_is_told_apart():
    """ZAYA's router has a class more than there are experts: to skip."""
    layout = next(iter(moe_layouts(open_source(tiny("zaya").model).blueprint).values()))
    assert layout.rows == {}
    assert any(name.endswith("router_mlp.out_proj.weight") for name in layout.entangled)


def test_a_router_as_wide_as_it_has_experts_is_not_turned():
    """8 experts in a model of width 8: the shapes do not tell which dimension counts experts."""
    model = mz.sparsify(build("llama", hidden_size=8, head_dim=4), "mixtral", num_experts=8)
    layout = next(iter(moe_layouts(open_source(model).blueprint).values()))
    assert layout.rows == {"model.layers.0.mlp.moe.router.weight": (0,)}


def test_numbers_of_our_own_layers():
    model = mz.sparsify(
        build("llama"), "deepseek-v3", num_experts=8, top_k=3, num_groups=4, groups_kept=2, num_shared=2
    )
    layout = next(iter(moe_layouts(open_source(model).blueprint).values()))
    assert (layout.num_experts, layout.top_k, layout.groups, layout.groups_kept) == (8, 3, 4, 2)
    assert layout.activation == "silu"
    assert set(layout.rows) == {f"{layout.block}.moe.router.{name}" for name in ("weight", "bias_E")}
    shared = layout.shared.read(model.state_dict())
    assert (shared.width, shared.hidden) == (16, 48)
    assert layout.shared.token_gate is None


def test_a_dense_model_has_no_layouts():
    assert moe_layouts(Blueprint.from_model(build("llama"))) == {}
    assert form_of(torch.nn.Linear(2, 2)) is None
