"""How families say which of their layers are MoE layers: None where a family cannot say it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from transformers import PreTrainedConfig

Places = Mapping[str, tuple[int, ...]]
Values = Mapping[str, Any]


def everywhere(places: Places, config: PreTrainedConfig) -> Values | None:
    """For families in which every layer is one."""
    return {} if len(places[""]) == config.num_hidden_layers else None


def listed(places: Places, config: PreTrainedConfig) -> Values | None:
    """For families that list the dense layers (Qwen-MoE)."""
    dense = [index for index in range(config.num_hidden_layers) if index not in places[""]]
    return {"mlp_only_layers": dense, "decoder_sparse_step": 1}


def after(name: str) -> Callable[[Places, PreTrainedConfig], Values | None]:
    """For families whose first layers are dense; ``name`` is what they call how many."""

    def place(places: Places, config: PreTrainedConfig) -> Values | None:
        first = places[""][0]
        return {name: first} if places[""] == tuple(range(first, config.num_hidden_layers)) else None

    return place


def _periodic(places: Places, config: PreTrainedConfig) -> tuple[int, int] | None:
    """Period and offset, if the layers are every n-th one."""
    for period in range(1, config.num_hidden_layers + 1):
        offset = places[""][0]
        if offset < period and places[""] == tuple(range(offset, config.num_hidden_layers, period)):
            return period, offset
    return None


def jamba(places: Places, config: PreTrainedConfig) -> Values | None:
    """For Jamba: every so many layers, from an offset."""
    found = _periodic(places, config)
    return None if found is None else {"expert_layer_period": found[0], "expert_layer_offset": found[1]}


def ernie(places: Places, config: PreTrainedConfig) -> Values | None:
    """For ERNIE: every so many layers, from a first to a last one."""
    indices = places[""]
    for interval in range(1, config.num_hidden_layers + 1):
        span = range(indices[0], indices[-1] + 1)
        if indices == tuple(index for index in span if (index + 1) % interval == 0):
            return {
                "moe_layer_interval": interval,
                "moe_layer_start_index": indices[0],
                "moe_layer_end_index": indices[-1],
            }
    return None


def switch(places: Places, config: PreTrainedConfig) -> Values | None:
    """For Switch: every so many blocks, in encoder and decoder."""
    values = {}
    for stack, count in (("encoder", config.num_layers), ("decoder", config.num_decoder_layers)):
        indices = places.get(stack, ())
        # transformers takes blocks 1, 1 + step, ...; all of them where the step is 1.
        steps = [
            step
            for step in range(1, count + 1)
            if indices == tuple(index for index in range(count) if step == 1 or index % step == 1)
        ]
        fitting = [number for number in range(1, count + 1) if steps and count // number == steps[0]]
        if not fitting:
            return None
        values[f"num_sparse_{stack}_layers"] = fitting[0]
    return values
