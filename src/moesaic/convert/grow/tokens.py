"""What a dense model's feed-forward networks read on some text: the tokens that partitions and gates are fitted to."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moesaic.convert.checkpoint.source import Source
from moesaic.convert.layout.dense import Network
from moesaic.core.errors import CheckpointError, ConfigError

Text = Sequence[str] | Tensor | Iterable[Mapping[str, Tensor]]
"""Texts, token ids (sequences, positions), or batches by name, as the model is called with."""

POSITIONS = 512
"""Most tokens of one text."""


def read_by_networks(
    source: Source,
    networks: Sequence[Network],
    text: Text,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_tokens: int | None = None,
) -> dict[str, Tensor]:
    """Run the dense model on some text, and keep what each network reads.

    Args:
        source: of the dense model; one in a folder is read into memory, and let go afterwards.
        networks: of the model.
        text: what it runs on; padding that an ``attention_mask`` names is left out.
        tokenizer: for texts; None for that of the source's folder.
        max_tokens: stop after so many, and keep no more.
    Returns:
        By path of the network, float32 (tokens, D).
    Raises:
        ConfigError: if there is no text, or none that the model can read.
    """
    model = dense_model(source)
    return run_networks(model, networks, batches(source, text, tokenizer), max_tokens=max_tokens)


@torch.no_grad()
def run_networks(
    model: PreTrainedModel,
    networks: Sequence[Network],
    inputs: Iterable[Mapping[str, Tensor]],
    *,
    max_tokens: int | None = None,
) -> dict[str, Tensor]:
    """As :func:`read_by_networks`, for a model in memory and batches by name; the model is left as it was.

    Raises:
        ConfigError: if there are no tokens.
    """
    base = model.base_model
    kept: dict[str, list[Tensor]] = {one.path: [] for one in networks}
    mask: list[Tensor | None] = [None]
    modes = {part: part.training for part in model.modules()}

    def keeps(path: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            read = cast(Tensor, args[0] if args else next(iter(kwargs.values())))
            is_valid = mask[0]
            fits = is_valid is not None and is_valid.shape == read.shape[:2]
            flat = read[is_valid.bool()] if is_valid is not None and fits else read.flatten(0, -2)
            kept[path].append(flat.float().cpu())

        return hook

    handles = [
        base.get_submodule(one.path).register_forward_pre_hook(keeps(one.path), with_kwargs=True) for one in networks
    ]
    device = next(model.parameters()).device
    seen = 0
    model.train(False)
    try:
        for batch in inputs:
            mask[0] = batch.get("attention_mask")
            # Below the head, which takes a fifth of a small model's time and says nothing here.
            base(**{name: tensor.to(device) for name, tensor in batch.items() if name != "labels"})
            seen = max(sum(len(part) for part in parts) for parts in kept.values())
            if max_tokens is not None and seen >= max_tokens:
                break
    finally:
        for handle in handles:
            handle.remove()
        for part, mode in modes.items():
            part.training = mode
    if not seen:
        raise ConfigError(
            "Some text is needed to see what the model's networks read, got none. Give a few thousand words."
        )
    return {path: torch.cat(parts)[:max_tokens] for path, parts in kept.items()}


def dense_model(source: Source) -> PreTrainedModel:
    """The model of a source, in memory."""
    if source.model is not None:
        return source.model
    kind = type(source.blueprint.model)
    return kind.from_pretrained(cast(Path, source.folder), local_files_only=True)


def batches(
    source: Source, text: Text, tokenizer: PreTrainedTokenizerBase | None = None
) -> Iterator[Mapping[str, Tensor]]:
    """Texts, ids or batches as batches by name; each text is one, so that nothing is padded.

    Raises:
        ConfigError: if there is no tokenizer for texts.
    """
    is_seq2seq = source.config.is_encoder_decoder
    if isinstance(text, str):
        text = [text]
    if isinstance(text, Tensor):
        yield from (_of_ids(ids[None], is_seq2seq) for ids in text)
        return
    for one in text:
        if isinstance(one, Mapping):
            yield one
            continue
        if isinstance(one, Tensor):
            yield _of_ids(one.view(1, -1), is_seq2seq)
            continue
        if tokenizer is None:
            tokenizer = tokenizer_of(source)
        ids = tokenizer(one, return_tensors="pt", truncation=True, max_length=_longest(source))["input_ids"]
        if ids.numel():
            yield _of_ids(cast(Tensor, ids), is_seq2seq)


def tokenizer_of(source: Source) -> PreTrainedTokenizerBase:
    """The tokenizer in a source's folder.

    Raises:
        ConfigError: if there is none.
    """
    from transformers import AutoTokenizer

    if source.folder is None:
        raise ConfigError(
            f"Texts need a tokenizer, and {source.where} is a model in memory. Pass tokenizer, or token ids."
        )
    try:
        return cast(PreTrainedTokenizerBase, AutoTokenizer.from_pretrained(source.folder, local_files_only=True))
    except Exception as error:  # transformers raises what it likes
        raise CheckpointError(
            f"{source.folder} has no readable tokenizer ({type(error).__name__}). Pass tokenizer, or token ids."
        ) from error


def _longest(source: Source) -> int:
    text = source.config.get_text_config()
    return min(POSITIONS, getattr(text, "max_position_embeddings", None) or POSITIONS)


def _of_ids(ids: Tensor, is_seq2seq: bool) -> dict[str, Tensor]:
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return batch | {"decoder_input_ids": ids} if is_seq2seq else batch
