"""LoRA on chosen experts: what was not chosen stays to the bit, and PEFT reads and merges what comes out."""

import copy
import sys
import warnings

import pytest
import torch
from torch.nn.utils import clip_grad_norm_

from moesaic import BackendError, ConfigError, recipes
from moesaic.hf import (
    balance,
    check_trains,
    controllers,
    domains,
    lora,
    moe_layers,
    sparsify,
    train_only,
    undo_train_only,
)
from moesaic.hf.peft.blocks import expert_blocks, modules_of, weights_of
from tests.hf.families import tiny
from tests.hf.tiny import OPTIONS, batch, build, recompute

peft = pytest.importorskip("peft")
# PEFT 0.21 asks transformers 5.23 for this by its old name.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

# Every layout that transformers has: halves side by side, interleaved, transposed and not, said or not; stacks in
# modules of their own; no gate; experts that are modules; identity experts counted in one stack.
LAYOUTS = ("mixtral", "gpt_oss", "llama4", "jetmoe", "nemotron_h", "switch_transformers", "longcat_flash")


def native(family):
    """A tiny model of a family in transformers and a batch with labels."""
    made = tiny(family)
    return made.model, {**made.inputs, "labels": made.inputs.get("decoder_input_ids", made.inputs["input_ids"])}


def sparse(recipe, family="llama", **options):
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some recipes look ahead, and say so
        model = sparsify(build(family), recipe, **OPTIONS[recipe] | options)
    return model, batch(family)


def train(model, inputs, *, steps=4, optimizer=torch.optim.AdamW, **options):
    options = options or {"lr": 1e-2, "weight_decay": 0.1}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    stepper = optimizer(trained, **options)
    model.train()
    for _ in range(steps):
        model(**inputs).loss.backward()
        clip_grad_norm_(trained, 0.5)
        stepper.step()
        stepper.zero_grad()
    return model.eval()


def experts_of(model):
    """The weights of every (layer, expert, projection), copied."""
    found, modules = {}, modules_of(model)
    for block in expert_blocks(model):
        for stack in block.stacks:
            weight = weights_of(modules[stack.path])[stack.name].detach()
            for projection, places in stack.where.items():
                for expert in range(block.num_experts):
                    at = (expert, places) if stack.dim == 1 else (expert, slice(None), places)
                    found[block.index, expert, projection] = weight[at].clone()
        for (expert, projection), path in block.linears.items():
            found[block.index, expert, projection] = modules[path].weight.detach().clone()
    return found


def assert_only(before, after, chosen):
    """What changed is among the chosen, and most of those did."""
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed <= chosen
    assert len(changed) >= len(chosen) / 2  # the others got no tokens


def chosen_of(model, experts, projections):
    return {
        (block.index, expert, projection)
        for block in expert_blocks(model)
        for expert in experts
        for projection in projections
        if projection in block.projections
    }


# --- what was not chosen stays ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("projections", [("up",), ("gate", "down"), "all"], ids=str)
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "aria"])
def test_adamw_with_weight_decay_and_clipping_leaves_the_others_to_the_bit(family, projections, dtype):
    model, inputs = native(family)
    model = model.to(dtype)
    before = experts_of(model)
    named = ("gate", "up", "down") if projections == "all" else projections
    chosen = chosen_of(model, [1, 3, 6], named)
    adapted = lora(model, rank=2, experts=[1, 3, 6], projections=projections)
    merged = train(adapted, inputs).merge_and_unload()
    assert_only(before, experts_of(merged), chosen)


@pytest.mark.parametrize("family", LAYOUTS)
def test_only_one_projection_of_chosen_experts_moves_in_every_layout(family):
    model, inputs = native(family)
    before, chosen = experts_of(model), chosen_of(model, [1, 2, 4], ["up"])
    merged = train(lora(model, rank=2, experts=[1, 2, 4], projections=["up"]), inputs).merge_and_unload()
    assert_only(before, experts_of(merged), chosen)


