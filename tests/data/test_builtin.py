import gzip
import io
import json
from importlib import resources
from pathlib import Path

import pytest

from moesaic.core.errors import DataError
from moesaic.data import Corpus, leakage, load_corpus
from moesaic.data import builtin as module


def test_three_domains_are_there_on_both_sides(builtin: Corpus):
    assert builtin.domains == ("code", "literature", "mathematics")
    assert {document.domain for document in builtin.held_out} == set(builtin.domains)


def test_domains_are_balanced_to_one_percent_in_training_and_ten_in_what_is_held_out(builtin: Corpus):
    train, held_out = zip(*builtin.num_bytes.values(), strict=True)
    assert min(train) > 0.99 * max(train)
    assert min(train) > 2_500_000
    assert max(train) < 4_000_000
    assert min(held_out) > 0.9 * max(held_out)
    assert min(held_out) > 140_000
    assert max(held_out) < 300_000


def test_almost_none_of_the_held_out_text_occurs_in_training(builtin: Corpus):
    shares = leakage(builtin)
    # Two novels share no ten words. Questions are built from some hundred sentence frames, a few of which span 64
    # bytes (0.2 to 0.4 % over four seeds). Modules share an import line or a licence here and there (0.1 to 0.6 % over
    # Python 3.11 to 3.13); a split by file gives 1.6 to 5 %, one by package that ignores copies 2.4 to 11 %.
    assert shares["literature"] < 0.001
    assert shares["mathematics"] < 0.01
    assert shares["code"] < 0.015


def test_no_group_stands_on_both_sides(builtin: Corpus):
    assert {it.group for it in builtin.train}.isdisjoint({it.group for it in builtin.held_out})
    assert {it.text for it in builtin.train}.isdisjoint({it.text for it in builtin.held_out})


def test_a_whole_novel_is_held_out(builtin: Corpus):
    assert {it.group for it in builtin.held_out if it.domain == "literature"} == {"Northanger Abbey"}
    assert len({it.group for it in builtin.train if it.domain == "literature"}) == 5


def test_no_question_occurs_twice(builtin: Corpus):
    questions = [it.text.split("\nAnswer:")[0] for it in builtin.train + builtin.held_out if it.domain == "mathematics"]
    assert len(set(questions)) == len(questions) > 30_000


def test_held_out_mathematics_has_every_kind_of_question(builtin: Corpus):
    kinds = {it.title for it in builtin.train if it.domain == "mathematics"}
    assert len(kinds) == 52
    assert {it.title for it in builtin.held_out if it.domain == "mathematics"} == kinds


def test_code_is_without_tests_tables_and_installed_packages(builtin: Corpus):
    folders = {part for it in builtin.train + builtin.held_out if it.domain == "code" for part in it.title.split("/")}
    assert folders.isdisjoint({"test", "tests", "site-packages", "encodings", "idlelib", "lib2to3", "pydoc_data"})
    assert "asyncio" in folders


def test_modules_that_copy_from_each_other_are_one_group():
    group = {it.title: it.group for it in module._standard_library(Path(module.sysconfig.get_path("stdlib")))}
    assert group["posixpath.py"] != group["ntpath.py"]
    documents = tuple(module._standard_library(Path(module.sysconfig.get_path("stdlib"))))
    joined = {it.title: it.group for it in module.join_families(documents)}
    assert joined["posixpath.py"] == joined["ntpath.py"]
    assert joined["bz2.py"] == joined["lzma.py"]
    assert joined["profile.py"] == joined["cProfile.py"]
    assert len(set(joined.values())) > 100


def test_the_same_seed_gives_the_same_corpus_and_another_seed_another(builtin: Corpus):
    assert load_corpus("builtin").fingerprint == builtin.fingerprint
    other = load_corpus("builtin", seed=1)
    assert other.fingerprint != builtin.fingerprint
    assert other.held_out != builtin.held_out


def test_nothing_held_out_leaves_all_text_to_training():
    corpus = load_corpus("builtin", held_out=0)
    assert corpus.held_out == ()
    assert min(train for train, _ in corpus.num_bytes.values()) > 3_100_000


def test_half_held_out_stays_balanced():
    sizes = load_corpus("builtin", held_out=0.5).num_bytes.values()
    for side in zip(*sizes, strict=True):
        assert min(side) > 0.95 * max(side)


def test_shipped_files_are_small_and_described():
    folder = resources.files("moesaic.data") / "corpora"
    readme = (folder / "README.md").read_text(encoding="utf-8")
    files = [file for file in folder.iterdir() if file.name.endswith(".gz")]
    assert len(files) == 2
    assert sum(len(file.read_bytes()) for file in files) < 3_500_000
    for file in files:
        assert f"`{file.name}`" in readme


def test_shipped_literature_has_no_editors_notes():
    text = gzip.decompress((resources.files("moesaic.data") / "corpora" / "literature.jsonl.gz").read_bytes()).decode()
    assert text.count("\n") == 269
    for added in ("Signet", "[At this point", "VOLUME I", "THE END", "ADVERTISEMENT BY"):
        assert added not in text
    assert json.loads(text.split("\n")[0])["title"] == "Emma, chapter 1"


def test_a_damaged_shipped_file_says_to_install_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "corpora").mkdir()
    file = tmp_path / "corpora" / "literature.jsonl.gz"
    buffer = io.BytesIO()
    with gzip.GzipFile(fileobj=buffer, mode="wb") as stream:
        stream.write(b'{"text": "a"}\n' * 100)
    file.write_bytes(buffer.getvalue()[:-12])
    monkeypatch.setattr(module.resources, "files", lambda package: tmp_path)
    with pytest.raises(DataError) as error:
        load_corpus("builtin")
    assert str(error.value).startswith(
        f"builtin: needed the shipped file {file}, but it is missing or damaged (EOFError: "
    )
    assert str(error.value).endswith(" Install the package again.")


def test_an_interpreter_without_library_source_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "os.py").write_text("import sys\n")
    monkeypatch.setattr(module.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(DataError) as error:
        load_corpus("builtin")
    assert str(error.value) == (
        f"builtin: needed the source of Python's standard library in {tmp_path}, got 1 files. "
        "Use a Python that comes with its library as .py files, or give your own text."
    )
