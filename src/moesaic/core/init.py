"""How fresh weights are drawn. Modules take these as values."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from moesaic.core.errors import ConfigError

Init = Callable[[Tensor, int], None]
"""Fills a weight in place, given the weight and its fan-in (inputs summed per output)."""


def normal(std: float) -> Init:
    """Draw from a normal distribution of fixed width, as most language models do.

    Raises:
        ConfigError: if ``std`` is negative.
    """
    if std < 0:
        raise ConfigError(f"init_std must be at least 0, got {std}. Most language models use 0.02.")

    def draw(weight: Tensor, _fan_in: int) -> None:
        # Without memory there is nothing to draw, and PyTorch takes its time to find out.
        if not weight.is_meta:
            nn.init.normal_(weight, std=std)

    return draw


def scaled_by_fan_in(scale: float = 1.0) -> Init:
    """Draw from a normal of variance ``scale / fan_in``, cut off at two standard deviations (Switch, section 2.4)."""

    def draw(weight: Tensor, fan_in: int) -> None:
        std = math.sqrt(scale / fan_in)
        nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)

    return draw


def truncated_normal(std: float, *, deviations: float) -> Init:
    """Draw from a normal of width ``std`` before it is cut off at this many standard deviations (OLMoE: 3)."""

    def draw(weight: Tensor, _fan_in: int) -> None:
        nn.init.trunc_normal_(weight, std=std, a=-deviations * std, b=deviations * std)

    return draw


def zeros(weight: Tensor, _fan_in: int) -> None:
    """Start at 0, as the gates of Shazeer 2017 do (appendix A)."""
    nn.init.zeros_(weight)


def orthogonal(gain: float = 1.0) -> Init:
    """Draw rows, or columns if they are fewer, at right angles and of length ``gain``."""

    @torch.no_grad()
    def draw(weight: Tensor, _fan_in: int) -> None:
        # In float32 at least: torch has no QR decomposition of lower precision on a CPU.
        wide = torch.empty_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
        weight.copy_(nn.init.orthogonal_(wide, gain=gain))

    return draw
