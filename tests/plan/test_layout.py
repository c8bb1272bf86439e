"""Layouts: what divides what, what is said when it does not, and who holds which layers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesaic import zoo
from moesaic.core.errors import ConfigError
from moesaic.plan import devices
from moesaic.plan.layout import Layout


def test_expert_and_tensor_parallelism_share_devices():
    layout = Layout(devices=64, tp=2, pp=4, ep=8, fsdp=2)
    assert (layout.dp, layout.expert_copies, layout.expert_fsdp) == (8, 2, 2)


@pytest.mark.parametrize(
    ("numbers", "text"),
    [
        (
            {"devices": 12, "tp": 8},
            "devices must be a multiple of tp * pp = 8 * 1 = 8, got 12. 8 or 16 would fit.",
        ),
        (
            {"devices": 3, "tp": 2, "pp": 4},
            "devices must be a multiple of tp * pp = 2 * 4 = 8, got 3. 8 would fit.",
        ),
        (
            {"devices": 24, "tp": 2, "pp": 2, "fsdp": 4},
            "fsdp must divide the 6 data-parallel ranks that devices=24, tp=2 and pp=2 leave, got 4. "
            "These do: 1, 2, 3, 6.",
        ),
        (
            {"devices": 20, "pp": 2, "ep": 4},
            "ep must divide the 10 devices of a stage (devices=20, pp=2), got 4. These do: 1, 2, 5, 10.",
        ),
        ({"devices": 0}, "devices must be at least 1, got 0. Give 1 to do without."),
        ({"shard": "weights"}, "shard must be 'all' or 'optimizer', got 'weights'. Choose one of them."),
    ],
)
def test_devices_that_cannot_be_divided_are_refused_with_what_would_fit(numbers, text):
    with pytest.raises(ConfigError) as error:
        Layout(**numbers)
    assert str(error.value) == text


@pytest.mark.parametrize(
    ("numbers", "text"),
    [
        (
            {"devices": 24, "ep": 12},
            "ep must divide the 8 experts of a layer of mixtral-8x7b, got 12. These do: 1, 2, 4, 8.",
        ),
        (
            {"devices": 6, "pp": 6},
            "pp must divide the 32 layers of mixtral-8x7b, got 6. These do: 1, 2, 4, 8, 16, 32, or let stages differ "
            "by one layer with uneven stages.",
        ),
        (
            {"devices": 64, "pp": 64, "uneven": True},
            "pp must divide the 32 layers of mixtral-8x7b, got 64. These do: 1, 2, 4, 8, 16, 32.",
        ),
        (
            {"devices": 24, "tp": 24},
            "tp must divide the heads of every layer of mixtral-8x7b (32), got 24. These do: 1, 2, 4, 8, 16, 32.",
        ),
    ],
)
def test_a_model_that_cannot_be_cut_is_refused_with_what_would_fit(numbers, text):
    with pytest.raises(ConfigError) as error:
        Layout(**numbers).check(zoo.get("mixtral-8x7b"))
    assert str(error.value) == text


@given(pp=st.integers(1, 61))
def test_stages_hold_all_layers_in_order_and_differ_by_one_at_most(pp):
    shape = zoo.get("deepseek-v3")
    layout = Layout(devices=pp, pp=pp, uneven=True)
    layout.check(shape)
    stages = layout.stages(shape)
    assert sum((stage.layers for stage in stages), ()) == shape.layers
    sizes = [len(stage.layers) for stage in stages]
    assert max(sizes) - min(sizes) <= 1
    assert [stage.first for stage in stages] == [sum(sizes[:number]) for number in range(pp)]
    assert [stage.has_embeddings for stage in stages] == [number == 0 for number in range(pp)]
    assert [stage.has_head for stage in stages] == [number == pp - 1 for number in range(pp)]


def test_every_device_has_figures_that_make_sense():
    for name in devices.names():
        device = devices.get(name)
        assert device.source
        assert device.memory_bytes > 1e9
        assert device.flops["bf16"] > device.bandwidth > device.link_in >= device.link_out > 0
        assert device.flops.get("fp8", 1e18) > device.flops["bf16"] > device.flops.get("fp32", 0)


def test_a_device_that_is_not_known_or_has_no_such_units_is_told():
    with pytest.raises(ConfigError, match=r"got 'h1000'\. Did you mean h100-80g"):
        devices.get("h1000")
    with pytest.raises(ConfigError) as error:
        devices.get("a100-40g").peak("fp8")
    assert str(error.value) == (
        "a100-40g has no peak for fp8, only for bf16, fp16, fp32, int8. Choose one of these dtypes."
    )
