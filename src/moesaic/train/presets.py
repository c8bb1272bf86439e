"""Named sets of settings, for commands that must always do the same."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moesaic.core.errors import ConfigError

PRESETS: Mapping[str, Mapping[str, Any]] = {
    # `make demo`: two models, then the report, in under six minutes on two CPU cores. What mattered for so short a run:
    # for both models, normalised queries and keys (qwen3), initial weights of about 1/sqrt(width), a byte-pair
    # tokenizer and short sequences; for the MoE, 2048 tokens a step, which leave 512 to each expert: with half as many
    # it stayed behind the twin for 900 steps of 1200.
    "demo": {
        "recipe": "mixtral",
        "data": "builtin",
        "tokenizer": "bpe:1024",
        "backbone": "qwen3",
        "width": 128,
        "layers": 4,
        "heads": 4,
        "hidden": 256,
        "num_experts": 8,
        "top_k": 2,
        "aux_coefficients": {"switch": 0.005},
        "context": 128,
        "batch_size": 16,
        "steps": 800,
        "lr": 2.5e-3,
        "warmup": 40,
        "seed": 0,
        "twin": True,
        "eval_every": 160,
        "eval_tokens": 16384,
        "save_every": 400,
        "log_every": 8,
    },
}


def preset(name: str) -> dict[str, Any]:
    """Give the settings of a preset.

    Raises:
        ConfigError: if there is no such preset.
    """
    if name not in PRESETS:
        raise ConfigError(f"preset must be one of {', '.join(PRESETS)}, got {name!r}. Pick one of them.")
    return dict(PRESETS[name])
