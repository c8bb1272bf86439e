"""What a sparse model's forward adds: padding reaches the router, balance losses reach the loss."""

import inspect
import threading

import pytest
import torch
from torch import nn
from transformers import LlamaForSequenceClassification

from moesaic import ConfigError, ShapeError, balance, recipes
from moesaic.hf import BalanceTerms, Seen, controllers, moe_layers, observe, sparsify
from moesaic.hf import balance as gather_balance
from tests.hf.tiny import CLASSIC, FAMILIES, OPTIONS, batch, build, gradients

RECIPES = CLASSIC


def sparse(family, recipe="mixtral", *, layers="all", aux_coefficients=None, **changes):
    options = OPTIONS[recipe]
    return sparsify(build(family, **changes), recipe, layers=layers, aux_coefficients=aux_coefficients, **options)


def padded(inputs, side, amount=4):
    """The same sequences with padding of random tokens, one sequence longer than the others' padding."""
    shape = (inputs["input_ids"].shape[0], amount)
    fill = {"input_ids": torch.randint(3, 61, shape), "attention_mask": torch.zeros(shape, dtype=torch.int64)}
    fill["labels"] = torch.full(shape, -100)
    order = (lambda new, old: (new, old)) if side == "left" else (lambda new, old: (old, new))
    return {name: torch.cat(order(fill[name], inputs[name]), dim=1) for name in inputs}


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_balance_losses_reach_the_loss_in_training_and_not_in_evaluation(family, recipe):
    model, inputs = sparse(family, recipe), batch(family)
    plain = model(**inputs)
    assert "aux_loss" not in plain
    model.train()
    seen = []
    with observe(model, lambda one: seen.append(one.routing)):
        output = model(**inputs)
    terms = [term for term in recipes.get(recipe).balance if isinstance(term, balance.LossTerm)]
    by_hand = sum(term.coefficient * term.loss(routing) for term in terms for routing in seen)
    assert len(seen) == len(moe_layers(model))
    assert float(by_hand) > 0
    torch.testing.assert_close(output.aux_loss, by_hand)
    with torch.no_grad():
        bare = model(**inputs)
    torch.testing.assert_close(output.loss, bare.loss + by_hand)
    if recipe in ("mixtral", "deepseek-v3"):  # nothing else differs between training and evaluation
        torch.testing.assert_close(bare.loss, plain.loss)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_balance_losses_alone_move_every_router(family, recipe):
    model = sparse(family, recipe).train()
    model(**batch(family)).aux_loss.backward()
    for path, layer in moe_layers(model).items():
        assert layer.router.weight.grad.abs().sum() > 0, path


def test_each_layer_is_balanced_by_itself():
    model, inputs = sparse("llama").train(), batch("llama")
    with gather_balance(model) as terms:
        model(**inputs)
    first, second = (layer.router for layer in moe_layers(model).values())
    # Layers leaning to opposite experts would look balanced if their counts were joined.
    with torch.no_grad():
        for router, sign in ((first, 1.0), (second, -1.0)):
            router.weight.zero_()
            router.weight[:2], router.weight[2:] = sign, -sign
        for layer in model.model.layers:
            layer.post_attention_layernorm.register_forward_hook(lambda _m, _a, output: output.abs())
    with gather_balance(model) as leaning:
        model(**inputs)
    assert float(leaning.means["switch"]) > 1.5 > float(terms.means["switch"])


def test_coefficients_can_be_replaced():
    inputs = batch("llama")
    torch.manual_seed(3)
    published = sparse("llama").train()(**inputs).aux_loss
    torch.manual_seed(3)
    tenfold = sparse("llama", aux_coefficients={"switch": 0.02}).train()(**inputs).aux_loss
    torch.testing.assert_close(tenfold, 10 * published)


def test_a_tuple_output_has_the_balance_losses_too():
    model, inputs = sparse("llama").train(), batch("llama")
    torch.testing.assert_close(model(**inputs, return_dict=False)[0], model(**inputs).loss)
    del inputs["labels"]
    assert model(**inputs, return_dict=False)[0].shape == (3, 7, 61)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "jamba", "lstm"])
