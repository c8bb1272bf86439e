"""Read the user's own text: files, folders and tables become documents."""

import gzip
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType

from moesaic.core.errors import DataError
from moesaic.data.corpus import Document

_TABLES = (".jsonl", ".jsonl.gz", ".parquet")
# A file with a zero byte this early is not text.
_PROBE_BYTES = 8192


def read_file(path: Path, *, text_column: str, domain_column: str, domain: str | None = None) -> tuple[Document, ...]:
    """Documents of one file: one for a text file, one per row for a table.

    Args:
        path: ends with .jsonl, .jsonl.gz or .parquet for a table; anything else is text, gzip'd if it ends with .gz.
        text_column: the column that holds the text.
        domain_column: the column that holds the domain; may be missing if it is called `domain`.
        domain: what to call the domain where no column says; by default the file's name.
    Raises:
        DataError: if the file cannot be read, or has no such column.
    """
    domain = domain or path.name.split(".")[0] or path.name
    if path.name.endswith(".parquet"):
        return tuple(_read_parquet(path, text_column, domain_column, domain))
    if path.name.endswith(_TABLES):
        return tuple(_read_json_lines(path, text_column, domain_column, domain))
    return (Document(_read_text(path), domain, path.name),)


def read_folder(folder: Path, *, text_column: str, domain_column: str) -> tuple[Document, ...]:
    """Documents of every text file and table under a folder, sorted by path; the first sub-folder is the domain.

    Raises:
        DataError: if a file cannot be read, or if none is text.
    """
    documents: list[Document] = []
    others = 0
    paths = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    for name in sorted(paths):
        parts = name.split("/")
        if any(part.startswith(".") for part in parts):
            continue
        if not name.endswith(_TABLES) and not name.endswith(".gz") and _is_binary(paths[name]):
            others += 1
            continue
        domain = parts[0] if len(parts) > 1 else folder.resolve().name
        for document in read_file(paths[name], text_column=text_column, domain_column=domain_column, domain=domain):
            title = document.title.replace(paths[name].name, name, 1)
            documents.append(Document(document.text, document.domain, title))
    if not documents:
        raise DataError(
            f"{folder}: needed a folder with text files, got none among {others} other files. "
            "Put .txt, .jsonl or .parquet files there, or give another folder."
        )
    return tuple(documents)


def read_datasets_folder(
    folder: Path, *, text_column: str, domain_column: str
) -> tuple[tuple[Document, ...], tuple[Document, ...]]:
    """Documents of a folder that `datasets` wrote with `save_to_disk`.

    Returns:
        The documents to train on, and those of the split `validation`, else `test`: empty where there is neither.
    Raises:
        DataError: if `datasets` is not installed, the folder is damaged, or there is no such column.
    """
    datasets = _library("datasets", folder)
    try:
        found = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{folder}: needed a folder that datasets saved, but it is damaged ({_reason(error)}). Save it again."
        ) from error
    splits = found if isinstance(found, Mapping) else {"train": found}
    aside = next((name for name in ("validation", "test") if name in splits and "train" in splits), None)
    sides: tuple[list[Document], list[Document]] = ([], [])
    for name, table in splits.items():
        if aside is not None and name not in ("train", aside):
            continue
        where = f"{folder} ({name})"
        wanted = _columns(where, table.column_names, text_column, domain_column)
        rows = table.select_columns(wanted)[:]
        labels = table.features.get(domain_column)
        if domain_column in wanted and hasattr(labels, "int2str"):
            rows[domain_column] = [labels.int2str(value) for value in rows[domain_column]]
        side = sides[1] if name == aside else sides[0]
        side.extend(_rows_of(rows, where, text_column, domain_column, folder.resolve().name))
    return tuple(sides[0]), tuple(sides[1])


