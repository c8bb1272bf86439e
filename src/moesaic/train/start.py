"""Training that goes on from a model that is there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from moesaic.core.errors import ConfigError
from moesaic.train.config import TrainConfig
from moesaic.train.load import find_model, load_trained

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def first_model(config: TrainConfig) -> PreTrainedModel:
    """Read the model that ``config.init`` names, with its weights in float32; a mixture of transformers is adopted."""
    from moesaic.hf import adopt

    assert config.init is not None
    model = load_trained(Path(config.init)).model
    nn.Module.float(model)
    return adopt(model, balance=config.balance) if _is_native(model) else model


def first_kind(config: TrainConfig) -> str:
    """Whether the model that ``config.init`` names is a ``moe`` or ``dense``; check that it can be trained as asked.

    The model is built without memory and its weights are not read.

    Raises:
        CheckpointError: if there is no model.
        ConfigError: if it is an encoder-decoder, made for shorter texts, or a mixture that cannot be adopted; or if
            there is balance for a model that has none or its own.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    from moesaic.hf import is_sparse
    from moesaic.hf.native.adopt import check_adoptable
    from moesaic.hf.register import register

    assert config.init is not None
    register()
    path = find_model(Path(config.init))[0]
    described: Any = AutoConfig.from_pretrained(str(path), local_files_only=True)
    if described.is_encoder_decoder:
        raise ConfigError(
            f"init must be a model that writes on from its own text, got the encoder-decoder {described.model_type} in "
            f"{config.init}. Train that one from scratch with --backbone."
        )
    longest = getattr(described.get_text_config(), "max_position_embeddings", None)
    if longest is not None and config.context > longest:
        raise ConfigError(
            f"context must be at most {longest} for the model in {config.init}, got {config.context}. Lower context."
        )
    build: Any = AutoModelForCausalLM.from_config
    with torch.device("meta"):
        model: PreTrainedModel = build(described)
    freeze(model, config.trainable)
    if _is_native(model):
        check_adoptable(model, balance=config.balance)
        return "moe"
    if config.balance is not None:
        has = "balances its layers as its recipe says" if is_sparse(model) else "has no MoE layers"
        raise ConfigError(
            f"balance beside init is for mixtures of transformers, got balance={dict(config.balance)} and the model in "
            f"{config.init}, which {has}. Leave balance out."
        )
    return "moe" if is_sparse(model) else "dense"


def _is_native(model: nn.Module) -> bool:
    """Whether a model is a mixture of transformers, of a family that we know or not."""
    from moesaic.hf.native.adopt import is_native_mixture
    from moesaic.hf.native.found import is_interface

    return is_native_mixture(model) or any(is_interface(part) for part in model.modules())


def freeze(model: PreTrainedModel, trainable: str | None) -> None:
    """Freeze every parameter in whose name a regular expression is not found; None freezes nothing.

    Raises:
        ConfigError: if nothing would be left to train.
    """
    if trainable is None:
        return
    for name, parameter in model.named_parameters():
        if re.search(trainable, name) is None:
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        first = next(name for name, _ in model.named_parameters())
        raise ConfigError(
            f"trainable must be found in the name of a parameter that can be trained, got {trainable!r}, which is in "
            f"none. They have names such as {first}."
        )
