"""Three domains of as many bytes each: an encyclopedia, program code, and mathematics."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Iterable
from pathlib import Path

from moesaic.core.errors import DataError
from moesaic.core.files import replacing_file
from moesaic.data import load_corpus

WIKIPEDIA, MATHEMATICS = "wikipedia_en.jsonl.gz", "dm_mathematics.jsonl.gz"
QUESTIONS_PER_TEXT = 16


def write_three_domains(folder: Path | None, out: Path, *, num_bytes: int = 3_000_000, seed: int = 0) -> Path:
    """Draw texts of each domain and write them as JSON lines with ``domain`` and ``text``.

    Code is the standard library of the Python that runs, as in the text that ships.

    Args:
        folder: holds :data:`WIKIPEDIA` and :data:`MATHEMATICS`, JSON lines with ``text``; None draws all from the text
            that ships, with novels for the encyclopedia.
        out: the file.
        num_bytes: of each domain, or a little more.
        seed: of the draw.
    Raises:
        DataError: if a file is not there or is something else.
    """
    rng = random.Random(seed)
    domains = _shipped()
    if folder is not None:
        domains = {
            "wikipedia": _texts(folder / WIKIPEDIA),
            "code": domains["code"],
            "mathematics": _texts(folder / MATHEMATICS),
        }
    rows = []
    for domain, texts in domains.items():
        if domain == "mathematics":
            texts = _joined(texts, rng)
        rows += _drawn(domain, texts, num_bytes, rng)
    with replacing_file(out) as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows).encode())
    return out


def _shipped() -> dict[str, list[str]]:
    corpus = load_corpus("builtin")
    texts: dict[str, list[str]] = {domain: [] for domain in corpus.domains}
    for one in (*corpus.train, *corpus.held_out):
        texts[one.domain].append(one.text)
    return texts


def _texts(path: Path) -> list[str]:
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            return [str(json.loads(line)["text"]) for line in file]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"The study needs {path}, gzipped JSON lines with a text in each, got {type(error).__name__}: {error}. "
            "Name the folder that holds it."
        ) from error


def _joined(texts: list[str], rng: random.Random) -> list[str]:
    """Short questions joined to texts as long as those of the other domains."""
    rng.shuffle(texts)
    return ["\n".join(texts[start : start + QUESTIONS_PER_TEXT]) for start in range(0, len(texts), QUESTIONS_PER_TEXT)]


def _drawn(domain: str, texts: Iterable[str], num_bytes: int, rng: random.Random) -> list[dict[str, str]]:
    texts = list(texts)
    rng.shuffle(texts)
    rows, have = [], 0
    for text in texts:
        if have >= num_bytes:
            break
        rows.append({"domain": domain, "text": text})
        have += len(text.encode())
    return rows
