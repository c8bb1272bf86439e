"""Training runs as sources: where the newest good model lies, and how a run that goes on is written anew."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moesaic.core import checkpoint
from moesaic.core.errors import CheckpointError

# As training names them.
RUN, HISTORY = "run.json", "history.jsonl"
MODEL, CHECKPOINTS, TOKENIZER, PAIR = "model", "checkpoints", "tokenizer", "pair"
OWN_MODEL = "own_model"
STATE_OF_TRAINING = ("trainer_state.json", "scheduler.json", "rng*", "window*.json")
# Settings that describe a model: a converted run's model is described by its checkpoint.
OF_THE_MODEL = (
    *("recipe", "backbone", "width", "layers", "moe_layers", "heads", "hidden", "num_experts", "top_k"),
    *("options", "aux_coefficients", "init_std", "twin", "tokenizer", "init"),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where a model was found.

    Attributes:
        folder: of the model.
        run: the folder of the run that is in mid-training there; None for a finished run, and for a bare model.
        step: optimizer steps that the run has taken.
    """

    folder: Path
    run: Path | None = None
    step: int = 0


def find_model(path: Path) -> Place:
    """The model that ``path`` names: itself, or the newest whole one of a run.

    Of a run that has ended it is the final model, of one that goes on its last good checkpoint, of a pair the MoE's.

    Raises:
        CheckpointError: if there is none, or it is not what training wrote.
    """
    if not path.is_dir():
        raise CheckpointError(f"There is no folder {path}. Name the folder of a model or of a run.")
    place = _of_run(path) if (path / RUN).is_file() else Place(folder=path)
    if (place.folder / checkpoint.MANIFEST).is_file():
        try:
            checkpoint.verify(place.folder)
        except CheckpointError as error:
            raise CheckpointError(
                f"{place.folder.parent}/{error} Go back to a checkpoint, or copy the folder again from where it was "
                "saved."
            ) from error
    if not (place.folder / "config.json").is_file():
        raise CheckpointError(
            f"{place.folder} holds no model: it has neither config.json nor {RUN}. Name the folder of a model or of a "
            "run."
        )
    return place


def _of_run(path: Path) -> Place:
    home = path / "moe" if read_run(path)["kind"] == PAIR else path
    if (home / MODEL).is_dir():
        return Place(folder=home / MODEL)
    good = checkpoint.last_good(home / CHECKPOINTS)
    if good.path is None:
        damaged = f" ({'; '.join(good.skipped)})" if good.skipped else ""
        raise CheckpointError(
            f"The run in {path} has no model yet: it saved no whole checkpoint{damaged}. Go on with the training."
        )
    return Place(folder=good.path, run=home, step=good.step)


def read_run(path: Path) -> dict[str, Any]:
    """Read ``run.json``.

    Raises:
        CheckpointError: if it is not one.
    """
    try:
        record: dict[str, Any] = json.loads((path / RUN).read_text(encoding="utf-8"))
        record["kind"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path / RUN} cannot be read. Name the run's model or checkpoint folder.") from error
    return record


@contextmanager
def new_run(place: Place, partial: Path, *, kind: str, method: str) -> Iterator[Path]:
    """Give the checkpoint folder of a run that goes on where another one was, and finish the run around it afterwards.

    Args:
        place: the run that was converted.
        partial: the folder of the new one.
        kind: ``moe`` or ``dense``.
        method: what was done, for ``run.json``.
    """
    assert place.run is not None
    home = partial / CHECKPOINTS / f"{checkpoint.PREFIX}{place.step}"
    home.mkdir(parents=True)
    yield home
    for pattern in STATE_OF_TRAINING:
        for file in place.folder.glob(pattern):
            shutil.copy2(file, home / file.name)
    checkpoint.seal(home, place.step)
    record = read_run(place.run)
    record["kind"] = kind
    # A mixture of transformers keeps no balance itself, its run does; a model of ours has it in its recipe.
    is_adopted = kind == "moe" and (record["settings"].get("init") is not None or record.get(OWN_MODEL, False))
    gone = OF_THE_MODEL if is_adopted else (*OF_THE_MODEL, "balance")
    record["settings"] = {name: value for name, value in record["settings"].items() if name not in gone}
    record |= {OWN_MODEL: True, "converted": method}
    (partial / RUN).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    if (place.run / HISTORY).is_file():
        shutil.copy2(place.run / HISTORY, partial / HISTORY)
    # A member of a pair uses the pair's tokenizer.
    for home in (place.run, place.run.parent):
        if (home / TOKENIZER).is_dir():
            shutil.copytree(home / TOKENIZER, partial / TOKENIZER)
            break
