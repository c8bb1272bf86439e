"""``bench decode``: cold weights, the bytes that must be read, and the bandwidth beside them."""

import itertools
from dataclasses import replace

import pytest
import torch

from moesaic.bench import bandwidth
from moesaic.bench.decode import Decoding, active_bytes, decode, layer_bytes, visits_of
from moesaic.bench.draw import draw

from .conftest import CPU, TINY

ONE = replace(TINY, num_tokens=1)


def _layers(count):
    return [draw(ONE, dtype=torch.float32, device=CPU, seed=seed) for seed in range(count)]


def test_a_single_token_meets_no_expert_twice_until_all_have_had_a_turn():
    layers = _layers(2)
    visits = visits_of(ONE, layers)
    assert len(visits) == 32
    for index, layer in enumerate(layers):
        mine = visits[index::2]
        assert all(visit.experts is layer.experts for visit in mine)
        chosen = [visit.expert_TK[0].tolist() for visit in mine]
        # Six experts, two a turn: each three turns in a row are all of them.
        assert sorted(itertools.chain(*chosen[:3])) == list(range(6))
        assert sorted(itertools.chain(*chosen[3:6])) == list(range(6))


def test_visits_go_round_the_layers():
    layers = _layers(40)
    visits = visits_of(replace(TINY, num_tokens=4), layers)
    assert len(visits) == 40
    assert [visit.experts for visit in visits] == [layer.experts for layer in layers]
    assert {visit.case.num_tokens for visit in visits} == {4}


def test_active_bytes_are_those_of_experts_that_somebody_chose():
    visit = draw(ONE, dtype=torch.bfloat16, device=CPU)
    assert active_bytes(visit) == 2 * 3 * 16 * 16 * 2
    shared = draw(ONE.with_shared(), dtype=torch.bfloat16, device=CPU)
    assert active_bytes(shared) == (2 + 2) * 3 * 16 * 16 * 2
    many = draw(replace(TINY, num_tokens=100), dtype=torch.bfloat16, device=CPU)
    assert active_bytes(many) == layer_bytes(many.case, torch.bfloat16) == 6 * 3 * 16 * 16 * 2


def test_bandwidth_is_that_of_the_fastest_reader_of_each_round():
    times = {"read: sum": (1.0, 4.0), "read: dot": (2.0, 2.0), "mine": (0.1, 0.1)}
    assert bandwidth.best(times, 8) == (8.0, 4.0)


def test_readers_read_what_they_say_and_it_is_many_caches():
    works, size = bandwidth.readers(CPU, 4096)
    assert size == 4096
    assert float(works["read: sum"].run()) == 1024
    assert float(works["read: dot"].run()) == 1024
    assert bandwidth.cold_bytes(CPU) >= 12 * 32 * 2**20


def test_decoding_gives_a_table_for_each_number_of_tokens_beside_bandwidth_and_a_dense_layer():
    plan = Decoding(cases=(TINY,), dtypes=(torch.float32,), tokens=(1, 4), rounds=5, device=CPU, cold_bytes=2**15)
    result = decode(plan)
    assert [group.title for group in result.groups] == [
        "tiny, balanced, float32, decoding 1 token",
        "tiny, balanced, float32, decoding 4 tokens",
    ]
    first = result.groups[0]
    names = [line.name for line in first.lines]
    assert names[-2:] == ["dense", "bandwidth"]
    assert {"moesaic torch", "moesaic in transformers' block", "transformers batched_mm"} <= set(names)
    not_here = {"moesaic triton", "moesaic native"}
    assert {line.name for line in first.lines if not line.samples} == not_here
    assert first.line("bandwidth").ratios == (1.0,) * 5
    assert first.facts["active_bytes"] == 2 * 3 * 16 * 16 * 4
    expected_us = 1e6 * first.facts["active_bytes"] / first.facts["bytes_per_s"]
    assert first.line("bandwidth").value == pytest.approx(expected_us, rel=1e-6)
