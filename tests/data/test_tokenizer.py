from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from moesaic.core.errors import ConfigError, DataError
from moesaic.data import Corpus, Document, load_tokenizer

PROSE = "".join(
    f"It is a truth universally acknowledged, number {number}, that they're here .\n" for number in range(60)
)
CORPUS = Corpus(
    train=(Document(PROSE, "prose"), Document("def f(x):\n    return x ** 2\n" * 20, "code")), held_out=(), name="small"
)
ANYTHING = st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=60)
ODD = [
    "",
    "\0",
    "🦉👩‍👩‍👧",
    "e\u0301",
    "\ufeff\uffff\U0010ffff",
    " , 's n't .",
    "\r\n\t  \n",
    "a<|endoftext|>b",
    "\u2028\x85",
]


@pytest.fixture(scope="module", params=["bytes", "bpe:300"])
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    return load_tokenizer(request.param, CORPUS)


@pytest.mark.parametrize("text", ODD)
def test_odd_text_comes_back_as_it_went_in(tokenizer: PreTrainedTokenizerFast, text: str):
    assert tokenizer.decode(tokenizer.encode(text)) == text


BYTES = load_tokenizer("bytes")
BPE = load_tokenizer("bpe:300", CORPUS)


@given(ANYTHING)
def test_any_text_comes_back_as_it_went_in(text: str):
    assert BYTES.decode(BYTES.encode(text)) == text
    assert BPE.decode(BPE.encode(text)) == text


@given(ANYTHING)
def test_byte_token_ids_are_the_bytes(text: str):
    assert BYTES.encode(text, split_special_tokens=True) == list(text.encode())


def test_one_token_begins_ends_and_pads():
    for tokenizer, size in ((BYTES, 257), (BPE, 300)):
        assert len(tokenizer) == size
        assert tokenizer.bos_token == tokenizer.eos_token == tokenizer.pad_token == "<|endoftext|>"
        assert tokenizer.eos_token_id == size - 1


def test_a_saved_tokenizer_loads_with_auto_tokenizer_and_by_its_folder(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
):
    tokenizer.save_pretrained(tmp_path)
    for again in (AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(tmp_path), load_tokenizer(str(tmp_path))):
        assert len(again) == len(tokenizer)
        assert again.eos_token_id == again.pad_token_id == again.bos_token_id == tokenizer.eos_token_id
        for text in [*ODD, PROSE]:
            assert again.encode(text) == tokenizer.encode(text)
            assert again.decode(again.encode(text)) == text


def test_byte_pairs_are_learnt_from_the_training_side_alone_and_the_same_each_time():
    again = load_tokenizer("bpe:300", CORPUS)
    assert again.get_vocab() == BPE.get_vocab()
    other = Corpus(train=CORPUS.train, held_out=(Document("zyzzyva " * 500, "d"),), name="other")
    assert load_tokenizer("bpe:300", other).get_vocab() == BPE.get_vocab()
    assert len(BPE.encode(PROSE)) < 0.5 * len(PROSE)


def test_a_folder_without_padding_and_beginning_gets_them_from_its_end_of_text(tmp_path: Path):
    plain = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1, "</s>": 2}, unk_token="[UNK]"))
    PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="</s>").save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.bos_token_id == tokenizer.pad_token_id == tokenizer.eos_token_id == 2


def test_a_folder_without_end_of_text_is_refused(tmp_path: Path):
    plain = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    PreTrainedTokenizerFast(tokenizer_object=plain).save_pretrained(tmp_path)
    with pytest.raises(ConfigError) as error:
        load_tokenizer(tmp_path)
    assert str(error.value) == (
        f"{tmp_path}: needed a tokenizer with an end-of-text token, got one without. "
        "Set its eos_token and save it again."
    )


def test_a_damaged_tokenizer_folder_is_named(tmp_path: Path):
    BYTES.save_pretrained(tmp_path)
    file = tmp_path / "tokenizer.json"
    file.write_text(file.read_text()[:1000])
    with pytest.raises(DataError) as error:
        load_tokenizer(tmp_path)
    assert str(error.value).startswith(f"{tmp_path}: needed a saved tokenizer, but it cannot be read (")
    assert str(error.value).endswith("). Save it again.")


@pytest.mark.parametrize("spec", ["bpe:257", "bpe:", "bpe:-5", "bpe:4k", "bpe:²"])
def test_a_size_that_is_none_is_refused(spec: str):
    with pytest.raises(ConfigError) as error:
        load_tokenizer(spec, CORPUS)
    assert str(error.value) == f"A byte-pair tokenizer needs a size of at least 258, got {spec!r}. Use 'bpe:4096'."


def test_byte_pairs_without_a_corpus_are_refused():
    with pytest.raises(ConfigError) as error:
        load_tokenizer("bpe:999")
    assert str(error.value) == ("The tokenizer 'bpe:999' needs a corpus to be trained on, got none. Pass corpus=...")


def test_too_little_text_for_a_vocabulary_says_how_much_there_is():
    corpus = Corpus(train=(Document("abab abab", "d"),), held_out=(), name="tiny")
    with pytest.raises(DataError) as error:
        load_tokenizer("bpe:4096", corpus)
    assert str(error.value) == (
        "tiny: needed text for a tokenizer of 4096 tokens, got enough for 260. Use 'bpe:260', 'bytes', or more text."
    )
    assert len(load_tokenizer("bpe:260", corpus)) == 260


def test_an_unknown_tokenizer_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError) as error:
        load_tokenizer("byte")
    assert str(error.value) == (
        "A tokenizer must be 'bytes', 'bpe:<size>' or a folder with tokenizer.json, got 'byte'. "
        "Check the path, or use 'bytes'."
    )
