"""Train a Mixture-of-Experts language model, and its dense twin if asked, into a run folder."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from moesaic.core import checkpoint
from moesaic.core.errors import CheckpointError, StoppedElsewhereError
from moesaic.train import folder, ranks
from moesaic.train.build import check_models
from moesaic.train.config import TrainConfig
from moesaic.train.interrupt import TrainingStoppedError
from moesaic.train.material import Material
from moesaic.train.quiet import quiet_transformers
from moesaic.train.session import Session, Summary
from moesaic.train.start import first_kind


def train(config: TrainConfig, *, overwrite: bool = False, show: bool = False) -> Summary:
    """Train from the beginning; under ``torchrun``, with all its processes.

    Args:
        config: what to train.
        overwrite: delete the run that is in ``config.out``.
        show: draw progress on standard error.
    Returns:
        The final figures by kind, ``moe`` and ``dense``, as ``summary.json`` holds them.
    Raises:
        ConfigError: if the folder is not empty, or a setting cannot be met.
        DataError: if the data cannot be read.
        CheckpointError: if the disk is full.
        TrainingStoppedError: if a signal asked to stop; everything is saved.
        NotFiniteError: if a loss is NaN or infinite.
        StoppedElsewhereError: on the other ranks, if one of them raises one of the above.
    """
    ranks.join()
    material: Material | None = None
    with _disk_full_explained(config.out):
        with ranks.together():
            if ranks.is_first():
                material = _begin(config, overwrite=overwrite)
        run = folder.read(config.out)
        with ranks.together():
            if material is None:
                material = Material.load(config, tokenizer=run.tokenizer, fingerprint=run.fingerprint)
        return _go_on(run, material, _console(show))


def _begin(config: TrainConfig, *, overwrite: bool) -> Material:
    """Make the run folder, with the tokenizer in it."""
    reads = [name for name in (config.data, config.tokenizer, config.init) if name is not None]
    folder.check(config.out, overwrite=overwrite, reads=reads)
    # Everything that can be refused is refused before the first file is written or deleted.
    material = Material.load(config)
    check_models(config, material.tokenizer, material.blocks.domains)
    kind = first_kind(config) if config.init is not None else "pair" if config.twin else "moe"
    folder.clear(config.out)
    run = folder.create(config.out, kind=kind, config=config, fingerprint=material.fingerprint)
    with checkpoint.replacing(run.folder / folder.TOKENIZER) as partial:
        material.tokenizer.save_pretrained(partial)
    return material


def resume(out: Path, *, changes: Mapping[str, Any] | None = None, show: bool = False) -> Summary:
    """Go on with a run from its last good checkpoint; a finished run is left alone.

    Args:
        out: its folder.
        changes: settings to change; only those that reach no weight may.
        show: draw progress on standard error.
    Raises:
        CheckpointError: if the folder is not a run.
        ConfigError: if a setting or the number of processes would change the result, or the data have changed.
        StoppedElsewhereError: on the other ranks, if one of them raises one of the above.
    """
    ranks.join()
    with ranks.together():
        run = folder.read(Path(out))
        config = folder.changed(run, changes or {})
    console = _console(show)
    if run.summary is not None:
        console.print(f"The run in {out} is finished: nothing to resume.", highlight=False, soft_wrap=True)
        return run.summary
    with ranks.together():
        folder.check_ranks(run)
        material = Material.load(config, tokenizer=run.tokenizer, fingerprint=run.fingerprint)
    with _disk_full_explained(run.folder):
        return _go_on(replace(run, config=config), material, console)


def _go_on(run: folder.Run, material: Material, console: Console) -> Summary:
    summary: Summary = {}
    for kind, path in run.members.items():
        member = run
        if run.kind == "pair":
            with ranks.together():
                if ranks.is_first():
                    folder.create(path, kind=kind, config=run.config, fingerprint=run.fingerprint)
            member = replace(folder.read(path), config=run.config)
        if member.summary is not None:
            summary |= member.summary
            continue
        session = Session(member, material, console=console, resume_with=run.folder)
        with quiet_transformers():
            summary |= session.train()
        if session.interrupted and len(summary) < len(run.members):
            raise TrainingStoppedError(
                f"Stopped as asked, after the last step of {path}; it is finished. "
                f"Go on with: {folder.how_to_go_on(run.folder)}"
            )
    if run.kind == "pair" and ranks.is_first():
        checkpoint.write_atomically(run.folder / folder.SUMMARY, json.dumps(summary, indent=1) + "\n")
    return summary


@contextmanager
def _disk_full_explained(out: Path) -> Iterator[None]:
    try:
        yield
    except StoppedElsewhereError:
        raise
    except checkpoint.DiskFullError as error:
        raise CheckpointError(f"{error} Then go on with: {folder.how_to_go_on(out)}") from error
    except Exception as error:
        if not checkpoint.is_disk_full(error):
            raise
        last = [
            checkpoint.describe_last(found) for found in sorted(out.rglob(folder.CHECKPOINTS)) if any(found.iterdir())
        ]
        raise CheckpointError(
            f"The disk is full at {out}; {last[-1] if last else 'no checkpoint was saved before that'}. "
            f"Free some space. Then go on with: {folder.how_to_go_on(out)}"
        ) from error


def _console(show: bool) -> Console:
    return Console(stderr=True, quiet=not (show and ranks.is_first()))
