"""Mixtral's questions, asked again: who takes which of 57 subjects, and which words have an expert of their own?"""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moesaic.core.errors import DataError
from moesaic.lab.studies.reading import Text, trace_of
from moesaic.lens import measures
from moesaic.lens.measures import TokenTable
from moesaic.lens.tokens import token_text
from moesaic.telemetry.trace import RoutingTrace
from moesaic.train import load_trained

FILE = "mmlu.jsonl.gz"
ASKED = (":", ".", "?", "␣what", "␣What", "␣who", "␣which", "␣Which", "␣not", "⏎")
"""Words that are looked up whether or not they stand out, as :func:`~moesaic.lens.tokens.visible` writes them."""
_SHUFFLES = 1000


@dataclass(frozen=True, kw_only=True, slots=True)
class Standout:
    """A subject that goes to an expert more than the others do.

    Attributes:
        subject: of the questions.
        expert: that takes more of it.
        share: of the subject's choices.
        average: of the mean subject's.
        count: choices of the subject.
    """

    subject: str
    expert: int
    share: float
    average: float
    count: int


def read_questions(folder: Path, *, of_each: int, seed: int = 0) -> list[Text]:
    """Draw test questions of each subject, with their choices, short ones first.

    Args:
        folder: holds ``mmlu.jsonl.gz`` with ``domain``, ``split``, ``question`` and ``choices``.
        of_each: of each subject; all if there are fewer.
        seed: of the draw.
    Raises:
        DataError: if the file is not there or is something else.
    """
    path = folder / FILE
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            rows = [json.loads(line) for line in file]
        asked = [(str(row["domain"]), _asked(row)) for row in rows if row["split"] == "test"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"The study needs {path} with a domain, a split, a question and choices in each line, got "
            f"{type(error).__name__}: {error}. Name the folder that holds it."
        ) from error
    rng, texts = random.Random(seed), []
    for subject in sorted({domain for domain, _ in asked}):
        mine = [text for text in asked if text[0] == subject]
        texts += rng.sample(mine, min(of_each, len(mine)))
    return sorted(texts, key=lambda one: len(one[1]))


def study(model: Path, texts: Sequence[Text], *, done: Callable[[int], None] = lambda _read: None) -> dict[str, Any]:
    """Let a model read the questions, and give what its experts took.

    Args:
        model: run folder or model folder.
        texts: (subject, question).
        done: told how many have been read.
    """
    trained = load_trained(model)
    trace = trace_of(trained.model, trained.tokenizer, texts, done=done)
    layers = sorted({0, trace.num_layers // 2, trace.num_layers - 1})
    return {
        "tokens": trace.num_tokens,
        "questions": len(texts),
        "top_k": trace.metadata.top_k,
        "domains": list(measures.domains(trace)),
        "layers": [_layer(trace, layer) for layer in layers],
        "about_domain": [one.to_dict() for one in measures.about_domain(trace)],
        "about_token": [one.to_dict() for one in measures.about_token(trace)],
        "words_or_subjects": measures.words_or_subjects(trace).to_dict(),
        "repetition": measures.repetition(trace).to_dict(),
        "repetition_either": measures.repetition(trace, first_only=False).to_dict(),
    }


def standouts(trace: RoutingTrace, layer: int, *, seed: int = 0) -> tuple[list[Standout], float]:
    """Subjects that single out an expert in a layer, the clearest first, and by how much chance can.

    ``share - average`` of a subject's clearest expert. The second value is exceeded by the clearest of all subjects in
    5 % of 1,000 shuffles in which whole questions exchange their subjects: only above it does a subject stand out.
    """
    count_SE, subject_S = _by_question(trace, layer)
    names = measures.domains(trace)
    one_hot_QS = (subject_S == np.arange(len(names))[:, None]).astype(np.float64)
    excess_QE, share_QE, average_E = _excess(one_hot_QS @ count_SE)
    rng = np.random.default_rng(seed)
    drawn = [float(_excess(rng.permutation(one_hot_QS, axis=1) @ count_SE)[0].max()) for _ in range(_SHUFFLES)]
    bound = float(np.quantile(drawn, 0.95))
    expert_Q = excess_QE.argmax(axis=1)
    order = np.argsort(-excess_QE.max(axis=1), kind="stable")
    total_Q = one_hot_QS @ count_SE.sum(axis=1)
    found = [
        Standout(
            subject=names[q],
            expert=int(expert_Q[q]),
            share=float(share_QE[q, expert_Q[q]]),
            average=float(average_E[expert_Q[q]]),
            count=int(total_Q[q]),
        )
        for q in order
        if excess_QE[q].max() > bound
    ]
    return found, bound


def _asked(row: dict[str, Any]) -> str:
    choices = "\n".join(f"{letter}. {choice}" for letter, choice in zip("ABCD", row["choices"], strict=False))
    return f"Question: {row['question']}\n{choices}\nAnswer:"


def _by_question(trace: RoutingTrace, layer: int) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    """Choices of each question (S, E), and its subject's place among the domains."""
    rows = trace.layer == layer
    sequences, place_N = np.unique(trace.sequence[rows], return_inverse=True)
    num_experts = trace.metadata.num_experts[layer]
    flat_N = place_N * num_experts + trace.expert[rows]
    count_SE = np.bincount(flat_N, minlength=len(sequences) * num_experts).reshape(-1, num_experts)
    domain_S = np.zeros(len(sequences), dtype=np.int64)
    domain_S[place_N] = trace.domain[rows]
    present = np.unique(trace.domain)
    return count_SE.astype(np.float64), np.searchsorted(present, domain_S)


def _excess(count_QE: npt.NDArray[np.float64]) -> tuple[npt.NDArray[np.float64], ...]:
    share_QE = count_QE / count_QE.sum(axis=1, keepdims=True)
    average_E = share_QE.mean(axis=0)
    return share_QE - average_E, share_QE, average_E


def _layer(trace: RoutingTrace, layer: int) -> dict[str, Any]:
    share = measures.domain_share(trace)
    load_E = measures.load_share(trace).value[layer]
    found, bound = standouts(trace, layer)
    return {
        "name": trace.metadata.layer_names[layer],
        "load": load_E.tolist(),
        "times_chance": (share.value[layer] / share.chance[layer]).tolist(),
        "bound": bound,
        "standouts": [{name: getattr(one, name) for name in Standout.__dataclass_fields__} for one in found],
        "tokens": _tokens(trace, measures.token_table(trace, layer, min_tokens=30)),
    }


def _tokens(trace: RoutingTrace, table: TokenTable) -> dict[str, list[dict[str, Any]]]:
    """The ten most faithful tokens of those that occur 30 times or more, and those that are always asked for."""
    texts = [token_text(trace, int(token)) for token in table.token_id_V]
    rows: list[dict[str, Any]] = [
        {
            "token": text,
            "n": int(table.count_V[place]),
            "expert": int(table.expert_V[place]),
            "share": float(table.share_V[place]),
            "low": float(table.low_V[place]),
            "chance": float(table.base_V[place]),
        }
        for place, text in enumerate(texts)
    ]
    faithful = sorted(rows, key=lambda row: -row["low"])[:10]
    return {"faithful": faithful, "asked": [row for row in rows if row["token"] in ASKED]}
