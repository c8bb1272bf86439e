"""The check that chosen experts train: it finds those that do not, and those that should not; it disturbs nothing."""

import copy

import pytest
import torch

from moesaic import ConfigError
from moesaic.hf import check_trains, lora, train_only
from moesaic.hf.peft.blocks import expert_blocks
from tests.hf.families import FAMILIES, tiny
from tests.hf.test_peft import native, sparse, train
from tests.hf.tiny import recompute

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


def counted(family):
    """A model, a batch, and how many tokens each (layer, expert) gets, by hooks of the test's own.

    The last token of a sequence predicts nothing and nothing looks back at it: it is left out.
    """
    model, inputs = native(family)
    loads = {}
    for block in expert_blocks(model):

        def hook(_module, args, _output, layer=block.index):
            for expert in args[1].view(2, 7, 2)[:, :-1].flatten().tolist():
                loads[layer, expert] = loads.get((layer, expert), 0) + 1

        model.get_submodule(block.experts).register_forward_hook(hook)
    model(**inputs)
    for block in expert_blocks(model):
        model.get_submodule(block.experts)._forward_hooks.clear()
    return model, inputs, loads


def test_it_tells_tokens_and_gradients_of_each_expert_and_projection():
    model, inputs, loads = counted("qwen3_moe")
    check = check_trains(lora(model, rank=2), inputs)
    assert [(row.layer, row.expert, row.projection) for row in check.rows[:4]] == [
        (0, 0, "gate"),
        (0, 0, "up"),
        (0, 0, "down"),
        (0, 1, "gate"),
    ]
    assert len(check.rows) == 3 * 8 * 3
    for row in check.rows:
        assert row.tokens == loads.get((row.layer, row.expert), 0)
        assert (row.gradient > 0) == (row.tokens > 0)
    assert {(row.layer, row.expert) for row in check.idle} >= {
        (layer, expert) for layer in range(3) for expert in range(8) if (layer, expert) not in loads
    }


def test_it_prints_one_line():
    model, inputs = native("mixtral")
    text = str(check_trains(lora(model, rank=2, experts=[1, 2, 3], router=True), inputs))
    assert text == (
        "24 of 27 projections of the chosen experts train, nothing else of any expert moves; got no tokens: "
        "layer 1 expert 2; 3 parameters beside experts train; 7,296 trainable numbers."
    )


def test_a_token_that_the_loss_does_not_depend_on_is_no_reason_to_call_an_expert_broken():
    model, inputs = native("mixtral")
    inputs["labels"] = torch.full_like(inputs["labels"], -100)
    inputs["labels"][0, 1] = 5  # only the first token of the first sequence predicts
    check = check_trains(lora(model, rank=2), inputs)
    last = [row for row in check.rows if row.layer == 2]
    assert {row.tokens for row in last} == {0, 1}
    assert len({row.expert for row in last if row.tokens}) == 2  # top 2


@pytest.mark.parametrize("make", [lambda: native("mixtral"), lambda: sparse("mixtral")], ids=["native", "ours"])
def test_nothing_is_disturbed(make):
    model, inputs = make()
    adapted = train(lora(model, rank=2, experts=[0, 1]), inputs, steps=1).train()
    adapted.base_model.model.model.layers[1].eval()
    adapted(**inputs).loss.backward()
    before = {name: (one.detach().clone(), one.grad) for name, one in adapted.named_parameters()}
    modes = [module.training for module in adapted.modules()]
    state = torch.get_rng_state()
    check_trains(adapted, inputs)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in adapted.modules()] == modes
    for name, parameter in adapted.named_parameters():
        assert parameter.grad is before[name][1]
        assert torch.equal(parameter, before[name][0])


def test_recomputed_activations_count_once():
    model, inputs = native("mixtral")
    adapted = lora(model, rank=2)
    expected = check_trains(adapted, inputs)
    recompute(model, {"use_reentrant": False})
    came = check_trains(adapted, inputs)
    assert [row.tokens for row in came.rows] == [row.tokens for row in expected.rows]


def test_no_grad_around_it_does_not_matter():
    model, inputs = native("mixtral")
    adapted = lora(model, rank=2)
    with torch.no_grad():
        assert len(check_trains(adapted, inputs).rows) == 72


