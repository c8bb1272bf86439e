"""From a model and held-out text to a routing trace and a page; what ``train`` and ``inspect`` share."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from moesaic.data import PrefixBlocks, TokenBlocks
    from moesaic.telemetry.trace import RoutingTrace
    from moesaic.train.load import Trained

# Of each domain: enough for stable shares of 8 to 64 experts, a few seconds on two cores.
TOKENS_PER_DOMAIN = 16384
_BATCH = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """What a path stands for: a trace file, or a model that is yet to read text.

    Attributes:
        path: as it was given.
        data: the text to read; None for the run's own.
        tokens: held-out tokens of each domain to read, at most.
        sample: share of the sequences to keep.
        context: tokens of a sequence; None for what the model was trained with.
    """

    path: Path
    data: str | None = None
    tokens: int = TOKENS_PER_DOMAIN
    sample: float = 1.0
    context: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class _Seen:
    """A trace, the run folders that its training left, by kind, and how its text was read."""

    trace: RoutingTrace
    runs: dict[str, Path]
    source: Source


def write_report(source: Source, html: Path, *, compare: Path | None = None) -> dict[str, Any]:
    """Trace a model on held-out text, or take a trace as it is, and draw the report.

    Args:
        source: what to look at.
        html: the page to write, or a folder, which gets ``report.html``; beside the page goes the trace that was made,
            ``report.trace.parquet``, named after it.
        compare: run folder, model folder or trace file to put beside it; a model reads the text of the first.
    Returns:
        The headline figures.
    Raises:
        CheckpointError: if there is no readable model or trace.
        ConfigError: if the model is dense, or it is a model folder and no data are named.
        BackendError: if an optional library is not installed.
    """
    from moesaic.lens import report

    seen = _traced(source)
    # A model reads what the first one has read, cut into the same pieces; a trace has read its text.
    other = None if compare is None else _traced(replace(seen.source, path=compare), is_second=True)
    html.parent.mkdir(parents=True, exist_ok=True)
    title = f"What the experts of {source.path} do"
    page = report(
        seen.trace, html, runs=_curves(seen, other), compare=None if other is None else other.trace, title=title
    )
    figures = {**headline(seen.trace), "report": str(page), "trace": str(source.path)}
    if not source.path.is_file():
        figures["trace"] = str(seen.trace.save(page.with_name(f"{page.stem}.trace.parquet")))
    return figures


def headline(trace: RoutingTrace) -> dict[str, Any]:
    """Give a trace's figures, each by layer where it has one value for each."""
    from moesaic.lens import measures

    layers = trace.metadata.layer_names
    return {
        "tokens": trace.num_tokens,
        "domains": list(measures.domains(trace)),
        "num_experts": dict(zip(layers, trace.metadata.num_experts, strict=True)),
        "load_max_over_mean": dict(zip(layers, measures.max_over_mean(trace).value.tolist(), strict=True)),
        "drop_rate": dict(zip(layers, measures.drop_rate(trace).value.tolist(), strict=True)),
        "idle_experts": len(measures.idle_experts(trace)),
    }


def _traced(source: Source, *, is_second: bool = False) -> _Seen:
    from moesaic.core.errors import ConfigError
    from moesaic.telemetry.trace import RoutingTrace
    from moesaic.train import load_trained

    if source.path.is_file():
        if source.data is not None and not is_second:
            raise ConfigError(
                f"{source.path} is a trace and has read its text already, but --data names another. Leave --data out."
            )
        return _Seen(trace=RoutingTrace.load(source.path, sample=source.sample), runs={}, source=source)
    trained = load_trained(source.path)
    run = trained.run
    longest = _longest(trained)
    context = min(source.context, longest) if source.context else run.config.context if run else min(256, longest)
    source = replace(source, data=source.data or (run.config.data if run else None), context=context)
    trace = _trace(trained, _held_out(trained, source.data, context), source)
    return _Seen(
        trace=replace(trace, metadata=replace(trace.metadata, model=str(source.path))),
        runs=_runs(trained),
        source=source,
    )


def _held_out(trained: Trained, data: str | None, context: int) -> TokenBlocks | PrefixBlocks:
    from moesaic.core.errors import ConfigError
    from moesaic.data import PrefixBlocks, TokenBlocks, load_corpus

    if data is None:
        raise ConfigError("A model folder does not say what it was trained on. Name the text with --data.")
    corpus: Any = load_corpus(data)
    # Text that is all of one piece has nothing held out; then what there is must do.
    blocks_of = PrefixBlocks if trained.model.config.is_encoder_decoder else TokenBlocks
    return blocks_of(corpus.held_out or corpus.train, trained.tokenizer, context)


def _longest(trained: Trained) -> int:
    return int(getattr(trained.model.config, "max_position_embeddings", 256))


def _trace(trained: Trained, blocks: TokenBlocks | PrefixBlocks, source: Source) -> RoutingTrace:
    import torch
    from rich.console import Console
    from rich.progress import track

    from moesaic.hf import domains, record

    batches = list(_batches(blocks, source.tokens))
    console = Console(stderr=True)
    model: Any = trained.model
    with (
        torch.inference_mode(),
        record(model, tokenizer=trained.tokenizer, domains=blocks.domains, sample=source.sample) as trace,
    ):
        shown = track(batches, "Reading held-out text", console=console, disable=not console.is_terminal)
        for domain, batch in shown:
            with domains(domain):
                model(**batch, use_cache=False)
    return trace


def _batches(blocks: TokenBlocks | PrefixBlocks, tokens: int) -> Iterator[tuple[int, dict[str, torch.Tensor]]]:
    """Evenly spread blocks of each domain, in batches of one domain."""
    import torch

    for index in range(len(blocks.domains)):
        mine = [block for block in range(len(blocks)) if int(blocks.domain_B[block]) == index]
        count = min(len(mine), max(1, tokens // blocks.block_size))
        chosen = [mine[position * len(mine) // count] for position in range(count)] if mine else []
        for start in range(0, count if mine else 0, _BATCH):
            items = [blocks[block] for block in chosen[start : start + _BATCH]]
            # An encoder-decoder makes its decoder's input from the labels; others would work out a loss for nothing.
            unread = {"domain"} if "decoder_attention_mask" in items[0] else {"domain", "labels"}
            yield index, {name: torch.stack([it[name] for it in items]) for name in items[0] if name not in unread}


def _runs(trained: Trained) -> dict[str, Path]:
    if trained.run is None:
        return {}
    members = trained.run.members.items()
    return {kind: folder for kind, folder in members if (folder / "history.jsonl").is_file()}


def _curves(seen: _Seen, other: _Seen | None) -> dict[str, str | Path]:
    """Run folders by name: what a run is, or, of two, where it is; of the second the dense twin is left out."""
    words = {"moe": "MoE", "dense": "dense twin"}
    if other is None or not other.runs:
        return {words[kind]: folder for kind, folder in seen.runs.items()}
    one, two = seen.source.path, other.source.path
    first, second = (one.name, two.name) if one.name != two.name else (str(one), f"{two} (second)")
    curves: dict[str, str | Path] = {
        first if kind == "moe" else f"{first}, {words[kind]}": folder for kind, folder in seen.runs.items()
    }
    return curves | {second: other.runs["moe"]} if "moe" in other.runs else curves
