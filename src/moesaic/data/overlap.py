"""How much of the held-out text a model may have seen in training."""

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from moesaic.core.errors import ConfigError
from moesaic.data.corpus import Corpus, Document


def leakage(corpus: Corpus, *, window_bytes: int = 64) -> dict[str, float]:
    """For each domain, the share of its held-out windows that occur anywhere in the training text, byte for byte.

    Windows lie inside one document and start at every byte; a document shorter than a window is one window. 64 bytes
    is about ten words: longer than set phrases, shorter than anything worth copying.

    Args:
        corpus: the text, both sides.
        window_bytes: length of a window; a power of two.
    Raises:
        ConfigError: if `window_bytes` is not a power of two.
    """
    if window_bytes < 1 or window_bytes & (window_bytes - 1):
        raise ConfigError(f"window_bytes must be a power of two, got {window_bytes}. Use 64.")
    seen = np.sort(_windows(corpus.train, window_bytes))
    shares = {}
    for domain in sorted({document.domain for document in corpus.held_out}):
        windows = np.sort(_windows((it for it in corpus.held_out if it.domain == domain), window_bytes))
        places = np.searchsorted(seen, windows).clip(max=len(seen) - 1)
        shares[domain] = float(np.mean(seen[places] == windows))
    return shares


def _windows(documents: Iterable[Document], window_bytes: int) -> NDArray[np.uint64]:
    """A 64-bit hash of every window: bytes become random words, and halves are joined until they span a window."""
    texts = [document.text.encode().ljust(window_bytes, b"\0") for document in documents]
    word_of_byte = np.random.default_rng(0).integers(0, 2**64, size=256, dtype=np.uint64)
    hashes = word_of_byte[np.frombuffer(b"".join(texts), dtype=np.uint8)]
    factor = np.uint64(0x9E3779B97F4A7C15)
    span = 1
    with np.errstate(over="ignore"):
        while span < window_bytes:
            hashes = hashes[:-span] * factor + hashes[span:]
            factor = factor * factor
            span *= 2
    ends = np.cumsum([len(text) for text in texts])
    crosses = np.zeros(len(hashes) + window_bytes, dtype=bool)
    for offset in range(1, window_bytes):
        crosses[ends - offset] = True
    return hashes[~crosses[: len(hashes)]]
