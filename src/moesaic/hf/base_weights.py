"""Low-rank experts change a network that is there already: give them the dense model's own."""

from __future__ import annotations

from typing import cast

import torch
from torch import nn

from moesaic.core.errors import ConfigError
from moesaic.experts import LoRAExperts


def load_base(dense: nn.Module, moe: nn.Module, path: str) -> None:
    """Copy a gated feed-forward network into the low-rank experts of a layer, if it has any.

    Args:
        dense: the network that the layer takes the place of.
        moe: the layer.
        path: where it stands.
    Raises:
        ConfigError: if the network is not gated with three maps named as Llama's, has biases, or differs from the
            layer in hidden size or activation.
    """
    for experts in [part for part in moe.modules() if isinstance(part, LoRAExperts)]:
        maps = {name: getattr(dense, f"{name}_proj", None) for name in ("gate", "up", "down")}
        if not all(isinstance(linear, nn.Linear) and linear.bias is None for linear in maps.values()):
            raise ConfigError(
                "Low-rank experts start from a gated network without biases, with the maps gate_proj, up_proj and "
                f"down_proj, got {type(dense).__name__} at {path}. Start from a model like Llama or Qwen3."
            )
        weights = {name: cast(nn.Linear, linear).weight.T for name, linear in maps.items()}
        hidden = experts.base.down_FD.shape[0]
        if weights["down"].shape[0] != hidden:
            raise ConfigError(
                f"Low-rank experts have the hidden size of the network that they change, {weights['down'].shape[0]} "
                f"at {path}, got hidden={hidden}. Leave hidden out."
            )
        _check_activation(dense, experts, path)
        experts.load_base(weights["gate"], weights["up"], weights["down"])


def _check_activation(dense: nn.Module, experts: LoRAExperts, path: str) -> None:
    """Compare by value: transformers has classes of its own for what are the same functions."""
    act = getattr(dense, "act_fn", None)
    x = torch.linspace(-4, 4, 33, device="cpu")
    if act is None or not torch.allclose(act(x), experts.activation.forward(x), atol=1e-6):
        raise ConfigError(
            f"Low-rank experts need the activation of the network that they change, {type(act).__name__} at {path}, "
            f"got {experts.activation.name}. Pass the recipe's option activation."
        )
