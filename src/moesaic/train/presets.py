"""Named sets of settings, for commands that must always do the same."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moesaic.core.errors import ConfigError

PRESETS: Mapping[str, Mapping[str, Any]] = {
    # `make demo`: two models, then the report, in under six minutes on two CPU cores. What mattered for so short a run,
    # for MoE and twin alike: normalised queries and keys (qwen3), initial weights of 1/sqrt(width) size, and many short
    # sequences in many small steps.
    "demo": {
        "recipe": "mixtral",
        "data": "builtin",
        "tokenizer": "bpe:2048",
        "backbone": "qwen3",
        "width": 128,
        "layers": 4,
        "heads": 4,
        "hidden": 256,
        "num_experts": 8,
        "top_k": 2,
        "aux_coefficients": {"switch": 0.005},
        "context": 128,
        "batch_size": 8,
        "steps": 1200,
        "lr": 2e-3,
        "warmup": 60,
        "seed": 0,
        "twin": True,
        "eval_every": 240,
        "eval_tokens": 16384,
        "save_every": 600,
        "log_every": 10,
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