@pytest.mark.parametrize("recipe", ["switch", "mixtral", "deepseek-v3", "gpt-oss", "moe++", "pr-moe", "soft-moe"])
def test_only_chosen_experts_of_our_own_models_move(recipe):
    model, inputs = sparse(recipe)
    before = experts_of(model)
    projections = [one for one in ("gate", "down") if one in expert_blocks(model)[0].projections]
    chosen = chosen_of(model, [0, 1], projections)
    merged = train(lora(model, rank=2, experts=[0, 1], projections=projections), inputs).merge_and_unload()
    assert_only(before, experts_of(merged), chosen)


@pytest.mark.parametrize(
    ("optimizer", "options"),
    [
        (torch.optim.SGD, {"lr": 0.5, "momentum": 0.9, "weight_decay": 0.1}),
        (torch.optim.RMSprop, {"lr": 1e-2, "centered": True, "weight_decay": 0.1}),
        (torch.optim.Adagrad, {"lr": 1e-1, "weight_decay": 0.1}),
        (torch.optim.Muon, {"lr": 1e-1, "weight_decay": 0.1}),
    ],
    ids=lambda one: getattr(one, "__name__", ""),
)
def test_other_optimizers_leave_the_others_too(optimizer, options):
    model, inputs = native("mixtral")
    before, chosen = experts_of(model), chosen_of(model, [1, 3], ["gate"])
    adapted = lora(model, rank=2, experts=[1, 3], projections=["gate"])
    merged = train(adapted, inputs, optimizer=optimizer, **options).merge_and_unload()
    assert_only(before, experts_of(merged), chosen)


def test_layers_have_experts_of_their_own():
    model, inputs = native("qwen2_moe")
    before = experts_of(model)
    merged = train(lora(model, rank=2, experts={0: [1, 5], 2: [0]}), inputs, steps=2).merge_and_unload()
    experts = {(0, 1), (0, 5), (2, 0)}
    chosen = {(layer, expert, one) for layer, expert in experts for one in ("gate", "up", "down")}
    assert_only(before, experts_of(merged), chosen)


def test_ranks_may_differ_by_expert():
    model, inputs = native("mixtral")
    before = experts_of(model)
    adapted = train(lora(model, rank={0: {1: 4, 3: 1}, 1: {3: 2}}, alpha=8), inputs)
    assert adapted.peft_config["default"].r == 4
    merged = experts_of(adapted.merge_and_unload())
    for key, rank in {(0, 1): 4, (0, 3): 1, (1, 3): 2}.items():
        for projection in ("up", "down"):
            change = (merged[(*key, projection)] - before[(*key, projection)]).double()
            # Rounding of the sum in float32 is noise of full rank.
            assert int((torch.linalg.svdvals(change) > 1e-6).sum()) == rank
    changed = {key[:2] for key in before if not torch.equal(before[key], merged[key])}
    assert changed == {(0, 1), (0, 3), (1, 3)}


# --- with PEFT there and back -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("beside", [{}, {"router": True, "shared": True, "attention": True}], ids=["experts", "all"])
@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v3", "gpt_oss", "afmoe", "switch_transformers"])
def test_an_adapter_loads_with_peft_and_gives_the_same(family, beside, tmp_path):
    model, inputs = native(family)
    base = copy.deepcopy(model)
    if not any(block.shared for block in expert_blocks(model)):
        beside = {name: one for name, one in beside.items() if name != "shared"}
    adapted = train(lora(model, rank=2, experts=[0, 1, 2], **beside), inputs)
    expected = adapted(**inputs).logits
    assert not torch.equal(expected, base(**inputs).logits)
    adapted.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    assert torch.equal(loaded(**inputs).logits, expected)
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(merged(**inputs).logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("recipe", ["mixtral", "deepseek-v3", "switch", "qwen1.5-moe"])
def test_an_adapter_of_our_own_model_loads_with_peft_and_gives_the_same(recipe, tmp_path):
    model, inputs = sparse(recipe)
    base = copy.deepcopy(model)
    shared = any(block.shared for block in expert_blocks(model))
    adapted = lora(model, rank=2, experts=[0, 3], router=True, shared=shared, attention=True)
    for steered in controllers(adapted):
        steered.controller.step(torch.tensor([5, 1, 0, 2]))
    expected = train(adapted, inputs)(**inputs).logits
    adapted.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    assert torch.equal(loaded(**inputs).logits, expected)
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(merged(**inputs).logits, expected, atol=1e-5, rtol=1e-5)
    if controllers(model):
        assert merged.model.layers[0].mlp.moe.router.bias_E.abs().sum() > 0


def test_what_peft_has_loaded_trains_on_without_moving_the_others(tmp_path):
    model, inputs = native("mixtral")
    base, before, chosen = copy.deepcopy(model), experts_of(model), chosen_of(model, [1, 3], ["gate", "up", "down"])
    train(lora(model, rank=2, experts=[1, 3]), inputs, steps=1).save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path, is_trainable=True)
    assert str(check_trains(loaded, inputs, experts=[1, 3])).startswith("18 of 18 projections")
    assert_only(before, experts_of(train(loaded, inputs).merge_and_unload()), chosen)


