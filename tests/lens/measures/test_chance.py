"""Chance: what is called so is what routers without opinion show, and nothing is called a find too often."""

from itertools import combinations

import numpy as np
import pytest

from moesaic.lens import measures
from moesaic.lens.measures.chance import p_value, shifted
from moesaic.lens.measures.no_preference import meeting_by_chance
from tests.lens.measures import naive
from tests.lens.measures.traces import drawn_rows, routed, sets, trace_of


@pytest.mark.parametrize(("num_tokens", "num_experts", "top_k"), [(200, 8, 2), (60, 16, 4), (500, 8, 1), (40, 4, 3)])
def test_balance_by_chance_is_the_mean_over_routers_without_opinion(num_tokens, num_experts, top_k):
    rng = np.random.default_rng(3)
    drawn = [sets(rng, num_tokens, num_experts, top_k) for _ in range(1500)]
    load = np.stack([np.bincount(one.ravel(), minlength=num_experts) for one in drawn]).astype(float)
    trace = routed(drawn[0], token_T=np.zeros(num_tokens), length=20, num_experts=num_experts)
    # The mean of 1,500 is good to 1 %. Scaled single draws stand for sets, to 5 % where K is close to E.
    seen = (measures.max_over_mean_of(load) - 1).mean()
    assert measures.max_violation(trace).chance[0] == pytest.approx(seen, rel=0.06)
    assert measures.max_over_mean(trace).chance[0] == measures.max_violation(trace).chance[0] + 1
    seen = np.square(measures.coefficient_of_variation_of(load)).mean() ** 0.5
    assert measures.coefficient_of_variation(trace).chance[0] == pytest.approx(seen, rel=0.03)
    seen = 1 - measures.load_entropy_of(load).mean()
    assert 1 - measures.load_entropy(trace).chance[0] == pytest.approx(seen, rel=0.05)


def test_dead_experts_by_chance_are_those_that_few_tokens_leave_idle():
    rng = np.random.default_rng(0)
    traces = [routed(sets(rng, 12, 16, 2), token_T=np.zeros(12), length=4, num_experts=16) for _ in range(200)]
    seen = np.mean([measures.dead_experts(trace).value[0] for trace in traces])
    assert measures.dead_experts(traces[0]).chance[0] == pytest.approx(16 * (14 / 16) ** 12)
    assert seen == pytest.approx(16 * (14 / 16) ** 12, rel=0.1)


def test_uniform_repetition_is_the_reference_of_mixtrals_table():
    assert measures.uniform_repetition(8, 2, first_only=True) == 1 / 8
    assert measures.uniform_repetition(8, 2, first_only=False) == pytest.approx(1 - (6 / 8) * (5 / 7))
    assert measures.uniform_repetition(4, 3, first_only=False) == 1


@pytest.mark.parametrize("first_only", [True, False])
def test_even_routers_repeat_as_chance_and_as_mixtrals_reference(first_only):
    expert_TK = sets(np.random.default_rng(1), 20_000, 8, 2)
    measured = measures.repetition(routed(expert_TK, token_T=np.zeros(20_000), length=100), first_only=first_only)
    expected = measures.uniform_repetition(8, 2, first_only=first_only)
    assert measured.count[0] == 200 * 99
    assert measured.value[0] == pytest.approx(expected, abs=0.01)
    assert measured.chance[0] == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize("same_text", [True, False])
def test_chance_of_sharing_an_expert_is_that_of_all_pairs(same_text):
    rng = np.random.default_rng(5)
    trace = trace_of(drawn_rows(rng, num_experts=(6,), most=3, lengths=[30, 9, 17], vocabulary=3), num_experts=(6,))
    drawn = measures.repetition(trace, first_only=False, same_text=same_text).chance[0]
    slow = naive.chance_of_repetition(trace, 0, first_only=False, same_text=same_text)
    assert drawn == pytest.approx(slow, abs=0.03)


def test_texts_that_each_keep_to_two_experts_repeat_for_the_text_and_not_for_the_neighbour():
    rng = np.random.default_rng(2)
    # 40 texts of 50 tokens; each draws freely from two experts of its own.
    first_T = np.repeat(rng.integers(0, 4, 40), 50) * 2 + rng.integers(0, 2, 2000)
    trace = routed(first_T[:, None], token_T=np.zeros(2000), length=50, num_experts=8)
    measured, of_text = measures.repetition(trace), measures.repetition(trace, same_text=True)
    assert measured.value[0] == pytest.approx(0.5, abs=0.03)
    assert measured.chance[0] == pytest.approx(1 / 8, abs=0.03)
    assert of_text.chance[0] == pytest.approx(0.5, abs=0.02)


