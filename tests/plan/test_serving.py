"""Serving and offload: by hand, against exhaustive search, and what must hold."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesaic import zoo
from moesaic.core.errors import ConfigError
from moesaic.plan import devices
from moesaic.plan.layout import Layout
from moesaic.plan.memory import Job
from moesaic.plan.offloading import hit_rates, offload
from moesaic.plan.popularity import Zipf
from moesaic.plan.ranking import USABLE, search, search_serving
from moesaic.plan.serving import ServeJob, serve

H100 = devices.get("h100-80g")
UNIFORM = Zipf(exponent=0.0)


def served(name="qwen3-30b-a3b", layout=None, **more):
    return serve(zoo.get(name), H100, layout or Layout(), ServeJob(**more), UNIFORM)


def test_one_sequence_reads_its_active_weights_and_its_cache():
    shape = zoo.get("mixtral-8x7b")
    plan = serve(shape, devices.get("h200"), Layout(), ServeJob(context=4096, batches=(1,)), UNIFORM)
    read = 2 * (shape.num_active_params - shape.params().embeddings) + shape.cache_bytes(4096)
    assert plan.decode[0].seconds == pytest.approx(read / 4.8e12)
    assert plan.decode[0].experts_touched == pytest.approx(2)
    assert plan.decode[0].binds == "memory"
    assert plan.weights == 2 * shape.num_params


def test_more_sequences_touch_more_experts_and_share_them():
    decode = served(batches=(1, 8, 64, 512)).decode
    touched = [one.experts_touched for one in decode]
    assert touched == sorted(touched)
    assert touched[1] == pytest.approx(128 * (1 - (1 - 8 / 128) ** 8))
    assert [one.seconds for one in decode] == sorted(one.seconds for one in decode)
    assert [one.tokens_per_s for one in decode] == sorted(one.tokens_per_s for one in decode)


def test_what_fits_is_what_is_said_to_fit():
    plan = served(batches=(1, 10_000))
    assert plan.most_sequences == int((80e9 - plan.weights) // plan.cache)
    assert [one.fits for one in plan.decode] == [True, False]


def test_heads_are_cut_and_latents_are_not():
    layout = Layout(devices=4, tp=4)
    qwen, deepseek = zoo.get("qwen3-30b-a3b"), zoo.get("deepseek-v2-lite")
    job = ServeJob(context=1000)
    assert serve(qwen, H100, layout, job, UNIFORM).cache == qwen.cache_bytes(1000) / 4
    assert serve(deepseek, H100, layout, job, UNIFORM).cache == deepseek.cache_bytes(1000)
    # Four key-value heads on eight devices: each head is there twice.
    assert serve(qwen, H100, Layout(devices=8, tp=8), job, UNIFORM).cache == qwen.cache_bytes(1000) / 4


@given(
    tp=st.sampled_from([1, 2, 4]), pp=st.sampled_from([1, 2]), ep=st.sampled_from([1, 2, 4]), batch=st.integers(1, 500)
)
@settings(max_examples=25, deadline=None)
def test_more_devices_hold_no_more_and_are_no_slower(tp, pp, ep, batch):
    small = Layout(devices=4 * pp, tp=tp, pp=pp, ep=ep)
    large = Layout(devices=8 * pp, tp=tp, pp=pp, ep=ep)
    one, two = (served(layout=it, batches=(batch,)) for it in (small, large))
    assert two.weights == one.weights
    assert two.decode[0].memory <= one.decode[0].memory * (1 + 1e-9)
    assert two.decode[0].seconds <= one.decode[0].seconds * (1 + 1e-9)


def test_serving_with_split_states_is_refused():
    with pytest.raises(ConfigError) as error:
        served(layout=Layout(devices=4, fsdp=2))
    assert str(error.value) == "fsdp must be 1 for serving, got 2. Cut weights with tp, ep or pp instead."
    with pytest.raises(ConfigError, match="context and batches must be positive, got 4096 and"):
        ServeJob(batches=(0,))


# --- offload --------------------------------------------------------------------------------------------------------


def optimal(asked, slots):
    """Most hits of any rule that may or may not keep what it fetched, by trying all."""

    @cache
    def most(place, held):
        if place == len(asked):
            return 0
        expert = asked[place]
        here = held | {expert}
        choices = [here] if len(here) <= slots else [here - {gone} for gone in here]
        return (expert in held) + max(most(place + 1, choice) for choice in choices)

    return most(0, frozenset())


@given(asked=st.lists(st.integers(0, 4), min_size=1, max_size=10), slots=st.integers(0, 4))
@settings(max_examples=60, deadline=None)
def test_the_best_rule_is_the_best_there_is(asked, slots):
    found = hit_rates(np.asarray(asked)[:, None], slots)
    assert found.best * len(asked) == pytest.approx(optimal(tuple(asked), slots))
    assert found.lru <= found.best + 1e-12
    assert found.static <= found.best + 1e-12


def test_hits_by_hand():
    found = hit_rates(np.asarray([[0], [1], [0], [2], [0], [1]]), 2)
    # LRU holds {0, 1}, {0, 2}, {0, 1}: two hits on 0. Keeping 0 and 1 hits 0 twice and 1 once.
    assert (found.lru, found.static, found.best) == (2 / 6, 3 / 6, 3 / 6)


def test_no_choice_is_no_request():
    assert hit_rates(np.asarray([[0, -1], [0, -1]]), 1).lru == 0.5
    assert hit_rates(np.asarray([[-1]]), 1).best == 0


@pytest.mark.parametrize("slots", [0, 8, 16])
def test_the_least_recently_used_of_independent_choices_is_as_good_as_any(slots):
    """One of 16 equal experts a token: a cache of c hits c in 16, without any locality to gain by."""
    experts = zoo.Experts(num_experts=16, top_k=1, hidden=8)
    found = hit_rates(UNIFORM.choices_TK(0, experts, 20_000), slots)
    assert found.lru == pytest.approx(slots / 16, abs=0.012)


def test_room_for_all_misses_the_first_use_alone():
    choices_TK = UNIFORM.choices_TK(0, zoo.Experts(num_experts=16, top_k=2, hidden=8), 500)
    found = hit_rates(choices_TK, 16)
    assert found.lru == found.static == found.best == 1 - 16 / 1000


def test_an_offloaded_mixtral_by_hand():
    """Without hits, two experts of 352 MB for each of 32 layers over 32 GB/s: the reference's 0.9 s at 25 GB/s."""
    shape, device = zoo.get("mixtral-8x7b"), devices.get("rtx4090")
    found = offload(shape, device, UNIFORM, fast_bytes=24e9, context=4096)
    each = 2 * zoo.count.expert_params(shape.mixtures[0], shape.width)
    assert each == pytest.approx(352e6, rel=0.002)
    pinned = 2 * (shape.num_params - shape.params().experts) + shape.cache_bytes(4096)
    assert found.pinned == pinned
    assert found.slots == int((24e9 - pinned - 2 * each) // (32 * each)) == 1
    read = (2 * (shape.num_active_params - shape.params().embeddings) + shape.cache_bytes(4096)) / device.bandwidth
    fetched = 64 * each * (1 - found.rates.lru) / device.link_host
    assert found.seconds["lru"] == pytest.approx(read + fetched)
    assert found.seconds["best"] < found.seconds["lru"]


def test_what_is_always_needed_must_fit():
    with pytest.raises(ConfigError) as error:
        offload(zoo.get("mixtral-8x7b"), devices.get("rtx4090"), UNIFORM, fast_bytes=4e9, context=4096)
    assert str(error.value) == (
        "mixtral-8x7b needs 4.5 GB of fast memory for what is always read and the experts of one token in one layer, "
        "got 4.0 GB. Use a smaller dtype or context, or a larger device."
    )
    with pytest.raises(ConfigError, match=r"tpu-v4 has no link to a host's memory in the table"):
        offload(zoo.get("mixtral-8x7b"), devices.get("tpu-v4"), UNIFORM, fast_bytes=30e9, context=4096)


# --- search ---------------------------------------------------------------------------------------------------------


def test_a_search_gives_layouts_that_fit_fastest_first():
    found = search(zoo.get("olmoe-1b-7b"), H100, 4, Job(context=2048, batch=64), UNIFORM)
    assert 0 < len(found.plans) <= 10
    assert len(found.plans) <= found.fitted <= found.tried
    seconds = [plan.times_busiest.in_turn for plan in found.plans]
    assert seconds == sorted(seconds)
    assert all(plan.memory_p99.total <= USABLE * H100.memory_bytes for plan in found.plans)
    assert {plan.batch_tokens for plan in found.plans} == {64 * 2048}


def test_a_search_that_finds_nothing_says_how_much_is_missing():
    found = search(zoo.get("mixtral-8x7b"), devices.get("rtx4090"), 2, Job(context=2048, batch=4), UNIFORM)
    assert found.plans == ()
    assert found.closest > 24e9


def test_a_search_for_serving_ranks_by_the_time_of_a_token():
    found = search_serving(zoo.get("olmoe-1b-7b"), H100, 4, ServeJob(batches=(1, 64)), UNIFORM)
    seconds = [plan.decode[-1].seconds for plan in found.plans]
    assert seconds == sorted(seconds)
    assert found.plans[0].layout.devices == 4
