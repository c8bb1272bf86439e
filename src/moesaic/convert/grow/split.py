"""Splitting: a dense model's networks are cut into experts, which add nothing to its parameters but a gate."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moesaic.convert.checkpoint.source import Source, open_source
from moesaic.convert.grow.cut import Cut, GateKind, Method, Splitting, cut_network, expert_width
from moesaic.convert.grow.target import rounding_of, target
from moesaic.convert.grow.tokens import Text, read_by_networks
from moesaic.convert.layout.dense import Network
from moesaic.convert.progress import tracked
from moesaic.convert.proof.probe import Batch
from moesaic.convert.run import Converted, convert
from moesaic.convert.steps import Change
from moesaic.convert.weights.stack import DenseFFN
from moesaic.core.errors import ConfigError


def split(
    source: str | Path | PreTrainedModel,
    recipe: str = "mixtral",
    *,
    num_experts: int | None = None,
    top_k: int | None = None,
    layers: str | list[int] = "all",
    method: Method | None = None,
    gate: GateKind | None = None,
    scale: Literal["fit", "slices", "published"] | float | None = None,
    text: Text | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_tokens: int = 2048,
    rows: Literal["up", "gate"] = "up",
    metric: Literal["l2", "cos"] = "l2",
    active_share: float = 0.1,
    overlap: bool = False,
    hidden: int | None = None,
    spread: float = 0.02,
    seed: int = 0,
    out: str | Path | None = None,
    probe: str | Tensor | Batch | None = "random",
    tolerance: float = 1e-5,
    shard_bytes: int | None = None,
    **options: Any,
) -> Converted:
    """Turn a dense model into a mixture whose experts are slices of its feed-forward networks.

    Each neuron goes to one expert (with ``overlap``, to as many as want it), so that all experts together are the dense
    network: with ``gate="zero"``, K = E and ``scale="slices"`` the function is kept. With fewer, part of the network's
    output is missing, and training has to make up for it; the receipt tells the gap.

    Where the recipe has an expert that every token visits, the neurons that matter most become that one.

    Args:
        source: a folder, or a model in memory, which stays as it is.
        recipe: one of :func:`moesaic.recipes.names` with experts of the kind that the model has.
        num_experts: E; the network's neurons are cut evenly. None for the recipe's number.
        top_k: K; None for the recipe's number.
        layers: see :func:`moesaic.sparsify`.
        method: "random"; "cluster", neurons with like rows; "coactivation", neurons that are active together;
            "importance", neurons that matter to the tokens of one cluster. The last two need ``text``. None for
            "coactivation" where there is text, else "random".
        gate: how the router starts. "zero": all experts alike. "random": as the recipe draws it. "centers": each
            expert's row is the mean of its neurons'. "from-data": the linear map that best predicts how much each
            expert has to say. "moefication": trained to tell which experts are active. The last two need ``text``. None
            for "from-data" where there is text, else "centers".
        scale: what a token's weights shall add up to. "slices": K, so that each chosen slice counts once.
            "published": E / K, as LLaMA-MoE's released models. "fit": what comes closest to the dense network's output
            on ``text``. None for "fit" where there is text, else "slices".
        text: texts, token ids or batches that the dense model is run on.
        tokenizer: for texts; None for that of the source's folder.
        max_tokens: most tokens of ``text`` that are used; all layers' are in memory at once.
        rows: which rows "cluster" compares.
        metric: how "cluster" compares them: by distance, or by the cosine to the mean.
        active_share: which part of the neurons "coactivation" counts as active on a token.
        overlap: let experts of "importance" share neurons; others are then in no expert.
        hidden: neurons of each expert with ``overlap``; None for F / E.
        spread: standard deviation over experts of the logits of a gate that is fitted; small, since slices of one
            network count alike, whoever is chosen.
        seed: draws partitions and gates.
        out: folder to write; None for a model in memory.
        probe: see :func:`~moesaic.convert.run.convert`.
        tolerance: largest difference of logits where the function is kept; see :func:`moesaic.upcycle`.
        shard_bytes: see :func:`~moesaic.convert.run.convert`.
        **options: the recipe's options, and ``aux_coefficients`` and ``balance`` of :func:`moesaic.sparsify`.
    Returns:
        The model or folder, and the receipt.
    Raises:
        ConfigError: if the model or an option is not usable, or text is needed and there is none.
        CheckpointError: if the function was to be kept and is not, or the source is damaged.

    Source: Zhu et al. 2024, "LLaMA-MoE"; Zhang et al. 2022, "MoEfication".
    """
    opened = open_source(source)
    has_text = text is not None
    how = Splitting(
        method=method or ("coactivation" if has_text else "random"),
        gate=gate or ("from-data" if has_text else "centers"),
        scale=scale if scale is not None else ("fit" if has_text else "slices"),
        rows=rows,
        cosine=metric == "cos",
        active_share=active_share,
        overlap=overlap,
        hidden=hidden,
        spread=spread,
    )
    numbers = {"num_experts": num_experts, "top_k": top_k, "layers": layers, "seed": seed, **options}
    reading = Reading(text=text, tokenizer=tokenizer, max_tokens=max_tokens)
    change = splitting(opened, recipe, how, reading, tolerance=tolerance, **numbers)
    return convert(opened, change, out, probe=probe, shard_bytes=shard_bytes)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Reading:
    """The text that a split is fitted to; see :func:`split`."""

    text: Text | None = None
    tokenizer: PreTrainedTokenizerBase | None = None
    max_tokens: int = 2048


def splitting(
    source: Source,
    recipe: str,
    how: Splitting,
    reading: Reading,
    *,
    tolerance: float = 1e-5,
    **numbers: Any,
) -> Change:
    """The change that :func:`split` makes. Each network is read once to be cut, one after the other.

    Args:
        source: dense.
        recipe: of the layers.
        how: they are cut.
        reading: what they are fitted to.
        tolerance: see :func:`split`.
        **numbers: of :func:`~moesaic.convert.grow.target.target`.
    Raises:
        ConfigError: see :func:`split`.
    """
    if reading.text is None and how.text_wanted_by is not None:
        raise ConfigError(
            f"{how.text_wanted_by} needs text to see which neurons are active when, got none. Pass text=[...], some "
            "thousand words of the model's use."
        )
    first = target(source, recipe, hidden=lambda _: 1, **numbers)
    widths = {room.network.path: expert_width(room, how) for room in first.rooms}
    made = target(source, recipe, hidden=lambda network: widths[network.path], **numbers)
    read: dict[str, Tensor] = {}
    if reading.text is not None:
        found = [room.network for room in made.rooms]
        read = read_by_networks(source, found, reading.text, tokenizer=reading.tokenizer, max_tokens=reading.max_tokens)
    cuts = [
        cut_network(room, how, _weights(source, room.network), read.pop(room.network.path, None))
        for room in tracked(made.rooms, "cutting", len(made.rooms))
    ]
    rounding = max(rounding_of(cut.factor, source, cut.room.network) for cut in cuts)
    return Change(
        method="split",
        config=made.config,
        steps=tuple(cut.room.step(cut.fill, cut.move, cut.router) for cut in cuts),
        notes=_notes(recipe, how, cuts),
        promises=tolerance * rounding if all(cut.keeps for cut in cuts) and rounding < math.inf else None,
    )


def _weights(source: Source, network: Network) -> DenseFFN:
    return network.read({name: source.read(name) for name in network.names})


def _notes(recipe: str, how: Splitting, cuts: list[Cut]) -> tuple[str, ...]:
    counts = sorted({len(cut.neuron_EF) for cut in cuts})
    notes = [
        f"recipe {recipe}: {' or '.join(map(str, counts))} experts in {len(cuts)} layers, slices of the dense network, "
        f"method {how.method}, gate {how.gate}, scale {how.scale}"
    ]
    shared = [len(cut.shared_F) for cut in cuts if cut.shared_F is not None]
    if shared:
        notes.append(f"the {shared[0]} neurons of each network that matter most are the shared expert")
    if how.overlap:
        idle = sum(cut.num_idle for cut in cuts) / sum(cut.room.network.hidden for cut in cuts)
        notes.append(f"{idle:.1%} of the neurons are in no expert")
    factors = [cut.factor for cut in cuts]
    notes.append(f"routed experts' outputs times {min(factors):.4g} to {max(factors):.4g}")
    missing = [cut.missing for cut in cuts if cut.missing is not None]
    if missing:
        notes.append(
            f"on held-out tokens {1 - sum(missing) / len(missing):.1%} of the dense networks' output is there, "
            f"{1 - max(missing):.1%} in the worst layer"
        )
    return tuple(notes)
