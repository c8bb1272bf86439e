import gzip
import json
import random
import sys
from pathlib import Path

import pytest

from moesaic.core.errors import ConfigError, DataError
from moesaic.data import Corpus, load_corpus

PARAGRAPHS = [f"Paragraph {number} says this and that at some length, and then it ends.\n\n" for number in range(100)]
PROSE = "".join(PARAGRAPHS)
ROWS = [
    {"text": f"row number {number} of the table", "domain": "even" if number % 2 == 0 else "odd"}
    for number in range(100)
]


def texts(corpus: Corpus) -> list[str]:
    return sorted(it.text for it in corpus.train + corpus.held_out)


def write_json_lines(path: Path, rows: list[dict[str, object]]) -> Path:
    content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def write_parquet(path: Path, rows: list[dict[str, object]]) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def message(source: Path | str, **options: object) -> str:
    with pytest.raises(DataError) as error:
        load_corpus(source, **options)
    return str(error.value)


# What can be read


@pytest.mark.parametrize("name", ["notes.txt", "notes.md", "notes", "notes.txt.gz"])
def test_a_text_file_is_one_domain_cut_at_paragraphs(tmp_path: Path, name: str):
    path = tmp_path / name
    path.write_bytes(gzip.compress(PROSE.encode()) if name.endswith(".gz") else PROSE.encode())
    corpus = load_corpus(path)
    assert corpus.domains == ("notes",)
    assert corpus.name == name
    assert all(it.text.endswith("\n\n") for it in corpus.train + corpus.held_out)
    assert sum(it.num_bytes for it in corpus.train + corpus.held_out) == len(PROSE)
    assert 0.02 * len(PROSE) < corpus.num_bytes["notes"][1] < 0.1 * len(PROSE)


def test_a_folder_is_a_document_per_file_and_a_domain_per_sub_folder(tmp_path: Path):
    for number in range(30):
        path = tmp_path / "mine" / ("poems/old" if number % 2 else "") / f"{number}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"file number {number}")
    (tmp_path / "mine" / ".hidden").write_text("not read")
    (tmp_path / "mine" / "picture.png").write_bytes(b"\x89PNG\r\n\0\0")
    (tmp_path / "mine" / "blank.txt").write_text(" \n")
    corpus = load_corpus(tmp_path / "mine", held_out=0.1)
    assert corpus.domains == ("mine", "poems")
    assert texts(corpus) == sorted(f"file number {number}" for number in range(30))
    assert "poems/old/1.txt" in {it.title for it in corpus.train + corpus.held_out}


def test_a_folder_gives_the_same_corpus_whatever_order_the_disk_lists_it_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for number in range(40):
        (tmp_path / f"{number}.txt").write_text(f"file number {number}")
    before = load_corpus(tmp_path)
    listing = Path.rglob

    def shuffled(self: Path, pattern: str) -> list[Path]:
        paths = list(listing(self, pattern))
        random.Random(1).shuffle(paths)
        return paths

    monkeypatch.setattr(Path, "rglob", shuffled)
    assert load_corpus(tmp_path) == before
    assert load_corpus(tmp_path, seed=1).held_out != before.held_out


def test_tables_in_a_folder_are_read_as_tables(tmp_path: Path):
    write_json_lines(tmp_path / "a.jsonl", ROWS)
    (tmp_path / "sub").mkdir()
    write_json_lines(tmp_path / "sub" / "b.jsonl", [{"text": f"other {number}"} for number in range(40)])
    corpus = load_corpus(tmp_path)
    assert corpus.domains == ("even", "odd", "sub")
    assert len(texts(corpus)) == 140


@pytest.mark.parametrize("name", ["table.jsonl", "table.jsonl.gz", "table.parquet"])
def test_a_table_is_a_document_per_row(tmp_path: Path, name: str):
    path = tmp_path / name
    (write_parquet if name.endswith("parquet") else write_json_lines)(path, ROWS)
    corpus = load_corpus(str(path))
    assert corpus.domains == ("even", "odd")
    assert texts(corpus) == sorted(row["text"] for row in ROWS)
    assert [len([it for it in corpus.held_out if it.domain == name]) for name in corpus.domains] == [3, 3]


