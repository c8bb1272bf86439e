"""One door to every kind of text."""

from collections.abc import Iterable
from pathlib import Path

from moesaic.core.errors import ConfigError, DataError
from moesaic.data.builtin import load_builtin
from moesaic.data.corpus import Corpus, Document
from moesaic.data.readers import read_datasets_folder, read_file, read_folder
from moesaic.data.split import split_by_domain


def load_corpus(
    source: str | Path = "builtin",
    *,
    text_column: str = "text",
    domain_column: str = "domain",
    held_out: float = 0.05,
    seed: int = 0,
) -> Corpus:
    """Read text, and hold some of it out to measure with.

    Sources:
        * `"builtin"`: literature, mathematics and code in equal parts; see `moesaic.data.builtin`.
        * a text file: cut at paragraphs; one domain, named after the file.
        * a folder of text files: a document per file. A file's domain is the sub-folder it lies in, or the folder's
          own name; hidden and binary files are left out.
        * `.jsonl`, `.jsonl.gz` or `.parquet`: a document per row, also inside a folder.
        * a folder that `datasets` saved: its split `validation`, else `test`, is held out as it is; without one,
          all rows are one pool.

    Your own text keeps the proportions it has; only `builtin` is balanced. Blank documents are left out. The split
    takes whole documents of each domain, and equal documents go to one side; a domain with fewer documents than
    `1 / held_out` is cut at paragraphs first. The same text and seed give the same split on every machine.

    Args:
        source: `"builtin"` or a path (a folder of that name is `"./builtin"`).
        text_column: where tables keep the text.
        domain_column: where tables keep the domain. Tables without a column `domain` are one domain, named after the
            file; any other name must be there.
        held_out: share of each domain's bytes to hold out, from 0 (nothing) to below 1.
        seed: another seed holds out other documents.
    Raises:
        ConfigError: if `held_out` is out of range.
        DataError: if the text cannot be found or read, or is too little to split.
    """
    if not 0 <= held_out < 1:
        raise ConfigError(f"held_out must be a share from 0 to below 1, got {held_out}. Use 0.05.")
    if source == "builtin":
        return load_builtin(held_out=held_out, seed=seed)
    path = Path(source)
    if not _exists(path):
        raise DataError(
            f"Needed a text file, a folder or 'builtin', got {str(source)!r}, which does not exist. Check the path."
        )
    name = path.resolve().name
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        train, aside = read_datasets_folder(path, text_column=text_column, domain_column=domain_column)
        if aside:
            return Corpus(train=_ordered(train, path), held_out=_ordered(aside, path), name=name)
    elif path.is_dir():
        train = read_folder(path, text_column=text_column, domain_column=domain_column)
    else:
        train = read_file(path, text_column=text_column, domain_column=domain_column)
    train, aside = split_by_domain(_ordered(train, path), held_out=held_out, seed=seed, name=str(path))
    return Corpus(train=train, held_out=aside, name=name)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError as error:
        reason = f"the system says: {error.strerror}. Check the path and its permissions"
        raise DataError(f"{str(path)[:200]}: needed a path that can be looked up, but {reason}.") from error


def _ordered(documents: Iterable[Document], path: Path) -> tuple[Document, ...]:
    """Documents with something in them, domain by domain."""
    kept = tuple(sorted((it for it in documents if it.text.strip()), key=lambda document: document.domain))
    if not kept:
        raise DataError(f"{path}: needed at least 1 document with text, got none. Give a source that contains text.")
    return kept
