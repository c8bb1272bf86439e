"""Held-out text knows which text each predicted token is from."""

from __future__ import annotations

import pytest
import torch

from moesaic.core.errors import ConfigError, DataError, ShapeError
from moesaic.data import load_tokenizer
from moesaic.data.corpus import Document
from moesaic.probe import HeldOut
from moesaic.probe.text import NO_TEXT, taken


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("bytes")


DOCUMENTS = [
    Document(text="ab" * 30, domain="words"),
    Document(text="cde", domain="words"),
    Document(text="12" * 10, domain="numbers"),
]


def test_every_token_of_a_whole_text_is_predicted_once_and_its_end_too(tokenizer):
    text = HeldOut.from_documents(DOCUMENTS, tokenizer, context=16, tokens=1000)
    assert text.domains == ("numbers", "words")
    assert text.tokens_of_text.tolist() == [21, 61, 4]
    assert [text.domains[index] for index in text.domain_of_text] == ["numbers", "words", "words"]
    assert text.num_bytes_of_text == (20.0, 60.0, 3.0)
    for number, document in enumerate([DOCUMENTS[2], DOCUMENTS[0], DOCUMENTS[1]]):
        parts = [ids[mine] for ids, mine in zip(text.input_ids_BP, text.text_BP == number, strict=True) if mine.any()]
        ids = torch.cat(parts).tolist()
        assert tokenizer.decode(ids[:-1]) == document.text
        assert ids.count(tokenizer.eos_token_id) == 1
    assert (text.input_ids_BP[:, 0] == tokenizer.bos_token_id).all()
    assert (text.text_BP[:, 0] == NO_TEXT).all()
    assert ((text.text_BP != NO_TEXT) <= text.valid_BP).all()


def test_domains_take_turns(tokenizer):
    documents = [Document(text="x" * 150, domain="a"), Document(text="y" * 150, domain="b")]
    text = HeldOut.from_documents(documents, tokenizer, context=16, tokens=1000)
    order = [text.domain_of_text[int(one.max())] for one in text.text_BP]
    assert order == [0, 1] * (len(order) // 2)


@pytest.mark.parametrize(
    ("lengths", "limit", "wanted"),
    [
        ([10, 20, 30], 100, [(0, 10), (1, 20), (2, 30)]),
        ([1000, 50, 1000], 450, [(0, 200), (1, 50), (2, 200)]),
        ([30] * 100, 300, [(index * 10, 30) for index in range(10)]),
        ([1000] * 10, 256, [(0, 128), (5, 128)]),
        ([500], 100, [(0, 100)]),
    ],
)
def test_the_beginnings_of_many_texts_are_read(lengths, limit, wanted):
    found = taken(lengths, limit)
    assert found == wanted
    assert sum(length for _, length in found) <= limit


def test_ids_are_texts_of_their_own():
    text = HeldOut.from_ids({"a": [torch.tensor([5, 6, 7])], "b": [torch.tensor([8, 9])]})
    assert text.tokens_of_text.tolist() == [2, 1]
    assert text.domain_of_text == (0, 1)
    assert sum(len(one.input_ids_BP) for one in text.batches(1)) == 2


def test_what_cannot_be_predicted_is_refused(tokenizer):
    with pytest.raises(DataError, match="Needed at least one token to predict, got none"):
        HeldOut.from_ids({"a": [torch.tensor([5])]})
    with pytest.raises(DataError, match="Needed at least one document of held-out text, got none"):
        HeldOut.from_documents([], tokenizer)
    with pytest.raises(ConfigError, match="context must be at least 2 tokens, got 1"):
        HeldOut.from_documents(DOCUMENTS, tokenizer, context=1)
    ids = torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(ShapeError, match=r"must all be \(blocks, positions\), got \[\(2, 3\), \(2, 4\)\]"):
        HeldOut(
            domains=("a",),
            input_ids_BP=ids,
            valid_BP=ids.bool(),
            text_BP=torch.zeros(2, 4, dtype=torch.int64),
            domain_of_text=(0,),
            num_bytes_of_text=(1.0,),
        )
    with pytest.raises(ConfigError, match="Each of 1 texts needs a domain and a number of bytes, got 1 and 0"):
        HeldOut(
            domains=("a",),
            input_ids_BP=ids,
            valid_BP=~ids.bool(),
            text_BP=ids,
            domain_of_text=(0,),
            num_bytes_of_text=(),
        )
