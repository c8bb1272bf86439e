"""Planted structure is found, by the measure that is meant to find it and not by the others."""

from dataclasses import replace

import numpy as np
import pytest

from moesaic.core.errors import ConfigError, DataError
from moesaic.lens import measures
from tests.lens.measures.traces import routed, sets, trace_of

LENGTH, TEXTS = 50, 24
NUM = LENGTH * TEXTS


@pytest.fixture(name="rng")
def _rng():
    return np.random.default_rng(11)


def text(rng, domain_S):
    """Tokens of which a third are common to all domains and the rest a domain's own."""
    domain_T = np.repeat(domain_S, LENGTH)
    return np.where(rng.random(NUM) < 1 / 3, rng.integers(0, 10, NUM), 10 + 10 * domain_T + rng.integers(0, 10, NUM))


def test_an_expert_for_each_domain_tells_all_of_the_domain(rng):
    domain_S = np.arange(TEXTS) % 3
    trace = routed(np.repeat(domain_S, LENGTH)[:, None], token_T=text(rng, domain_S), length=LENGTH, domain_S=domain_S)
    (told,) = measures.about_domain(trace, num_shuffles=499)
    assert told.bits == pytest.approx(np.log2(3))
    assert told.ceiling == pytest.approx(np.log2(3))
    assert told.p_value == 1 / 500
    assert told.chance < 0.3
    np.testing.assert_array_equal(measures.domain_specialisation(trace).value[0], np.eye(3))
    words = measures.words_or_subjects(trace).value[:, 0]
    assert words[1] == words[2] == 1
    assert words[0] < 0.9
    assert [taker.expert for taker in measures.takers(trace, 0)] == [0, 1, 2]


def test_an_expert_for_each_token_is_words_and_not_subjects(rng):
    domain_S = np.arange(TEXTS) % 3
    token_T = text(rng, domain_S)
    expert_T = (token_T * 2654435761) % 2**32 % 4
    trace = routed(expert_T[:, None], token_T=token_T, length=LENGTH, domain_S=domain_S)
    (told,) = measures.about_token(trace)
    assert told.bits == pytest.approx(told.ceiling)
    assert told.p_value == 1 / 100
    assert told.chance < 0.5
    assert measures.vocabulary_specialisation(trace).value[0] == 1
    assert measures.vocabulary_specialisation(trace).chance[0] < 0.6
    table = measures.token_table(trace, 0)
    np.testing.assert_array_equal(table.expert_V, (table.token_id_V * 2654435761) % 2**32 % 4)
    np.testing.assert_array_equal(table.share_V, 1)
    from_token, from_domain, from_both = measures.words_or_subjects(trace).value[:, 0]
    assert from_token > 0.99
    assert from_both <= from_token
    assert from_domain < 0.7


def test_a_router_without_opinion_is_told_to_have_none(rng):
    domain_S = rng.permutation(TEXTS) % 3
    trace = routed(sets(rng, NUM, 8, 2), token_T=text(rng, domain_S), length=LENGTH, domain_S=domain_S)
    for told in (*measures.about_domain(trace, num_shuffles=199), *measures.about_token(trace)):
        assert told.p_value > 0.05
        # Twice N ln 2 times the bits is a chi-squared of (E - 1)(V - 1) degrees: by luck within 0.02 of its mean.
        assert told.bits == pytest.approx(told.chance, abs=0.02)
    special = measures.vocabulary_specialisation(trace)
    assert special.value[0] == pytest.approx(special.chance[0], rel=0.05)
    words = measures.words_or_subjects(trace)
    np.testing.assert_allclose(words.value[:, 0], 1 / 8, atol=0.04)
    share = measures.domain_specialisation(trace)
    np.testing.assert_allclose(share.chance, 2 / 8)
    np.testing.assert_allclose(share.value, 2 / 8, atol=0.08)


