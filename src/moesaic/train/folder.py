"""The run folder: what a run was started with, so that it can be gone on with, looked into and generated from."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from moesaic.core.checkpoint import write_atomically
from moesaic.core.errors import CheckpointError, ConfigError
from moesaic.train import ranks
from moesaic.train.config import FREE_TO_CHANGE, TrainConfig

RUN, SUMMARY, HISTORY = "run.json", "summary.json", "history.jsonl"
CHECKPOINTS, MODEL, TOKENIZER, BOARD = "checkpoints", "model", "tokenizer", "tensorboard"
KINDS = ("moe", "dense", "pair")
FORMAT_VERSION = 1
# In run.json of a run that moesaic convert has written: the model is that of the newest checkpoint, not of settings.
OWN_MODEL = "own_model"


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """A run folder that has been read.

    Attributes:
        folder: where it is.
        kind: ``moe``, ``dense`` (a twin), or ``pair``: a folder with one run of each.
        config: what it was started with.
        fingerprint: of the data.
        num_ranks: processes that train it together.
    """

    folder: Path
    kind: str
    config: TrainConfig
    fingerprint: str
    num_ranks: int = 1

    @property
    def summary(self) -> dict[str, Any] | None:
        """The final figures by kind; None while the run is not finished."""
        path = self.folder / SUMMARY
        if not path.exists():
            return None
        value: dict[str, Any] = _read_json(path)
        return value

    @property
    def tokenizer(self) -> Path | None:
        """The tokenizer that the first session made; a member of a pair uses the pair's. None if it never got there."""
        places = (self.folder / TOKENIZER, self.folder.parent / TOKENIZER)
        return next((place for place in places if place.is_dir()), None)

    @property
    def members(self) -> dict[str, Path]:
        """The folders that hold a model, by kind: both of a pair, else this one."""
        if self.kind == "pair":
            return {kind: self.folder / kind for kind in ("moe", "dense")}
        return {self.kind: self.folder}


def create(folder: Path, *, kind: str, config: TrainConfig, fingerprint: str) -> Run:
    """Make a run folder with its ``run.json``; one that is there already, from a resumed pair, is read."""
    if (folder / RUN).exists():
        return read(folder)
    folder.mkdir(parents=True, exist_ok=True)
    versions = {name: version(name) for name in ("moesaic", "torch", "transformers", "accelerate", "safetensors")}
    record = {
        "format_version": FORMAT_VERSION,
        "kind": kind,
        "settings": config.settings(),
        "data": {"source": config.settings()["data"], "fingerprint": fingerprint},
        "ranks": ranks.count(),
        "versions": versions,
    }
    write_atomically(folder / RUN, json.dumps(record, indent=1) + "\n")
    return Run(folder=folder, kind=kind, config=config, fingerprint=fingerprint, num_ranks=ranks.count())


def how_to_go_on(folder: Path, num_ranks: int | None = None) -> str:
    """Give the command that is enough to go on with a run; ``num_ranks`` is by default as many as train now."""
    num_ranks = num_ranks or ranks.count()
    command = "moesaic" if num_ranks == 1 else f"torchrun --nproc-per-node {num_ranks} -m moesaic"
    return f"{command} train --resume --out {shlex.quote(str(folder))}"


def check(folder: Path, *, overwrite: bool, reads: Sequence[str] = ()) -> None:
    """See that a new run may be written to a folder; nothing is changed yet.

    Args:
        folder: of the run to come.
        overwrite: a run that is there may be deleted.
        reads: paths, or other words, of what the new run needs; it must not be deleted with the old one.
    Raises:
        ConfigError: if the folder holds something, and ``overwrite`` is off, it is not a run, or it is needed.
    """
    if folder.is_file():
        raise ConfigError(f"the run folder {folder} is a file. Name a folder that does not exist yet.")
    if not folder.exists() or not any(folder.iterdir()):
        return
    is_run = (folder / RUN).is_file()
    if overwrite and is_run:
        for path in map(Path, reads):
            if path.exists() and path.resolve().is_relative_to(folder.resolve()):
                raise ConfigError(
                    f"{path} lies inside the run folder {folder}, which --overwrite would delete. "
                    "Move it elsewhere first."
                )
        return
    if overwrite:
        raise ConfigError(
            f"{folder} is not empty and is no run of Moesaic (it has no {RUN}), so --overwrite does not delete it. "
            "Name another folder, or delete it yourself."
        )
    if is_run:
        raise ConfigError(
            f"{folder} already holds a run. Go on with it with --resume, replace it with --overwrite, "
            "or name another folder."
        )
    raise ConfigError(f"{folder} is not empty. Name a folder that does not exist yet.")


