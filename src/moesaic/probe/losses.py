"""The loss of a model on held-out text, text by text, as it is and with experts changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import nn

from moesaic.core.errors import ConfigError
from moesaic.hf.intervening import intervene
from moesaic.hf.interventions import Intervention, SwitchOff
from moesaic.hf.layers import moe_layers
from moesaic.hf.scope import domains
from moesaic.hf.watching import Seen, adopted, observe
from moesaic.probe.text import NO_TEXT, HeldOut

Trial = tuple[Intervention, ...]
"""Interventions that are made together."""

Steps = Callable[[int, int], None]
"""Told how much of the work is done, and how much there is."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Losses:
    """What a model loses on each text, as it is and under each trial.

    Attributes:
        layer_names: of the MoE layers, in depth order.
        num_experts: of each.
        nats: of each text, as the model is (texts,).
        changes: by how much each trial changes that (trials, texts).
        rows: rows that each expert serves of each text's predicted tokens, for each layer (texts, E).
        tokens: predicted of each text (texts,).
    """

    layer_names: tuple[str, ...]
    num_experts: tuple[int, ...]
    nats: npt.NDArray[np.float64]
    changes: npt.NDArray[np.float64]
    rows: tuple[npt.NDArray[np.int64], ...]
    tokens: npt.NDArray[np.int64]


@torch.no_grad()
def losses(
    model: nn.Module,
    text: HeldOut,
    trials: Callable[[tuple[npt.NDArray[np.int64], ...]], Sequence[Trial]],
    *,
    batch_size: int = 8,
    step: Steps = lambda _done, _all: None,
) -> Losses:
    """Run a model over text as it is, and once more for each trial, the same batches each time.

    A batch in which no token visits an expert that a trial switches off is not run again: nothing would change.

    Args:
        model: with MoE layers, in any mode; it is run in evaluation and left as it came.
        text: to predict.
        trials: from the rows that each expert serves of each text, a (texts, E) for each layer, to what is tried.
        batch_size: blocks of one forward.
        step: called after each forward.
    Raises:
        ConfigError: if the model has no MoE layers, a trial cannot be made, or the model predicts no next token.
    """
    with adopted(model), in_evaluation(model):
        layers = moe_layers(model)
        batches = list(text.batches(batch_size))
        counts = [np.zeros((text.num_texts, layer.num_experts), dtype=np.int64) for layer in layers.values()]
        touched: list[list[npt.NDArray[np.bool_]]] = []
        nats = np.zeros(text.num_texts)
        plain = []
        for index, batch in enumerate(batches):
            seen: dict[int, npt.NDArray[np.int64]] = {}
            with observe(model, lambda one, batch=batch, seen=seen: _count(one, batch, counts, seen)):  # type: ignore[misc]
                plain.append(nats_of(model, batch))
            nats += plain[-1]
            touched.append([seen.get(layer, np.zeros(0)) > 0 for layer in range(len(layers))])
            step(index + 1, len(batches))
        tried = list(trials(tuple(counts)))
        names = tuple(layers)
        total = len(batches) * (1 + len(tried))
        changes = np.zeros((len(tried), text.num_texts))
        for which, trial in enumerate(tried):
            with intervene(model, *trial):
                for index, batch in enumerate(batches):
                    if _matters(trial, names, touched[index]):
                        changes[which] += nats_of(model, batch) - plain[index]
                    step(len(batches) * (1 + which) + index + 1, total)
    return Losses(
        layer_names=names,
        num_experts=tuple(one.shape[1] for one in counts),
        nats=nats,
        changes=changes,
        rows=tuple(counts),
        tokens=text.tokens_of_text,
    )


def nats_of(model: Any, batch: HeldOut) -> npt.NDArray[np.float64]:
    """The nats that a model loses on each text of a batch (texts,).

    Raises:
        ConfigError: if it gives no logits of the next token.
    """
    device = next(model.parameters()).device
    ids_BP = batch.input_ids_BP.to(device)
    with domains(_domain_of_blocks(batch)):
        output = model(input_ids=ids_BP, attention_mask=batch.valid_BP.to(device).long(), use_cache=False)
    logits = getattr(output, "logits", None)
    if logits is None or logits.ndim != 3 or logits.shape[:2] != ids_BP.shape:
        raise ConfigError(
            f"A change of loss needs a causal language model, whose logits are (blocks, positions, words), got "
            f"{type(model).__name__}. Give one such as LlamaForCausalLM."
        )
    nats_BP = F.cross_entropy(logits[:, :-1].float().transpose(1, 2), ids_BP[:, 1:], reduction="none").double().cpu()
    text_BP = batch.text_BP[:, 1:]
    real_BP = text_BP != NO_TEXT
    sums = torch.zeros(batch.num_texts, dtype=torch.float64)
    return np.asarray(sums.index_add_(0, text_BP[real_BP], nats_BP[real_BP]).numpy())


@contextmanager
def in_evaluation(model: nn.Module) -> Iterator[None]:
    """Run a model in evaluation mode, and put each part back into the mode that it was in."""
    training = {part: part.training for part in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for part, was in training.items():
            part.training = was


def _domain_of_blocks(batch: HeldOut) -> torch.Tensor:
    """For routers that ask for it: the domain of each block's last text."""
    last_B = batch.text_BP.max(dim=1).values.clamp_min(0)
    return torch.tensor(batch.domain_of_text)[last_B]


def _count(
    one: Seen,
    batch: HeldOut,
    counts: list[npt.NDArray[np.int64]],
    seen: dict[int, npt.NDArray[np.int64]],
) -> None:
    """Add up who serves which text, and who serves anybody; a token's rows serve the text that it predicts."""
    routing = one.routing
    load = routing.load_E.cpu().numpy()
    seen[one.index] = seen.get(one.index, np.zeros_like(load)) + load
    if routing.num_tokens != batch.text_BP.numel():
        return
    # A position predicts the token after it.
    text_BP = torch.full_like(batch.text_BP, NO_TEXT)
    text_BP[:, :-1] = batch.text_BP[:, 1:]
    text_N = text_BP.reshape(-1)[routing.token_N.cpu()]
    expert_N, real_N = routing.expert_N.cpu(), (text_N != NO_TEXT) & routing.kept_N.cpu()
    np.add.at(counts[one.index], (text_N[real_N].numpy(), expert_N[real_N].numpy()), 1)


def _matters(trial: Trial, names: tuple[str, ...], touched: list[npt.NDArray[np.bool_]]) -> bool:
    """Whether a trial can change anything in a batch, by whom its tokens visit."""
    for one in trial:
        if not isinstance(one, SwitchOff):
            return True
        layer = names.index(one.layer) if isinstance(one.layer, str) else one.layer
        if not len(touched[layer]) or any(touched[layer][expert] for expert in one.experts):
            return True
    return False
