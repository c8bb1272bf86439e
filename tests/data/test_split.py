import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesaic.core.errors import DataError
from moesaic.data import Corpus, Document
from moesaic.data.split import cut, fit, join_families, split, split_by_domain

TEXTS = st.lists(st.text(min_size=1, max_size=30), min_size=2, max_size=40)


@given(TEXTS, st.floats(0.01, 0.99), st.integers(0, 5))
def test_every_document_is_on_one_side_and_equal_texts_on_the_same(texts: list[str], share: float, seed: int):
    documents = [Document(text, "d") for text in texts]
    train, held_out = split(documents, held_out_bytes=share * sum(it.num_bytes for it in documents), seed=seed)
    assert sorted(it.text for it in train + held_out) == sorted(texts)
    assert {it.text for it in train}.isdisjoint({it.text for it in held_out})
    assert train
    assert bool(held_out) == (len(set(texts)) > 1)


@given(TEXTS, st.randoms(use_true_random=False))
def test_the_order_of_documents_does_not_change_who_is_held_out(texts: list[str], shuffler: random.Random):
    documents = [Document(text, "d") for text in texts]
    _, before = split(documents, held_out_bytes=20, seed=3)
    shuffler.shuffle(documents)
    _, after = split(documents, held_out_bytes=20, seed=3)
    assert sorted(it.text for it in before) == sorted(it.text for it in after)


def test_a_share_of_many_documents_is_met_closely():
    documents = [Document(f"{number:05d} " * 10, "d") for number in range(2000)]
    _, held_out = split(documents, held_out_bytes=0.05 * 60 * 2000, seed=0)
    assert 100 <= len(held_out) <= 101


def test_groups_stay_together_and_the_smallest_goes_when_all_are_huge():
    documents = [Document(f"{group}{number}" * 100, "d", group=group) for group in "abc" for number in range(9)]
    documents = [it for it in documents if it.group != "b"] + [Document("b" * 50, "d", group="b")]
    _, held_out = split(documents, held_out_bytes=20, seed=0)
    assert [it.group for it in held_out] == ["b"]


def test_fit_takes_whole_documents_up_to_the_size_in_their_order():
    documents = [Document(f"{number:03d}" * 10, "d") for number in range(100)]
    chosen = fit(documents, size_bytes=1000, seed=1)
    assert len(chosen) == 33
    assert list(chosen) == sorted(chosen, key=lambda it: it.text)
    assert chosen != fit(documents, size_bytes=1000, seed=2)


@given(st.text(alphabet="ab \n.é", max_size=400), st.integers(1, 40))
def test_pieces_put_together_are_the_text_again_and_none_is_long(text: str, size: int):
    pieces = list(cut(text, size))
    assert "".join(pieces) == text
    assert max(map(len, pieces)) <= 1.5 * size


def test_text_is_cut_after_a_blank_line_where_there_is_one():
    text = ("one two three\nfour five six\n\n" * 20).strip()
    assert all(piece.endswith("\n\n") for piece in list(cut(text, 100))[:-1])


def test_groups_that_share_lines_become_one_and_custom_lines_do_not_count():
    licence = "# Licensed to everybody under the terms of nobody in particular.\n"
    copied = "".join(f"    the_same_long_line_number_{number} = compute_something({number})\n" for number in range(5))
    own = {
        name: "".join(f"{name}_own_line_{number} = another_thing_altogether()\n" for number in range(20))
        for name in "abcdef"
    }
    documents = [Document(licence + own[name] + (copied if name in "ad" else ""), "code", name, name) for name in own]
    group = {it.title: it.group for it in join_families(documents)}
    assert group == {"a": "a", "b": "b", "c": "c", "d": "a", "e": "e", "f": "f"}


def test_a_domain_with_one_document_is_cut_at_paragraphs():
    text = "\n\n".join(f"Paragraph {number} says this and that at some length, and ends." for number in range(200))
    train, held_out = split_by_domain([Document(text, "d", "notes")], held_out=0.05, seed=0, name="notes.txt")
    assert sorted((train + held_out)[0].title.split(", part ")) == ["1", "notes"]
    assert sum(it.num_bytes for it in train + held_out) == len(text)
    assert 0.025 * len(text) <= sum(it.num_bytes for it in held_out) <= 0.075 * len(text)


def test_too_little_text_for_two_sides_names_the_domain_and_a_way_out():
    with pytest.raises(DataError) as error:
        split_by_domain([Document("a few words", "poems")], held_out=0.05, seed=0, name="mine.txt")
    assert str(error.value) == (
        "mine.txt: needed at least 2 different documents or paragraphs of domain 'poems' for a held-out split, "
        "got 1 of 11 bytes. Add text; only load_corpus(held_out=0) takes it as it is."
    )


def test_a_corpus_without_training_text_is_refused():
    with pytest.raises(DataError) as error:
        Corpus(train=(), held_out=(Document("a", "d"),), name="mine")
    assert str(error.value) == (
        "mine: needed at least 1 document to train on, got 0. Give a source that contains text."
    )


def test_the_fingerprint_sees_text_domain_side_and_where_documents_end():
    def fingerprint(train: list[tuple[str, str]], held_out: list[tuple[str, str]]) -> str:
        return Corpus(
            train=tuple(Document(*it) for it in train), held_out=tuple(Document(*it) for it in held_out), name="x"
        ).fingerprint

    seen = {
        fingerprint([("ab", "d")], [("c", "d")]),
        fingerprint([("a", "d"), ("b", "d")], [("c", "d")]),
        fingerprint([("ab", "d"), ("c", "d")], []),
        fingerprint([("ab", "e")], [("c", "d")]),
        fingerprint([("abc", "d")], [("c", "d")]),
    }
    assert len(seen) == 5
    assert all(len(it) == 16 for it in seen)
