"""What networks read on some text, padding left out."""

import pytest
import torch

from moesaic.convert.checkpoint.source import open_source
from moesaic.convert.grow.tokens import batches, dense_model, read_by_networks, run_networks
from moesaic.convert.layout.dense import networks
from moesaic.core.errors import CheckpointError, ConfigError
from moesaic.data import load_tokenizer
from tests.hf.tiny import build


def reads(model, **inputs):
    """The inputs of the first network, caught by hand."""
    seen = []
    handle = model.model.layers[0].mlp.gate_proj.register_forward_hook(lambda _m, args, _o: seen.append(args[0]))
    with torch.no_grad():
        model(**inputs)
    handle.remove()
    return seen[0]


def test_every_network_is_seen_and_padding_is_not():
    model = build("llama")
    ids, mask = torch.randint(3, 61, (2, 6)), torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
    found = networks(model)
    read = run_networks(model, found, [{"input_ids": ids, "attention_mask": mask, "labels": ids}])
    assert [len(read[one.path]) for one in found] == [10, 10]
    want = reads(model, input_ids=ids, attention_mask=mask)
    torch.testing.assert_close(read["layers.0.mlp"], want[mask.bool()])


def test_reading_stops_when_there_is_enough_and_leaves_the_model_as_it_was():
    model = build("llama").train()
    calls = []
    model.model.register_forward_pre_hook(lambda *_: calls.append(1))
    read = run_networks(model, networks(model), batches(open_source(model), torch.randint(3, 61, (5, 6))), max_tokens=8)
    assert {len(x_TD) for x_TD in read.values()} == {8}
    assert len(calls) == 2
    assert all(part.training for part in model.modules())
    assert not model.model.layers[0].mlp._forward_pre_hooks


@pytest.mark.parametrize("family", ["gpt2", "t5", "jamba", "lstm"])
def test_other_families_are_read_too(family):
    model = build(family)
    read = run_networks(model, networks(model), batches(open_source(model), torch.randint(3, 61, (2, 6))))
    assert all(x_TD.shape == (12, 16) and x_TD.dtype == torch.float32 for x_TD in read.values())


def test_texts_ids_and_batches_say_the_same(tmp_path):
    model = build("llama", vocab_size=300)
    tokenizer = load_tokenizer("bytes")
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    source, found = open_source(tmp_path), networks(model)
    texts = ["one two three", "four"]
    ids = [tokenizer(text, return_tensors="pt")["input_ids"] for text in texts]
    by_texts = read_by_networks(source, found, texts)
    by_ids = read_by_networks(open_source(model), found, [one[0] for one in ids])
    by_batches = run_networks(model, found, [{"input_ids": one, "attention_mask": torch.ones_like(one)} for one in ids])
    by_hand = read_by_networks(open_source(model), found, texts, tokenizer=tokenizer)
    for path, x_TD in by_texts.items():
        assert len(x_TD) == sum(one.numel() for one in ids)
        for other in (by_ids, by_batches, by_hand):
            torch.testing.assert_close(x_TD, other[path])
    assert type(dense_model(source)) is type(model)
    assert read_by_networks(source, found, "four")["layers.0.mlp"].shape[0] == ids[1].numel()


def test_texts_without_a_tokenizer_are_refused(tmp_path):
    model = build("llama")
    with pytest.raises(ConfigError) as error:
        list(batches(open_source(model), ["one"]))
    assert str(error.value) == (
        "Texts need a tokenizer, and LlamaForCausalLM is a model in memory. Pass tokenizer, or token ids."
    )
    model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="has no readable tokenizer"):
        list(batches(open_source(tmp_path), ["one"]))


def test_no_text_at_all_is_refused():
    model = build("llama")
    with pytest.raises(ConfigError, match="Some text is needed to see what the model's networks read, got none"):
        read_by_networks(open_source(model), networks(model), torch.zeros(0, 5, dtype=torch.int64))
