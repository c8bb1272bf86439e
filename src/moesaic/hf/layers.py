"""The MoE layers of a model: where they stand, what they weigh, what steers them."""

from __future__ import annotations

from torch import nn

from moesaic.balance import BiasController
from moesaic.hf.block import SparseBlock
from moesaic.layer import MoELayer


def blocks(model: nn.Module) -> dict[str, SparseBlock]:
    """The sparse blocks of a model by module path, in depth order."""
    return {path: module for path, module in model.named_modules() if isinstance(module, SparseBlock)}


def moe_layers(model: nn.Module) -> dict[str, MoELayer]:
    """The MoE layers of a model by the module path of the feed-forward network that each replaces, in depth order."""
    return {path: block.moe for path, block in blocks(model).items()}


def is_sparse(model: nn.Module) -> bool:
    """Whether a model has MoE layers of ours."""
    return any(isinstance(module, SparseBlock) for module in model.modules())


def active_params(model: nn.Module) -> int:
    """Parameters that one token meets: all of the model but the experts that it does not choose."""
    idle = sum(layer.num_params - layer.num_active_params for layer in moe_layers(model).values())
    return sum(parameter.numel() for parameter in model.parameters()) - idle


def bias_controllers(model: nn.Module) -> dict[str, BiasController]:
    """A controller for each layer whose recipe balances by selection bias, by module path.

    Step each once per optimizer step, on the load of everything that the step saw.
    """
    return {
        path: rule.build(block.moe.router)  # type: ignore[arg-type]
        for path, block in blocks(model).items()
        for rule in block.rules
        if getattr(block.moe.router, "bias_E", None) is not None
    }
