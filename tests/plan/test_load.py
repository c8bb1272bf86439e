"""Loads: popularity against draws, capacity against counting, distinct experts against a simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesaic.core.errors import CheckpointError, ConfigError
from moesaic.plan.load import distinct, drops, loads, reach
from moesaic.plan.popularity import Recorded, Zipf, read_routing
from moesaic.telemetry import RoutingTrace, TraceMetadata
from moesaic.zoo import Experts

UNIFORM = Zipf(exponent=0.0)


def mixture(num_experts=16, top_k=4, **more):
    return Experts(num_experts=num_experts, top_k=top_k, hidden=8, **more)


def trace(choices_SPLK, num_experts):
    """A trace of sequences, positions, layers, choices."""
    choices = np.asarray(choices_SPLK)
    sequence, position, layer, choice = (index.ravel() for index in np.indices(choices.shape))
    rows = choices.size
    metadata = TraceMetadata(
        model="m",
        layer_names=tuple(f"l{number}" for number in range(choices.shape[2])),
        num_experts=(num_experts,) * choices.shape[2],
        top_k=choices.shape[3],
    )
    ones = np.ones(rows)
    return RoutingTrace(
        metadata=metadata,
        sequence=sequence,
        position=position,
        layer=layer,
        choice=choice,
        token_id=-ones,
        expert=choices.ravel(),
        weight=ones,
        score=ones,
        kept=ones.astype(bool),
        domain=-ones,
    )


# --- popularity -----------------------------------------------------------------------------------------------------


@given(exponent=st.floats(0, 2), num_experts=st.integers(2, 64), data=st.data())
@settings(max_examples=25, deadline=None)
def test_chances_sum_to_the_choices_and_none_exceeds_one(exponent, num_experts, data):
    top_k = data.draw(st.integers(1, num_experts))
    chances_E = Zipf(exponent=exponent).chances_E(0, mixture(num_experts, top_k))
    assert chances_E.sum() == pytest.approx(top_k, rel=1e-6)
    assert chances_E.min() > 0
    assert chances_E.max() <= 1 + 1e-9


@pytest.mark.parametrize("exponent", [0.5, 1.1, 1.6])
def test_chances_are_those_of_drawing_without_putting_back(exponent):
    """Against numpy's own sampler, 5,000 tokens: 4 standard errors."""
    weight_E = np.arange(1, 9) ** -exponent
    rng = np.random.default_rng(0)
    drawn = [rng.choice(8, size=3, replace=False, p=weight_E / weight_E.sum()) for _ in range(5000)]
    counted_E = np.bincount(np.concatenate(drawn), minlength=8) / 5000
    chances_E = np.sort(Zipf(exponent=exponent).chances_E(0, mixture(8, 3)))[::-1]
    assert np.abs(chances_E - counted_E).max() < 4 * math.sqrt(0.25 / 5000)


def test_one_choice_has_the_weights_themselves():
    weight_E = np.arange(1, 9) ** -1.5
    chances_E = np.sort(Zipf(exponent=1.5).chances_E(0, mixture(8, 1)))[::-1]
    np.testing.assert_allclose(chances_E, weight_E / weight_E.sum(), rtol=1e-9)


def test_draws_agree_with_chances_and_differ_between_layers():
    popularity, experts = Zipf(exponent=1.0), mixture()
    counts = [np.bincount(popularity.choices_TK(it, experts, 20_000).ravel(), minlength=16) / 20_000 for it in (0, 1)]
    for layer, counted_E in enumerate(counts):
        np.testing.assert_allclose(counted_E, popularity.chances_E(layer, experts), atol=0.015)
    assert np.argmax(counts[0]) != np.argmax(counts[1])


def test_a_token_keeps_to_its_groups():
    experts = mixture(32, 6, groups=8, groups_kept=3)
    groups_TK = UNIFORM.choices_TK(0, experts, 500) // 4
    assert max(len(set(row)) for row in groups_TK.tolist()) == 3


def test_recorded_choices_are_counted_as_they_are():
    recorded = Recorded.of(trace([[[[0, 1], [3, 2]], [[0, 2], [3, 1]]]], 4), "t")
    np.testing.assert_array_equal(recorded.chances_E(0, mixture(4, 2)), [1.0, 0.5, 0.5, 0.0])
    np.testing.assert_array_equal(recorded.chances_E(1, mixture(4, 2)), [0.0, 0.5, 0.5, 1.0])


