"""Does balance without a loss leave experts freer to specialise? Two models of one kind on three domains of text."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moesaic.data import load_corpus
from moesaic.lab.studies.mixed_text import write_three_domains
from moesaic.lab.studies.reading import trace_of
from moesaic.lens import measures
from moesaic.train import TrainConfig, load_trained, resume, train

BALANCES: Mapping[str, dict[str, float]] = {"auxiliary loss": {"sequence": 0.003}, "loss-free": {"bias": 0.003}}
"""What balances each model; all else is the same."""
# Of a text's beginning, what is read to see who takes it.
_CHARACTERS = 1200


@dataclass(frozen=True, kw_only=True, slots=True)
class Domains:
    """The numbers of the study.

    Attributes:
        steps: optimizer steps of 2,048 tokens.
        layers: of each model.
        num_experts: routed experts of each layer.
        top_k: experts that a token meets, beside one that all share.
        width: of the model.
        hidden: of an expert.
        vocab: tokens.
        num_bytes: of each domain, learnt and held out.
        texts: of each domain, held out, that are traced.
        seed: of everything random.
    """

    steps: int = 1200
    layers: int = 4
    num_experts: int = 16
    top_k: int = 4
    width: int = 128
    hidden: int = 96
    vocab: int = 4096
    num_bytes: int = 3_000_000
    texts: int = 150
    seed: int = 0


QUICK = Domains(steps=4, layers=2, num_experts=4, top_k=2, width=32, hidden=16, vocab=512, num_bytes=20_000, texts=4)


def study(
    plan: Domains, folder: Path | None, work: Path, *, say: Callable[[str], None] = lambda _line: None
) -> dict[str, Any]:
    """Train both models, trace them on held-out text, and give the figures.

    Args:
        plan: the numbers.
        folder: holds the texts; None draws from the text that ships, with novels in place of the encyclopedia.
        work: gets the text and a run folder for each model; a finished run is not trained again.
        say: told what is being done.
    """
    data = str(_text(plan, folder, work))
    return {"plan": _numbers(plan), "runs": {name: _one(plan, name, data, work, say) for name in BALANCES}}


def config_of(plan: Domains, balance: str, data: str, work: Path) -> TrainConfig:
    """The settings of one model's training."""
    return TrainConfig(
        out=work / balance.replace(" ", "-"),
        data=data,
        tokenizer=f"bpe:{plan.vocab}",
        recipe="deepseek-v3",
        num_experts=plan.num_experts,
        top_k=plan.top_k,
        width=plan.width,
        hidden=plan.hidden,
        layers=plan.layers,
        context=256,
        batch_size=8,
        steps=plan.steps,
        lr=2e-3,
        balance=BALANCES[balance],
        seed=plan.seed,
    )


def _text(plan: Domains, folder: Path | None, work: Path) -> Path:
    out = work / "three-domains.jsonl"
    if not out.is_file():
        work.mkdir(parents=True, exist_ok=True)
        write_three_domains(folder, out, num_bytes=plan.num_bytes, seed=plan.seed)
    return out


def _numbers(plan: Domains) -> dict[str, int]:
    return {name: getattr(plan, name) for name in Domains.__dataclass_fields__}


def _one(plan: Domains, name: str, data: str, work: Path, say: Callable[[str], None]) -> dict[str, Any]:
    config = config_of(plan, name, data, work)
    if (config.out / "run.json").is_file():
        summary = resume(config.out, show=True)
    else:
        say(f"Training the model with {name}, {plan.steps} steps.")
        summary = train(config, show=True)
    say(f"Tracing the model with {name}.")
    trained = load_trained(config.out)
    corpus = load_corpus(data)
    texts = [
        (domain, one.text[:_CHARACTERS])
        for domain in corpus.domains
        for one in [doc for doc in corpus.held_out if doc.domain == domain][: plan.texts]
    ]
    trace = trace_of(trained.model, trained.tokenizer, texts)
    share = measures.domain_share(trace)
    about = measures.about_domain(trace)
    relative_LQE = share.value / share.chance
    worst = {
        domain: [float(measures.max_over_mean(part).value[layer]) for layer in range(trace.num_layers)]
        for domain, part in measures.by_domain(trace).items()
    }
    return {
        "balance": BALANCES[name],
        "bits_per_byte": summary["moe"]["bits_per_byte"],
        "tokens": trace.num_tokens,
        "domains": list(measures.domains(trace)),
        "times_chance": np.round(relative_LQE, 4).tolist(),
        "max_over_mean": [float(value) for value in measures.max_over_mean(trace).value],
        "max_over_mean_by_domain": worst,
        "about_domain": [one.to_dict() for one in about],
        "words_or_subjects": measures.words_or_subjects(trace).to_dict(),
    }