def _read_json_lines(path: Path, text_column: str, domain_column: str, domain: str) -> Iterator[Document]:
    # Not splitlines(): JSON strings may hold U+2028 and other line ends as they are.
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"{where}: needed one JSON object, got text that is not JSON ({error}). Mend or delete that line."
            ) from error
        if not isinstance(row, dict):
            raise DataError(
                f"{where}: needed one JSON object, got a value of type {type(row).__name__}. "
                f'Write every line as {{"{text_column}": "..."}}.'
            )
        columns = _columns(where, tuple(row), text_column, domain_column)
        label = row[domain_column] if domain_column in columns else None
        yield from _document(row[text_column], label, where, f"{path.name}, line {number}", text_column, domain)


def _read_parquet(path: Path, text_column: str, domain_column: str, domain: str) -> Iterator[Document]:
    pyarrow = _library("pyarrow", path)
    parquet = _library("pyarrow.parquet", path)
    try:
        with parquet.ParquetFile(path) as file:
            columns = _columns(str(path), file.schema_arrow.names, text_column, domain_column)
            rows = file.read(columns=columns).to_pydict()
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(
            f"{path}: needed a Parquet file, but it cannot be read as one ({_reason(error)}). Write or copy it again."
        ) from error
    yield from _rows_of(rows, str(path), text_column, domain_column, domain)


def _rows_of(
    rows: Mapping[str, Sequence[object]], where: str, text_column: str, domain_column: str, domain: str
) -> Iterator[Document]:
    texts = rows[text_column]
    labels = rows[domain_column] if domain_column in rows else [None] * len(texts)
    name = Path(where).name
    for number, (text, label) in enumerate(zip(texts, labels, strict=True), start=1):
        yield from _document(text, label, f"{where}, row {number}", f"{name}, row {number}", text_column, domain)


def _columns(where: str, there: Sequence[str], text_column: str, domain_column: str) -> list[str]:
    """The columns to read, text first."""
    optional = domain_column == "domain"
    for column in (text_column,) if optional else (text_column, domain_column):
        if column not in there:
            setting = "text_column" if column == text_column else "domain_column"
            listed = ", ".join(map(repr, there)) or "none at all"
            raise DataError(f"{where}: needed a column {column!r}, got {listed}. Set {setting} to one of them.")
    return [text_column, domain_column] if domain_column in there else [text_column]


def _document(text: object, label: object, where: str, title: str, text_column: str, domain: str) -> Iterator[Document]:
    """A row's document, or nothing for a row whose text is null."""
    if text is None:
        return
    if not isinstance(text, str):
        raise DataError(
            f"{where}: needed text in column {text_column!r}, got a value of type {type(text).__name__}. "
            "Set text_column to a column of text."
        )
    label = domain if label is None else str(label)
    for value in (text, label):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"{where}: needed text that UTF-8 can hold, got half of a character (U+{ord(value[error.start]):04X}) "
                f"at position {error.start}. Mend or delete it."
            ) from error
    yield Document(text, label, title)


def _read_text(path: Path) -> str:
    try:
        content = path.read_bytes()
        if path.name.endswith(".gz"):
            content = gzip.decompress(content)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(
            f"{path}: needed a whole gzip file, but it is cut off or damaged ({_reason(error)}). Copy it again."
        ) from error
    except OSError as error:
        raise DataError(
            f"{path}: needed a file that can be read, but the system says: {error.strerror}. "
            "Check the path and its permissions."
        ) from error
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: needed UTF-8 text, got byte 0x{content[error.start]:02X} at position {error.start}. "
            "Convert it, for example with `iconv -f latin1 -t utf-8`."
        ) from error


def _is_binary(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return b"\0" in file.read(_PROBE_BYTES)
    except OSError:
        return False  # reading it in full says what is wrong


def _library(name: str, path: Path) -> ModuleType:
    """An optional library, or an error that says how to get it."""
    from importlib import import_module

    try:
        return import_module(name)
    except ImportError as error:
        package = name.split(".")[0]
        raise DataError(
            f"{path}: needed the library {package} to read it, but it is not installed. "
            "Install it with: pip install 'moesaic[data]'."
        ) from error


def _reason(error: BaseException) -> str:
    return str(error).split("\n")[0].rstrip(".") or type(error).__name__
