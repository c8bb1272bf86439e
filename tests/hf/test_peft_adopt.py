"""Adapters and chosen weights on adopted models: the same outputs and gradients as on transformers' own."""

import copy

import pytest
import torch

from moesaic.hf import adopt, check_trains, hot_experts, lora, moe_layers, record, train_only
from moesaic.hf.native.adopt import release
from tests.hf.families import FAMILIES
from tests.hf.test_peft import native, train
from tests.hf.test_peft_check import REFUSED

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

# Each way in which an adopted model runs its experts: our fused kernel, our general way, surgery, modules.
WAYS = ("mixtral", "gpt_oss", "llama4", "jetmoe", "switch_transformers", "longcat_flash")


def adapted(model):
    torch.manual_seed(0)
    return lora(model, rank=2)


def chosen(model):
    return train_only(model, experts=[0, 1, 3], projections=["up"])


def outcome(model, inputs):
    """Logits and gradients, with second matrices that are not 0."""
    numbers = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=numbers) * 0.2)
    output = model.eval()(**inputs)
    output.loss.backward()
    # transformers gives experts that are modules and get no tokens None, and we give them zeros.
    trained = {name: one for name, one in model.named_parameters() if one.requires_grad}
    gradients = {name: torch.zeros_like(one) if one.grad is None else one.grad for name, one in trained.items()}
    return output.logits.detach(), gradients


def assert_alike(first, second):
    torch.testing.assert_close(first[0], second[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(first[1], second[1], atol=1e-5, rtol=1e-4)


def labelled(family):
    model, inputs = native(family)
    if family == "openai_privacy_filter":
        inputs["labels"] = inputs["labels"] % model.config.num_labels
    return model, inputs


def compare(how, family):
    model, inputs = labelled(family)
    untouched = copy.deepcopy(model)(**inputs).logits
    expected = outcome(how(copy.deepcopy(model)), inputs)
    if how is adapted:
        assert (expected[0] - untouched).abs().max() > 1e-2
    assert_alike(outcome(how(adopt(copy.deepcopy(model))), inputs), expected)
    assert_alike(outcome(adopt(how(model)), inputs), expected)


@pytest.mark.parametrize("how", [adapted, chosen])
@pytest.mark.parametrize("family", WAYS)
def test_outputs_and_gradients_are_those_of_the_model_of_transformers(family, how):
    compare(how, family)


@pytest.mark.slow
@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in (*REFUSED, *WAYS)])
def test_outputs_and_gradients_are_those_of_the_model_of_transformers_in_every_family(family):
    """Adapters that adoption finds, and weights that are chosen when it is there."""
    model, inputs = labelled(family)
    expected = outcome(adapted(copy.deepcopy(model)), inputs)
    assert_alike(outcome(adopt(adapted(copy.deepcopy(model))), inputs), expected)
    expected = outcome(chosen(copy.deepcopy(model)), inputs)
    assert_alike(outcome(chosen(adopt(model)), inputs), expected)


@pytest.mark.parametrize("family", WAYS)
def test_chosen_experts_of_adopted_models_train(family):
    model, inputs = native(family)
    check = check_trains(lora(adopt(model), rank=2, experts=[0, 1, 3], projections=["up"]), inputs)
    assert len(check.idle) < len(check.rows)
    assert None not in {row.tokens for row in check.rows}


def test_an_adapter_may_be_read_by_an_adopted_model_and_by_a_released_one(tmp_path):
    model, inputs = native("mixtral")
    base = copy.deepcopy(model)
    first = train(lora(adopt(model), rank=2, experts=[1, 3], router=True), inputs)
    expected = first(**inputs).logits
    first.save_pretrained(tmp_path)
    for other in (adopt(copy.deepcopy(base)), base):
        loaded = peft.PeftModel.from_pretrained(other, tmp_path).eval()
        torch.testing.assert_close(loaded(**inputs).logits, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(release(first)(**inputs).logits, expected, atol=1e-5, rtol=1e-5)


def test_a_router_that_peft_has_copied_is_one_layer_and_its_copy_is_watched():
    model, inputs = native("mixtral")
    model = adopt(model, balance={"switch": 0.1})
    layers = [f"base_model.model.{path}" for path in moe_layers(model)]
    tuned = lora(model, rank=2, router=True).train()
    assert list(moe_layers(tuned)) == layers
    output = tuned(**inputs)
    output.aux_loss.backward()
    router = tuned.base_model.model.model.layers[0].mlp.gate
    assert router.modules_to_save["default"].weight.grad.abs().sum() > 0
    assert router.original_module.weight.grad is None
    with torch.no_grad(), record(tuned) as trace:
        tuned(**inputs)
    assert set(trace.layer) == {0, 1, 2}
    assert list(trace.metadata.layer_names) == layers


def test_a_trace_of_an_adopted_model_chooses_the_experts_to_adapt():
    model, inputs = native("deepseek_v3")
    with torch.no_grad(), record(adopt(model)) as trace:
        model(**inputs)
    hot = hot_experts(trace, share=0.25)
    assert [len(experts) for experts in hot.values()] == [2, 2]
    check = check_trains(lora(model, rank=2, experts=hot), inputs)
    assert not check.idle
