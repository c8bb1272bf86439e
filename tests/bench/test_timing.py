"""The clock's rules: everybody once a round, in a turning order, warm-up apart."""

import gc

import pytest
import torch

from moesaic.bench.timing import Work, clock_of, interleaved, ratios, spread
from moesaic.core.errors import ConfigError


def test_everybody_runs_once_a_round_in_an_order_that_turns_and_warm_up_does_not_count():
    calls = []
    works = {
        name: Work(run=lambda name=name: calls.append(name), before=lambda name=name: calls.append(name.upper()))
        for name in "abc"
    }
    ticks = iter(range(10, 100))

    def clock(run):
        run()
        return float(next(ticks))

    times = interleaved(works, rounds=5, clock=clock, warm_up=1)
    order = "".join(call for call in calls if call.islower())
    assert order == "cab" + "abc" + "bca" + "cab" + "abc" + "bca"
    assert "".join(calls[:6]) == "CcAaBb"
    assert times["a"] == (13.0, 18.0, 20.0, 22.0, 27.0)
    assert all(len(values) == 5 for values in times.values())


def test_what_is_short_runs_once_unseen_before_each_turn_but_its_first():
    calls = []
    works = {name: Work(run=lambda name=name: calls.append(name)) for name in ("short", "long")}
    lasts = {"short": 0.1, "long": 30.0}

    def clock(run):
        run()
        calls[-1] = calls[-1].upper()
        return lasts[calls[-1].lower()]

    interleaved(works, rounds=5, clock=clock, warm_up=0)
    assert calls.count("SHORT") == calls.count("LONG") == 5
    assert (calls.count("short"), calls.count("long")) == (4, 0)
    assert all(calls[at - 1] == "short" for at, call in enumerate(calls) if call == "SHORT" and at > 0)


def test_no_garbage_is_collected_while_the_clock_runs():
    seen = []
    interleaved({"a": Work(run=lambda: seen.append(gc.isenabled()))}, rounds=5, clock=clock_of(torch.device("cpu")))
    assert seen == [False] * 11
    assert gc.isenabled()


def test_a_clock_gives_seconds():
    assert 0 < clock_of(torch.device("cpu"))(lambda: sum(range(1000))) < 1


def test_fewer_than_five_rounds_are_refused():
    with pytest.raises(ConfigError) as error:
        interleaved({}, rounds=4, clock=clock_of(torch.device("cpu")))
    assert str(error.value) == "rounds must be at least 5, got 4. A median of fewer says little."


def test_ratios_are_taken_round_by_round():
    assert ratios((2.0, 9.0), (1.0, 3.0)) == (2.0, 3.0)
    assert spread((3.0, 1.0, 2.0)) == (1.0, 2.0, 3.0)
