import math

import pytest
import torch
from torch.nn import functional as F

from moesaic.core.errors import DataError
from moesaic.data import TokenBlocks, load_corpus, load_tokenizer
from moesaic.train import Evaluator
from moesaic.train.build import build_model


@pytest.fixture(params=["bytes", "bpe:280"])
def setting(request, tiny, text):
    corpus = load_corpus(text)
    tokenizer = load_tokenizer(request.param, corpus)
    model = build_model("moe", tiny(recipe="deepseek-v3", top_k=2), tokenizer)
    return corpus, TokenBlocks(corpus.held_out, tokenizer, 24), model


def by_hand(corpus, blocks, model):
    """One block at a time, in float64 sums, bytes counted from the documents."""
    bits = dict.fromkeys(blocks.domains, 0.0)
    model.eval()
    for index in range(len(blocks)):
        block = blocks[index]
        used = int(block["attention_mask"].sum())
        with torch.no_grad():
            logits = model(input_ids=block["input_ids"][None, :used]).logits[0]
        nats = F.cross_entropy(logits[:-1].double(), block["input_ids"][1:used], reduction="sum")
        bits[blocks.domains[int(block["domain"])]] += float(nats) / math.log(2)
    size = {name: sum(len(d.text.encode()) for d in corpus.held_out if d.domain == name) for name in bits}
    per_byte = {name: bits[name] / size[name] for name in bits}
    return {**per_byte, "mean": sum(per_byte.values()) / len(per_byte)}


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_bits_per_byte_are_exact_whatever_the_batch(setting, batch_size):
    corpus, blocks, model = setting
    result = Evaluator(blocks, batch_size=batch_size)(model)
    assert result.bits_per_byte == pytest.approx(by_hand(corpus, blocks, model), rel=1e-5)


def test_evaluation_moves_nothing(setting):
    _, blocks, model = setting
    model.train()
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    generator = torch.random.get_rng_state()
    Evaluator(blocks)(model)
    assert model.training
    assert torch.equal(generator, torch.random.get_rng_state())
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())


def test_a_part_of_the_text_is_spread_over_it_and_scaled_to_its_bytes(setting):
    _, blocks, model = setting
    part = Evaluator(blocks, max_tokens=60)
    assert 2 * len(blocks.domains) <= len(part._chosen) < len(blocks)
    whole = Evaluator(blocks)(model).bits_per_byte
    assert part(model).bits_per_byte == pytest.approx(whole, rel=0.2)
    assert Evaluator(blocks, max_tokens=10**9)(model).bits_per_byte == whole


def test_batches_mix_the_domains_so_that_no_capacity_is_overfilled_by_one_of_them(setting):
    _, blocks, _ = setting
    order = Evaluator(blocks)._chosen
    domains = [int(blocks[index]["domain"]) for index in order]
    assert sorted(order) == list(range(len(blocks)))
    for start in range(0, len(order) - 8, 8):
        share = sum(domains[start : start + 8]) / 8
        assert abs(share - sum(domains) / len(domains)) < 0.25
    for domain in (0, 1):
        mine = [index for index in order if int(blocks[index]["domain"]) == domain]
        assert mine == sorted(mine)


def test_an_evaluation_without_text_is_refused():
    with pytest.raises(DataError) as error:
        Evaluator([])
    assert str(error.value) == (
        "an evaluation needs at least one block of held-out text, got none. Hold out more text."
    )