@pytest.mark.parametrize("name", ["table.jsonl", "table.parquet"])
def test_columns_can_have_other_names_and_a_domain_is_optional(tmp_path: Path, name: str):
    rows = [{"body": row["text"], "year": 1800 + number % 2, "no": None} for number, row in enumerate(ROWS)]
    path = tmp_path / name
    (write_parquet if name.endswith("parquet") else write_json_lines)(path, rows)
    assert load_corpus(path, text_column="body").domains == ("table",)
    assert load_corpus(path, text_column="body", domain_column="year").domains == ("1800", "1801")


def test_json_lines_keep_odd_line_ends_blank_lines_and_rows_without_text_apart(tmp_path: Path):
    rows = [*ROWS, {"text": "a\u2028b\x85c\r\nd", "domain": "odd"}, {"text": None}, {"text": "  "}]
    path = write_json_lines(tmp_path / "table.jsonl", rows)
    path.write_text(path.read_text(encoding="utf-8") + "\n\n", encoding="utf-8")
    assert texts(load_corpus(path)) == sorted([*(row["text"] for row in ROWS), "a\u2028b\x85c\r\nd"])


def test_equal_rows_go_to_one_side(tmp_path: Path):
    path = write_json_lines(tmp_path / "table.jsonl", [{"text": f"row {number % 30}"} for number in range(300)])
    corpus = load_corpus(path)
    assert {it.text for it in corpus.train}.isdisjoint({it.text for it in corpus.held_out})
    assert len(corpus.train) + len(corpus.held_out) == 300


def test_text_may_begin_with_a_byte_order_mark(tmp_path: Path):
    path = tmp_path / "notes.txt"
    path.write_bytes(b"\xef\xbb\xbf" + PROSE.encode())
    assert not any("\ufeff" in text for text in texts(load_corpus(path)))


def test_nothing_held_out_keeps_documents_whole(tmp_path: Path):
    path = tmp_path / "notes.txt"
    path.write_text(PROSE)
    corpus = load_corpus(path, held_out=0)
    assert [it.text for it in corpus.train] == [PROSE]
    assert corpus.held_out == ()


# Folders that `datasets` saved


@pytest.fixture
def datasets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    return pytest.importorskip("datasets")


def test_a_saved_dataset_is_a_document_per_row_and_class_labels_give_their_names(datasets, tmp_path: Path):
    features = datasets.Features(
        {"text": datasets.Value("string"), "domain": datasets.ClassLabel(names=["news", "mail"])}
    )
    rows = {"text": [row["text"] for row in ROWS], "domain": [number % 2 for number in range(100)]}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "saved")
    corpus = load_corpus(tmp_path / "saved")
    assert corpus.domains == ("mail", "news")
    assert texts(corpus) == sorted(rows["text"])


def test_a_saved_validation_split_is_held_out_as_it_is(datasets, tmp_path: Path):
    sides = {
        name: datasets.Dataset.from_list(ROWS[start::3]) for start, name in enumerate(["train", "validation", "test"])
    }
    datasets.DatasetDict(sides).save_to_disk(tmp_path / "saved")
    corpus = load_corpus(tmp_path / "saved")
    assert sorted(it.text for it in corpus.train) == sorted(row["text"] for row in ROWS[0::3])
    assert sorted(it.text for it in corpus.held_out) == sorted(row["text"] for row in ROWS[1::3])


def test_saved_splits_of_other_names_are_one_pool(datasets, tmp_path: Path):
    sides = {name: datasets.Dataset.from_list(ROWS[start::2]) for start, name in enumerate(["one", "two"])}
    datasets.DatasetDict(sides).save_to_disk(tmp_path / "saved")
    assert texts(load_corpus(tmp_path / "saved")) == sorted(row["text"] for row in ROWS)