def test_adapters_of_shared_experts_alone_are_found_out():
    # The trap: PEFT is told the names of projections, finds them in shared experts only, and says nothing.
    model, inputs = native("flint")
    settings = peft.LoraConfig(r=2, target_modules=["mlp.shared_expert.up_proj", "mlp.shared_expert.down_proj"])
    model.config.model_type = "something-else"  # of which PEFT does not know the older names
    adapted = peft.get_peft_model(model, settings)
    with pytest.raises(ConfigError) as error:
        check_trains(adapted, inputs, experts="all")
    assert str(error.value) == (
        "layer 0 (model.layers.1.mlp), expert 0, gate was asked to train and is frozen: no adapter reaches it and its "
        "own weights do not train. Name its parameter in target_parameters, not target_modules, or use "
        "moesaic.hf.lora."
    )


def test_an_adapter_that_reaches_only_some_projections_is_found_out():
    model, inputs = native("mixtral")
    settings = peft.LoraConfig(r=2, target_modules=[], target_parameters=["experts.down_proj"])
    adapted = peft.get_peft_model(model, settings)
    assert len(check_trains(adapted, inputs, projections=["down"]).rows) == 24
    with pytest.raises(
        ConfigError, match=r"layer 0 \(model.layers.0.mlp\), expert 0, gate was asked to train and is f"
    ):
        check_trains(adapted, inputs, experts="all")


def test_an_adapter_that_the_layer_does_not_use_is_found_out():
    # The other trap: the block reads the weights of its experts, so that what is around them is not called.
    model, inputs = native("mixtral")
    adapted = lora(model, rank=2)
    block = model.model.layers[1].mlp
    innermost = block.experts.get_base_layer()
    block.experts.forward = innermost.forward
    with pytest.raises(ConfigError, match=r"layer 1 .*, expert \d, gate was asked to train and got an unknown number"):
        check_trains(adapted, inputs)


def test_a_detached_output_is_found_out():
    model, inputs = native("mixtral")
    adapted = lora(model, rank=2, layers=[0, 1])
    model.model.layers[0].mlp.experts.register_forward_hook(lambda _module, _args, output: output.detach())
    with pytest.raises(ConfigError, match=r"layer 0 .* but the loss depends on nothing that the experts of its layer"):
        check_trains(adapted, inputs)


def test_experts_that_were_not_chosen_and_would_move_are_found_out():
    model, inputs = native("mixtral")
    settings = peft.LoraConfig(r=2, target_modules=[], target_parameters=["experts.gate_up_proj", "experts.down_proj"])
    adapted = peft.get_peft_model(model, settings)
    with pytest.raises(ConfigError) as error:
        check_trains(adapted, inputs, experts=[3])
    assert "Only chosen experts should move, but a step of AdamW would move layer 0 (model.layers.0.mlp), expert " in (
        str(error.value)
    )
    train(adapted, inputs, steps=1)
    with pytest.raises(ConfigError, match="Only chosen experts should have changed, but the adapter changes layer 0"):
        check_trains(adapted, inputs, experts=[3])


def test_an_expert_that_only_another_batch_would_move_is_found_out():
    model, inputs = native("mixtral")
    settings = peft.LoraConfig(r=2, target_modules=[], target_parameters=["layers.1.mlp.experts.down_proj"])
    adapted = peft.get_peft_model(model, settings)
    check = check_trains(adapted, inputs, layers=[1], projections=["down"])
    assert [(row.layer, row.expert) for row in check.idle] == [(1, 2)]
    with pytest.raises(ConfigError) as error:
        check_trains(adapted, inputs, experts={1: [0, 1, 3, 4, 5, 6, 7]}, projections=["down"])
    assert str(error.value) == (
        "Only chosen experts should move, but model.layers.1.mlp.experts.down_proj has an adapter for expert 2 of "
        "layer 1, which is not one: this batch would not move it, another one would. Choose experts with "
        "moesaic.hf.lora or moesaic.hf.train_only, which hold the others."
    )


def test_a_stack_that_trains_whole_moves_all_its_experts_by_weight_decay():
    model, inputs = native("mixtral")
    model.requires_grad_(False)
    model.model.layers[0].mlp.experts.down_proj.requires_grad_(True)
    check = check_trains(model, inputs, layers=[0], projections=["down"])
    assert len(check.rows) == 8
    with pytest.raises(ConfigError, match=r"would move layer 0 \(model.layers.0.mlp\), expert 0, down"):
        check_trains(model, inputs, layers=[0], experts=[1], projections=["down"])