def clear(folder: Path) -> None:
    """Delete the run in a folder, if there is one; :func:`check` comes first."""
    if (folder / RUN).is_file():
        shutil.rmtree(folder)


def read(folder: Path) -> Run:
    """Read a run folder.

    Raises:
        CheckpointError: if it is not one, or its ``run.json`` is damaged or of another version.
    """
    if not folder.is_dir():
        raise CheckpointError(f"There is no folder {folder}. Name the folder given to --out in training.")
    if not (folder / RUN).is_file():
        raise CheckpointError(f"{folder} is not a run folder: it has no {RUN}. Name the folder given to --out.")
    record = _read_json(folder / RUN)
    if record.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{folder / RUN} is of format {record.get('format_version')}, this version of Moesaic reads format "
            f"{FORMAT_VERSION}. Use the version that wrote it."
        )
    try:
        kind, settings, fingerprint = record["kind"], record["settings"], record["data"]["fingerprint"]
        if record.get(OWN_MODEL):
            settings = {**settings, "init": str(folder)}
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / RUN} lacks {error}. Start the run anew with --overwrite.") from error
    if kind not in KINDS:
        raise CheckpointError(f"{folder / RUN} is of kind {kind!r}, needed one of {', '.join(KINDS)}.")
    try:
        config = TrainConfig.from_settings(settings, folder)
    except (ConfigError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{folder / RUN} has settings that cannot be: {str(error).rstrip('.')}. Put back the file that training "
            "wrote, or start the run anew with --overwrite."
        ) from error
    num_ranks = record.get("ranks", 1)
    return Run(folder=folder, kind=kind, config=config, fingerprint=fingerprint, num_ranks=num_ranks)


def check_ranks(run: Run) -> None:
    """See that as many processes go on with a run as started it.

    Raises:
        ConfigError: naming both numbers.
    """
    if run.num_ranks != ranks.count():
        raise ConfigError(
            f"the run in {run.folder} was started with processes={run.num_ranks}, resuming asked for processes="
            f"{ranks.count()}, which would give another model. Go on with: {how_to_go_on(run.folder, run.num_ranks)}"
        )


def changed(run: Run, changes: Mapping[str, Any]) -> TrainConfig:
    """Give a run's config with other values for the settings that may change when it is resumed.

    Steps may not: the learning rate's cosine is laid out over them, so that the steps already taken would have been
    other ones.

    Raises:
        ConfigError: naming a setting that reaches the weights, and both its values.
    """
    settings = run.config.settings()
    wanted = TrainConfig.from_settings({**settings, **changes}, run.folder).settings()
    for name in settings:
        if name not in FREE_TO_CHANGE and settings[name] != wanted[name]:
            raise ConfigError(
                f"the run in {run.folder} was started with {name}={settings[name]!r}, resuming asked for {name}="
                f"{wanted[name]!r}, which would give another model. Leave {name} out, or start a new run."
            )
    return TrainConfig.from_settings(wanted, run.folder)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise ValueError("it is not a JSON object")
    except OSError as error:
        # The run itself may be whole: no advice here that would delete it.
        raise CheckpointError(
            f"{path} cannot be read: {error.strerror or error}. Check who may read it, and the disk."
        ) from error
    except ValueError as error:
        raise CheckpointError(f"{path} cannot be read: {error}. Start the run anew with --overwrite.") from error
    return value
