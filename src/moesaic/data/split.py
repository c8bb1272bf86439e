"""Put documents on two sides without leakage, the same way every time.

Nothing here depends on the order in which documents arrive: the seed and a group's own name decide where it goes.
"""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import combinations
from math import ceil

from moesaic.core.errors import DataError
from moesaic.data.corpus import Document

# A group that would carry a domain's held-out part past 1.5 times its share stays in training.
_MOST_OVER = 1.5
# Pieces of text that has too few documents to split: between a few sentences and a page.
_SMALLEST_PIECE, _LARGEST_PIECE = 256, 4096


def split(
    documents: Iterable[Document], *, held_out_bytes: float, seed: int
) -> tuple[tuple[Document, ...], tuple[Document, ...]]:
    """Put whole groups of one domain's documents aside until they hold `held_out_bytes`.

    Groups come in an order drawn from the seed: first those of at most a quarter of what was asked, so that several
    kinds are measured, then larger ones, but none that would overshoot by half. Where that leaves less than half of
    what was asked, the smallest groups are added, so that a few huge groups (novels) give up the smallest of them. One
    group at least stays in training.

    Returns:
        The documents to train on and those held out, each in the order they came. Either may be empty.
    """
    documents = tuple(documents)
    size_bytes: Counter[str] = Counter()
    for document in documents:
        size_bytes[_group(document)] += document.num_bytes
    chosen: set[str] = set()
    total = 0
    order = sorted(size_bytes, key=lambda name: _draw(seed, name))
    for largest in (held_out_bytes / 4, held_out_bytes * _MOST_OVER):
        for group in order:
            if total >= held_out_bytes or len(chosen) == len(order) - 1:
                break
            if group not in chosen and size_bytes[group] <= min(largest, _MOST_OVER * held_out_bytes - total):
                chosen.add(group)
                total += size_bytes[group]
    for group in sorted(size_bytes, key=lambda name: (size_bytes[name], _draw(seed, name))):
        if total >= held_out_bytes / 2 or len(chosen) == len(order) - 1:
            break
        if group not in chosen:
            chosen.add(group)
            total += size_bytes[group]
    train = tuple(document for document in documents if _group(document) not in chosen)
    return train, tuple(document for document in documents if _group(document) in chosen)


def fit(documents: Sequence[Document], *, size_bytes: float, seed: int) -> tuple[Document, ...]:
    """Whole documents, drawn with the seed, that together hold at most `size_bytes`; in the order they came."""
    order = sorted(range(len(documents)), key=lambda index: _draw(seed, documents[index].title + documents[index].text))
    chosen = []
    for index in order:
        if documents[index].num_bytes <= size_bytes:
            chosen.append(index)
            size_bytes -= documents[index].num_bytes
    return tuple(documents[index] for index in sorted(chosen))


def split_by_domain(
    documents: Iterable[Document], *, held_out: float, seed: int, name: str
) -> tuple[tuple[Document, ...], tuple[Document, ...]]:
    """Hold out a share of each domain's bytes, whole documents at a time.

    A domain with fewer documents than `1 / held_out` cannot give that share in whole documents: its documents are
    cut at paragraphs first, into pieces of at most 4 KB.

    Raises:
        DataError: if a domain has too little text for two sides.
    """
    by_domain: defaultdict[str, list[Document]] = defaultdict(list)
    for document in documents:
        by_domain[document.domain].append(document)
    if held_out == 0:
        return tuple(document for domain in sorted(by_domain) for document in by_domain[domain]), ()
    sides: tuple[list[Document], list[Document]] = ([], [])
    for domain in sorted(by_domain):
        whole = by_domain[domain]
        total = sum(document.num_bytes for document in whole)
        pieces = tuple(_pieces(whole, ceil(1 / held_out), total)) if len(whole) * held_out < 1 else tuple(whole)
        train, aside = split(pieces, held_out_bytes=held_out * total, seed=seed)
        if not train or not aside:
            raise DataError(
                f"{name}: needed at least 2 different documents or paragraphs of domain {domain!r} for a held-out "
                f"split, got 1 of {total} bytes. Add text; only load_corpus(held_out=0) takes it as it is."
            )
        sides[0].extend(train)
        sides[1].extend(aside)
    return tuple(sides[0]), tuple(sides[1])


def cut(text: str, size: int) -> Iterator[str]:
    """Cut text into pieces of about `size` characters: after a blank line, else a line, else a word.

    The pieces put together are the text again; none is over 1.5 times `size`.
    """
    start = 0
    while len(text) - start > _MOST_OVER * size:
        end = start + size
        for mark in ("\n\n", "\n", " "):
            found = text.rfind(mark, start + size // 2, start + size)
            if found >= 0:
                end = found + len(mark)
                break
        yield text[start:end]
        start = end
    yield text[start:]


def join_families(documents: Iterable[Document], *, least_shared: float = 0.03) -> Iterator[Document]:
    """Give groups that copy from each other one group, so that a copy never stands on the other side.

    Two groups belong together when the smaller shares `least_shared` of its long lines (32 characters and more) with
    the larger. A line that more than 4 groups have is custom (a licence, an idiom), not a copy, and does not count.
    """
    documents = tuple(documents)
    lines: defaultdict[str, set[str]] = defaultdict(set)
    for document in documents:
        lines[_group(document)].update(line for raw in document.text.split("\n") if len(line := raw.strip()) >= 32)
    owners: defaultdict[str, list[str]] = defaultdict(list)
    for group in sorted(lines):
        for line in lines[group]:
            owners[line].append(group)
    shared = Counter(pair for groups in owners.values() if 2 <= len(groups) <= 4 for pair in combinations(groups, 2))
    parent = {group: group for group in lines}

    def family(group: str) -> str:
        while parent[group] != group:
            group = parent[group]
        return group

    for (one, other), count in sorted(shared.items()):
        if count >= least_shared * min(len(lines[one]), len(lines[other])):
            first, second = sorted((family(one), family(other)))
            parent[second] = first
    for document in documents:
        yield replace(document, group=family(_group(document)))


def _pieces(documents: Iterable[Document], at_least: int, total_bytes: int) -> Iterator[Document]:
    size = max(_SMALLEST_PIECE, min(_LARGEST_PIECE, total_bytes // (4 * at_least)))
    for document in documents:
        texts = list(cut(document.text, size))
        for number, text in enumerate(texts, start=1):
            title = f"{document.title}, part {number}" if len(texts) > 1 else document.title
            yield Document(text, document.domain, title)


def _group(document: Document) -> str:
    return document.group or document.text


def _draw(seed: int, name: str) -> bytes:
    return hashlib.sha256(f"{seed} {name}".encode()).digest()