def test_a_trace_of_another_model_is_told():
    recorded = Recorded.of(trace([[[[0, 1]]]], 4), "other.parquet")
    with pytest.raises(ConfigError) as error:
        recorded.chances_E(0, mixture(16, 2))
    assert str(error.value) == (
        "The routing of layer 0 with 16 experts was needed, and other.parquet has 4 experts "
        "(its layers: 1 of 4 experts). Give a trace of the model that is planned for."
    )


def test_routing_is_read_from_words_or_a_file(tmp_path):
    assert read_routing("uniform") == UNIFORM
    assert read_routing("zipf:1.1") == Zipf(exponent=1.1)
    path = trace([[[[0, 1]]]], 4).save(tmp_path / "t.parquet")
    assert read_routing(str(path)).num_experts == (4,)
    (tmp_path / "bad").write_text("no trace")
    with pytest.raises(CheckpointError, match="no readable Parquet file"):
        read_routing(str(tmp_path / "bad"))
    with pytest.raises(ConfigError, match=r"routing must be 'uniform', 'zipf:EXPONENT' or the path .* got 'zip:1'"):
        read_routing("zip:1")


# --- loads ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("popularity", [UNIFORM, Zipf(exponent=1.0)], ids=lambda it: it.name)
def test_loads_are_those_of_counting_tokens(popularity):
    experts, tokens = mixture(16, 4), 2000
    drawn = loads(popularity, (experts,), ep=4, tokens=tokens)
    counted = []
    for seed in range(200):
        device = popularity.choices_TK(0, experts, tokens, seed) // 4
        counted.append(np.bincount(device.ravel(), minlength=4) / tokens)
    counted = np.asarray(counted)
    np.testing.assert_allclose(drawn.factors[:, 0].mean(axis=0), counted.mean(axis=0), atol=0.01)
    np.testing.assert_allclose(drawn.factors[:, 0].std(axis=0), counted.std(axis=0), rtol=0.25)
    assert drawn.busiest() == pytest.approx(counted.max(axis=1).mean(), rel=0.01)
    assert drawn.p99(0, 1) == pytest.approx(np.quantile(counted.max(axis=1), 0.99), rel=0.02)


@given(exponent=st.floats(0, 1.5), ep=st.sampled_from([1, 2, 4, 8, 16]), tokens=st.integers(64, 100_000))
@settings(max_examples=20, deadline=None)
def test_the_p99_load_is_at_least_the_mean(exponent, ep, tokens):
    drawn = loads(Zipf(exponent=exponent), (mixture(),) * 3, ep=ep, tokens=tokens)
    assert drawn.factors.mean() == pytest.approx(1, abs=0.02)
    assert drawn.p99(0, 3) >= 1 - 1e-9
    assert drawn.busiest() >= 1 - 1e-9
    assert drawn.p99(0, 1) >= drawn.p99(0, 3) - 0.05


def test_groups_make_loads_less_even():
    plain, grouped = mixture(64, 8), mixture(64, 8, groups=8, groups_kept=2)
    even = loads(UNIFORM, (plain,), ep=8, tokens=4096)
    uneven = loads(UNIFORM, (grouped,), ep=8, tokens=4096)
    devices = UNIFORM.choices_TK(0, grouped, 60 * 1024, 3).reshape(60, 1024, 8) // 8
    counted = np.asarray([np.bincount(device_TK.ravel(), minlength=8) for device_TK in devices])
    # Of a quarter of the tokens, twice as uneven.
    expected = counted.std(axis=0).mean() / 1024 / 2
    assert even.factors.std() < uneven.factors.std() == pytest.approx(expected, rel=0.15)


def test_whole_sequences_are_drawn_from_a_trace():
    """Two sequences, each on a device of its own: a micro-batch of one sequence is all on one."""
    recorded = Recorded.of(trace([[[[0, 1]]] * 8, [[[2, 3]]] * 8], 4), "t")
    one = loads(recorded, (mixture(4, 2),), ep=2, tokens=8)
    assert set(one.factors.ravel().tolist()) == {0.0, 2.0}
    many = loads(recorded, (mixture(4, 2),), ep=2, tokens=8 * 400)
    assert many.busiest() == pytest.approx(1.04, abs=0.02)


