"""Against other people's code: scikit-learn's mutual information, scipy's entropy, variation and Wilson interval."""

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import mutual_info_score

from moesaic.lens import measures
from moesaic.lens.measures.vocabulary import wilson
from tests.lens.measures.traces import drawn_rows, trace_of


@pytest.fixture(scope="module", name="trace")
def _trace():
    rng = np.random.default_rng(7)
    rows = drawn_rows(rng, num_experts=(5, 8), most=3, lengths=rng.integers(5, 60, 30), vocabulary=20)
    return trace_of(rows, num_experts=(5, 8))


def in_bits(one, other):
    return mutual_info_score(one, other) / np.log(2)


def test_information_about_domains_and_tokens_is_that_of_scikit_learn(trace):
    for layer, (domain, token) in enumerate(
        zip(measures.about_domain(trace, num_shuffles=0), measures.about_token(trace, num_shuffles=0), strict=True)
    ):
        rows = (trace.layer == layer) & (trace.domain >= 0)
        assert domain.bits == pytest.approx(in_bits(trace.expert[rows], trace.domain[rows]))
        assert domain.ceiling == pytest.approx(stats.entropy(np.bincount(trace.domain[rows]), base=2))
        assert domain.num_rows == rows.sum()
        rows = (trace.layer == layer) & (trace.token_id >= 0)
        assert token.bits == pytest.approx(in_bits(trace.expert[rows], trace.token_id[rows]))
        assert token.ceiling == pytest.approx(stats.entropy(np.bincount(trace.expert[rows]), base=2))
        assert token.num_rows == rows.sum()
        for told in (domain, token):
            assert np.isnan(told.chance)
            assert np.isnan(told.p_value)
            assert told.to_dict()["chance"] is None


def test_information_about_the_next_layer_is_that_of_scikit_learn(trace):
    first = {
        layer: {
            (sequence, position): expert
            for sequence, position, expert in zip(part.sequence, part.position, part.expert, strict=True)
        }
        for layer in (0, 1)
        for part in [trace.where((trace.layer == layer) & (trace.choice == 0))]
    }
    both = sorted(first[0].keys() & first[1].keys())
    (told,) = measures.about_next_layer(trace, num_shuffles=3)
    assert told.bits == pytest.approx(in_bits([first[0][place] for place in both], [first[1][place] for place in both]))
    assert told.num_rows == len(both)


def test_spread_and_entropy_are_those_of_scipy(trace):
    load_LE = measures.load(trace)
    for layer, experts in enumerate((5, 8)):
        load = load_LE[layer, :experts]
        assert measures.coefficient_of_variation(trace).value[layer] == pytest.approx(stats.variation(load))
        assert measures.load_entropy(trace).value[layer] == pytest.approx(stats.entropy(load, base=experts))


def test_the_interval_of_a_share_is_that_of_scipy():
    for right, count in ((0, 7), (3, 7), (40, 41), (500, 1000)):
        theirs = stats.binomtest(right, count).proportion_ci(method="wilson")
        low, high = wilson(np.asarray(right / count), np.asarray(count))
        assert (float(low), float(high)) == pytest.approx((theirs.low, theirs.high), abs=1e-4)


def test_a_run_of_loads_over_steps_is_measured_step_by_step():
    load = np.random.default_rng(0).random((6, 3, 8))
    for function, theirs in (
        (measures.coefficient_of_variation_of, lambda one: stats.variation(one)),
        (measures.load_entropy_of, lambda one: stats.entropy(one, base=8)),
        (measures.max_over_mean_of, lambda one: one.max() / one.mean()),
    ):
        values = function(load)
        assert values.shape == (6, 3)
        assert values[4, 1] == pytest.approx(theirs(load[4, 1]))
