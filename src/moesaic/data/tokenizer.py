"""Text to token ids and back: plain bytes, a byte-pair encoding of the corpus, or any tokenizer folder."""

from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from moesaic.core.errors import ConfigError, DataError
from moesaic.data.corpus import Corpus
from moesaic.data.split import cut

END_OF_TEXT = "<|endoftext|>"


def load_tokenizer(spec: str | Path, corpus: Corpus | None = None) -> PreTrainedTokenizerFast:
    """Build, train or read a tokenizer. What comes back saves with `save_pretrained` and loads with `AutoTokenizer`.

    Args:
        spec: `"bytes"`: token id = byte, and `<|endoftext|>` is 256. `"bpe:4096"`: a byte-level byte-pair encoding of
            4096 tokens, trained on the corpus's training side. Anything else: a folder with a saved tokenizer; one
            without tokens to begin or to pad a text uses its end-of-text token for that.
        corpus: needed by `"bpe:..."`.
    Raises:
        ConfigError: if `spec` is none of these, or its tokenizer has no end-of-text token.
        DataError: if the corpus has too little text for that many tokens, or the folder cannot be read.
    """
    if spec == "bytes":
        return byte_tokenizer()
    if isinstance(spec, str) and spec.startswith("bpe:"):
        size = spec.removeprefix("bpe:")
        if not size.isascii() or not size.isdigit() or int(size) < 258:
            raise ConfigError(f"A byte-pair tokenizer needs a size of at least 258, got {spec!r}. Use 'bpe:4096'.")
        if corpus is None:
            raise ConfigError(f"The tokenizer {spec!r} needs a corpus to be trained on, got none. Pass corpus=...")
        return train_bpe(corpus, int(size))
    return _read(Path(spec))


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """256 byte tokens, whose ids are the bytes, and one that ends, begins and pads texts."""
    ids = {_character(byte): byte for byte in range(256)}
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return _finished(tokenizer)


def train_bpe(corpus: Corpus, size: int) -> PreTrainedTokenizerFast:
    """A byte-level byte-pair encoding of exactly `size` tokens, learnt from the training text.

    Raises:
        DataError: if the text has too few repeated pairs for that many tokens.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=size - 1,  # one more for the end of text
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_pieces(corpus), trainer)
    if tokenizer.get_vocab_size() != size - 1:
        most = tokenizer.get_vocab_size() + 1
        raise DataError(
            f"{corpus.name}: needed text for a tokenizer of {size} tokens, got enough for {most}. "
            f"Use 'bpe:{most}', 'bytes', or more text."
        )
    return _finished(tokenizer)


def _character(byte: int) -> str:
    """The letter that stands for a byte in a byte-level vocabulary: its Latin-1 letter, or one past 255 if it has none.

    GPT-2's alphabet, which `ByteLevel` uses (Radford et al. 2019, `bytes_to_unicode`).
    """
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    if byte in visible:
        return chr(byte)
    return chr(256 + [other for other in range(256) if other not in visible].index(byte))


def _pieces(corpus: Corpus) -> Iterator[str]:
    for document in corpus.train:
        yield from cut(document.text, 1 << 16)


def _finished(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        # Tidying would eat the blank of " ," and text would not come back as it went in.
        clean_up_tokenization_spaces=False,
    )


def _read(folder: Path) -> PreTrainedTokenizerFast:
    if not (folder / "tokenizer.json").is_file() and not (folder / "tokenizer_config.json").is_file():
        raise ConfigError(
            f"A tokenizer must be 'bytes', 'bpe:<size>' or a folder with tokenizer.json, got {str(folder)!r}. "
            "Check the path, or use 'bytes'."
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # the library raises bare Exception for a damaged tokenizer.json
        reason = str(error).split("\n")[0].rstrip(".")
        raise DataError(
            f"{folder}: needed a saved tokenizer, but it cannot be read ({reason}). Save it again."
        ) from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ConfigError(
            f"{folder}: needed a tokenizer of the `tokenizers` library, got a {type(tokenizer).__name__}. "
            "Save it with a tokenizer.json."
        )
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            f"{folder}: needed a tokenizer with an end-of-text token, got one without. "
            "Set its eos_token and save it again."
        )
    if tokenizer.bos_token_id is None:
        tokenizer.bos_token = tokenizer.eos_token
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
