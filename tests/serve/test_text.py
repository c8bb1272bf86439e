import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesaic.serve.text import StopText, TextStream
from tests.serve.conftest import tokenizer

BYTES = tokenizer()


def decode(ids):
    return BYTES.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def streamed(ids):
    stream = TextStream(decode)
    pieces = [stream.put(token) for token in ids]
    return [*pieces, stream.end()]


@given(st.lists(st.integers(0, 255), max_size=40))
def test_pieces_of_any_bytes_are_together_what_decoding_all_at_once_gives(ids):
    assert "".join(streamed(ids)) == decode(ids)


@given(st.text(max_size=20))
def test_pieces_of_any_text_are_together_the_text(text):
    assert "".join(streamed(list(text.encode()))) == text


def test_a_character_waits_for_its_last_byte():
    assert streamed("aé€".encode()) == ["a", "", "é", "", "", "€", ""]


def test_bytes_that_never_become_a_character_come_out_at_the_end():
    assert "".join(streamed(b"a\xe2\x82")) == decode(list(b"a\xe2\x82")) == "a\N{REPLACEMENT CHARACTER}"


def test_tokens_that_only_mark_something_are_left_out():
    assert "".join(streamed([*b"ab", BYTES.eos_token_id, *b"c"])) == "abc"


def shown(pieces, stops):
    stop, text = StopText(stops), ""
    for piece in pieces:
        more, ended = stop.put(piece)
        text += more
        if ended:
            return text, True
    return text + stop.end(), False


@given(st.text("ab", max_size=30), st.text("ab", min_size=1, max_size=4), st.data())
def test_text_is_cut_before_the_first_stop_however_it_is_pieced(text, stop, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    before, found, _ = text.partition(stop)
    assert shown(pieces, [stop]) == (before, bool(found))


@pytest.mark.parametrize(
    ("pieces", "first"), [(["one END"], "one "), (["one", " E"], "one "), (["a\n"], "a")], ids=repr
)
def test_what_could_begin_a_stop_is_held_back(pieces, first):
    stop = StopText(["END", "\n\n"])
    assert "".join(stop.put(piece)[0] for piece in pieces) == first
