"""Text for an encoder and a decoder: all of it is predicted, once, after what stands before it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moesaic.core.errors import ConfigError, DataError
from moesaic.data import Document, PrefixBlocks, load_tokenizer

from .test_token_blocks import DOCUMENTS, END, TOKENIZER


@given(DOCUMENTS, st.integers(1, 10))
def test_every_token_is_predicted_once_after_those_before_it(documents: list[Document], half: int):
    expected = {
        domain: [id_ for it in documents if it.domain == domain for id_ in (*it.text.encode(), END)]
        for domain in sorted({it.domain for it in documents})
    }
    if sum(map(len, expected.values())) < half:
        with pytest.raises(DataError):
            PrefixBlocks(documents, TOKENIZER, 2 * half)
        return
    blocks = PrefixBlocks(documents, TOKENIZER, 2 * half)
    got: dict[str, list[int]] = {domain: [] for domain in blocks.domains}
    for block in (blocks[index] for index in range(len(blocks))):
        before = got[blocks.domains[int(block["domain"])]]
        read = block["input_ids"][block["attention_mask"].bool()].tolist()
        assert read == [END, *before[max(0, len(before) - half + 1) :]][: len(read)]
        assert len(read) == (half if before else 1)
        used = int((block["labels"] != -100).sum())
        assert block["decoder_attention_mask"].tolist() == [1] * used + [0] * (half - used)
        before += block["labels"][:used].tolist()
        assert block["labels"][used:].tolist() == [-100] * (half - used)
    assert got == expected
    assert blocks.num_tokens == sum(map(len, expected.values()))
    assert blocks.num_bytes_per_domain == {
        domain: sum(it.num_bytes for it in documents if it.domain == domain) for domain in blocks.domains
    }


def test_encoder_and_decoder_share_the_positions_of_a_block():
    blocks = PrefixBlocks([Document("some text " * 20, "a")], TOKENIZER, 32)
    assert {name: tuple(value.shape) for name, value in blocks[3].items()} == {
        "input_ids": (16,),
        "attention_mask": (16,),
        "labels": (16,),
        "decoder_attention_mask": (16,),
        "domain": (),
    }
    assert all(value.dtype == torch.int64 for value in blocks[0].values())
    assert blocks.block_size == 32


def test_blocks_are_a_sequence():
    blocks = PrefixBlocks([Document("some text " * 20, "a")], TOKENIZER, 32)
    assert len(list(blocks)) == len(blocks) == 13
    assert all(torch.equal(blocks[-1][name], blocks[12][name]) for name in blocks[0])
    with pytest.raises(IndexError, match="block 13 of 13"):
        blocks[13]


@pytest.mark.parametrize(("block_size", "instead"), [(33, 32), (1, 2), (0, 2)])
def test_a_size_without_two_halves_is_refused(block_size, instead):
    with pytest.raises(ConfigError) as error:
        PrefixBlocks([Document("some text", "a")], load_tokenizer("bytes"), block_size)
    assert str(error.value) == (
        f"block_size must be even, half of it for the encoder and half for the decoder, got {block_size}. "
        f"Use {instead}."
    )
