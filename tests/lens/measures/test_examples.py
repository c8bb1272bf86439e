"""Small traces worked out by hand."""

from dataclasses import replace

import numpy as np
import pytest

from moesaic.lens import measures


def test_every_choice_counts_and_shares_are_over_all_choices_of_the_domain(make_trace):
    # Two tokens of code (experts 0,1 and 0,2) and one of literature (experts 3,0), top-2.
    trace = make_trace(
        [(0, 0, 0, 0, 65, 0, 0), (0, 0, 0, 1, 65, 1, 0), (0, 1, 0, 0, 66, 0, 0), (0, 1, 0, 1, 66, 2, 0),
         (1, 0, 0, 0, 67, 3, 1), (1, 0, 0, 1, 67, 0, 1)]
    )  # fmt: skip
    assert measures.domains(trace) == ("code", "literature")
    np.testing.assert_array_equal(measures.domain_share(trace).value, [[[0.5, 0.25, 0.25, 0.0], [0.5, 0.0, 0.0, 0.5]]])
    np.testing.assert_array_equal(measures.load(trace), [[3, 1, 1, 1]])
    np.testing.assert_allclose(measures.load_share(trace).value, [[3 / 6, 1 / 6, 1 / 6, 1 / 6]])


def test_shares_add_up_to_one_in_every_layer_and_domain(random_trace):
    trace = random_trace(num_experts=(4, 7, 2), lean=1.0)
    np.testing.assert_allclose(np.nansum(measures.domain_share(trace).value, axis=2), 1)
    assert np.isnan(measures.domain_share(trace).value[0, :, 4:]).all()
    assert np.nansum(measures.load(trace)) == trace.num_rows


def test_loads_by_domain_add_up_to_the_load_unknown_domains_included(random_trace):
    trace = random_trace(num_experts=(4, 7))
    trace = replace(trace, domain=np.where(trace.sequence < 4, -1, trace.domain))
    assert measures.domains(trace) == ("code", "literature", "mathematics", "no domain given")
    by_domain = measures.load_by_domain(trace)
    np.testing.assert_array_equal(by_domain.sum(axis=1), measures.load(trace))
    assert np.nansum(by_domain[0, 3]) == 4 * 32 * 2
    assert np.nansum(by_domain[0, 0]) == (trace.where(trace.domain == 0).layer == 0).sum()


def test_experts_per_token_is_top_k_or_its_average(make_trace, random_trace):
    np.testing.assert_array_equal(measures.experts_per_token(random_trace(top_k=3)).value, [3, 3])
    # Layer 0: three experts and one; layer 1: one for the second token, none for the first; layer 2: nothing.
    rows = [(0, 0, 0, 0, 65, 0, 0), (0, 0, 0, 1, 65, 1, 0), (0, 0, 0, 2, 65, 2, 0), (0, 1, 0, 0, 66, 0, 0),
            (0, 1, 1, 0, 66, 3, 0)]  # fmt: skip
    trace = make_trace(rows, num_experts=(4, 4, 4), top_k=None)
    np.testing.assert_array_equal(measures.experts_per_token(trace).value, [2, 1, np.nan])
    assert trace.num_tokens == 2


def test_an_expert_without_a_row_counts_in_the_mean(make_trace):
    # Three of four experts share six rows evenly: 2 over a mean of 6 / 4, not of 6 / 3.
    trace = make_trace([(0, number, 0, 0, 65, number % 3, 0) for number in range(6)])
    np.testing.assert_allclose(measures.max_over_mean(trace).value, [2 / 1.5])
    assert measures.idle_experts(trace) == [(0, 3)]


def test_one_expert_doing_everything_is_as_bad_as_there_are_experts(make_trace):
    trace = make_trace([(0, number, 0, 0, 65, 2, 0) for number in range(5)], num_experts=(6,))
    np.testing.assert_allclose(measures.max_over_mean(trace).value, [6])


def test_experts_that_a_smaller_layer_lacks_are_not_idle(make_trace):
    trace = make_trace([(0, 0, 0, 0, 65, 0, 0), (0, 0, 0, 1, 65, 1, 0), (0, 0, 1, 0, 65, 2, 0)], num_experts=(2, 3))
    assert measures.idle_experts(trace) == [(1, 0), (1, 1)]


def test_renaming_experts_changes_no_balance_figure(random_trace):
    trace = random_trace(num_experts=(8, 8), lean=2.0)
    renamed = replace(trace, expert=np.random.default_rng(1).permutation(8)[trace.expert])
    np.testing.assert_allclose(measures.max_over_mean(renamed).value, measures.max_over_mean(trace).value)
    for first, second in zip(measures.about_domain(renamed), measures.about_domain(trace), strict=True):
        assert first.bits == pytest.approx(second.bits)