def test_an_adapter_of_one_projection_goes_on_after_the_same_call(tmp_path):
    model, inputs = native("mixtral")
    base, before, chosen = copy.deepcopy(model), experts_of(model), chosen_of(model, [1, 3], ["up"])
    asked = {"rank": 2, "experts": [1, 3], "projections": ["up"]}
    first = train(lora(model, **asked), inputs, steps=1)
    expected = first(**inputs).logits
    first.save_pretrained(tmp_path)
    again = lora(base, **asked)
    again.load_adapter(tmp_path, "default", is_trainable=True)
    assert torch.equal(again.eval()(**inputs).logits, expected)
    assert_only(before, experts_of(train(again, inputs).merge_and_unload()), chosen)


def test_peft_alone_does_not_hold_a_projection_and_the_check_says_so(tmp_path):
    model, inputs = native("mixtral")
    base = copy.deepcopy(model)
    train(lora(model, rank=2, experts=[1], projections=["up"]), inputs, steps=1).save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path, is_trainable=True)
    with pytest.raises(ConfigError, match=r"would move layer 0 \(model.layers.0.mlp\), expert 1, gate, which"):
        check_trains(loaded, inputs, experts=[1], projections=["up"])


def test_the_adapter_holds_just_what_was_asked_for():
    model, _ = native("qwen2_moe")
    adapted = lora(model, rank=2, layers=[1], projections=["down"])
    config = adapted.peft_config["default"]
    assert list(config.target_parameters) == ["model.layers.1.mlp.experts.down_proj"]
    assert not config.target_modules
    assert isinstance(adapted, peft.PeftModelForCausalLM)
    trained = [name for name, one in adapted.named_parameters() if one.requires_grad]
    assert [name.partition(".mlp.")[2] for name in trained] == [
        "experts.lora_A.default.weight",
        "experts.lora_B.default.weight",
    ]


def test_shared_experts_are_left_alone_where_peft_would_take_them_for_all():
    # With target_modules=["up_proj", "down_proj"], PEFT adapts shared experts and no others.
    model, inputs = native("deepseek_v3")
    adapted = lora(model, rank=2)
    assert not any("shared" in name for name, one in adapted.named_parameters() if one.requires_grad)
    merged = train(adapted, inputs).merge_and_unload()
    fresh = tiny("deepseek_v3").model
    for layer in (1, 2):
        mine, theirs = merged.model.layers[layer].mlp, fresh.model.layers[layer].mlp
        assert torch.equal(mine.shared_experts.up_proj.weight, theirs.shared_experts.up_proj.weight)
        assert not torch.equal(mine.experts.down_proj, theirs.experts.down_proj)


def test_the_scale_and_options_are_those_of_peft():
    model, inputs = native("mixtral")
    plain = copy.deepcopy(model)
    adapted = train(lora(model, rank=2, alpha=6, use_rslora=True), inputs)
    settings = peft.LoraConfig(
        r=2,
        lora_alpha=6,
        use_rslora=True,
        target_modules=[],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    )
    theirs = peft.get_peft_model(plain, settings)
    theirs.load_state_dict(adapted.state_dict())
    assert torch.equal(theirs.eval()(**inputs).logits, adapted(**inputs).logits)


# --- with the rest of transformers and of Moesaic ---------------------------------------------------------------------


