"""Memory and times: parts by hand, and what must hold whatever the model and the layout."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesaic import zoo
from moesaic.core.errors import ConfigError
from moesaic.plan import devices
from moesaic.plan.activations import Code, layer_kept
from moesaic.plan.layout import Layout
from moesaic.plan.memory import Held, Job, stage_memory
from moesaic.plan.popularity import Zipf
from moesaic.plan.training import in_flight, train
from moesaic.zoo import Attention, Dense, Experts, Layer, Lstm, Mamba, ModelShape, Other

H100 = devices.get("h100-80g")
UNIFORM = Zipf(exponent=0.0)
LAYER = Layer(
    mixers=(Attention(heads=8, kv_heads=4, head_dim=16),),
    feeds=(Experts(num_experts=16, top_k=2, hidden=256),),
)
SMALL = ModelShape(name="small", width=128, vocab=1024, layers=(LAYER,) * 8)


def planned(layout=None, job=None, popularity=UNIFORM, shape=SMALL, **more):
    return train(shape, H100, layout or Layout(), job or Job(context=512), popularity, **more)


@pytest.mark.parametrize("name", ["mixtral-8x7b", "deepseek-v3", "switch-base-128", "jamba-v0.1", "shazeer-moe-256"])
def test_the_weights_of_all_devices_are_those_of_the_model(name):
    shape = zoo.get(name)
    for pp in (1, 2):
        layout = Layout(devices=pp, pp=pp, uneven=True)
        held = [Held.of(shape, stage, layout) for stage in layout.stages(shape)]
        total = sum(one.common + one.experts for one in held)
        # A table that input and output share is on both end stages.
        twice = shape.params().embeddings if shape.tied and pp > 1 else 0
        assert total == shape.num_params + twice


def test_one_device_holds_what_the_zoo_says():
    memory, expected = planned().memory, SMALL.memory(dtype="bf16", train=True)
    assert memory.weights == expected.weights
    assert memory.optimizer == expected.optimizer
    # Ours adds gradients up in float32.
    assert memory.gradients == 2 * expected.gradients
    assert planned(job=Job(context=512, grad_dtype="bf16")).memory.gradients == expected.gradients


def test_fused_activations_of_a_layer_by_hand():
    found = layer_kept(LAYER, 128, Code(fused=True, dtype="bf16"))
    # Two norms keep input and output; queries, keys, values, outputs; a normaliser a head; scores before and after.
    assert found.token == 2 * (4 * 128 + 2 * 128 + 2 * 64) + 4 * 8 + 4 * 2 * 16
    # In and out, and gate, up and their product.
    assert found.row == 2 * (2 * 128 + 3 * 256)


def test_a_layer_computed_anew_keeps_its_input_alone():
    deep = replace(SMALL, layers=(LAYER,) * 40)
    kept, anew = (planned(shape=deep, job=Job(context=512, recompute=it)).memory for it in (False, True))
    more = replace(SMALL, layers=(LAYER,) * 41)
    assert (
        planned(shape=more, job=Job(context=512, recompute=True)).memory.activations - anew.activations == 512 * 128 * 2
    )
    assert anew.activations < kept.activations / 10
    assert planned(shape=deep).other_recompute == planned(shape=deep, job=Job(context=512, recompute=True)).memory_p99


@pytest.mark.parametrize("mixer", [Mamba(inner=256, state=16, conv=4, dt_rank=8), Lstm(hidden=64)])
def test_other_mixers_keep_something_that_grows_with_the_tokens(mixer):
    shape = replace(SMALL, layers=(Layer(mixers=(mixer,), feeds=(Dense(hidden=256),)),))
    one, two = (planned(shape=shape, job=Job(context=it)).memory.activations for it in (256, 512))
    assert two == pytest.approx(2 * one)


def test_what_is_not_known_is_not_guessed():
    unknown = Layer(
        mixers=(Other(name="Odd", params=10, active_params=10, matmul_params=10),), feeds=(Dense(hidden=8),)
    )
    with pytest.raises(ConfigError) as error:
        planned(shape=replace(SMALL, layers=(unknown,)))
    assert str(error.value) == (
        "What Odd keeps for the backward is not known: only its weights were counted. "
        "Plan for serving, or give a model whose layers the zoo knows."
    )


def test_micro_batches_under_way_are_those_of_one_forward_one_backward():
    layout = Layout(devices=4, pp=4)
    assert [in_flight(layout, stage) for stage in layout.stages(SMALL)] == [4, 3, 2, 1]
    # Eight pieces of half a stage in the first: 2 * 3 + 4 + 1 = 11 of them.
    twice = replace(layout, interleave=2)
    assert in_flight(twice, twice.stages(SMALL)[0]) == 6


@given(
    tp=st.sampled_from([1, 2, 4]),
    pp=st.sampled_from([1, 2, 4]),
    ep=st.sampled_from([1, 2, 4, 8]),
    split=st.booleans(),
    shard=st.sampled_from(["all", "optimizer"]),
    recompute=st.booleans(),
    exponent=st.sampled_from([0.0, 1.0]),
)
@settings(max_examples=40, deadline=None)
def test_laws_of_every_layout(tp, pp, ep, split, shard, recompute, exponent):
    devices_ = 32 * pp
    layout = Layout(devices=devices_, tp=tp, pp=pp, ep=ep, fsdp=32 // tp if split else 1, shard=shard)
    job = Job(context=256, recompute=recompute, batch=4 * 32 * pp)
    plan = planned(layout, job, Zipf(exponent=exponent))
    double = replace(layout, devices=2 * devices_, fsdp=layout.fsdp * (2 if split else 1))
    wider = planned(double, job, Zipf(exponent=exponent))
    # The same work on more devices takes no more memory on each; loads are drawn, the mean is not.
    assert wider.memory.total <= plan.memory.total * (1 + 1e-9)
    assert plan.memory_p99.total >= plan.memory.total
    for memory in (plan.memory, plan.memory_p99):
        assert memory.total == pytest.approx(sum(memory.as_dict().values()))
        assert min(memory.as_dict().values()) >= 0
    assert plan.flops.total == sum(plan.flops.as_dict().values())
    times = plan.times
    assert times.bound <= times.in_turn
    assert times.bound <= plan.times_busiest.bound * (1 + 1e-9)
    assert plan.mfu() <= 1 + 1e-9
    assert plan.mfu(times.in_turn) <= plan.mfu()


@pytest.mark.parametrize("name", zoo.names()[::3])
def test_every_third_model_of_the_zoo_can_be_planned(name):
    shape, layout = zoo.get(name), Layout(devices=2, pp=2, uneven=True)
    plan = planned(layout, Job(context=512, batch=8), shape=shape)
    states = sum(getattr(plan.memory, part) for part in ("weights", "gradients", "optimizer"))
    # 18 bytes for each weight, about half of them on either device: the fuller one may be that with more logits.
    assert 8 * shape.num_params <= states <= 18 * shape.num_params
    assert plan.memory.activations > 0
    assert 0 < plan.mfu() <= 1
    assert len(plan.traffic) == len({*shape.encoder, *shape.layers})


def test_one_device_without_waits_reaches_the_peak_and_counts_its_flops():
    job = Job(context=512, batch=64, micro_batch=64)
    plan = planned(job=job)
    flops = SMALL.flops_per_token(512, causal=True, backward=True)
    assert plan.model_flops == flops
    assert plan.times.compute == pytest.approx(64 * 512 * flops / H100.peak("bf16"))
    assert plan.mfu(plan.times.compute) == pytest.approx(1)


def test_computing_anew_costs_a_forward_and_lowers_mfu():
    job = Job(context=512, batch=64)
    plain, anew = planned(job=job), planned(job=replace(job, recompute=True))
    layers = SMALL.flops_per_token(512, causal=True) - 2 * SMALL.vocab * SMALL.width
    assert (anew.times.compute - plain.times.compute) * H100.peak("bf16") == pytest.approx(64 * 512 * layers)
    assert anew.model_flops == plain.model_flops


def test_skewed_routing_costs_memory_and_time():
    layout, job = Layout(devices=8, ep=8), Job(context=512, batch=64)
    even, skewed = planned(layout, job), planned(layout, job, Zipf(exponent=1.2))
    assert skewed.memory_p99.total > even.memory_p99.total
    assert skewed.times_busiest.compute > 1.5 * even.times_busiest.compute
    assert skewed.times.bound == pytest.approx(even.times.bound)


def test_drops_are_those_of_the_layers():
    plan = planned(job=Job(context=512), popularity=Zipf(exponent=1.0), capacity_factor=1.0)
    assert plan.drops.capacity == 64
    assert plan.mean_drop_rate == pytest.approx(plan.drops.rate)
    assert planned().drops is None


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"optimizer": "lion"}, "optimizer must be one of adamw, adamw-bf16, momentum, sgd, got 'lion'. Choose one."),
        ({"dtype": "int4"}, "dtype for training must be fp32, bf16, fp16 or fp8, got 'int4'. Choose one."),
        ({"context": 0}, "context must be at least 1, got 0. Give a positive number."),
    ],
)
def test_a_job_that_cannot_be_is_refused(change, text):
    with pytest.raises(ConfigError) as error:
        Job(**change)
    assert str(error.value) == text


def test_a_batch_that_does_not_divide_is_refused_with_what_would_fit():
    with pytest.raises(ConfigError) as error:
        planned(Layout(devices=4), Job(batch=10, micro_batch=2))
    assert str(error.value) == (
        "batch must be a multiple of ranks * micro_batch = 4 * 2 = 8, got 10. 8 or 16 would fit."
    )


def test_a_cut_over_tensor_parallel_devices_repeats_norms_and_routers_alone():
    whole = Layout(devices=2, tp=2)
    parts = SMALL.params()
    held = Held.of(SMALL, whole.stages(SMALL)[0], whole)
    inside = parts.routers + parts.norms - SMALL.norm_params * SMALL.final_norms
    assert held.common == pytest.approx((parts.total - parts.experts - inside) / 2 + inside)
    assert held.experts == parts.experts


def test_memory_of_a_stage_grows_with_its_load_by_rows_alone():
    layout, job = Layout(devices=8, ep=8), Job(context=512)
    stage = layout.stages(SMALL)[0]
    # Below, the loss takes more than the layer that is worked on.
    two, three, four = (stage_memory(SMALL, stage, layout, job, load=it, in_flight=1) for it in (2.0, 3.0, 4.0))
    rows = 512 * 2
    working = 2 * (128 + 3 * 256)
    grown = rows * (8 * layer_kept(LAYER, 128, job.code).row + working)
    assert three.activations - two.activations == pytest.approx(grown)
    assert four.activations - three.activations == pytest.approx(grown)
    # What comes in from other devices grows, too.
    assert three.buffers - two.buffers == pytest.approx(rows * 128 * 2)
    assert three.weights == two.weights
