"""From a model and held-out text to a routing trace and a page; what ``train`` and ``inspect`` share."""

from __future__ import annotations

from collections.abc import Iterator
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


def write_report(path: Path, *, data: str | None, html: Path, tokens: int = TOKENS_PER_DOMAIN) -> dict[str, Any]:
    """Trace a run's model on held-out text and draw the report.

    Args:
        path: run folder, or model folder.
        data: the text; None for the run's own.
        html: the page to write, or a folder, which gets ``report.html``; beside the page goes
            ``report.trace.parquet``, named after it.
        tokens: held-out tokens of each domain to read, at most.
    Returns:
        The headline figures.
    Raises:
        CheckpointError: if there is no readable model.
        ConfigError: if the model is dense, or it is a model folder and no data are named.
        BackendError: if an optional library is not installed.
    """
    from moesaic.lens import report
    from moesaic.train import load_trained

    trained = load_trained(path)
    trace = _trace(trained, _held_out(trained, data), tokens)
    html.parent.mkdir(parents=True, exist_ok=True)
    page = report(trace, html, runs=_runs(trained), title=f"What the experts of {path} do")
    beside = trace.save(page.with_name(f"{page.stem}.trace.parquet"))
    return {**headline(trace), "report": str(page), "trace": str(beside)}


def headline(trace: RoutingTrace) -> dict[str, Any]:
    """Give a trace's figures, each by layer where it has one value for each."""
    from moesaic.lens import metrics

    layers = trace.metadata.layer_names
    return {
        "tokens": trace.num_tokens,
        "domains": list(metrics.domains(trace)),
        "num_experts": dict(zip(layers, trace.metadata.num_experts, strict=True)),
        "load_max_over_mean": dict(zip(layers, metrics.max_over_mean(trace).tolist(), strict=True)),
        "drop_rate": dict(zip(layers, metrics.drop_rate(trace).tolist(), strict=True)),
        "idle_experts": len(metrics.idle_experts(trace)),
    }


def _held_out(trained: Trained, data: str | None) -> TokenBlocks | PrefixBlocks:
    from moesaic.core.errors import ConfigError
    from moesaic.data import PrefixBlocks, TokenBlocks, load_corpus

    source = data or (trained.run.config.data if trained.run else None)
    if source is None:
        raise ConfigError("A model folder does not say what it was trained on. Name the text with --data.")
    corpus: Any = load_corpus(source)
    context = trained.run.config.context if trained.run else min(256, _longest(trained))
    # Text that is all of one piece has nothing held out; then what there is must do.
    blocks_of = PrefixBlocks if trained.model.config.is_encoder_decoder else TokenBlocks
    return blocks_of(corpus.held_out or corpus.train, trained.tokenizer, context)


def _longest(trained: Trained) -> int:
    return int(getattr(trained.model.config, "max_position_embeddings", 256))


def _trace(trained: Trained, blocks: TokenBlocks | PrefixBlocks, tokens: int) -> RoutingTrace:
    import torch
    from rich.console import Console
    from rich.progress import track

    from moesaic.hf import domains, record

    batches = list(_batches(blocks, tokens))
    console = Console(stderr=True)
    model: Any = trained.model
    with (
        torch.inference_mode(),
        record(model, tokenizer=trained.tokenizer, domains=blocks.domains) as trace,
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
    labels = {"moe": "MoE", "dense": "dense twin"}
    members = trained.run.members.items()
    return {labels[kind]: folder for kind, folder in members if (folder / "history.jsonl").is_file()}