def two_layers(rng, noise):
    """The second layer's first choice follows from the first's, but for a part that is drawn anew."""
    first_T = rng.integers(0, 6, NUM)
    next_T = np.where(rng.random(NUM) < noise, rng.integers(0, 6, NUM), np.roll(np.arange(6), 2)[first_T])
    rows = [
        (n // LENGTH, n % LENGTH, layer, 0, 1, int(expert_T[n]), 0)
        for n in range(NUM)
        for layer, expert_T in enumerate((first_T, next_T))
    ]
    return trace_of(rows, num_experts=(6, 6))


def test_a_layer_that_follows_the_one_before_is_foretold(rng):
    exact, noisy, free = (two_layers(rng, noise) for noise in (0, 0.5, 1))
    assert measures.next_layer(exact).value[0] == 1
    assert measures.next_layer(noisy).value[0] == pytest.approx(0.5 + 0.5 / 6, abs=0.05)
    assert measures.next_layer(free).value[0] == pytest.approx(1 / 6, abs=0.04)
    for trace in (exact, noisy, free):
        assert measures.next_layer(trace).chance[0] == pytest.approx(1 / 6, abs=0.04)
    told = [measures.about_next_layer(trace)[0] for trace in (exact, noisy, free)]
    assert told[0].bits == pytest.approx(told[0].ceiling)
    assert told[0].p_value == told[1].p_value == 1 / 100
    assert told[2].p_value > 0.05


def test_an_encoder_and_a_decoder_do_not_foretell_each_other():
    # The same places, other tokens: nothing follows from one to the other.
    rows = [(s, p, layer, 0, 10 * layer + p, p % 2, 0) for s in range(4) for p in range(6) for layer in range(2)]
    trace = trace_of(rows, num_experts=(2, 2))
    assert np.isnan(measures.next_layer(trace).value[0])
    assert measures.next_layer(trace).count[0] == 0
    assert measures.about_next_layer(trace)[0].num_rows == 0


def test_one_sequence_alone_cannot_be_held_out():
    trace = trace_of([(0, p, layer, 0, 1, p % 2, 0) for p in range(9) for layer in range(2)], num_experts=(2, 2))
    assert np.isnan(measures.next_layer(trace).value).all()
    assert np.isnan(measures.words_or_subjects(trace).value).all()


def test_experts_that_work_in_pairs_are_found(rng):
    pair_T = rng.integers(0, 3, NUM)
    measured = measures.coactivation(
        routed(np.stack([pair_T, pair_T + 3], axis=1), token_T=np.zeros(NUM), length=LENGTH, num_experts=6)
    )
    for expert in range(6):
        assert measured.value[0, expert, (expert + 3) % 6] == 1
        assert measured.chance[0, expert, (expert + 3) % 6] == pytest.approx(1 / 5, abs=0.03)


def test_a_checkpoint_agrees_with_itself_and_by_chance_with_a_stranger(rng):
    one, other = (routed(sets(rng, NUM, 8, 2), token_T=np.zeros(NUM), length=LENGTH) for _ in range(2))
    assert measures.saturation(one, one).value[0] == 1
    measured = measures.saturation(one, other)
    assert measured.value[0] == pytest.approx(2 / 8, abs=0.03)
    assert measured.chance[0] == pytest.approx(2 / 8, abs=0.01)
    assert measured.count[0] == NUM
    # Half of the tokens have one of their two experts changed: (1 + 1/2) / 2.
    changed_TK = one.expert.reshape(-1, 2).copy()
    free_T = np.asarray([next(e for e in range(8) if e not in pair) for pair in changed_TK.tolist()])
    changed_TK[::2, 1] = free_T[::2]
    assert measures.saturation(replace(one, expert=changed_TK.ravel()), one).value[0] == pytest.approx(0.75)


def test_traces_of_other_text_or_another_model_do_not_saturate():
    one = trace_of([(3, 7, 0, 0, 41, 0, 0)], num_experts=(2,))
    with pytest.raises(DataError) as error:
        measures.saturation(one, trace_of([(3, 7, 0, 0, 42, 0, 0)], num_experts=(2,)))
    assert str(error.value) == (
        "Saturation needs two traces of one text, but in layers.0, sequence 3, position 7, one read token 41 and the "
        "other 42. Record both checkpoints on the same batches, in the same order."
    )
    with pytest.raises(DataError, match=r"have no \(sequence, position\) in common"):
        measures.saturation(one, trace_of([(2, 7, 0, 0, 41, 0, 0)], num_experts=(2,)))
    with pytest.raises(ConfigError) as refused:
        measures.saturation(one, trace_of([(3, 7, 0, 0, 41, 0, 0)], num_experts=(5,)))
    assert str(refused.value) == (
        "Saturation compares two checkpoints of one model, but the traces have different num_experts: (2,) and (5,). "
        "Record both from one model."
    )


def test_a_domain_and_a_stretch_of_text_are_traces_of_their_own():
    rows = [(s, p, 0, 0, 1, p // 5, s % 2) for s in range(4) for p in range(10)]
    trace = trace_of(rows, num_experts=(2,))
    assert {name: part.num_rows for name, part in measures.by_domain(trace).items()} == {"code": 20, "prose": 20}
    halves = measures.by_position(trace, 2)
    assert list(halves) == ["0–4", "5–9"]
    assert [measures.load(part)[0].tolist() for part in halves.values()] == [[20, 0], [0, 20]]
    assert [measures.max_over_mean(part).value[0] for part in halves.values()] == [2, 2]
    assert measures.max_over_mean(trace).value[0] == 1
    assert len(measures.by_position(trace, 100)) == 10
    stacked = measures.Measured.stack([measures.load_share(part) for part in halves.values()])
    assert stacked.value.tolist() == [[[1, 0]], [[0, 1]]]
    with pytest.raises(ConfigError, match=r"^num_bins must be at least 1, got 0\."):
        measures.by_position(trace, 0)