def test_a_saved_dataset_without_the_column_lists_those_it_has(datasets, tmp_path: Path):
    datasets.Dataset.from_dict({"body": ["a"], "label": [1]}).save_to_disk(tmp_path / "saved")
    assert message(tmp_path / "saved") == (
        f"{tmp_path / 'saved'} (train): needed a column 'text', got 'body', 'label'. Set text_column to one of them."
    )


def test_a_damaged_saved_dataset_says_to_save_it_again(datasets, tmp_path: Path):
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    for path in (tmp_path / "saved").glob("*.arrow"):
        path.write_bytes(path.read_bytes()[:50])
    said = message(tmp_path / "saved")
    assert said.startswith(f"{tmp_path / 'saved'}: needed a folder that datasets saved, but it is damaged (")
    assert said.endswith("). Save it again.")


# What cannot be read


def test_a_missing_path_is_named(tmp_path: Path):
    assert message(tmp_path / "no.txt") == (
        f"Needed a text file, a folder or 'builtin', got '{tmp_path}/no.txt', which does not exist. Check the path."
    )


def test_a_path_that_is_no_path_is_named():
    assert message("word " * 200) == (
        f"{('word ' * 200)[:200]}: needed a path that can be looked up, but the system says: File name too long. "
        "Check the path and its permissions."
    )


def test_a_file_without_permission_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "secret.txt"
    path.write_text(PROSE)

    def refused(self: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "read_bytes", refused)
    assert message(path) == (
        f"{path}: needed a file that can be read, but the system says: Permission denied. "
        "Check the path and its permissions."
    )


def test_text_in_another_encoding_names_the_byte(tmp_path: Path):
    path = tmp_path / "latin.txt"
    path.write_bytes("A café, ".encode("latin1"))
    assert message(path) == (
        f"{path}: needed UTF-8 text, got byte 0xE9 at position 5. "
        "Convert it, for example with `iconv -f latin1 -t utf-8`."
    )


def test_a_gzip_file_that_is_cut_off_says_so(tmp_path: Path):
    path = write_json_lines(tmp_path / "table.jsonl.gz", ROWS)
    path.write_bytes(path.read_bytes()[:-20])
    said = message(path)
    assert said.startswith(f"{path}: needed a whole gzip file, but it is cut off or damaged (")
    assert said.endswith("). Copy it again.")


def test_a_file_that_is_called_gzip_and_is_not_says_so(tmp_path: Path):
    path = tmp_path / "notes.txt.gz"
    path.write_text(PROSE)
    assert message(path) == (
        f"{path}: needed a whole gzip file, but it is cut off or damaged (Not a gzipped file (b'Pa')). Copy it again."
    )


@pytest.mark.parametrize("name", ["empty.txt", "empty.jsonl"])
def test_an_empty_file_says_so(tmp_path: Path, name: str):
    path = tmp_path / name
    path.write_text("\n \n")
    assert message(path) == (
        f"{path}: needed at least 1 document with text, got none. Give a source that contains text."
    )


def test_a_folder_without_text_says_what_it_has(tmp_path: Path):
    for number in range(3):
        (tmp_path / f"{number}.bin").write_bytes(b"\0\1\2")
    assert message(tmp_path) == (
        f"{tmp_path}: needed a folder with text files, got none among 3 other files. "
        "Put .txt, .jsonl or .parquet files there, or give another folder."
    )


def test_a_line_that_is_not_json_is_named_by_its_number(tmp_path: Path):
    path = write_json_lines(tmp_path / "table.jsonl", ROWS)
    lines = path.read_text().split("\n")
    lines[41] = '{"text": "cut o'
    path.write_text("\n".join(lines))
    assert message(path) == (
        f"{path}, line 42: needed one JSON object, got text that is not JSON "
        "(Unterminated string starting at: line 1 column 10 (char 9)). Mend or delete that line."
    )


