"""Every count against plain loops, over traces in every form that the format allows."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesaic.lens import measures
from tests.lens.measures import naive
from tests.lens.measures.traces import drawn_traces

FEW = settings(max_examples=40, deadline=None)


def same(measured, slow):
    np.testing.assert_allclose(np.asarray(measured, dtype=float), np.asarray(slow, dtype=float), atol=1e-12)


def index_of(trace, name):
    return -1 if name == measures.NO_DOMAIN else trace.metadata.domains.index(name)


@FEW
@given(drawn_traces())
def test_balance(trace):
    layers = range(trace.num_layers)
    for name in ("max_over_mean", "coefficient_of_variation", "load_entropy", "dead_experts", "drop_rate",
                 "experts_per_token"):  # fmt: skip
        same(getattr(measures, name)(trace).value, [getattr(naive, name)(trace, layer) for layer in layers])
    same(measures.max_violation(trace).value, [naive.max_over_mean(trace, layer) - 1 for layer in layers])
    for layer in layers:
        load, experts = naive.loads(trace, layer), trace.metadata.num_experts[layer]
        same(measures.load(trace)[layer, :experts], load)
        assert np.isnan(measures.load(trace)[layer, experts:]).all()
        assert measures.max_over_mean(trace).count[layer] == sum(load)
        slow = naive.choices_of_tokens(trace, layer)
        fast = measures.choices_of_tokens(trace)[layer]
        assert {number: count for number, count in enumerate(fast.tolist()) if count} == dict(slow)


@FEW
@given(drawn_traces(), st.booleans())
def test_domains(trace, first_only):
    share, special = measures.domain_share(trace), measures.domain_specialisation(trace, first_only=first_only)
    for layer, experts in enumerate(trace.metadata.num_experts):
        for place, name in enumerate(measures.domains(trace)):
            domain = index_of(trace, name)
            slow = [naive.domain_share(trace, layer, domain, expert) for expert in range(experts)]
            same(share.value[layer, place, :experts], slow)
            slow = [
                naive.domain_specialisation(trace, layer, domain, expert, first_only=first_only)
                for expert in range(experts)
            ]
            same(special.value[layer, place, :experts], slow)


@FEW
@given(drawn_traces(), st.booleans(), st.integers(1, 3))
def test_vocabulary(trace, first_only, min_tokens):
    fast = measures.vocabulary_specialisation(trace, first_only=first_only, min_tokens=min_tokens)
    same(
        fast.value,
        [
            naive.vocabulary_specialisation(trace, layer, first_only=first_only, min_tokens=min_tokens)
            for layer in range(trace.num_layers)
        ],
    )
    for layer in range(trace.num_layers):
        table = measures.token_table(trace, layer, first_only=first_only, min_tokens=min_tokens)
        assert len(table.token_id_V) == fast.count[layer]
        if len(table.token_id_V):
            assert table.share_V.mean() == pytest.approx(fast.value[layer])
            assert (np.diff(table.count_V) <= 0).all()
            assert ((table.low_V <= table.share_V) & (table.share_V <= table.high_V)).all()


@FEW
@given(drawn_traces(), st.booleans())
def test_neighbours(trace, first_only):
    measured = measures.repetition(trace, first_only=first_only)
    same(measured.value, [naive.repetition(trace, layer, first_only=first_only) for layer in range(trace.num_layers)])


@FEW
@given(drawn_traces())
def test_chance_of_staying_with_the_first_choice_within_a_text_is_that_of_all_its_pairs(trace):
    measured = measures.repetition(trace, same_text=True)
    for layer in np.flatnonzero(measured.count).tolist():
        texts = {sequence for sequence, _ in naive.tokens_of(trace, layer)}
        if len(texts) > 1:
            slow = naive.chance_of_repetition(trace, layer, first_only=True, same_text=True)
            assert measured.chance[layer] == pytest.approx(slow)


@FEW
@given(drawn_traces())
def test_coactivation(trace):
    fast = measures.coactivation(trace)
    for layer, experts in enumerate(trace.metadata.num_experts):
        slow = [[naive.coactivation(trace, layer, one, other) for other in range(experts)] for one in range(experts)]
        same(fast.value[layer, :experts, :experts], slow)
        assert np.isnan(fast.value[layer, experts:]).all()


@FEW
@given(drawn_traces())
def test_guessing(trace):
    fast, words = measures.next_layer(trace), measures.words_or_subjects(trace)
    tokens = [naive.tokens_of(trace, layer) for layer in range(trace.num_layers)]
    for layer in range(trace.num_layers - 1):
        examples = [
            (place[0], {"expert": experts[0]}, tokens[layer + 1][place][2][0])
            for place, (_, _, experts) in tokens[layer].items()
            if place in tokens[layer + 1]
        ]
        count = trace.metadata.num_experts[layer + 1]
        same(fast.value[layer], naive.guessed(examples, ["expert"], count))
        same(fast.chance[layer], naive.guessed(examples, [], count))
    for layer, count in enumerate(trace.metadata.num_experts):
        examples = [
            (place[0], {"token": token, "domain": domain, "both": (token, domain)}, experts[0])
            for place, (token, domain, experts) in tokens[layer].items()
            if token >= 0 and domain >= 0
        ]
        same(words.value[0, layer], naive.guessed(examples, ["token"], count))
        same(words.value[1, layer], naive.guessed(examples, ["domain"], count))
        same(words.value[2, layer], naive.guessed(examples, ["both", "token", "domain"], count))


@FEW
@given(drawn_traces(), st.booleans(), st.integers(0, 99))
def test_saturation(trace, first_only, seed):
    # The final checkpoint renames the experts of a part of the rows and forgets some tokens.
    rng = np.random.default_rng(seed)
    num_experts_N = np.asarray(trace.metadata.num_experts)[trace.layer]
    turn_T = rng.integers(0, 6, 100)[trace.position + 10 * trace.sequence] if trace.num_rows else 0
    final = replace(trace, expert=(trace.expert + turn_T) % num_experts_N)
    final = final.where(final.position % 4 < 3)
    slow = [naive.saturation(trace, final, layer, first_only=first_only) for layer in range(trace.num_layers)]
    if np.isnan(np.asarray(slow)).all():
        return
    fast = measures.saturation(trace, final, first_only=first_only)
    same(fast.value, [value for value, _ in slow])
    same(fast.chance, [chance for _, chance in slow])


@settings(max_examples=8, deadline=None)
@given(drawn_traces())
def test_a_summary_of_anything_is_json_and_the_order_of_rows_is_no_matter(trace):
    import json

    if not trace.num_rows:
        return
    told = json.dumps(measures.summary(trace, num_shuffles=2, num_bins=3), allow_nan=False)
    order = np.random.default_rng(0).permutation(trace.num_rows)
    shuffled = replace(
        trace,
        **{
            name: getattr(trace, name)[order]
            for name in ("sequence", "position", "layer", "choice", "token_id", "expert", "weight", "score", "kept",
                         "domain")
        },
    )  # fmt: skip
    assert json.dumps(measures.summary(shuffled, num_shuffles=2, num_bins=3), allow_nan=False) == told
