"""The text that every installation has: literature, mathematics and code, in equal parts.

* *literature*: Jane Austen's six novels, a document per chapter. Split by whole novel: names, places and turns of
  phrase recur from chapter to chapter, so a held-out chapter of a novel that was trained on would not be unseen. The
  shortest novel, Northanger Abbey, is the one held out.
* *mathematics*: questions with answers of 52 kinds, from the DeepMind Mathematics generator, a document per question.
  No question occurs twice.
* *code*: the running interpreter's standard library, a document per file. Split by package or top-level module,
  modules that copy from each other kept together. So this third of the corpus, and the fingerprint with it, differ
  between versions of Python.
"""

import gzip
import json
import sys
import sysconfig
import tokenize
import zlib
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

from moesaic.core.errors import DataError
from moesaic.data.corpus import Corpus, Document
from moesaic.data.split import fit, join_families, split

# Both sides of a domain together. Every domain gets as much, so that blocks drawn at random are balanced.
DOMAIN_SIZE_BYTES = 3_200_000

# Tests and demonstrations repeat themselves, encodings are generated tables, pydoc_data is a manual, lib2to3 and
# distutils are gone from newer versions, and many systems package tkinter and idlelib apart.
_NOT_CODE = {
    *("test", "tests", "idle_test", "turtle", "turtledemo", "encodings", "pydoc_data", "lib2to3", "distutils"),
    *("tkinter", "idlelib", "ensurepip", "__phello__", "__pycache__"),
}


def load_builtin(*, held_out: float, seed: int) -> Corpus:
    """Read, balance and split the text that ships with the package.

    Each domain gives `held_out` of 3.2 MB to measure with and the rest to train on; where a domain has less, all
    domains get as much as the smallest.

    Raises:
        DataError: if a shipped file is damaged, or if the interpreter came without its library's source.
    """
    train: dict[str, tuple[Document, ...]] = {}
    aside: dict[str, tuple[Document, ...]] = {}
    for domain, documents in (
        ("code", tuple(join_families(_standard_library(Path(sysconfig.get_path("stdlib")))))),
        ("literature", tuple(_shipped("literature"))),
        ("mathematics", tuple(_shipped("mathematics"))),
    ):
        if held_out == 0:
            train[domain], aside[domain] = documents, ()
        else:
            train[domain], aside[domain] = split(documents, held_out_bytes=held_out * DOMAIN_SIZE_BYTES, seed=seed)
    return Corpus(
        train=_balanced(train, (1 - held_out) * DOMAIN_SIZE_BYTES, seed),
        held_out=_balanced(aside, held_out * DOMAIN_SIZE_BYTES, seed),
        name="builtin",
    )


def _balanced(by_domain: dict[str, tuple[Document, ...]], size_bytes: float, seed: int) -> tuple[Document, ...]:
    least = min(sum(document.num_bytes for document in documents) for documents in by_domain.values())
    return tuple(
        document
        for domain in sorted(by_domain)
        for document in fit(by_domain[domain], size_bytes=min(size_bytes, least), seed=seed)
    )


def _shipped(domain: str) -> Iterator[Document]:
    file = resources.files("moesaic.data") / "corpora" / f"{domain}.jsonl.gz"
    try:
        lines = gzip.decompress(file.read_bytes()).decode().split("\n")[:-1]
        for row in map(json.loads, lines):
            yield Document(row["text"], domain, row["title"], row["group"])
    except (OSError, EOFError, zlib.error, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"builtin: needed the shipped file {file}, but it is missing or damaged ({type(error).__name__}: {error}). "
            "Install the package again."
        ) from error


def _standard_library(root: Path) -> Iterator[Document]:
    paths = [path for path in root.rglob("*.py") if _is_code(path.relative_to(root).parts)]
    if len(paths) < 100:
        raise DataError(
            f"builtin: needed the source of Python's standard library in {root}, got {len(paths)} files. "
            "Use a Python that comes with its library as .py files, or give your own text."
        )
    for path in sorted(paths, key=lambda path: path.relative_to(root).as_posix()):
        parts = path.relative_to(root).parts
        with tokenize.open(path) as file:
            text = file.read()
        if text.strip():
            # `_pydecimal` belongs to `decimal`: an underscore says who may import it, not what it is about.
            group = parts[0].removesuffix(".py").removeprefix("_py").strip("_")
            yield Document(text, "code", "/".join(parts), group)


def _is_code(parts: tuple[str, ...]) -> bool:
    names = (parts[0].removesuffix(".py"), *parts[1:-1])
    return names[0] in sys.stdlib_module_names and _NOT_CODE.isdisjoint(names)
