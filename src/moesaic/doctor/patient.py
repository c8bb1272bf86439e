"""What a path holds: a run, a model, a history, or some of it; and the text to run a model on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesaic.core.errors import CheckpointError, ConfigError, MoesaicError
from moesaic.doctor.finding import Unknown
from moesaic.doctor.history import History, read_history

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from moesaic.doctor.measure.layers import Batch
    from moesaic.train.config import TrainConfig
    from moesaic.train.folder import Run

HISTORY = "history.jsonl"
_BATCH = 8
_LONGEST = 256


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Patient:
    """Who is examined.

    Attributes:
        name: what reports call it.
        model: in evaluation mode; or why there is none.
        tokenizer: None where there is none.
        history: what its training wrote; or why there is none.
        config: of the run that it comes from; None outside of runs.
        damaged: what is wrong with a model that is there and cannot be read; empty if nothing is.
    """

    name: str
    model: PreTrainedModel | Unknown
    tokenizer: PreTrainedTokenizerFast | None
    history: History | Unknown
    config: TrainConfig | None = None
    damaged: str = ""


def find_patient(path: Path) -> Patient:
    """Read what a path holds.

    Args:
        path: a run folder, a model folder of ours or of transformers, a folder with a ``history.jsonl``, or that file.
    Raises:
        CheckpointError: if it is none of these.
        DataError: if there is nothing but a history, and it cannot be read.
        ConfigError: if it is a run or a model without MoE layers.
    """
    from moesaic.train import folder

    if path.is_file() and path.name.endswith(".jsonl"):
        return _of_history(path)
    if (path / folder.RUN).is_file():
        return _of_run(path)
    if (path / "config.json").is_file():
        return _of_model(path, _history_in(path), None)
    if (path / HISTORY).is_file():
        return _of_history(path / HISTORY)
    raise CheckpointError(
        f"{path} holds nothing to examine: what is needed is a run folder (with run.json), a model folder (with "
        f"config.json), or a {HISTORY}. Name the folder given to --out in training, or a model's."
    )


def _of_run(path: Path) -> Patient:
    from moesaic.train import folder

    run = folder.read(path)
    home = run.members.get("moe")
    if home is None:
        raise ConfigError(f"{path} is the run of a dense model, and the doctor examines MoE layers. Name another run.")
    return _of_model(path, _history_in(home), run)


def _of_model(path: Path, history: History | Unknown, run: Run | None) -> Patient:
    from moesaic.core.checkpoint import last_good
    from moesaic.train import folder, load_trained

    config = None if run is None else run.config
    found: dict[str, Any] = {"name": str(path), "history": history, "config": config, "tokenizer": None}
    if run is not None:
        home = run.members["moe"]
        saved = (home / folder.MODEL).is_dir() or last_good(home / folder.CHECKPOINTS).path is not None
        if not saved and not isinstance(history, Unknown):
            return Patient(model=Unknown("the run has saved no whole checkpoint yet"), **found)
    try:
        trained = load_trained(path)
    except CheckpointError as error:
        if "no readable tokenizer" in str(error):
            raise
        return Patient(model=Unknown("the model cannot be read"), damaged=str(error), **found)
    model: Any = trained.model
    if config is not None and config.balance is not None and config.init is not None:
        from moesaic.hf import adopt
        from moesaic.hf.native.adopt import is_native_mixture

        if is_native_mixture(model):
            # As it was trained: its family saves no balance.
            model = adopt(model, kernel=None, balance=config.balance)
    return Patient(model=model, **{**found, "tokenizer": trained.tokenizer})


def _of_history(path: Path) -> Patient:
    return Patient(
        name=str(path), model=Unknown("there is a history and no model"), tokenizer=None, history=read_history(path)
    )


def _history_in(path: Path) -> History | Unknown:
    if not (path / HISTORY).is_file():
        return Unknown(f"there is no {HISTORY}")
    try:
        return read_history(path / HISTORY)
    except MoesaicError as error:
        return Unknown(f"the history cannot be read: {error}")


def held_out(patient: Patient, data: str | None, tokens: int) -> tuple[list[Batch], str]:
    """Batches of text for a patient's model, domains mixed as in training, and what they are in words.

    Args:
        patient: with a model and a tokenizer.
        data: the text; None for the run's own, or what ships with the package for a model without a run.
        tokens: about how many.
    Raises:
        DataError: if the text cannot be read.
        ConfigError: if the tokenizer lacks a special token.
    """
    from moesaic.data import PrefixBlocks, TokenBlocks, load_corpus

    model: Any = patient.model
    source = data or (patient.config.data if patient.config is not None else "builtin")
    corpus = load_corpus(source)
    length = min(_LONGEST, patient.config.context if patient.config else _LONGEST, _longest(model))
    blocks_of: Any = PrefixBlocks if model.config.is_encoder_decoder else TokenBlocks
    documents = corpus.held_out or corpus.train
    blocks = blocks_of(documents, _with_ends(patient.tokenizer), length - length % 2)
    chosen = _spread(blocks, max(1, tokens // blocks.block_size))
    batches = [collated([blocks[index] for index in chosen[at : at + _BATCH]]) for at in range(0, len(chosen), _BATCH)]
    what = "held-out text" if corpus.held_out else "text"
    return batches, f"{len(chosen) * blocks.block_size:,} tokens of {what} of {source} ({', '.join(blocks.domains)})"


def collated(items: Sequence[Batch]) -> Batch:
    """Put blocks into one batch."""
    import torch

    return {name: torch.stack([one[name] for one in items]) for name in items[0]}


def _longest(model: Any) -> int:
    return int(getattr(model.config.get_text_config(), "max_position_embeddings", None) or _LONGEST)


def _with_ends(tokenizer: Any) -> Any:
    """A tokenizer of any family with the three tokens that blocks begin, end and are filled up with."""
    names = ("bos_token", "eos_token", "pad_token")
    known = next((getattr(tokenizer, name) for name in names[1::-1] if getattr(tokenizer, name) is not None), None)
    if known is not None:
        for name in names:
            if getattr(tokenizer, name) is None:
                setattr(tokenizer, name, known)
    return tokenizer


def _spread(blocks: Any, count: int) -> list[int]:
    """Blocks of all domains in turn, evenly spread over each."""
    by_domain = [
        [block for block in range(len(blocks)) if int(blocks.domain_B[block]) == domain]
        for domain in range(len(blocks.domains))
    ]
    each = -(-count // max(1, sum(bool(mine) for mine in by_domain)))
    places = []
    for mine in by_domain:
        take = min(each, len(mine))
        places += [((place + 0.5) / take, mine[place * len(mine) // take]) for place in range(take)]
    return [index for _, index in sorted(places)]
