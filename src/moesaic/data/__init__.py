"""Text to train on and to measure with: what ships with the package, readers for your own, tokenizers, blocks.

Names load on first use, so that `import moesaic` pays for neither transformers nor pyarrow.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moesaic.data.blocks import TokenBlocks
    from moesaic.data.corpus import Corpus, Document
    from moesaic.data.load import load_corpus
    from moesaic.data.overlap import leakage
    from moesaic.data.prefix import PrefixBlocks
    from moesaic.data.tokenizer import load_tokenizer

__all__ = ["Corpus", "Document", "PrefixBlocks", "TokenBlocks", "leakage", "load_corpus", "load_tokenizer"]

_HOME = {
    "Corpus": "moesaic.data.corpus",
    "Document": "moesaic.data.corpus",
    "PrefixBlocks": "moesaic.data.prefix",
    "TokenBlocks": "moesaic.data.blocks",
    "leakage": "moesaic.data.overlap",
    "load_corpus": "moesaic.data.load",
    "load_tokenizer": "moesaic.data.tokenizer",
}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
