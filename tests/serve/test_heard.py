import numpy as np
import pytest
import torch

import moesaic as mz
from moesaic.core.errors import ConfigError
from moesaic.serve.heard import Heard
from tests.lens.conftest import make_trace
from tests.serve.conftest import make

LETTERS = tuple(chr(number) for number in range(256))


def table(experts, num_experts=2, dropped=()):
    """One choice for each token."""
    choices = torch.tensor(experts).view(-1, 1)
    logits = torch.zeros(len(experts), num_experts)
    routing = mz.Routing.from_choices(choices, torch.ones(len(experts), 1), logits, logits)
    kept = routing.kept_N.clone()
    kept[list(dropped)] = False
    return mz.Routing(**{**{name: getattr(routing, name) for name in routing.__dataclass_fields__}, "kept_N": kept})


def test_favourites_are_the_tokens_that_an_expert_takes_more_often_than_chance():
    heard = Heard({"mlp": 2}, LETTERS)
    ids = list(b"aabbcc") * 10
    heard.add(
        0, table([token == ord("a") or (token == ord("c") and place % 2) for place, token in enumerate(ids)]), ids, 60
    )
    liked, count = heard.favourites(0, 1)
    assert [(one.text, one.num_rows) for one in liked] == [("a", 20)]
    # Of the 30 choices of expert 1 among 60, all 20 of a went there: twice as many as chance.
    assert liked[0].lift == pytest.approx(2.0)
    assert count == 60


def test_only_new_tokens_are_counted_and_dropped_ones_apart():
    heard = Heard({"mlp": 2}, LETTERS)
    heard.add(0, table([0, 1, 1, 0], dropped=[2]), list(b"abcd"), 2)
    assert heard.load(0).tolist() == [1, 1]
    assert heard.dropped(0).tolist() == [0, 1]
    assert heard.from_service == 2


def test_what_experts_take_while_others_are_off_is_load_but_no_liking():
    heard = Heard({"mlp": 2}, LETTERS)
    heard.add(0, table([0, 1] * 10), list(b"ab") * 10, 20, is_own_choice=False)
    assert heard.load(0).tolist() == [10, 10]
    assert heard.favourites(0, 1) == ([], 0)


def test_memory_has_a_bound_and_the_newest_choices_stay():
    heard = Heard({"mlp": 2}, LETTERS, newest=50)
    for token, expert in ((ord("a"), 0), (ord("b"), 1), (ord("c"), 1), (ord("d"), 0)):
        heard.add(0, table([expert] * 30), [token] * 30, 30)
    liked, count = heard.favourites(0, 1)
    assert (liked[0].text, liked[0].num_rows, count) == ("c", 20, 50)
    assert heard.load(0).tolist() == [60, 60]


def test_a_trace_of_the_model_is_remembered_and_its_load_is_not_counted_as_served(tmp_path):
    pytest.importorskip("pyarrow")
    rows = [(0, place, layer, 0, 97 + place % 2, place % 2, 0) for layer in (0, 1) for place in range(40)]
    trace = make_trace(rows, num_experts=(2, 2), top_k=1, layer_names=("one", "two"))
    heard = Heard({"one": 2, "two": 2}, LETTERS)
    heard.read_trace(trace.save(tmp_path / "t.parquet"))
    liked, count = heard.favourites(1, 1)
    assert ([one.text for one in liked], count, heard.from_trace) == (["b"], 40, 40)
    assert heard.load(1).tolist() == [0, 0]


def test_a_trace_of_another_model_is_refused(tmp_path):
    pytest.importorskip("pyarrow")
    path = make_trace([(0, 0, 0, 0, 1, 1, 0)], num_experts=(3,), layer_names=("mlp",)).save(tmp_path / "t.parquet")
    with pytest.raises(ConfigError) as error:
        Heard({"mlp": 2}, LETTERS).read_trace(path)
    assert str(error.value) == (
        f"The trace {path} must be of this model, with the layers mlp (2 experts), got mlp (3 experts). "
        "Record it again with moesaic inspect, or serve the model that it is of."
    )


def test_a_layer_that_reads_something_else_than_the_text_is_left_out():
    heard = Heard({"mlp": 2}, LETTERS)
    heard.add(0, table([0, 1, 1]), list(b"abcd"), 4)
    assert heard.load(0).sum() == np.int64(0)


def test_the_route_knows_the_favourites_of_what_was_served():
    from moesaic.serve.live_routes import _about

    served = make()
    heard = Heard(served.layers, LETTERS)
    ids = list(b"ab") * 20
    heard.add(0, table([int(token == ord("b")) for token in ids], num_experts=4), ids, 40)
    facts = _about(served, heard, 0, 1)
    assert [one["text"] for one in facts["favourites"]] == ["b"]
    assert (facts["share"], facts["choices"], facts["told_of"], facts["even_share"]) == (0.5, 20, 40, 0.25)
