"""Labelled text, split into what a model trains on and what it is measured with."""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from moesaic.core.errors import DataError


@dataclass(frozen=True, slots=True)
class Document:
    """One piece of text that belongs together: a chapter, a question with its answer, a source file.

    Args:
        text: the text itself; anything that UTF-8 can hold.
        domain: what kind of text it is; held-out figures are told apart by it.
        title: what to call it, for people.
        group: documents of one group never stand on both sides of a split; empty: those with the same text.
    """

    text: str
    domain: str
    title: str = ""
    group: str = ""

    @property
    def num_bytes(self) -> int:
        """Length of the text in UTF-8."""
        return len(self.text.encode())


@dataclass(frozen=True, slots=True, kw_only=True)
class Corpus:
    """Documents to train on and documents to measure with.

    Args:
        train: documents to learn from, domain by domain, each domain in reading order.
        held_out: documents that training never sees; may be empty.
        name: where the text came from, for people.
    Raises:
        DataError: if there is nothing to train on.
    """

    train: tuple[Document, ...]
    held_out: tuple[Document, ...]
    name: str
    fingerprint: str = field(init=False)
    """16 hexadecimal digits of a SHA-256 over every document: equal for equal text, domains and split."""

    def __post_init__(self) -> None:
        if not self.train:
            raise DataError(
                f"{self.name}: needed at least 1 document to train on, got 0. Give a source that contains text."
            )
        object.__setattr__(self, "fingerprint", _fingerprint(self.train, self.held_out))

    @property
    def domains(self) -> tuple[str, ...]:
        """Names of the domains on either side, sorted."""
        return tuple(sorted({document.domain for document in self.train + self.held_out}))

    @property
    def num_bytes(self) -> Mapping[str, tuple[int, int]]:
        """For each domain, the UTF-8 bytes of its training text and of its held-out text."""
        return {name: (_num_bytes(self.train, name), _num_bytes(self.held_out, name)) for name in self.domains}


def _num_bytes(documents: Iterable[Document], domain: str) -> int:
    return sum(document.num_bytes for document in documents if document.domain == domain)


def _fingerprint(train: Iterable[Document], held_out: Iterable[Document]) -> str:
    digest = hashlib.sha256()
    for side, documents in ((b"train", train), (b"held-out", held_out)):
        for document in documents:
            domain, text = document.domain.encode(), document.text.encode()
            # Lengths first: without them "ab" + "c" and "a" + "bc" would be one corpus.
            digest.update(b"%s %d %d " % (side, len(domain), len(text)))
            digest.update(domain)
            digest.update(text)
    return digest.hexdigest()[:16]