def test_balance_losses_reach_the_loss_and_the_router():
    model, inputs = sparse("deepseek-v3", balance={"switch": 0.1})
    adapted = lora(model, rank=2, router=True).train()
    output = adapted(**inputs)
    with balance(adapted) as terms:
        again = adapted(**inputs)
    torch.testing.assert_close(output.aux_loss, terms.total)
    torch.testing.assert_close(again.loss, output.loss)
    output.aux_loss.backward()
    trained = {name: one.grad for name, one in adapted.named_parameters() if one.requires_grad and "router" in name}
    assert len(trained) == 2
    assert all(gradient.abs().sum() > 0 for gradient in trained.values())
    assert "aux_loss" not in adapted.eval()(**inputs)


def test_the_layer_still_tells_its_numbers_and_its_kernel():
    model, _ = sparse("mixtral")
    plain = moe_layers(model)["model.layers.0.mlp"]
    expected = (plain.num_experts, plain.kernel_report())
    layer = moe_layers(lora(model, rank=2, router=True))["base_model.model.model.layers.0.mlp"]
    assert (layer.num_experts, layer.kernel_report()) == expected
    assert layer.num_active_params < layer.num_params


@pytest.mark.parametrize("make", [lambda: native("mixtral"), lambda: sparse("mixtral")], ids=["native", "ours"])
def test_recomputed_activations_give_the_same_gradients(make):
    model, inputs = make()
    adapted = lora(model, rank=2, experts=[0, 1])
    train(adapted, inputs, steps=1)

    def gradients():
        adapted.train().zero_grad()
        adapted(**inputs).loss.backward()
        return {name: one.grad.clone() for name, one in adapted.named_parameters() if one.requires_grad}

    expected = gradients()
    recompute(model, {"use_reentrant": False})
    came = gradients()
    assert any(gradient.any() for gradient in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(came[name], gradient, msg=name)


def test_generate_uses_the_adapter():
    model, inputs = sparse("mixtral")
    prompt = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    adapted = train(lora(model, rank=4, alpha=64), inputs, steps=6)
    tokens = adapted.generate(**prompt, max_new_tokens=4, do_sample=False)
    assert torch.equal(tokens, adapted.merge_and_unload().generate(**prompt, max_new_tokens=4, do_sample=False))


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"layers": [3]},
            "layers must be 'all' or different indices of MoE layers in 0..2, got [3]. They count in depth order; "
            "layer 0 is model.layers.0.mlp.",
        ),
        (
            {"experts": [1, 8]},
            "experts must be 'all' or different indices in 0..7 for layer 0, model.layers.0.mlp, got [1, 8]. "
            "Leave a layer out to train none of its experts.",
        ),
        (
            {"experts": {1: []}},
            "experts must be 'all' or different indices in 0..7 for layer 1, model.layers.1.mlp, got []. "
            "Leave a layer out to train none of its experts.",
        ),
        (
            {"experts": {1: [2]}, "layers": [1]},
            "experts by layer names the layers itself, so layers must be left 'all', got layers=[1] and experts of the "
            "layers [1]. Give one of the two.",
        ),
        (
            {"projections": "gate_proj"},
            "projections must be 'all' or some of gate, up, down, which these experts have, got 'gate_proj'. "
            "Name each once.",
        ),
        (
            {"rank": {0: {1: 2}}, "experts": [1]},
            "rank by expert names the layers and experts that train, so layers and experts must be left 'all', got "
            "layers='all' and experts=[1]. Give rank={layer: {expert: rank}} alone.",
        ),
        (
            {"rank": {0: {1: 2, 2: 0}}},
            "rank must be at least 1, got 0. Leave out experts that shall not train.",
        ),
        ({"alpha": -1}, "alpha must be positive, got -1. Twice the rank is usual."),
        (
            {"shared": True},
            "shared=True needs such a part beside the experts, and none of the 3 layers from model.layers.0.mlp on has "
            "one that can be adapted. Leave shared out.",
        ),
        (
            {"r": 4, "target_modules": ["q_proj"]},
            "r, target_modules of LoraConfig cannot be given beside what lora makes of its own arguments. Use rank, "
            "alpha, dropout, layers, experts, projections, router, shared and attention.",
        ),
        (
            {"dropout": 0.1},
            "dropout must be 0 where PEFT adapts a parameter, got 0.1 and 6 parameters, the first "
            "model.layers.0.mlp.experts.gate_up_proj. Leave dropout out; a smaller rank regularises too.",
        ),
    ],
    ids=lambda one: next(iter(one)) if isinstance(one, dict) else "",
)
def test_what_cannot_be_is_refused_before_the_model_is_touched(options, message):
    model, _ = native("mixtral")
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(ConfigError) as error:
        lora(model, **options)
    assert str(error.value) == message
    assert [name for name, _ in model.named_modules()] == names
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_an_ungated_expert_has_no_gate():
    with pytest.raises(ConfigError, match=r"some of up, down, which these experts have, got \['gate'\]"):
        lora(native("nemotron_h")[0], projections=["gate"])


