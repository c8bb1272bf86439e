"""Choose experts by what a routing trace says of them."""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt

from moesaic.core.errors import ConfigError
from moesaic.telemetry.trace import RoutingTrace


def hot_experts(
    trace: RoutingTrace,
    *,
    top_p: float | None = None,
    share: float | None = None,
    score: Literal["weight", "frequency"] = "weight",
) -> dict[int, list[int]]:
    """The experts of each layer that some text uses most, for :func:`lora` and :func:`train_only`.

    Each layer's scores are divided by their own sum; what another layer does cannot crowd its experts out.

    Args:
        trace: recorded on text like that to train on. Rows that capacity dropped do not count.
        top_p: as few experts as together have this share of their layer's score. ESFT takes 0.1 with "weight" and 0.2
            with "frequency".
        share: this share of the layer's experts, rounded up, whatever their score.
        score: "weight" is the mean over sequences of the expert's mean weight (ESFT-Gate); "frequency" the mean over
            sequences of the share of choices that it gets (ESFT-Token).
    Returns:
        Experts by index of the MoE layer, lowest index first.
    Raises:
        ConfigError: if not just one of ``top_p`` and ``share`` is given, in ``(0, 1]``; or a layer has no rows.

    Source: Wang et al. 2024, "Let the Expert Stick to His Last: Expert-Specialized Fine-Tuning for Sparse
    Architectural Large Language Models", equations 6 to 8. The published script divides by sums over layers, which
    does not give the published choices.
    """
    given = {name: value for name, value in (("top_p", top_p), ("share", share)) if value is not None}
    if len(given) != 1 or not all(0 < value <= 1 for value in given.values()):
        raise ConfigError(
            f"hot_experts needs one of top_p and share, above 0 and at most 1, got top_p={top_p} and share={share}. "
            "Start with top_p=0.2."
        )
    if score not in ("weight", "frequency"):
        raise ConfigError(f"score must be 'weight' or 'frequency', got {score!r}. ESFT has both.")
    chosen: dict[int, list[int]] = {}
    for layer, num_experts in enumerate(trace.metadata.num_experts):
        score_E = _scores(trace, layer, num_experts, score)
        best = np.argsort(-score_E, kind="stable")  # ties go to the lowest index
        if share is not None:
            count = int(np.ceil(round(share * num_experts, 9)))
        else:
            assert top_p is not None
            # Sums of shares end a little beside 1.
            count = 1 + int(np.argmax(np.cumsum(score_E[best]) >= min(top_p, 1.0) - 1e-9))
        chosen[layer] = sorted(int(expert) for expert in best[:count])
    return chosen


def _scores(trace: RoutingTrace, layer: int, num_experts: int, score: str) -> npt.NDArray[np.float64]:
    """Each expert's share of one layer."""
    rows = (trace.layer == layer) & trace.kept
    if not rows.any():
        raise ConfigError(
            f"The trace has no kept rows of layer {layer}, {trace.metadata.layer_names[layer]}, so none of its "
            f"{num_experts} experts can be preferred. Record text that this layer sees."
        )
    sequences, sequence = np.unique(trace.sequence, return_inverse=True)
    if score == "weight":
        weight = trace.weight[rows].astype(np.float64)
        tokens = np.unique(np.stack([sequence, trace.position]), axis=1)[0]
        length = np.bincount(tokens)
    else:
        weight = np.ones(int(rows.sum()))
        length = np.bincount(sequence[rows], minlength=len(sequences))
    # Every sequence counts alike, however long.
    score_E = np.bincount(trace.expert[rows], weight / length[sequence[rows]], minlength=num_experts)
    total = score_E.sum()
    if total <= 0:
        raise ConfigError(
            f"The weights of layer {layer}, {trace.metadata.layer_names[layer]}, sum to {total:.3g}, so its experts "
            "cannot be ranked by them. Use score='frequency'."
        )
    return np.asarray(score_E / total)
