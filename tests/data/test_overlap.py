import random

import pytest

from moesaic.core.errors import ConfigError
from moesaic.data import Corpus, Document, leakage


def random_text(size: int, seed: int) -> str:
    return "".join(random.Random(seed).choices("abcdefgh \n", k=size))


def corpus_of(train: list[str], held_out: list[str]) -> Corpus:
    return Corpus(
        train=tuple(Document(it, "d") for it in train), held_out=tuple(Document(it, "d") for it in held_out), name="x"
    )


def test_leakage_agrees_with_a_plain_count():
    shared = random_text(300, 1)
    train = [random_text(500, 2), random_text(200, 3) + shared, "short"]
    held_out = [random_text(400, 4) + shared[50:200], "short", "other"]
    windows = [it[i : i + 64] for it in held_out for i in range(max(1, len(it) - 63))]
    seen = {it[i : i + 64] for it in train for i in range(max(1, len(it) - 63))}
    expected = sum(window in seen for window in windows) / len(windows)
    assert 0.1 < expected < 0.3
    assert leakage(corpus_of(train, held_out)) == {"d": pytest.approx(expected, abs=1e-12)}


def test_windows_do_not_run_across_documents():
    half = random_text(40, 1)
    assert leakage(corpus_of([half, half], [half + half])) == {"d": 0.0}


def test_copied_text_is_all_leakage():
    text = random_text(1000, 5)
    assert leakage(corpus_of([text], [text[100:400]])) == {"d": 1.0}


def test_a_window_that_is_no_power_of_two_is_refused():
    with pytest.raises(ConfigError) as error:
        leakage(corpus_of(["a"], ["b"]), window_bytes=48)
    assert str(error.value) == "window_bytes must be a power of two, got 48. Use 64."
