"""The LSTM language model of 2017: what it computes, what it leaves alone, how it is found again."""

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from moesaic import ConfigError, ShapeError
from moesaic.hf import LstmConfig, LstmForCausalLM, moe_layers
from moesaic.hf.lstm import LstmModel
from tests.hf.test_forward import sparse
from tests.hf.tiny import assert_equal_tensors, batch, build


def by_hand(model, input_ids):
    """The model of one sequence as the paper has it: a loop over steps, gates in the order i, f, g, o."""
    x_PD = model.model.embed_tokens.weight[input_ids]
    for block in model.model.layers:
        weights = dict(block.lstm.named_parameters())
        h_D = c_D = torch.zeros(x_PD.shape[1])
        outputs = []
        for x_D in x_PD:
            gates = weights["weight_ih_l0"] @ x_D + weights["weight_hh_l0"] @ h_D
            i, f, g, o = (gates + weights["bias_ih_l0"] + weights["bias_hh_l0"]).chunk(4)
            c_D = f.sigmoid() * c_D + i.sigmoid() * g.tanh()
            h_D = o.sigmoid() * c_D.tanh()
            outputs.append(h_D)
        x_PD = x_PD + torch.stack(outputs)
        if block.feed_forward is not None:
            network = block.feed_forward
            y_PD = F.relu(x_PD @ network.up_proj.weight.T) @ network.down_proj.weight.T
            x_PD = x_PD + (y_PD.sigmoid() if model.config.sigmoid_after else y_PD)
    return x_PD @ model.lm_head.weight.T


@pytest.mark.parametrize("sigmoid_after", [True, False])
def test_it_computes_what_the_paper_says(sigmoid_after):
    model, input_ids = build("lstm", sigmoid_after=sigmoid_after), torch.randint(61, (9,))
    torch.testing.assert_close(model(input_ids[None]).logits[0], by_hand(model, input_ids))


def test_a_network_stands_between_each_layer_and_the_next():
    model = build("lstm", num_hidden_layers=4)
    assert [block.feed_forward is not None for block in model.model.layers] == [True, True, True, False]


def test_the_sigmoid_is_on_the_mixture_too():
    model, inputs = sparse("lstm"), batch("lstm")
    seen = []
    layer = moe_layers(model)["model.layers.0.feed_forward"]
    layer.register_forward_hook(lambda _module, arguments, output: seen.append((arguments[0], output[0])))
    model.model.layers[1].register_forward_pre_hook(lambda _module, arguments: seen.append(arguments[0]))
    model(**inputs)
    (x_TD, y_TD), after = seen
    torch.testing.assert_close(after.flatten(0, 1), x_TD + y_TD.sigmoid())


def test_dropout_is_on_the_output_of_every_layer_and_in_training_only():
    model, inputs = build("lstm", dropout=0.5), batch("lstm")
    dropped = []
    for part in model.modules():
        if isinstance(part, torch.nn.Dropout):
            part.register_forward_hook(lambda _module, _arguments, output: dropped.append(float((output == 0).sum())))
    assert torch.equal(model(**inputs).logits, model(**inputs).logits)
    dropped.clear()
    model.train()(**inputs)
    assert len(dropped) == 1 + 3 + 2  # embedding, LSTM layers, networks between them
    assert all(0.3 < count / (3 * 7 * 16) < 0.7 for count in dropped)


def test_padding_amid_the_text_changes_nothing_either():
    model, input_ids = build("lstm"), torch.randint(61, (1, 6))
    mask = torch.tensor([[0, 1, 1, 0, 0, 1, 0, 1, 1, 1]])
    more = torch.randint(61, (1, 10)).masked_scatter(mask.bool(), input_ids)
    torch.testing.assert_close(model(more, attention_mask=mask).logits[mask.bool()], model(input_ids).logits[0])


def test_what_comes_later_changes_nothing_before():
    model, input_ids = build("lstm"), torch.randint(61, (2, 8))
    other = torch.cat([input_ids[:, :5], torch.randint(61, (2, 3))], dim=1)
    assert torch.equal(model(input_ids).logits[:, :5], model(other).logits[:, :5])


def test_embeddings_serve_as_well_as_tokens_and_the_last_logits_can_be_had_alone():
    model, input_ids = build("lstm"), torch.randint(61, (2, 8))
    logits = model(inputs_embeds=model.get_input_embeddings()(input_ids), logits_to_keep=3).logits
    assert torch.equal(logits, model(input_ids).logits[:, -3:])


def test_the_loss_is_that_of_the_next_token():
    model, inputs = build("lstm"), batch("lstm")
    inputs["labels"][:, 5:] = -100
    output = model(**inputs)
    expected = F.cross_entropy(output.logits[:, :4].flatten(0, 1), inputs["labels"][:, 1:5].flatten())
    torch.testing.assert_close(output.loss, expected)
    torch.testing.assert_close(model(**inputs, num_items_in_batch=24).loss, expected / 2)


def test_fresh_weights_have_the_spread_that_was_asked_for_and_open_forget_gates():
    model = build("lstm", hidden_size=64, intermediate_size=128)
    for name, parameter in model.named_parameters():
        if name.endswith("bias_ih_l0"):
            expected = torch.tensor([0.0, 1.0, 0.0, 0.0]).repeat_interleave(64)
            assert torch.equal(parameter.detach(), expected)
        elif "bias" in name:
            assert not parameter.detach().any()
        else:
            assert float(parameter.detach().std()) == pytest.approx(0.1, rel=0.05)


def test_trained_biases_come_back_and_ties_stay(tmp_path):
    model = build("lstm", tie_word_embeddings=True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is LstmForCausalLM
    assert_equal_tensors(model.state_dict(), loaded.state_dict())
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert type(AutoModel.from_pretrained(tmp_path)) is LstmModel


def test_auto_classes_know_it_from_its_configuration():
    config = AutoConfig.for_model("moesaic-lstm", hidden_size=16, intermediate_size=24)
    assert type(config) is LstmConfig
    assert type(AutoModelForCausalLM.from_config(config)) is LstmForCausalLM


def test_one_layer_leaves_no_place_for_a_network():
    with pytest.raises(ConfigError) as error:
        LstmConfig(num_hidden_layers=1)
    assert str(error.value) == (
        "An LSTM language model needs num_hidden_layers of at least 2, so that a feed-forward network stands between "
        "two of them, got 1. Use 2."
    )


def test_neither_and_both_inputs_are_refused():
    model, input_ids = build("lstm"), torch.randint(61, (2, 8))
    for given, inputs in (
        ("neither", {}),
        ("both", {"input_ids": input_ids, "inputs_embeds": model.get_input_embeddings()(input_ids)}),
    ):
        with pytest.raises(ConfigError) as error:
            model(**inputs)
        assert str(error.value) == f"LstmModel reads input_ids or inputs_embeds, got {given}. Pass one of them."


def test_a_mask_that_fits_not_is_refused():
    with pytest.raises(ShapeError) as error:
        build("lstm")(torch.randint(61, (2, 8)), attention_mask=torch.ones(2, 9))
    assert str(error.value) == (
        "attention_mask must have one entry for each token, (2, 8), got (2, 9). An LSTM keeps no cache: pass the whole "
        "text with its mask."
    )


def test_a_prompt_of_embeddings_is_refused():
    model = build("lstm")
    with pytest.raises(ConfigError) as error:
        model.generate(inputs_embeds=torch.randn(1, 3, 16), max_new_tokens=2)
    assert str(error.value) == (
        "LstmForCausalLM generates from input_ids, got inputs_embeds: it keeps no cache to go on from them. "
        "Pass token ids."
    )