def test_experts_meet_by_chance_as_the_even_router_makes_them_meet():
    measured = measures.coactivation(
        routed(sets(np.random.default_rng(0), 30_000, 6, 3), token_T=np.zeros(30_000), length=100)
    )
    off = ~np.eye(6, dtype=bool)
    np.testing.assert_allclose(measured.chance[0][off], 2 / 5, atol=0.005)
    np.testing.assert_allclose(measured.value[0][off], 2 / 5, atol=0.02)


def test_chance_of_meeting_keeps_the_loads_and_prefers_no_pair():
    rng = np.random.default_rng(1)
    # Weighted draws without replacement: expert 0 is on most tokens, expert 5 on few; no pair is drawn to each other.
    expert_TK = (rng.gumbel(size=(40_000, 6)) + np.log([8, 4, 2, 2, 1, 0.5])).argsort(axis=1)[:, -3:]
    measured = measures.coactivation(routed(expert_TK, token_T=np.zeros(40_000), length=100))
    value, chance = measured.value[0], measured.chance[0]
    np.testing.assert_allclose(np.nansum(chance, axis=1), np.nansum(value, axis=1), rtol=1e-6)
    np.testing.assert_allclose(chance[~np.eye(6, dtype=bool)], value[~np.eye(6, dtype=bool)], atol=0.015)
    assert value[5, 0] > 0.8
    assert value[5, 4] < 0.15


@pytest.mark.parametrize("rate_of_last", [0.0, 0.3, 0.999])
def test_meeting_by_chance_is_that_of_all_sets_weighed_one_by_one(rate_of_last):
    rng = np.random.default_rng(4)
    # Some tokens have one expert, some two, some three of five; the sets are listed and weighed one by one.
    size_K = np.asarray([0, 0.2, 0.3, 0.5])
    chosen = np.asarray([[e in s for e in range(5)] for k in (1, 2, 3) for s in combinations(range(5), k)], dtype=float)
    weight_E = np.append(rng.random(4) + 0.2, rate_of_last / (1 - rate_of_last))
    odds = np.prod(np.where(chosen > 0, weight_E, 1), axis=1)
    for size in (1, 2, 3):
        mine = chosen.sum(axis=1) == size
        odds[mine] *= size_K[size] / odds[mine].sum()
    met_EE = (chosen * odds[:, None]).T @ chosen
    found_EE = meeting_by_chance(met_EE.diagonal().copy(), size_K)
    np.fill_diagonal(met_EE, 0)
    np.testing.assert_allclose(found_EE, met_EE, atol=1e-6)


def alike(rng, num_values, num_tokens, stay):
    """Values that mostly stay as they were: neighbours are alike."""
    fresh = rng.random(num_tokens) > stay
    fresh[0] = True
    return rng.integers(0, num_values, num_tokens)[np.maximum.accumulate(np.where(fresh, np.arange(num_tokens), 0))]


def test_alike_neighbours_are_not_called_a_find_more_often_than_one_time_in_twenty():
    rng = np.random.default_rng(0)
    told, single = [], []
    for _ in range(50):
        token_T, expert_T = alike(rng, 6, 600, 0.9), alike(rng, 4, 600, 0.9)
        trace = routed(expert_T[:, None], token_T=token_T, length=60, num_experts=4)
        (one,) = measures.about_token(trace, num_shuffles=39)
        told.append(one.p_value)
        shuffled = [
            measures.about_token(routed(rng.permutation(expert_T)[:, None], token_T=token_T, length=60), num_shuffles=0)
            for _ in range(19)
        ]
        single.append(p_value(one.bits, [other[0].bits for other in shuffled]))
    assert np.mean(np.asarray(told) <= 0.05) < 0.14
    # Shuffling single tokens finds something nearly always: this is what the shift is for.
    assert np.mean(np.asarray(single) <= 0.05) > 0.5


def test_every_shift_is_another_one_and_keeps_the_column():
    column = np.asarray([1, 2, 2, 3])
    turned = [tuple(one.tolist()) for one in shifted(column, 10, seed=0)]
    assert len(turned) == len(set(turned)) == 3
    assert all(sorted(one) == [1, 2, 2, 3] and one != (1, 2, 2, 3) for one in turned)
    assert list(shifted(column[:1], 10, seed=0)) == []
    assert list(shifted(column[:0], 10, seed=0)) == []


def test_a_p_value_is_never_nothing():
    assert p_value(5.0, [1.0, 2.0, 3.0]) == 1 / 4
    assert p_value(2.0, [1.0, 2.0, 3.0]) == 3 / 4
    assert np.isnan(p_value(2.0, []))
