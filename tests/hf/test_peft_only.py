"""Training the weights of chosen experts alone: no optimizer sees the others, and files keep their names."""

import copy

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from moesaic import ConfigError
from moesaic.hf import check_trains, freeze_routers, train_only, undo_train_only
from moesaic.hf.peft.blocks import expert_blocks
from tests.hf.families import tiny
from tests.hf.test_peft import assert_only, chosen_of, experts_of, native, sparse, train
from tests.hf.tiny import assert_equal_tensors, build, recompute

LAYOUTS = ("mixtral", "gpt_oss", "llama4", "jetmoe", "nemotron_h", "switch_transformers", "longcat_flash")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("projections", [("up",), ("gate", "down"), "all"], ids=str)
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_adamw_with_weight_decay_leaves_the_others_to_the_bit(family, projections, dtype):
    model, inputs = native(family)
    model = model.to(dtype)
    before, everything = experts_of(model), {name: one.clone() for name, one in model.state_dict().items()}
    named = ("gate", "up", "down") if projections == "all" else projections
    chosen = chosen_of(model, [1, 3, 6], named)
    trained = undo_train_only(train(train_only(model, experts=[1, 3, 6], projections=projections), inputs))
    assert_only(before, experts_of(trained), chosen)
    for name, tensor in trained.state_dict().items():
        assert torch.equal(tensor, everything[name]) or ".experts." in name, name


@pytest.mark.parametrize("family", LAYOUTS)
def test_one_projection_of_chosen_experts_moves_in_every_layout(family):
    model, inputs = native(family)
    before, chosen = experts_of(model), chosen_of(model, [1, 2, 4], ["up"])
    trained = undo_train_only(train(train_only(model, experts=[1, 2, 4], projections=["up"]), inputs))
    assert_only(before, experts_of(trained), chosen)


@pytest.mark.parametrize("recipe", ["mixtral", "switch", "gpt-oss", "moe++", "soft-moe", "smear"])
def test_only_chosen_experts_of_our_own_models_move(recipe):
    model, inputs = sparse(recipe)
    before, chosen = experts_of(model), chosen_of(model, [0, 1], ["gate", "up", "down"])
    trained = undo_train_only(train(train_only(model, experts=[0, 1]), inputs))
    assert_only(before, experts_of(trained), chosen)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "llama4"])
def test_outputs_and_gradients_are_those_of_the_whole_model(family):
    model, inputs = native(family)
    whole = copy.deepcopy(model).train()
    train_only(model, experts=[1, 3], projections=["up", "down"]).train()
    mine, theirs = model(**inputs), whole(**inputs)
    assert torch.equal(mine.logits, theirs.logits)
    mine.loss.backward()
    theirs.loss.backward()
    up = next(stack for stack in expert_blocks(whole)[0].stacks if "up" in stack.where)
    places = (slice(None), up.where["up"]) if up.dim == 1 else (slice(None), slice(None), up.where["up"])
    for block in expert_blocks(whole):
        chosen = model.get_submodule(block.experts).parametrizations
        expected = whole.get_submodule(block.experts)
        torch.testing.assert_close(chosen.gate_up_proj[0].chosen.grad, expected.gate_up_proj.grad[[1, 3]][places])
        torch.testing.assert_close(chosen.down_proj[0].chosen.grad, expected.down_proj.grad[[1, 3]])
        assert expected.down_proj.grad[[1, 3]].abs().sum() > 0


def test_the_optimizer_has_state_for_the_chosen_only():
    model, inputs = native("mixtral")
    model = train_only(model, experts=[1, 3], layers=[0])
    stepper = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad])
    model(**inputs).loss.backward()
    stepper.step()
    numbers = sum(state["exp_avg"].numel() for state in stepper.state.values())
    assert numbers == 2 * 3 * 24 * 32  # experts, projections, F, D


def test_biases_train_with_their_expert():
    model, inputs = native("gpt_oss")
    before = model.model.layers[0].mlp.experts.down_proj_bias.detach().clone()
    before_up = model.model.layers[0].mlp.experts.gate_up_proj_bias.detach().clone()
    model = undo_train_only(train(train_only(model, experts=[3], projections=["up", "down"]), inputs))
    moved = (model.model.layers[0].mlp.experts.down_proj_bias != before).any(dim=1)
    assert moved.tolist() == [expert == 3 for expert in range(8)]
    moved = model.model.layers[0].mlp.experts.gate_up_proj_bias != before_up
    assert moved[3, 1::2].all()  # up is at odd places
    assert moved.sum() == 24


def test_routers_shared_experts_and_attention_train_if_asked():
    model, inputs = native("qwen2_moe")
    before = {name: one.clone() for name, one in model.state_dict().items()}
    model = train_only(model, layers=[1], experts=[0], router=True, shared=True, attention=True)
    check = check_trains(model, inputs)
    assert len(check.others) == 1 + 4 + 7  # the router, the shared expert with its gate, attention with biases
    undo_train_only(train(model, inputs))
    moved = {name for name, one in model.state_dict().items() if not torch.equal(one, before[name])}
    assert {name.partition("layers.1.")[1] for name in moved} == {"layers.1."}
    assert {name.split("layers.1.")[1].split(".")[1] for name in moved} == {
        *("q_proj", "k_proj", "v_proj", "o_proj"),
        *("gate", "shared_expert", "shared_expert_gate", "experts"),
    }