# --- capacity -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("popularity", [UNIFORM, Zipf(exponent=0.8)], ids=lambda it: it.name)
@pytest.mark.parametrize("factor", [0.5, 1.0, 1.25])
def test_drops_are_those_of_counting_tokens(popularity, factor):
    experts, tokens = mixture(8, 2), 200
    found = drops(popularity, 0, experts, tokens=tokens, factor=factor)
    assert found.capacity == math.ceil(factor * tokens * 2 / 8)
    lost = []
    for choices_TK in popularity.choices_TK(0, experts, 400 * tokens).reshape(400, tokens, 2):
        count_E = np.bincount(choices_TK.ravel(), minlength=8)
        lost.append(np.maximum(count_E - found.capacity, 0).sum() / (2 * tokens))
    assert found.rate == pytest.approx(np.mean(lost), abs=4 * np.std(lost) / 20 + 1e-4)
    assert found.empty == pytest.approx(1 - (1 - found.rate) * 2 * tokens / (8 * found.capacity), abs=1e-12)


@given(exponent=st.floats(0, 1.5), tokens=st.integers(1, 5000), low=st.floats(0.1, 3), more=st.floats(0, 3))
@settings(max_examples=40, deadline=None)
def test_the_drop_rate_falls_with_the_capacity_factor(exponent, tokens, low, more):
    popularity = Zipf(exponent=round(exponent, 1))
    rates = [drops(popularity, 0, mixture(), tokens=tokens, factor=it).rate for it in (low, low + more)]
    assert 0 <= rates[1] <= rates[0] + 1e-12 <= 1 + 1e-12


def test_places_for_all_drop_nothing():
    assert drops(Zipf(exponent=2.0), 0, mixture(8, 2), tokens=100, factor=4.0).rate == 0


def test_a_capacity_of_nothing_is_refused():
    with pytest.raises(ConfigError) as error:
        drops(UNIFORM, 0, mixture(), tokens=8, factor=0.0)
    assert str(error.value) == (
        "capacity factor must be positive, got 0.0. 1.25 is common; leave it out to drop nothing."
    )


# --- distinct experts and reach -------------------------------------------------------------------------------------


def test_distinct_experts_of_equal_ones_have_the_known_formula():
    assert distinct(UNIFORM, 0, mixture(128, 8), 32) == pytest.approx(128 * (1 - (1 - 8 / 128) ** 32), rel=1e-12)
    assert distinct(UNIFORM, 0, mixture(128, 8), 1) == pytest.approx(8)


@pytest.mark.parametrize("popularity", [UNIFORM, Zipf(exponent=1.2)], ids=lambda it: it.name)
@pytest.mark.parametrize("tokens", [1, 4, 32])
def test_distinct_experts_are_those_of_counting(popularity, tokens):
    experts = mixture(32, 4)
    choices_TK = popularity.choices_TK(0, experts, tokens * 1000)
    counted = [len(set(row.tolist())) for row in choices_TK.reshape(1000, -1)]
    error = np.std(counted) / math.sqrt(1000)
    assert distinct(popularity, 0, experts, tokens) == pytest.approx(np.mean(counted), abs=4 * error + 1e-9)


@given(num_experts=st.sampled_from([8, 16, 64]), top_k=st.integers(1, 8), ep=st.sampled_from([1, 2, 4, 8]))
def test_a_token_reaches_no_more_devices_than_it_has_experts(num_experts, top_k, ep):
    found = reach(UNIFORM, 0, mixture(num_experts, top_k), ep=ep, per_node=min(ep, 4))
    assert found.rows == pytest.approx(top_k)
    assert 1 - 1e-9 <= found.nodes <= found.devices + 1e-9
    assert found.devices <= min(top_k, ep) + 1e-9


def test_the_formula_of_reach_agrees_with_draws():
    experts = mixture(32, 6)
    exact = reach(UNIFORM, 0, experts, ep=8, per_node=4)
    device_TK = UNIFORM.choices_TK(0, experts, 20_000) // 4
    assert exact.devices == pytest.approx(np.mean([len(set(row)) for row in device_TK.tolist()]), abs=0.03)
    assert exact.nodes == pytest.approx(np.mean([len(set(row)) for row in (device_TK // 4).tolist()]), abs=0.03)


def test_node_limits_are_counted():
    limited = mixture(64, 8, groups=8, groups_kept=3)
    found = reach(UNIFORM, 0, limited, ep=64, per_node=8)
    assert found.nodes <= 3
    assert reach(UNIFORM, 0, mixture(64, 8), ep=64, per_node=8).nodes > 5
