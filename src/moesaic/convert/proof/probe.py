"""What a model says on a small batch, so that two models can be compared: its logits, and where its routers send."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from moesaic.convert.checkpoint.blueprint import model_class
from moesaic.core.errors import ConfigError
from moesaic.hf import is_sparse, observe
from moesaic.hf.native.adopt import is_native_mixture
from moesaic.hf.watching import adopted

Batch = Mapping[str, Tensor]
SEQUENCES, POSITIONS, PADDED = 4, 32, 8


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Measured:
    """What a model said.

    Attributes:
        logits: of the tokens that are no padding.
        routes: for each MoE layer in depth order, True where the router sent a token to an expert, padding left out;
            empty for a dense model.
    """

    logits: Tensor
    routes: tuple[Tensor, ...]


def probe_batch(config: PreTrainedConfig, probe: str | Tensor | Batch) -> Batch:
    """The batch that a probe stands for.

    Args:
        config: of the model that will read it.
        probe: "random" for 4 sequences of 32 seeded random ids, the last with padding (or random images where a model
            reads those); token ids, (sequences, positions); or the model's inputs by name.
    Raises:
        ConfigError: if the probe is something else, or the model reads neither text nor images.
    """
    if isinstance(probe, Tensor):
        return _text(config, probe, torch.ones_like(probe))
    if isinstance(probe, Mapping):
        return probe
    if probe != "random":
        raise ConfigError(
            f"probe must be 'random', token ids of shape (sequences, positions), a batch by name or None, got "
            f"{probe!r}. Leave it out for a random batch."
        )
    draw = torch.Generator().manual_seed(0)
    text = config.get_text_config()
    vocab_size = getattr(text, "vocab_size", None)
    if vocab_size is not None:
        positions = min(POSITIONS, getattr(text, "max_position_embeddings", None) or POSITIONS)
        ids = torch.randint(vocab_size - 1, (SEQUENCES, positions), generator=draw)
        # The embedding of padding is often zero: before it all experts tie, and models break ties in their own ways.
        padding = getattr(text, "pad_token_id", None)
        ids += ids >= (vocab_size if padding is None else padding)
        mask = torch.ones_like(ids)
        mask[-1, positions - min(PADDED, positions // 2) :] = 0
        return _text(config, ids, mask)
    size = getattr(config, "image_size", None)
    if size is None:
        raise ConfigError(
            f"A model of type {config.model_type} reads neither text nor images, so no probe can be drawn for it. "
            "Pass its inputs as probe, or None to go without."
        )
    height, width = (size, size) if isinstance(size, int) else size
    shape = (SEQUENCES, getattr(config, "num_channels", 3), height, width)
    return {"pixel_values": torch.randn(shape, generator=draw)}


def _text(config: PreTrainedConfig, ids: Tensor, mask: Tensor) -> Batch:
    batch = {"input_ids": ids, "attention_mask": mask}
    # Of another length, so that the encoder's mask cannot be taken for the decoder's.
    return batch | {"decoder_input_ids": ids.flip(1)[:, ::2]} if config.is_encoder_decoder else batch


def num_tokens(batch: Batch) -> int:
    """Tokens, or images, of a batch that are no padding."""
    mask = batch.get("attention_mask")
    return int(next(iter(batch.values())).shape[0]) if mask is None else int(mask.sum())


@torch.no_grad()
def measure(model: PreTrainedModel, batch: Batch) -> Measured:
    """Run a model on a batch, in evaluation mode; the model is left as it was."""
    modes = {part: part.training for part in model.modules()}
    model.train(False)
    try:
        device = next(model.parameters()).device
        with _routes_of(model) as routes:
            output = model(**{name: tensor.to(device) for name, tensor in batch.items()})
    finally:
        for part, mode in modes.items():
            part.training = mode
    said = _said(output)
    mask = batch.get("attention_mask")
    if mask is not None and mask.shape == said.shape[:2] and not model.config.is_encoder_decoder:
        said = said[mask.bool().to(said.device)]
    return Measured(logits=said.to(torch.promote_types(said.dtype, torch.float32)).cpu(), routes=tuple(routes))


def _said(output: Any) -> Tensor:
    """The logits; or what a model without a head gives first."""
    given = output.logits if getattr(output, "logits", None) is not None else output.to_tuple()[0]
    said: Tensor = given[-1] if isinstance(given, tuple) else given
    return said


def measured_in(model: PreTrainedModel | Path, config: PreTrainedConfig, batch: Batch, dtype: torch.dtype) -> Measured:
    """Run what a model's weights and configuration stand for, or a folder's, on a batch in a given precision.

    The model itself may have been cast, its buffers that no file holds too: it is built again.
    """
    if isinstance(model, Path):
        wide: PreTrainedModel = model_class(config).from_pretrained(model, dtype=dtype, local_files_only=True)
    else:
        weights = {name: tensor.detach().to(dtype) for name, tensor in model.named_parameters(remove_duplicate=False)}
        wide = built(model_class(config), config, model.state_dict() | weights)
        cast(nn.Module, wide).to(model.device)
    if dtype == torch.float64 and not is_sparse(wide):
        # transformers' grouped products have no float64.
        wide.set_experts_implementation("eager")
    return measure(wide, batch)


def built(kind: type[PreTrainedModel], config: PreTrainedConfig, state: Mapping[str, Tensor]) -> PreTrainedModel:
    """A model of its own around these very tensors, in evaluation mode.

    Args:
        kind: its class.
        config: of it; copied.
        state: every tensor of its ``state_dict``, tied ones under each of their names.
    """
    model: PreTrainedModel = kind(copy.deepcopy(config))
    model.load_state_dict(state, strict=True, assign=True)
    model.tie_weights()
    model.train(False)
    return model


def difference(before: Measured, after: Measured) -> float | None:
    """The largest absolute difference of logits; None where they are not of the same things."""
    if before.logits.shape != after.logits.shape:
        return None
    return float((before.logits - after.logits).abs().max())


def equal_routes(before: Measured, after: Measured) -> float | None:
    """The share of (layer, token) that go to the same set of experts; None where the experts are not the same."""
    if not before.routes or [one.shape for one in before.routes] != [one.shape for one in after.routes]:
        return None
    equal = [(one == other).all(dim=-1) for one, other in zip(before.routes, after.routes, strict=True)]
    return float(torch.cat(equal).double().mean())


@contextmanager
def _routes_of(model: PreTrainedModel) -> Iterator[list[Tensor]]:
    """Gather the choices of each MoE layer in the forwards within: ours, or of any family of transformers."""
    routes: list[Tensor] = []
    if not is_sparse(model) and not is_native_mixture(model):
        yield routes
        return
    with adopted(model), observe(model, lambda seen: routes.append(_chosen(seen.routing))):
        yield routes


def _chosen(routing: Any) -> Tensor:
    chosen_TE = torch.zeros(routing.num_tokens, routing.num_experts, dtype=torch.bool)
    kept_N = routing.kept_N.cpu()
    chosen_TE[routing.token_N.cpu()[kept_N], routing.expert_N.cpu()[kept_N]] = True
    return chosen_TE[routing.valid_T.cpu()]