def test_a_layer_of_which_everything_is_chosen_keeps_its_stacks():
    model, _ = native("mixtral")
    train_only(model, layers=[0])
    trained = [name for name, one in model.named_parameters() if one.requires_grad]
    assert trained == ["model.layers.0.mlp.experts.gate_up_proj", "model.layers.0.mlp.experts.down_proj"]


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [lambda: native("mixtral"), lambda: sparse("mixtral")], ids=["native", "ours"])
def test_a_folder_has_whole_stacks_under_their_names(make, tmp_path):
    model, inputs = make()
    names = list(model.state_dict())
    model.save_pretrained(tmp_path / "before")
    train(train_only(model, experts=[1, 3], projections=["gate", "down"]), inputs)
    assert sorted(model.state_dict()) == sorted(names)
    model.save_pretrained(tmp_path / "after")
    before, after = (load_file(tmp_path / one / "model.safetensors") for one in ("before", "after"))
    assert list(after) == list(before)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "after")
    assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
    assert_equal_tensors(loaded.state_dict(), undo_train_only(model).state_dict())


def test_it_reads_whole_stacks_too():
    model, inputs = native("mixtral")
    other = copy.deepcopy(model)
    trained = train(train_only(model, experts=[1, 3]), inputs)
    train_only(other, experts=[0, 3], projections=["up"])
    other.load_state_dict(trained.state_dict())
    assert torch.equal(other(**inputs).logits, trained(**inputs).logits)


def test_a_copy_trains_for_itself():
    model, inputs = native("mixtral")
    model = train_only(model, experts=[1])
    before = {name: one.clone() for name, one in model.state_dict().items()}
    copied = train(copy.deepcopy(model), inputs)
    assert_equal_tensors(model.state_dict(), before)
    assert not torch.equal(copied(**inputs).logits, model(**inputs).logits)


# --- with the rest ----------------------------------------------------------------------------------------------------


def test_recomputed_activations_give_the_same_gradients():
    model, inputs = native("mixtral")
    train_only(model, experts=[0, 1], projections=["gate"]).train()

    def gradients():
        model.zero_grad()
        model(**inputs).loss.backward()
        return {name: one.grad.clone() for name, one in model.named_parameters() if one.requires_grad}

    expected = gradients()
    recompute(model, {"use_reentrant": False})
    for name, gradient in gradients().items():
        torch.testing.assert_close(gradient, expected[name], msg=name)


def test_generate_works():
    model, inputs = native("mixtral")
    prompt = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    expected = model.generate(**prompt, max_new_tokens=3, do_sample=False)
    assert torch.equal(train_only(model, experts=[0]).generate(**prompt, max_new_tokens=3, do_sample=False), expected)


def test_an_error_within_experts_leaves_no_stale_weights():
    model, inputs = native("mixtral")
    train_only(model, experts=[0, 1, 2, 3])
    experts = model.model.layers[0].mlp.experts
    with pytest.raises(RuntimeError):
        experts(torch.randn(3, 31), torch.zeros(3, 2, dtype=torch.int64), torch.ones(3, 2))
    before = model(**inputs).logits
    with torch.no_grad():
        experts.parametrizations.down_proj[0].chosen.mul_(2)
    assert not torch.equal(model(**inputs).logits, before)


def test_undoing_lets_train_what_trained_before():
    model, _ = native("mixtral")
    model.lm_head.requires_grad_(False)
    before = {name: one.requires_grad for name, one in model.named_parameters()}
    kind, keys = [type(part) for part in model.modules()], list(model.state_dict())
    undo_train_only(train_only(model, experts=[0], projections=["up"]))
    assert {name: one.requires_grad for name, one in model.named_parameters()} == before
    assert [type(part) for part in model.modules()] == kind
    assert sorted(model.state_dict()) == sorted(keys)


def test_twice_or_undone_without_need_is_refused():
    model, _ = native("mixtral")
    with pytest.raises(ConfigError) as error:
        undo_train_only(model)
    assert str(error.value) == (
        "undo_train_only needs a model on which moesaic.hf.train_only was called, got MixtralForCausalLM as it was "
        "loaded. There is nothing to undo."
    )
    train_only(model, experts=[0])
    with pytest.raises(ConfigError, match="train_only needs a model that is as it was loaded, got MixtralForCausalLM"):
        train_only(model, experts=[1])


# --- routers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "gpt_oss", "dbrx", "jetmoe", "switch_transformers"])
def test_frozen_routers_stay_and_the_rest_trains(family):
    model, inputs = native(family)
    before = {name: one.clone() for name, one in model.state_dict().items()}
    train(freeze_routers(model), inputs, steps=2)
    moved = {name for name, one in model.state_dict().items() if not torch.equal(one, before[name])}
    routers = {name for name in before if ".router." in name or ".mlp.gate." in name}
    assert routers
    assert not routers & moved
    assert any("experts" in name or "linear" in name for name in moved)


def test_the_routers_of_our_own_models_freeze():
    model, _ = sparse("deepseek-v3")
    freeze_routers(model)
    frozen = [name for name, one in model.named_parameters() if not one.requires_grad]
    assert frozen == [f"model.layers.{layer}.mlp.moe.router.weight" for layer in (0, 1)]


def test_a_model_without_routers_is_refused():
    with pytest.raises(
        ConfigError, match="freeze_routers needs routers with parameters, and LlamaForCausalLM has none"
    ):
        freeze_routers(build("llama"))
    with pytest.raises(ConfigError, match="SparseLlamaForCausalLM has none"):
        freeze_routers(sparse("hash")[0])
    assert tiny("mixtral").family == "mixtral"