def test_padding_changes_nothing_at_the_tokens(family, side, recipe):
    model, inputs = sparse(family, recipe).train(), batch(family)
    more = padded(inputs, side)
    if family == "gpt2":  # learned positions: say where each token stands
        more["position_ids"] = (more["attention_mask"].cumsum(1) - 1).clamp_min(0)
    short, long = model(**inputs), model(**more)
    real = more["attention_mask"].bool()
    torch.testing.assert_close(long.logits[real], short.logits.flatten(0, 1), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(long.aux_loss, short.aux_loss, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("recipe", RECIPES)
def test_padding_of_encoder_and_decoder_each_reach_their_own_layers(recipe):
    model, inputs = sparse("t5", recipe).train(), batch("t5")
    decoder = torch.cat([torch.zeros(3, 1, dtype=torch.int64), inputs["labels"][:, :-1]], dim=1)
    inputs |= {"decoder_input_ids": decoder, "decoder_attention_mask": torch.ones_like(decoder)}
    labels = inputs.pop("labels")
    encoder = padded({name: inputs[name] for name in ("input_ids", "attention_mask")} | {"labels": labels}, "right")
    encoder.pop("labels")
    decoder_inputs = {"input_ids": decoder, "attention_mask": torch.ones_like(decoder), "labels": labels}
    output = padded(decoder_inputs, "right", 2)
    more = {"decoder_input_ids": output["input_ids"], "decoder_attention_mask": output["attention_mask"], **encoder}
    short, long = model(**inputs), model(**more)
    torch.testing.assert_close(long.logits[:, :5], short.logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(long.aux_loss, short.aux_loss, atol=1e-6, rtol=1e-5)


def test_a_stack_that_is_called_alone_leaves_its_padding_out():
    model, inputs = sparse("llama", "switch"), batch("llama")
    more = padded(inputs, "left")
    short, long = model.model(inputs["input_ids"]), model.model(more["input_ids"], more["attention_mask"])
    torch.testing.assert_close(long[0][:, 4:], short[0], atol=1e-5, rtol=1e-5)


def test_every_token_of_an_image_is_routed():
    model, seen = sparse("vit"), []
    with observe(model, seen.append):
        model(**batch("vit"))
    assert [one.routing.num_tokens for one in seen] == [15, 15]
    assert seen[0].input_ids_BP is None
    assert all(bool(one.routing.valid_T.all()) for one in seen)


def test_a_mask_of_another_kind_counts_every_token():
    model, inputs, seen = sparse("llama"), batch("llama"), []
    causal = torch.ones(3, 1, 7, 7).tril().bool()
    with observe(model, seen.append):
        model(input_ids=inputs["input_ids"], attention_mask=causal)
    assert bool(seen[0].routing.valid_T.all())


def test_a_mask_of_another_batch_is_refused():
    model = sparse("llama")
    with pytest.raises(ShapeError) as error:
        model(input_ids=torch.ones(3, 7, dtype=torch.int64), attention_mask=torch.ones(3, 5, dtype=torch.int64))
    assert str(error.value) == (
        "attention_mask must have one entry for each token, (3, at least 7), got (3, 5). "
        "Pass the mask of the tokens that this stack reads."
    )


def test_an_observer_sees_each_layer_once_with_the_batch():
    model, inputs = sparse("llama").train(), padded(batch("llama"), "right", 2)
    seen: list[Seen] = []
    with observe(model, seen.append):
        model(**inputs).loss.backward()
    model(**inputs)
    assert [(one.layer, one.index, one.training) for one in seen] == [
        ("model.layers.0.mlp", 0, True),
        ("model.layers.1.mlp", 1, True),
    ]
    assert torch.equal(seen[0].input_ids_BP, inputs["input_ids"])
    assert torch.equal(seen[0].routing.valid_T, inputs["attention_mask"].flatten().bool())
    assert torch.equal(seen[0].routing.sequence_T, torch.arange(3).repeat_interleave(9))
    assert not seen[0].routing.scores_TE.requires_grad


def test_those_who_look_may_leave_in_any_order():
    model, inputs = sparse("llama"), batch("llama")
    first, second = [], []
    one, two = observe(model, first.append), observe(model, second.append)
    one.__enter__()
    two.__enter__()
    model(**inputs)
    one.__exit__(None, None, None)
    model(**inputs)
    two.__exit__(None, None, None)
    model(**inputs)
    assert (len(first), len(second)) == (2, 4)


def test_observing_a_dense_model_is_refused():
    with pytest.raises(ConfigError) as error, observe(nn.Linear(2, 2), print):
        pass
    assert str(error.value) == (
        "Linear has no MoE layers to look at. Give a model that moesaic.sparsify has converted, or a mixture of "
        "transformers that moesaic.adopt has adopted."
    )


def test_a_loop_of_ones_own_gets_the_balance_losses_with_their_gradient():
    model, inputs = sparse("llama").train(), batch("llama")
    model(**inputs).loss.backward()
    expected = gradients(model)
    model.zero_grad()
    labels = inputs.pop("labels")
    with gather_balance(model) as terms:
        logits = model(**inputs).logits
    cross_entropy = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    (cross_entropy + terms.total).backward()
    torch.testing.assert_close(gradients(model), expected)


def test_balance_can_be_read_in_evaluation_without_changing_the_loss():
    model, inputs = sparse("llama"), batch("llama")
    plain = model(**inputs).loss
    with torch.no_grad(), gather_balance(model) as terms:
        assert torch.equal(model(**inputs).loss, plain)
        model(**inputs)
    assert isinstance(terms, BalanceTerms)
    assert 0.9 < float(terms.means["switch"]) < 4
    torch.testing.assert_close(terms.total, 2 * 2 * 2e-3 * terms.means["switch"])


def test_a_model_within_another_models_forward_keeps_to_itself():
    student, teacher, inputs = sparse("llama").train(), sparse("gpt2").train(), batch("llama")
    alone = student(**inputs).aux_loss
    seen = []

    def teach(*_: object) -> None:
        teacher.transformer(inputs["input_ids"])

    # A stack of the teacher runs in the middle of the student's forward.
    student.model.norm.register_forward_hook(teach)
    with observe(student, lambda one: seen.append(one.layer)), observe(teacher, lambda one: seen.append(one.layer)):
        together = student(**inputs).aux_loss
    torch.testing.assert_close(together, alone)
    assert seen == ["model.layers.0.mlp", "model.layers.1.mlp", "transformer.h.0.mlp", "transformer.h.1.mlp"]


def test_two_threads_do_not_meet():
    models = [sparse("llama", aux_coefficients={"switch": 0.01 * (index + 1)}).train() for index in range(2)]
    inputs = [batch("llama", sequences=2 + index) for index in range(2)]
    alone = [model(**one).loss.item() for model, one in zip(models, inputs, strict=True)]
    wrong: list[object] = []
    barrier = threading.Barrier(2)

    def work(index: int) -> None:
        seen: list[int] = []
        with observe(models[index], lambda one: seen.append(one.routing.num_tokens)):
            for _ in range(20):
                barrier.wait(timeout=30)
                if models[index](**inputs[index]).loss.item() != alone[index]:
                    wrong.append("loss")
        if seen != [7 * (2 + index)] * 40:
            wrong.append(seen)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("family", FAMILIES)
def test_the_signature_of_forward_stays_the_dense_one(family):
    dense, converted = build(family), sparse(family)
    assert inspect.signature(converted.forward) == inspect.signature(dense.forward)
    assert inspect.signature(type(converted).forward) == inspect.signature(type(dense).forward)


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_can_still_be_asked_for(family):
    model, inputs = sparse(family), batch(family)
    output = model(**inputs, output_hidden_states=True)
    states = output.decoder_hidden_states if family == "t5" else output.hidden_states
    assert len(states) == 1 + model.config.num_hidden_layers
    if family == "t5":
        assert len(output.encoder_hidden_states) == 3


def test_another_head_gets_the_balance_losses_too():
    model = sparsify(LlamaForSequenceClassification(build("llama").config), "mixtral", **OPTIONS["mixtral"]).train()
    inputs = batch("llama") | {"labels": torch.tensor([0, 1, 1])}
    output = model(**inputs)
    assert list(moe_layers(model)) == ["model.layers.0.mlp", "model.layers.1.mlp"]
    with torch.no_grad():
        torch.testing.assert_close(output.loss, model(**inputs).loss + output.aux_loss)


def test_numbers_of_parameters_leave_out_the_experts_that_a_token_does_not_meet():
    from moesaic.hf import active_params

    dense = build("llama")
    model = sparsify(build("llama"), "mixtral", hidden=12, num_experts=4, top_k=2)
    one_expert, router = 3 * 16 * 12, 4 * 16
    total = sum(parameter.numel() for parameter in model.parameters())
    assert active_params(model) == total - 2 * 2 * one_expert
    # Two experts of half the width are the dense network: the twin has all but the routers.
    assert active_params(model) == sum(parameter.numel() for parameter in dense.parameters()) + 2 * router


def test_controllers_steer_the_layers_that_have_a_bias():
    assert controllers(sparse("llama", "mixtral")) == []
    model = sparse("llama", "deepseek-v3")
    steered = controllers(model)
    assert [one.layers for one in steered] == [("model.layers.0.mlp",), ("model.layers.1.mlp",)]
    steered[1].controller.step(torch.tensor([4, 0, 0, 0]))
    biases = [layer.router.bias_E for layer in moe_layers(model).values()]
    assert not biases[0].any()
    assert biases[1].argmin() == 0
