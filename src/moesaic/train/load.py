"""A trained model from a run folder, or from any model folder of ours."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesaic.core import checkpoint
from moesaic.core.errors import CheckpointError, ConfigError, MoesaicError
from moesaic.train import folder
from moesaic.train.quiet import quiet_transformers

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast


@dataclass(frozen=True, kw_only=True, slots=True)
class Trained:
    """A model that was read, in evaluation mode.

    Attributes:
        model: the model.
        tokenizer: its tokenizer.
        path: the model folder that was read.
        run: the run that it came from; None for a bare model folder.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    path: Path
    run: folder.Run | None


def load_trained(path: Path) -> Trained:
    """Read the model of a run (the MoE of a pair; the last good checkpoint of a run that goes on), or a model folder.

    Raises:
        CheckpointError: if it is neither, or the model is missing, damaged, pickled or foreign.
    """
    path, run = find_model(path)
    checkpoint.refuse_pickles(path)
    if (path / checkpoint.MANIFEST).is_file():
        _verify(path)
    with quiet_transformers():
        model, tokenizer = _read(path)
    model.train(False)
    return Trained(model=model, tokenizer=tokenizer, path=path, run=run)


def find_model(path: Path) -> tuple[Path, folder.Run | None]:
    """Give the model folder of a run, and the run; or a model folder as it is.

    Raises:
        CheckpointError: if it is neither, or the run has no model yet.
    """
    path = Path(path)
    if (path / folder.RUN).is_file() or not (path / "config.json").is_file():
        run = folder.read(path)
        return _model_of(run), run
    return path, None


def _verify(path: Path) -> None:
    try:
        checkpoint.verify(path)
    except CheckpointError as error:
        raise CheckpointError(
            f"{path.parent}/{error} Go back to a checkpoint, or copy the folder again from where it was saved."
        ) from error


def _model_of(run: folder.Run) -> Path:
    home = next(iter(run.members.values()))
    if (home / folder.MODEL).is_dir():
        return home / folder.MODEL
    good = checkpoint.last_good(home / folder.CHECKPOINTS)
    if good.path is None:
        damaged = f" ({'; '.join(good.skipped)})" if good.skipped else ""
        raise CheckpointError(
            f"The run in {run.folder} has no model yet: it saved no whole checkpoint{damaged}. "
            f"Go on with: {folder.how_to_go_on(run.folder, run.num_ranks)}"
        )
    return good.path


def _read(path: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

    from moesaic.hf.register import register

    register()
    try:
        config = AutoConfig.from_pretrained(str(path), local_files_only=True)
        load: Any = (AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM).from_pretrained
        model, info = load(str(path), local_files_only=True, use_safetensors=True, output_loading_info=True)
    except ConfigError as error:
        raise CheckpointError(
            f"{path}/config.json asks for a model that cannot be: {str(error).rstrip('.')}. Go back to a checkpoint, "
            "or copy the folder again from where it was saved."
        ) from error
    except MoesaicError:
        raise
    except Exception as error:  # transformers and safetensors raise what they like
        raise CheckpointError(
            f"{path} does not hold a readable model ({_reason(error)}). Go back to a checkpoint, or copy the folder "
            "again."
        ) from error
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(str(path), local_files_only=True)
    except Exception as error:
        raise CheckpointError(
            f"{path} holds a model but no readable tokenizer ({_reason(error)}). Save the one that it was trained "
            "with beside it, with tokenizer.save_pretrained."
        ) from error
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[what]:
            first = sorted(map(str, info[what]))[0]
            raise CheckpointError(
                f"The weights in {path} are not those that its config.json describes: {what.replace('_keys', '')} are "
                f"{len(info[what])} tensors, the first {first}. Copy the folder again from where it was saved."
            )
    return model, tokenizer


def _reason(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
