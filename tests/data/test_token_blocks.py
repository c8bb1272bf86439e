import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from moesaic.core.errors import ConfigError, DataError
from moesaic.data import Corpus, Document, TokenBlocks, load_tokenizer

TOKENIZER = load_tokenizer("bytes")
END = TOKENIZER.eos_token_id
DOCUMENTS = st.lists(
    st.builds(
        Document,
        st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=40),
        st.sampled_from(["a", "b", "c"]),
    ),
    min_size=1,
    max_size=12,
)


@given(DOCUMENTS, st.integers(2, 20))
def test_every_token_stands_in_the_blocks_once_and_in_order(documents: list[Document], block_size: int):
    expected = {
        domain: [id_ for it in documents if it.domain == domain for id_ in (*it.text.encode(), END)]
        for domain in sorted({it.domain for it in documents})
    }
    if sum(map(len, expected.values())) < block_size - 1:
        with pytest.raises(DataError):
            TokenBlocks(documents, TOKENIZER, block_size)
        return
    blocks = TokenBlocks(documents, TOKENIZER, block_size)
    got: dict[str, list[int]] = {domain: [] for domain in blocks.domains}
    for index in range(len(blocks)):
        block = blocks[index]
        used = int(block["attention_mask"].sum())
        assert block["input_ids"][0] == END
        got[blocks.domains[int(block["domain"])]] += block["input_ids"][1:used].tolist()
        # Padding stands at the end only, and only there are labels left out.
        assert block["attention_mask"].tolist() == [1] * used + [0] * (block_size - used)
        assert block["labels"].tolist() == block["input_ids"][:used].tolist() + [-100] * (block_size - used)
        last_of_domain = index + 1 == len(blocks) or blocks[index + 1]["domain"] != block["domain"]
        assert used == block_size or last_of_domain
    assert got == expected
    assert blocks.num_tokens == sum(map(len, expected.values()))
    assert blocks.num_bytes_per_domain == {
        domain: sum(it.num_bytes for it in documents if it.domain == domain) for domain in blocks.domains
    }


def test_shapes_and_types_are_what_a_trainer_expects():
    blocks = TokenBlocks([Document("some text " * 20, "a")], TOKENIZER, 32)
    batch = next(iter(DataLoader(blocks, batch_size=3)))
    assert {name: tuple(value.shape) for name, value in batch.items()} == {
        "input_ids": (3, 32),
        "attention_mask": (3, 32),
        "labels": (3, 32),
        "domain": (3,),
    }
    assert all(value.dtype == torch.int64 for value in batch.values())


def test_a_block_can_be_changed_without_harm_to_the_next_reader():
    blocks = TokenBlocks([Document("some text " * 20, "a")], TOKENIZER, 32)
    blocks[0]["input_ids"].zero_()
    blocks[0]["labels"].zero_()
    assert TOKENIZER.decode(blocks[0]["input_ids"][1:]) == ("some text " * 20)[:31]


def test_blocks_are_a_sequence():
    blocks = TokenBlocks([Document("some text " * 20, "a")], TOKENIZER, 32)
    assert len(list(blocks)) == len(blocks) == 7
    assert torch.equal(blocks[-1]["input_ids"], blocks[6]["input_ids"])
    with pytest.raises(IndexError, match="block 7 of 7"):
        blocks[7]


def test_two_sets_count_domains_alike_when_told_the_names():
    blocks = TokenBlocks([Document("text", "z")], TOKENIZER, 4, domains=("a", "z"))
    assert blocks.domains == ("a", "z")
    assert int(blocks[0]["domain"]) == 1
    assert blocks.num_bytes_per_domain == {"a": 0, "z": 4}


def test_text_that_spells_a_special_token_is_read_as_text():
    text = "before <|endoftext|> after"
    blocks = TokenBlocks([Document(text, "a")], TOKENIZER, len(text) + 2)
    assert blocks[0]["input_ids"].tolist() == [END, *text.encode(), END]
    # and the tokenizer is left as it was
    assert TOKENIZER.encode("<|endoftext|>") == [END]


def test_byte_pairs_predict_the_same_bytes_in_fewer_tokens():
    documents = [Document("It is a truth universally acknowledged. " * 50, "a")]
    tokenizer = load_tokenizer("bpe:280", Corpus(train=tuple(documents), held_out=(), name="x"))
    blocks = TokenBlocks(documents, tokenizer, 16)
    assert blocks.num_bytes_per_domain == {"a": 2000}
    assert blocks.num_tokens < 1200
    ids = np.concatenate([it["input_ids"][1 : int(it["attention_mask"].sum())].numpy() for it in blocks])
    assert tokenizer.decode(ids[:-1]) == documents[0].text


def test_a_large_vocabulary_keeps_its_ids():
    words = {f"w{number}": number for number in range(70_000)}
    plain = Tokenizer(models.WordLevel({**words, "</s>": 70_000}, unk_token="w0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="</s>", bos_token="</s>", pad_token="</s>")
    blocks = TokenBlocks([Document("w69999", "a")], tokenizer, 2)
    assert [it["input_ids"].tolist() for it in blocks] == [[70_000, 69_999], [70_000, 70_000]]


def test_builtin_takes_two_bytes_a_token(builtin: Corpus):
    blocks = TokenBlocks(builtin.held_out, TOKENIZER, 256, domains=builtin.domains)
    assert blocks._tokens.nbytes == 2 * blocks.num_tokens
    assert blocks.domains == ("code", "literature", "mathematics")


def test_a_block_of_one_token_is_refused():
    with pytest.raises(ConfigError) as error:
        TokenBlocks([Document("text", "a")], TOKENIZER, 1)
    assert str(error.value) == "block_size must be at least 2, got 1. Use 256."


def test_text_shorter_than_a_block_says_how_short():
    with pytest.raises(DataError) as error:
        TokenBlocks([Document("text", "a"), Document("more", "b")], TOKENIZER, 256)
    assert str(error.value) == (
        "Needed at least 255 tokens to fill one block of 256, got 10 from 2 documents. "
        "Give more text, or lower block_size (--context)."
    )


def test_no_documents_say_so():
    with pytest.raises(DataError) as error:
        TokenBlocks([], TOKENIZER, 64)
    assert str(error.value) == (
        "Needed at least 63 tokens to fill one block of 64, got 0 from 0 documents. "
        "Give more text, or lower block_size (--context)."
    )


def test_a_domain_without_a_number_is_refused():
    with pytest.raises(ConfigError) as error:
        TokenBlocks([Document("text", "a")], TOKENIZER, 4, domains=("b",))
    assert str(error.value) == "domains must have every document's domain, got none called 'a'. Add it."


def test_a_tokenizer_without_padding_is_refused():
    plain = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="a", bos_token="a")
    with pytest.raises(ConfigError) as error:
        TokenBlocks([Document("text", "a")], tokenizer, 4)
    assert str(error.value) == (
        "The tokenizer needs a pad_token, got none. "
        "Set tokenizer.pad_token, or read it with load_tokenizer, which fills it in."
    )
