"""Compare what was made with what it was made from, and refuse it if it is further away than was promised."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from moesaic.convert.checkpoint.source import Source
from moesaic.convert.proof import probe as probes
from moesaic.convert.proof.receipt import Receipt
from moesaic.core.errors import CheckpointError

MOST_IN_FLOAT64 = 2 * 10**9
"""Parameters up to which a promise is checked in float64.

Rounding alone moves the logits of a small real model by 2e-4 in float32 (SmolLM2-135M, logits up to 34): float64 tells
a fault from that.
"""


def compared(
    receipt: Receipt,
    source: Source,
    made: PreTrainedModel | Path,
    config: PreTrainedConfig,
    batch: probes.Batch | None,
) -> Receipt:
    """Run both models on the probe, one after the other, and add to the receipt how far they are apart.

    Args:
        receipt: of the conversion.
        source: what was converted.
        made: what came out, or its folder.
        config: of that.
        batch: what both read; None to compare nothing.
    Raises:
        CheckpointError: if they are further apart than was promised.
    """
    original = source.model if source.model is not None else source.folder
    if batch is None or original is None:
        return receipt
    before, dtype = _before(receipt, source, original, batch)
    after = probes.measured_in(made, config, batch, dtype)
    gap = probes.difference(before, after)
    largest = float(before.logits.abs().max())
    if receipt.promised is not None and not (gap is not None and gap <= receipt.promised * max(1.0, largest)):
        raise CheckpointError(
            f"{receipt.method} promises logits within {receipt.promised:.0e} of the source's (times the largest, "
            f"{largest:.3g}, if that is above 1), and they differ by {gap} on {probes.num_tokens(batch)} tokens. "
            "Nothing was written: this is a fault of Moesaic, or the source computes what its configuration does not "
            "say."
        )
    return replace(
        receipt,
        largest_logit_difference=gap,
        largest_logit=largest,
        equal_routes=probes.equal_routes(before, after),
        probe_tokens=probes.num_tokens(batch),
        probe_dtype=str(dtype).removeprefix("torch."),
    )


def _before(
    receipt: Receipt, source: Source, original: PreTrainedModel | Path, batch: probes.Batch
) -> tuple[probes.Measured, torch.dtype]:
    """What the source says, and in which precision: float64 to check a promise, where the model runs in it."""
    is_small = max(source.blueprint.num_params, receipt.num_params) <= MOST_IN_FLOAT64
    if receipt.promised is not None and is_small:
        try:
            measured = probes.measured_in(original, source.config, batch, torch.float64)
        except RuntimeError:
            measured = None  # some families mix in float32 of their own
        if measured is not None and bool(measured.logits.isfinite().all()):
            return measured, torch.float64
    return probes.measured_in(original, source.config, batch, torch.float32), torch.float32