def test_something_else_that_trains_is_found_out():
    model, inputs = native("mixtral")
    adapted = lora(model, rank=2, experts=[1])
    model.model.layers[0].self_attn.q_proj.weight.requires_grad_(True)
    with pytest.raises(ConfigError) as error:
        check_trains(adapted, inputs)
    assert str(error.value) == (
        "Only what was asked for should train, but base_model.model.model.layers.0.self_attn.q_proj.weight does too. "
        "Freeze it with requires_grad_(False), or ask for it: router, shared and attention say what trains beside "
        "experts."
    )


def test_a_router_that_gets_no_gradient_is_found_out():
    model, inputs = native("mixtral")
    adapted = lora(model, rank=2, router=True)
    router = model.model.layers[1].mlp.gate

    def cut(_module, _args, output):
        return tuple(one.detach() for one in output)

    router.register_forward_hook(cut)
    with pytest.raises(ConfigError, match=r"model.layers.1.mlp.gate was asked to train and gets no gradient"):
        check_trains(adapted, inputs)


def test_what_a_model_was_made_for_is_known_to_it_and_its_copies():
    model, inputs = native("mixtral")
    adapted = lora(model, rank=2, experts={1: [3]}, projections=["down"])
    assert [str(row) for row in check_trains(copy.deepcopy(adapted), inputs).rows] == [
        "layer 1 (model.layers.1.mlp), expert 3, down"
    ]


def test_a_copy_in_which_a_projection_is_no_longer_held_is_found_out():
    # A copy of a tensor has none of its hooks.
    model, inputs = native("mixtral")
    adapted = copy.deepcopy(lora(model, rank=2, experts={1: [3]}, projections=["up"]))
    with pytest.raises(ConfigError, match=r"would move layer 1 \(model.layers.1.mlp\), expert 3, gate"):
        check_trains(adapted, inputs)


def test_a_model_of_which_nothing_is_known_needs_to_be_told():
    model, inputs = native("mixtral")
    with pytest.raises(ConfigError) as error:
        check_trains(model, inputs)
    assert str(error.value) == (
        "check_trains must be told which experts should train, for a model that neither moesaic.hf.lora nor train_only "
        "made in this process, got MixtralForCausalLM alone. Pass experts='all', or which."
    )


def test_a_batch_without_labels_and_a_frozen_model_are_refused():
    model, inputs = native("mixtral")
    prompt = {name: one for name, one in inputs.items() if name != "labels"}
    with pytest.raises(ConfigError, match=r"needs a loss, and MixtralForCausalLM gave none for input_ids, attention_m"):
        check_trains(model, prompt, experts="all")
    model.requires_grad_(False)
    with pytest.raises(ConfigError, match=r"all \d+ parameters of MixtralForCausalLM are frozen"):
        check_trains(model, inputs, experts="all")


def test_it_works_in_bfloat16_after_training():
    model, inputs = native("mixtral")
    adapted = train(lora(model.to(torch.bfloat16), rank=2, experts=[1, 3], projections=["gate"]), inputs)
    assert len(check_trains(adapted, inputs).idle) == 0


REFUSED = ("dbrx", "diffusion_gemma", "doge", "vitpose_backbone")


@pytest.mark.slow
@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in REFUSED])
@pytest.mark.parametrize("how", [lora, train_only])
def test_one_projection_of_chosen_experts_trains_in_every_family(how, family):
    made = tiny(family)
    inputs = dict(made.inputs)
    inputs["labels"] = inputs.get("decoder_input_ids", inputs.get("input_ids"))
    if family == "openai_privacy_filter":
        inputs["labels"] = inputs["labels"] % made.model.config.num_labels
    check = check_trains(how(made.model, experts=[0, 1, 3], projections=["up"]), inputs)
    assert len(check.idle) < len(check.rows)
    assert None not in {row.tokens for row in check.rows}


@pytest.mark.slow
@pytest.mark.parametrize("family", REFUSED)
def test_families_whose_experts_cannot_be_chosen_are_refused(family):
    with pytest.raises(ConfigError, match=r"has no experts that can be chosen|must have experts of its own"):
        lora(tiny(family).model)
