"""A trace says what every router chose, for which token of which sequence."""

import warnings

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from moesaic import ConfigError
from moesaic.hf import observe, record, sparsify, trace_domain
from moesaic.telemetry.trace import RoutingTrace
from tests.hf.test_forward import padded, sparse
from tests.hf.tiny import batch, build


def test_a_trace_has_a_row_for_each_choice_and_none_for_padding():
    model, inputs, seen = sparse("llama", "mixtral"), padded(batch("llama"), "left"), []
    with record(model) as trace, observe(model, seen.append):
        model(**inputs)
    assert isinstance(trace, RoutingTrace)
    assert trace.num_rows == 3 * 7 * 2 * 2
    assert trace.metadata.layer_names == ("model.layers.0.mlp", "model.layers.1.mlp")
    assert trace.metadata.num_experts == (4, 4)
    assert (trace.metadata.model, trace.metadata.recipe, trace.metadata.top_k) == (
        "SparseLlamaForCausalLM",
        "mixtral",
        2,
    )
    first = trace.where((trace.layer == 0) & (trace.sequence == 1) & (trace.choice == 0))
    assert first.position.tolist() == list(range(7))
    assert first.token_id.tolist() == inputs["input_ids"][1, 4:].tolist()
    chosen = seen[0].routing.expert_N.view(3, 11, 2)[1, 4:, 0]
    assert first.expert.tolist() == chosen.tolist()
    assert (trace.domain == -1).all()


def test_the_number_of_choices_is_told_where_every_token_has_as_many():
    inputs = batch("llama")
    found = {}
    for recipe in ("switch", "mixtral", "dense", "top-p", "relu", "soft-moe"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            model = sparse("llama", recipe)
        with record(model) as trace:
            assert trace.metadata.top_k is None
            model(**inputs)
        found[recipe] = trace.metadata.top_k
    assert found == {"switch": 1, "mixtral": 2, "dense": 4, "top-p": None, "relu": None, "soft-moe": 4}
    mixed = sparsify(build("llama"), "mixtral", num_experts=[2, 4], top_k=2)
    mixed.model.layers[1].mlp.moe.router.top_k = 1
    with record(mixed) as trace:
        mixed(**inputs)
    assert trace.metadata.top_k is None


def test_batches_are_numbered_on_and_carry_their_domain():
    model = sparse("llama")
    with record(model, domains=["prose"]) as trace:
        model(**batch("llama"))
        with trace_domain("code"):
            model(**batch("llama", sequences=2))
        with trace_domain(["prose", "code"]):
            model(**batch("llama", sequences=2))
        assert trace.num_rows == 0
    assert trace.metadata.domains == ("prose", "code")
    domains = {int(s): {int(d) for d in trace.domain[trace.sequence == s]} for s in np.unique(trace.sequence)}
    assert domains == {0: {-1}, 1: {-1}, 2: {-1}, 3: {1}, 4: {1}, 5: {0}, 6: {1}}


def test_generation_goes_on_in_the_sequences_of_its_prompt():
    model, inputs = sparse("llama"), batch("llama", sequences=2, positions=5)
    mask = inputs["attention_mask"].clone()
    mask[0, :2] = 0
    with record(model) as trace:
        for _ in range(2):
            model.generate(
                inputs["input_ids"], attention_mask=mask, max_new_tokens=3, min_new_tokens=3, do_sample=False
            )
    one = trace.where((trace.layer == 0) & (trace.choice == 0))
    positions = {int(s): one.position[one.sequence == s].tolist() for s in np.unique(one.sequence)}
    assert positions == {0: [0, 1, 2, 3, 4], 1: [0, 1, 2, 3, 4, 5, 6], 2: [0, 1, 2, 3, 4], 3: [0, 1, 2, 3, 4, 5, 6]}


def test_encoder_and_decoder_each_report_their_own_tokens():
    model, inputs = sparse("t5"), batch("t5")
    with record(model) as trace:
        model(**inputs)
    encoder, decoder = trace.where(trace.layer == 0), trace.where(trace.layer == 2)
    assert set(encoder.token_id.tolist()) <= set(inputs["input_ids"].flatten().tolist())
    assert decoder.token_id[decoder.position == 0].tolist() == [0] * 6
    assert np.unique(trace.sequence).tolist() == [0, 1, 2]


def test_images_have_no_token_ids():
    model = sparse("vit")
    with record(model) as trace:
        model(**batch("vit"))
    assert (trace.token_id == -1).all()
    assert trace.num_tokens == 15


def test_a_trace_keeps_what_came_before_an_error():
    model = sparse("llama")
    with pytest.raises(ValueError, match="exactly one of input_ids"), record(model) as trace:
        [model(**inputs) for inputs in (batch("llama"), {})]
    assert trace.num_tokens == 21


def test_a_domain_for_each_sequence_is_counted():
    model = sparse("llama")
    with pytest.raises(ConfigError) as error, record(model), trace_domain(["prose", "code"]):
        model(**batch("llama"))
    assert str(error.value) == (
        "trace_domain needs one name for the batch or one for each of its 3 sequences, got 2. "
        "Give a name for each sequence."
    )


def test_token_texts_tell_every_byte():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*alphabet, "Ġé", "<end>"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")
    model = sparse("llama")
    with record(model, tokenizer=wrapped) as trace:
        pass
    texts = trace.metadata.token_text
    assert texts[vocabulary["a"]] == "a"
    assert texts[vocabulary["Ġ"]] == " "
    assert texts[vocabulary["é"]] == b"\xe9".decode("utf-8", "surrogateescape")
    assert texts[vocabulary["<end>"]] == "<end>"
    assert sorted(text.encode("utf-8", "surrogateescape") for text in texts[:256]) == [bytes([b]) for b in range(256)]


def test_token_texts_of_words_have_their_space():
    tokenizer = Tokenizer(models.WordLevel({"▁the": 0, "cat": 1, "<unk>": 2}, unk_token="<unk>"))
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
    with record(sparse("llama"), tokenizer=wrapped) as trace:
        pass
    assert trace.metadata.token_text == (" the", "cat", "<unk>")


def test_a_saved_trace_is_the_one_that_was_recorded(tmp_path):
    pytest.importorskip("pyarrow")
    model = sparse("llama")
    model.config.name_or_path = "runs/a"
    with record(model) as trace:
        model(torch.randint(3, 61, (2, 4)))
    loaded = RoutingTrace.load(trace.save(tmp_path / "trace.parquet"))
    assert loaded.metadata.model == "runs/a"
    assert loaded.expert.tolist() == trace.expert.tolist()
