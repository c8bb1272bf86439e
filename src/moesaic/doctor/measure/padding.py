"""Is padding counted? The same sequences are filled up with different tokens behind a mask; nothing may change."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from moesaic.core.routing import Routing
from moesaic.data.blocks import IGNORED
from moesaic.doctor.measure.layers import Batch, Heard, run, undisturbed
from moesaic.doctor.vitals import Padding
from moesaic.hf.scope import listening

# Weights that differ by less are rounding: the same sums in another order.
_ROUNDING = 1e-4
_TEXT = {"input_ids", "attention_mask", "labels", "domain", "decoder_input_ids", "decoder_attention_mask"}


def examine_padding(model: nn.Module, batch: Batch) -> Padding:
    """Cut the sequences of a batch to different lengths and fill them up, once with one token and once with many.

    Args:
        model: with MoE layers of ours, or adopted ones.
        batch: ``input_ids`` and ``attention_mask`` of two sequences or more.
    """
    cut, filled = _filled(batch)
    with undisturbed(model, training=False), torch.no_grad():
        plain, plain_losses, of_batch = _heard(model, cut)
        other, other_losses, _ = _heard(model, filled)
    mask = cut["attention_mask"]
    real = int((mask != 0).sum())
    counted, rerouted = {}, {}
    before: float | None = None
    for layer, one in plain.items():
        # Decoders and routers that read part of the tokens have a mask of their own.
        reads_batch = layer in of_batch and one.num_tokens == mask.numel()
        if reads_batch and int(one.valid_T.sum()) > real:
            counted[layer] = int(one.valid_T.sum()) - real
        known_T = mask.reshape(-1) != 0 if reads_batch else one.valid_T
        rerouted[layer] = _changed(_weights(one), _weights(other[layer]), known_T)
        if before is None:
            before = _changed(one.logits_TE.double(), other[layer].logits_TE.double(), known_T)
    losses = {name: _change(value, other_losses[name]) for name, value in plain_losses.items()}
    worst: dict[str, float] = {}
    for (name, _layer), change in losses.items():
        worst[name] = max(worst.get(name, 0.0), change)
    return Padding(
        num_tokens=real,
        num_padding=mask.numel() - real,
        before=before or 0.0,
        counted=counted,
        rerouted=rerouted,
        losses=worst,
    )


def _filled(batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The batch with its sequences cut to falling lengths, with two kinds of padding."""
    ids_BP, mask_BP = batch["input_ids"], batch["attention_mask"].clone()
    num_sequences, num_positions = ids_BP.shape
    for row in range(num_sequences):
        keep = max(1, num_positions * (row + 1) // (num_sequences + 1))
        mask_BP[row, keep:] = 0
    hidden_BP = mask_BP == 0
    generator = torch.Generator().manual_seed(0)
    # Tokens of the text itself: every one of them has an embedding that was trained.
    known = torch.unique(ids_BP[~hidden_BP]).cpu()
    drawn_BP = known[torch.randint(len(known), ids_BP.shape, generator=generator)].to(ids_BP)
    same = {**batch, "attention_mask": mask_BP}
    if "labels" in batch and batch["labels"].shape == ids_BP.shape and "decoder_attention_mask" not in batch:
        same["labels"] = batch["labels"].masked_fill(hidden_BP, IGNORED)
    first = ids_BP.masked_fill(hidden_BP, int(known[0]))
    return {**same, "input_ids": first}, {**same, "input_ids": torch.where(hidden_BP, drawn_BP, ids_BP)}


def _heard(model: nn.Module, batch: Batch) -> tuple[dict[str, Routing], dict[tuple[str, str], float], set[str]]:
    """Routings and balance losses by layer, and the layers of the stack that reads the batch's tokens."""
    heard = Heard(model, balance=True)
    with listening(heard):
        run(model, batch)
    routings = {layer: reports[0].routing for layer, reports in heard.reports.items() if reports}
    losses = {
        (name, layer): float(loss)
        for layer, reports in heard.reports.items()
        for report in reports
        for name, loss in report.losses.items()
    }
    of_batch = {
        layer
        for layer, reports in heard.reports.items()
        if reports and reports[0].frame.input_ids is not None
        if torch.equal(reports[0].frame.input_ids, batch["input_ids"])
    }
    return routings, losses, of_batch


def _changed(before_TE: Tensor, after_TE: Tensor, known_T: Tensor) -> float:
    """Share of the known tokens whose numbers differ by more than rounding."""
    before_TE, after_TE = (one.nan_to_num(0.0, 0.0, 0.0) for one in (before_TE, after_TE))
    scale = float(before_TE.abs().max())
    differ_T = ((before_TE - after_TE).abs() > _ROUNDING * (scale or 1.0)).any(dim=-1)[known_T]
    return float(differ_T.double().mean()) if len(differ_T) else 0.0


def _weights(routing: Routing) -> Tensor:
    """Each token's weights over experts, rows that were dropped counting as 0."""
    weight_TE = torch.zeros(
        routing.num_tokens, routing.num_experts, dtype=torch.float64, device=routing.weight_N.device
    )
    kept_N = routing.kept_N
    weight_N = routing.weight_N[kept_N].double()
    return weight_TE.index_put((routing.token_N[kept_N], routing.expert_N[kept_N]), weight_N, accumulate=True)


def _change(before: float, after: float) -> float:
    size = max(abs(before), abs(after))
    return abs(after - before) / size if size else 0.0


def lengths(batch: Mapping[str, Tensor]) -> bool:
    """Whether a batch can be filled up: token ids and their mask, of two sequences or more, and no image among them."""
    if not set(batch) <= _TEXT:
        return False
    ids = batch.get("input_ids")
    return (
        isinstance(ids, Tensor) and ids.ndim == 2 and len(ids) > 1 and isinstance(batch.get("attention_mask"), Tensor)
    )
