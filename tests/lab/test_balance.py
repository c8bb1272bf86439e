"""Every term that is there to balance does, from a collapsed router; where one does not, its trial says why."""

from dataclasses import replace

import pytest

from moesaic.lab.balance import TRIALS, BalanceResult, Trial, every_term, page, rebalance

DOES_NOT = {"ReLU L1 with sparsity"}
SLOW = {"localised", "loss-free bias, published rate"}
MARKED = [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in TRIALS if name not in DOES_NOT]


@pytest.mark.parametrize("name", MARKED)
def test_a_term_brings_the_load_back_and_nothing_else_does(name):
    trial = TRIALS[name]
    before, after = rebalance(trial)
    _, without = rebalance(replace(trial, terms={}, rules=()))
    assert before > 2.5
    assert without > 2.5
    assert after < 1.5


@pytest.mark.parametrize("name", sorted(DOES_NOT))
def test_where_a_term_does_not_its_trial_says_so(name):
    _, after = rebalance(TRIALS[name])
    assert after > 1.5
    assert TRIALS[name].note.startswith("does not ")


def test_the_same_seed_gives_the_same_figures_and_another_seed_others():
    trial = replace(TRIALS["Switch"], steps=3)
    assert rebalance(trial) == rebalance(trial)
    assert rebalance(trial, seed=1) != rebalance(trial)


def test_the_gap_is_how_far_the_router_is_skewed():
    trial = Trial(recipe="mixtral", steps=1)
    loads = [rebalance(replace(trial, gap=gap))[0] for gap in (0.0, 2.0, 6.0)]
    assert loads == sorted(loads)
    assert loads[0] < 1.6
    assert loads[2] > 3.5


def test_every_term_reports_each_trial_as_it_ends():
    seen = []
    results = every_term(steps=1, done=seen.append)
    assert [one.term for one in results] == list(TRIALS)
    assert seen == results
    assert {one.steps for one in results} == {1}
    assert {one.term for one in results if one.note} == {name for name, trial in TRIALS.items() if trial.note}


def test_the_page_has_a_row_for_each_result():
    result = BalanceResult(
        recipe="relu", term="a term", counts="visits", steps=7, before=4.0, without=3.0, after=1.25, note="why"
    )
    assert page([result]).splitlines()[-1] == (
        "| a term | `relu` | visits of devices | 7 | 4.00 | 3.00 | **1.25** | why |"
    )