def test_a_line_that_is_no_object_is_named_by_its_number(tmp_path: Path):
    path = tmp_path / "table.jsonl"
    path.write_text('{"text": "a"}\n["text"]\n')
    assert message(path) == (
        f'{path}, line 2: needed one JSON object, got a value of type list. Write every line as {{"text": "..."}}.'
    )


@pytest.mark.parametrize(("name", "where"), [("table.jsonl", ", line 1"), ("table.parquet", "")])
def test_a_missing_column_lists_those_there_are(tmp_path: Path, name: str, where: str):
    path = tmp_path / name
    (write_parquet if name.endswith("parquet") else write_json_lines)(path, ROWS)
    assert message(path, text_column="body") == (
        f"{path}{where}: needed a column 'body', got 'text', 'domain'. Set text_column to one of them."
    )
    assert message(path, domain_column="lang") == (
        f"{path}{where}: needed a column 'lang', got 'text', 'domain'. Set domain_column to one of them."
    )


@pytest.mark.parametrize(("name", "where"), [("table.jsonl", "line 2"), ("table.parquet", "row 2")])
def test_a_column_that_is_not_text_is_named(tmp_path: Path, name: str, where: str):
    path = tmp_path / name
    (write_parquet if name.endswith("parquet") else write_json_lines)(path, [{"id": None}, {"id": 7}])
    assert message(path, text_column="id") == (
        f"{path}, {where}: needed text in column 'id', got a value of type int. Set text_column to a column of text."
    )


def test_half_a_character_is_named(tmp_path: Path):
    path = tmp_path / "table.jsonl"
    path.write_text('{"text": "fine"}\n{"text": "abc\\ud83d"}\n')
    assert message(path) == (
        f"{path}, line 2: needed text that UTF-8 can hold, got half of a character (U+D83D) at position 3. "
        "Mend or delete it."
    )


def test_a_file_that_is_called_parquet_and_is_not_says_so(tmp_path: Path):
    pytest.importorskip("pyarrow")
    path = tmp_path / "table.parquet"
    path.write_text(PROSE)
    said = message(path)
    assert said.startswith(f"{path}: needed a Parquet file, but it cannot be read as one (")
    assert said.endswith("). Write or copy it again.")


def test_a_missing_library_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "table.parquet"
    path.write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert message(path) == (
        f"{path}: needed the library pyarrow to read it, but it is not installed. "
        "Install it with: pip install 'moesaic[data]'."
    )


def test_too_little_text_to_split_says_so(tmp_path: Path):
    path = tmp_path / "note.txt"
    path.write_text("Just a line.")
    assert message(path) == (
        f"{path}: needed at least 2 different documents or paragraphs of domain 'note' for a held-out split, "
        "got 1 of 12 bytes. Add text; only load_corpus(held_out=0) takes it as it is."
    )
    assert len(load_corpus(path, held_out=0).train) == 1


@pytest.mark.parametrize("share", [-0.1, 1.0, 5])
def test_a_share_that_is_none_is_refused(share: float):
    with pytest.raises(ConfigError) as error:
        load_corpus("builtin", held_out=share)
    assert str(error.value) == f"held_out must be a share from 0 to below 1, got {share}. Use 0.05."


def test_importing_the_package_loads_nothing_heavy():
    import subprocess

    code = "import sys, moesaic.data; print({'transformers', 'pyarrow', 'datasets', 'tokenizers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_unknown_names_are_attribute_errors():
    import moesaic.data

    names = {"Corpus", "Document", "PrefixBlocks", "TokenBlocks", "leakage", "load_corpus", "load_tokenizer"}
    assert set(dir(moesaic.data)) == names
    with pytest.raises(AttributeError, match=r"module 'moesaic\.data' has no attribute 'nothing'"):
        moesaic.data.nothing  # noqa: B018