def test_drop_rate_is_dropped_rows_over_all_rows_of_the_layer(make_trace):
    trace = make_trace([(0, number, number % 2, 0, 65, 0, 0) for number in range(8)], num_experts=(4, 4, 4))
    kept = np.ones(8, dtype=bool)
    kept[[0, 2, 4]] = False
    np.testing.assert_array_equal(measures.drop_rate(replace(trace, kept=kept)).value, [0.75, 0.0, np.nan])


def test_layers_without_rows_give_nan_and_no_warning(make_trace):
    trace = make_trace([(0, 0, 1, 0, 65, 0, 0)], num_experts=(4, 4))
    assert np.isnan(measures.max_over_mean(trace).value[0])
    assert np.isnan(measures.domain_share(trace).value[0]).all()


def test_the_taker_is_the_expert_that_a_domain_has_most_above_the_average(make_trace):
    rows = [(0, number, 0, 0, 65, 0, 0) for number in range(3)] + [(0, 3, 0, 0, 65, 1, 0)]
    rows += [(1, number, 0, 0, 65, 0, 1) for number in range(2)] + [(1, n, 0, 0, 65, 2, 1) for n in (2, 3)]
    code, literature = measures.takers(make_trace(rows), 0)
    assert (code.domain, code.expert, code.share, code.average) == ("code", 0, 0.75, 0.625)
    assert (literature.domain, literature.expert, literature.share, literature.average) == ("literature", 2, 0.5, 0.25)


def test_repetition_looks_at_neighbours_of_one_sequence_only(make_trace):
    # Experts 0 0 1 | 1: two neighbour pairs, one equal; the pair over the border does not count, nor one over a gap.
    rows = [(0, 0, 0, 0, 65, 0, 0), (0, 1, 0, 0, 65, 0, 0), (0, 2, 0, 0, 65, 1, 0), (1, 0, 0, 0, 65, 1, 0),
            (1, 5, 0, 0, 65, 1, 0)]  # fmt: skip
    measured = measures.repetition(make_trace(rows[::-1]))
    assert measured.value[0] == 0.5
    assert measured.count[0] == 2
    assert measured.chance[0] == pytest.approx(0.4**2 + 0.6**2)


def test_random_routing_repeats_as_often_as_chance(random_trace):
    measured = measures.repetition(random_trace(num_experts=(8,), num_sequences=60, length=64))
    assert measured.chance[0] == pytest.approx(1 / 8, abs=0.01)
    assert measured.value[0] == pytest.approx(measured.chance[0], abs=0.02)


def test_an_expert_for_each_domain_tells_everything(make_trace):
    trace = make_trace(
        [(sequence, n, 0, 0, 65, sequence % 2, sequence % 2) for sequence in range(16) for n in range(4)]
    )
    (told,) = measures.about_domain(trace)
    assert told.bits == pytest.approx(1)
    assert told.ceiling == pytest.approx(1)
    assert told.p_value < 0.01
    assert told.num_rows == 64


def test_random_routing_tells_nothing_beyond_chance(random_trace):
    for told in measures.about_domain(random_trace(num_sequences=30)):
        assert told.p_value > 0.01
        assert told.bits == pytest.approx(told.chance, abs=0.01)


def test_whole_texts_are_shuffled_so_that_alike_tokens_prove_nothing(make_trace):
    # Each text keeps one expert throughout, drawn without regard to its domain: thousands of rows, twelve texts.
    experts = [0, 1, 0, 1, 2, 1, 0, 2, 3, 3, 1, 0]
    trace = make_trace([(s, n, 0, 0, 65, experts[s], s % 2) for s in range(12) for n in range(200)])
    (told,) = measures.about_domain(trace)
    assert told.bits > 0.1
    assert told.chance > 0.1
    assert told.p_value > 0.05


def test_rows_of_unknown_domain_are_left_out_of_what_experts_tell(random_trace, without_domains):
    (told,) = measures.about_domain(without_domains(random_trace(num_experts=(4,))))
    assert (told.num_rows, told.bits, told.ceiling) == (0, 0.0, 0.0)


def test_a_router_that_reads_only_the_token_is_told_by_it(make_trace):
    trace = make_trace([(0, n, 0, 0, 65 + n % 4, n % 4, 0) for n in range(400)])
    (told,) = measures.about_token(trace)
    assert told.bits == pytest.approx(2)
    assert told.ceiling == pytest.approx(2)


def test_a_router_that_ignores_the_token_comes_out_at_chance(make_trace):
    rng = np.random.default_rng(0)
    trace = make_trace([(0, n, 0, 0, rng.integers(0, 50), rng.integers(0, 4), 0) for n in range(6000)])
    (told,) = measures.about_token(trace)
    assert told.bits == pytest.approx(told.chance, rel=0.25)