def test_experts_that_are_modules_may_have_dropout():
    model, inputs = native("switch_transformers")
    adapted = lora(model, rank=2, experts=[0, 1, 2], dropout=0.5).train()
    torch.manual_seed(0)
    train(adapted, inputs)
    assert adapted.train()(**inputs).loss != adapted(**inputs).loss


@pytest.mark.parametrize("recipe", ["mixlora", "base"])
def test_experts_that_cannot_be_chosen_are_refused(recipe):
    with pytest.raises(ConfigError, match="SparseLlamaForCausalLM has no experts that can be chosen one by one"):
        lora(sparse(recipe)[0])


@pytest.mark.parametrize("recipe", ["smear", "lory"])
def test_experts_that_are_merged_before_they_run_are_refused(recipe):
    with pytest.raises(ConfigError, match=r"MergedMoE at model.layers.0.mlp reads their weights to merge them"):
        lora(sparse(recipe)[0])


def test_a_dense_model_is_refused():
    with pytest.raises(ConfigError, match="LlamaForCausalLM has no experts"):
        lora(build("llama"))


def test_experts_that_two_layers_share_are_refused_until_one_is_named():
    model, _ = native("diffusion_gemma")
    with pytest.raises(ConfigError, match=r"is the same tensor as model\.encoder"):
        lora(model)
    lora(model, layers=[0, 1, 2])


def test_a_model_that_is_changed_already_is_refused_until_that_is_undone():
    model, inputs = native("mixtral")
    adapted = lora(model, rank=2, experts=[1])
    for call, given in ((lora, adapted), (lora, model), (train_only, model)):
        with pytest.raises(ConfigError) as error:
            call(given)
        prefix = "base_model.model." if given is adapted else ""
        assert str(error.value) == (
            f"{call.__name__} needs a model that is as it was loaded, got {type(given).__name__} with "
            f"{prefix}model.layers.0.mlp.experts changed already. Call merge_and_unload() where it has adapters, "
            "moesaic.hf.undo_train_only where its experts train, and name everything that shall train in one call."
        )
    merged = adapted.merge_and_unload()
    with pytest.raises(ConfigError, match="check_trains must be told which experts should train"):
        check_trains(merged, inputs)
    train_only(merged.requires_grad_(True), experts=[2])
    with pytest.raises(ConfigError, match="lora needs a model that is as it was loaded"):
        lora(merged)
    assert len(check_trains(lora(undo_train_only(merged), rank=2, experts=[0]), inputs).rows) == 9


def test_without_peft_the_error_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(BackendError) as error:
        lora(native("mixtral")[0])
    assert str(error.value) == "LoRA needs peft, which is not installed. Run: pip install 'moesaic[peft]'"


def test_an_older_peft_is_refused(monkeypatch):
    monkeypatch.setattr(peft, "__version__", "0.20.1")
    with pytest.raises(BackendError) as error:
        lora(native("mixtral")[0])
    assert str(error.value) == (
        "LoRA on experts needs peft 0.21.2 or newer, got 0.20.1, in which adapters of stacked experts may lie "
        "otherwise. Run: pip install -U peft"
    )


REFUSED = ("base", "lora-moe", "lory", "mixlora", "mole", "smear")


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [name for name in recipes.names() if name not in REFUSED])
def test_the_first_expert_of_every_recipe_trains_under_an_adapter(recipe):
    model, inputs = sparse(recipe)
    adapted = lora(model, rank=2, experts=[0])
    with domains(0):
        check = check_trains(adapted, inputs)
    assert len(check.idle) < len(check.rows)
