"""What follows from a shape: caches, memory, FLOPs by hand."""

from __future__ import annotations

import pytest

from moesaic import zoo
from moesaic.core.errors import ConfigError
from moesaic.zoo.cost import cached_numbers, mixer_flops


def test_a_latent_cache_is_that_of_the_paper():
    # 512 + 64 numbers a token and layer, where multi-head attention would keep 2 * 128 * 128.
    shape = zoo.get("deepseek-v3")
    assert shape.cache_bytes(1) == 2 * 61 * (512 + 64)
    assert shape.cache_bytes(1000) == 1000 * shape.cache_bytes(1)


def test_grouped_attention_keeps_its_key_value_heads_and_a_window_no_more_than_itself():
    assert zoo.get("mixtral-8x7b").cache_bytes(10) == 10 * 2 * 32 * 2 * 8 * 128
    assert zoo.get("gpt-oss-20b").cache_bytes(4096) == 2 * 12 * 2 * 8 * 64 * (128 + 4096)
    assert zoo.get("mixtral-8x7b").cache_bytes(10, dtype="fp8") == 10 * 32 * 2 * 8 * 128


def test_a_state_does_not_grow():
    mamba = zoo.Mamba(inner=8, state=4, conv=3, dt_rank=2)
    assert cached_numbers(mamba, 10) == cached_numbers(mamba, 10_000) == 8 * 7
    assert cached_numbers(zoo.Lstm(hidden=6, projection=2), 9) == 8


@pytest.mark.parametrize("window", [None, 1, 3, 7, 9])
@pytest.mark.parametrize("causal", [False, True])
def test_keys_seen_are_those_of_a_mask_that_is_written_out(window, causal):
    context, heads, head_dim = 7, 3, 5
    pairs = sum(
        (not causal or j <= i) and (window is None or not causal or i - j < window)
        for i in range(context)
        for j in range(context)
    )
    if window is not None and not causal:
        pairs = context * min(window, context)
    attention = zoo.Attention(heads=heads, kv_heads=1, head_dim=head_dim, window=window)
    maps = 2 * 11 * (2 * heads * head_dim + 2 * head_dim)
    flops = mixer_flops(attention, 11, context, causal=causal)
    assert flops == pytest.approx(maps + 4 * heads * head_dim * pairs / context, abs=0.5)


def test_flops_are_twice_the_active_weights_that_multiply():
    shape = zoo.get("mixtral-8x7b")
    active = shape.params(active=True)
    multiply = active.total - active.embeddings - active.norms
    assert shape.flops_per_token() == 2 * multiply
    assert shape.flops_per_token(4096) - shape.flops_per_token() == 32 * 4 * 32 * 128 * 4096
    assert shape.flops_per_token(4096, backward=True) == 3 * shape.flops_per_token(4096)
    assert shape.flops_per_token(4096, causal=True) < shape.flops_per_token(4096)


def test_an_encoder_decoder_counts_a_token_of_each():
    shape = zoo.get("switch-c-2048")
    active = shape.params(active=True)
    tables = sum(one.buckets * one.heads for layer in shape.encoder + shape.layers for one in layer.mixers)
    # Input and output share one table, which works once, as the head.
    assert shape.flops_per_token() == 2 * (active.total - active.norms - tables)


def test_memory_to_serve_is_weights_and_caches_and_to_train_what_adam_keeps():
    shape = zoo.get("olmoe-1b-7b")
    params = shape.num_params
    served = shape.memory(context=100, sequences=3)
    assert served.weights == 2 * params
    assert served.cache == 3 * shape.cache_bytes(100)
    assert served.total == served.weights + served.cache
    trained = shape.memory(train=True)
    assert trained.total == (2 + 2 + 12) * params
    assert shape.memory(train=True, dtype="fp32").total == (4 + 4 + 8) * params
    assert shape.memory(train=True, dtype="fp32", optimizer="sgd").total == 8 * params
    assert shape.memory(dtype="mxfp4").weights == round(4.25 / 8 * params)


def test_a_dtype_or_an_optimizer_that_is_not_known_is_refused():
    shape = zoo.get("olmoe-1b-7b")
    with pytest.raises(ConfigError) as error:
        shape.memory(dtype="fp7")
    assert str(error.value) == (
        "dtype must be one of fp32, bf16, fp16, fp8, int8, mxfp4, int4, got 'fp7'. Choose one of them."
    )
    with pytest.raises(ConfigError) as error:
        shape.memory(optimizer="lion")
    assert str(error.value) == "optimizer must be one of adamw, momentum, sgd, got 'lion'. Choose one of them."


def test_parts_add_and_multiply_part_by_part():
    parts = zoo.Parts(experts=2, norms=1) + zoo.Parts(experts=3) * 2
    assert (parts.experts, parts.norms, parts.total) == (8, 1, 9)
