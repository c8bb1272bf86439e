import pytest

from moesaic.lens.layers import layer_labels
from moesaic.lens.measures import preferred_tokens
from moesaic.lens.tokens import brief, one_line, token_text, visible


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        (" the", "␣the"),
        ("\n\t\r", "⏎⇥␍"),
        ("\udcc3", "\\xC3"),
        ("\x00\x7f", "\\x00\\x7F"),
        ("\u202e\u200b", "\\u{202E}\\u{200B}"),
        ("\ud800", "\\u{D800}"),
        ("\u00a0", "\\xA0"),
        ("\u0301", "◌\u0301"),
        ("é<b>", "é<b>"),
    ],
)
def test_nothing_in_a_token_stays_unseen(text, seen):
    assert visible(text) == seen


def test_a_heading_keeps_its_spaces_and_shows_the_rest():
    assert one_line("two  words\n\udcff") == "two  words⏎\\xFF"


def test_a_long_name_keeps_its_beginning_and_its_end():
    assert brief("short") == "short"
    assert brief("x" * 26) == "x" * 26
    assert brief("beginning of a long name and its end", 11) == "begin…s end"


def test_a_token_without_text_is_its_number(make_trace):
    trace = make_trace([(0, 0, 0, 0, 1, 0, 0)], token_text=("a", ""))
    assert [token_text(trace, token) for token in (0, 1, 2, -1)] == ["a", "#1", "#2", "#-1"]


def test_a_rare_token_does_not_win_by_luck(make_trace):
    # Token 1 went to expert 0 in 400 of 500 rows, token 2 in its only 3; token 0 makes up the rest.
    rows = [(0, n, 0, 0, 1, 0 if n < 400 else 1, 0) for n in range(500)]
    rows += [(1, n, 0, 0, 2, 0, 0) for n in range(3)] + [(2, n, 0, 0, 0, n % 4, 0) for n in range(2000)]
    trace = make_trace(rows)
    (favourite,) = preferred_tokens(trace, 0)[0]
    assert (favourite.token_id, favourite.share, favourite.num_rows) == (1, 0.8, 500)
    assert favourite.lift == pytest.approx(0.8 / (903 / 2503))
    assert [token.token_id for token in preferred_tokens(trace, 0, min_rows=1)[0]] == [1, 2]


def test_of_two_equal_shares_the_commoner_token_comes_first(make_trace):
    rows = [(0, n, 0, 0, 1, 0 if n < 40 else 1, 0) for n in range(50)]
    rows += [(1, n, 0, 0, 2, 0 if n < 400 else 1, 0) for n in range(500)]
    rows += [(2, n, 0, 0, 3, n % 4, 0) for n in range(4000)]
    assert [token.token_id for token in preferred_tokens(make_trace(rows), 0)[0]] == [2, 1]


def test_experts_that_take_every_token_alike_prefer_none(make_trace):
    rows = [(0, n, 0, 0, n % 5, (n // 5) % 4, 0) for n in range(1000)]
    assert preferred_tokens(make_trace(rows), 0) == [[], [], [], []]


def test_an_idle_expert_prefers_nothing(make_trace):
    trace = make_trace([(0, n, 0, 0, n % 2, n % 2, 0) for n in range(400)])
    assert [len(tokens) for tokens in preferred_tokens(trace, 0)] == [1, 1, 0, 0]


@pytest.mark.parametrize(
    ("names", "labels"),
    [
        (["model.layers.0.mlp", "model.layers.11.mlp"], ["layer 0", "layer 11"]),
        (["transformer.h.3.mlp"], ["layer 3"]),
        (["encoder.0.layer.1.ff", "decoder.0.layer.2.ff"], ["encoder.0.layer.1", "decoder.0.layer.2"]),
        (["moe"], ["moe"]),
        (["a.\n<b>", "a.c"], ["⏎<b>", "c"]),
        ([], []),
    ],
)  # fmt: skip
def test_layers_are_called_by_what_tells_them_apart(names, labels):
    assert list(layer_labels(names).values()) == labels
