"""Questions with several answers: how often a language model finds the right one the likeliest."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moesaic.core.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SETS: Mapping[str, str] = {"MMLU": "mmlu", "ARC-Easy": "arc_easy", "HellaSwag": "hellaswag"}
"""Question sets by name, and the file of each: ``mmlu.jsonl.gz`` and so on, in a folder that the user names."""
# Rows of one forward, counted with their padding; and no more than are scored at once.
_TOKENS_PER_BATCH = 4096


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """A question, or the beginning of a text.

    Attributes:
        prompt: what the answers continue.
        choices: the answers, each as it follows the prompt.
        answer: index of the right one.
    """

    prompt: str
    choices: tuple[str, ...]
    answer: int


def read_questions(folder: Path, name: str, *, count: int, seed: int = 0) -> tuple[Question, ...]:
    """Draw questions of a set; the same ones for the same seed, so that models can be compared question by question.

    Args:
        folder: holds the sets as gzipped JSON lines with ``question``, ``choices`` and ``answer``. Where rows have a
            ``split``, those of ``test`` are taken.
        name: in :data:`SETS`.
        count: how many; all if there are fewer.
        seed: of the draw.
    Raises:
        DataError: if the file is not there, or is something else.
    """
    path = folder / f"{SETS[name]}.jsonl.gz"
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            rows = [json.loads(line) for line in file]
        rows = [row for row in rows if row.get("split", "test") == "test"]
        questions = [_question(name, row) for row in rows]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{name} needs {path} with a question, choices and the answer's index in each line, got "
            f"{type(error).__name__}: {error}. Name the folder that holds it."
        ) from error
    if not questions:
        raise DataError(f"{name} needs at least 1 question in {path}, got none. Name the folder that holds it.")
    drawn = sorted(random.Random(seed).sample(range(len(questions)), min(count, len(questions))))
    return tuple(questions[index] for index in drawn)


def _question(name: str, row: Mapping[str, Any]) -> Question:
    """HellaSwag's endings go on from a text; the others answer a question, without letters and without examples."""
    text = str(row["question"]).strip()
    prompt = text if name == "HellaSwag" else f"Question: {text}\nAnswer:"
    choices, answer = tuple(f" {str(choice).strip()}" for choice in row["choices"]), int(row["answer"])
    if not 0 <= answer < len(choices):
        raise ValueError(f"an answer of {answer} among {len(choices)} choices")
    return Question(prompt=prompt, choices=choices, answer=answer)


@torch.no_grad()
def answered_rightly(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    *,
    autocast: AbstractContextManager[Any] | None = None,
) -> list[bool]:
    """For each question, whether the right choice has the highest log-likelihood per byte.

    Dividing by the length in bytes keeps long answers from losing for their length (``acc_norm`` of the usual
    harnesses). Rows of several questions run together, padded on the right, where no causal model looks; the
    mask keeps padding out of the experts' load.

    Args:
        model: a causal language model of transformers; left in the mode that it came in.
        tokenizer: its tokenizer.
        questions: to answer.
        autocast: to run it in.
    """
    rows = [
        (index, choice, *_tokens(tokenizer, question, text))
        for index, question in enumerate(questions)
        for choice, text in enumerate(question.choices)
    ]
    scores = [[0.0] * len(question.choices) for question in questions]
    was_training = model.training
    model.eval()
    try:
        with autocast or nullcontext():
            for batch in _batches(rows):
                for (index, choice, _, _), nats in zip(batch, _nats(model, batch), strict=True):
                    scores[index][choice] = -nats / len(questions[index].choices[choice].encode())
    finally:
        model.train(was_training)
    return [max(range(len(one)), key=one.__getitem__) == questions[index].answer for index, one in enumerate(scores)]


_Row = tuple[int, int, list[int], list[int]]


def _tokens(tokenizer: PreTrainedTokenizerBase, question: Question, choice: str) -> tuple[list[int], list[int]]:
    """Ids of the prompt, after the token that begins a text if there is one, and those of the choice."""
    plain: Any = tokenizer
    begin = [] if plain.bos_token_id is None else [int(plain.bos_token_id)]
    prompt, answer = (plain(text, add_special_tokens=False)["input_ids"] for text in (question.prompt, choice))
    return begin + list(prompt), list(answer)


def _batches(rows: Sequence[_Row]) -> Iterator[list[_Row]]:
    """Rows of like length together."""
    batch: list[_Row] = []
    for row in sorted(rows, key=lambda row: len(row[2]) + len(row[3])):
        if batch and (len(batch) + 1) * (len(row[2]) + len(row[3])) > _TOKENS_PER_BATCH:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def _nats(model: nn.Module, batch: Sequence[_Row]) -> list[float]:
    """Minus the log-likelihood of each row's choice after its prompt."""
    device = next(model.parameters()).device
    width = max(len(prompt) + len(answer) for _, _, prompt, answer in batch)
    ids_BP = torch.zeros(len(batch), width, dtype=torch.int64)
    mask_BP = torch.zeros_like(ids_BP)
    is_answer_BP = torch.zeros(len(batch), width, dtype=torch.bool)
    for place, (_, _, prompt, answer) in enumerate(batch):
        used = len(prompt) + len(answer)
        ids_BP[place, :used] = torch.tensor([*prompt, *answer])
        mask_BP[place, :used] = 1
        is_answer_BP[place, len(prompt) : used] = True
    # Logits are large: only those from the first answer's first token on are worked out.
    first = min(len(prompt) for _, _, prompt, _ in batch)
    logits_BPV: Tensor = model(
        input_ids=ids_BP.to(device),
        attention_mask=mask_BP.to(device),
        use_cache=False,
        logits_to_keep=width - first + 1,
    ).logits
    target_BP = ids_BP[:, first:].to(device)
    nats_BP = F.cross_entropy(logits_BPV[:, :-1].float().transpose(1, 2), target_BP, reduction="none")
    wanted_BP = is_answer_BP[:, first:].to(device)
    return [float(value) for value in nats_BP.double().masked_fill(~wanted_BP, 0.0).sum(dim=1)]
