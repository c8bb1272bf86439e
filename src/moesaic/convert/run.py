"""Carry out a conversion: settle the books, stream the tensors, compare the two models, write the receipt."""

from __future__ import annotations

import copy
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from moesaic.convert.checkpoint import optimizer
from moesaic.convert.checkpoint.blueprint import Blueprint
from moesaic.convert.checkpoint.disk import ToDisk
from moesaic.convert.checkpoint.ledger import Ledger
from moesaic.convert.checkpoint.run_folder import new_run
from moesaic.convert.checkpoint.shards import DEFAULT_SHARD_BYTES, ShardWriter
from moesaic.convert.checkpoint.source import Source
from moesaic.convert.layout.layouts import config_is_ours, moe_layouts
from moesaic.convert.progress import tracked
from moesaic.convert.proof import probe as probes
from moesaic.convert.proof.compare import compared
from moesaic.convert.proof.receipt import RECEIPT, Receipt, describe_files
from moesaic.convert.steps import Change, Step
from moesaic.core.checkpoint import flush, is_disk_full
from moesaic.core.errors import CheckpointError, ConfigError

_BESIDE = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "chat_template*",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "LICENSE*",
)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Converted:
    """What a conversion made.

    Attributes:
        receipt: what was done, and how far the models are apart.
        model: in memory; None where a folder was converted into a folder.
        folder: where it was written; None if it was not.
    """

    receipt: Receipt
    model: PreTrainedModel | None
    folder: Path | None


def convert(
    source: Source,
    change: Change,
    out: str | Path | None = None,
    *,
    probe: str | Tensor | probes.Batch | None = "random",
    shard_bytes: int | None = None,
) -> Converted:
    """Carry out a conversion.

    Tensors stream from the source: those of one step are in memory at a time, and one file of the target. Their types
    are kept. The folder appears under its name when all is written and compared, or not at all.

    Args:
        source: what to convert; a model in memory stays as it is.
        change: what to do.
        out: folder to write, which must not exist; None for a model in memory.
        probe: what both models read to be compared, see :func:`~moesaic.convert.proof.probe.probe_batch`; None to go
            without.
        shard_bytes: largest size of a file; None for that of the source's largest if it has several, or 5 GB.
    Raises:
        CheckpointError: if a tensor is missing, left over or misshapen, the disk is full, or the models are further
            apart than the method promises; nothing is left at ``out`` then.
        ConfigError: if ``out`` is not empty, or the model cannot read the probe.
    """
    config = _target_config(source, change.config)
    target = Blueprint.of(config)
    config.architectures = [type(target.model).__name__]
    ledger = Ledger.of(source, change, target)
    batch = None if probe is None else probes.probe_batch(source.config, probe)
    receipt = _receipt(source, change, ledger)
    if out is None:
        model = _build(source, ledger, config)
        receipt = replace(receipt, size_bytes=_size_of(model))
        return Converted(receipt=compared(receipt, source, model, config, batch), model=model, folder=None)
    with _writing(Path(out), source, ledger) as partial, _home(source, change, ledger, partial) as home:
        most = shard_bytes or source.shard_bytes or DEFAULT_SHARD_BYTES
        written = _write(source, ledger, config, home, most, as_in_memory=home != partial)
        receipt = replace(receipt, size_bytes=written.total_bytes, stored_out=written.num_tensors)
        receipt = compared(receipt, source, home, config, batch)
        if source.place is not None and optimizer.has_state(source.place.folder):
            receipt = replace(receipt, optimizer=optimizer.move_optimizer(source, ledger, home))
        receipt = replace(receipt, files=describe_files(home))
        (home / RECEIPT).write_text(receipt.to_json(), encoding="utf-8")
    in_memory = None if source.model is None else _build(source, ledger, config)
    return Converted(receipt=receipt, model=in_memory, folder=Path(out))


@contextmanager
def _home(source: Source, change: Change, ledger: Ledger, partial: Path) -> Iterator[Path]:
    """Where the model goes: the folder itself, or a checkpoint in it where a run in mid-training is to go on."""
    place, config = source.place, ledger.target.model.config
    if place is None or place.run is None or config.is_encoder_decoder:  # training takes no such model from a folder
        yield partial
        return
    is_mixture = config_is_ours(config) or bool(moe_layouts(ledger.target))
    if is_mixture and not config_is_ours(config) and config_is_ours(source.config):
        yield partial  # a model of ours that is exported is for others to serve
        return
    with new_run(place, partial, kind="moe" if is_mixture else "dense", method=change.method) as home:
        yield home


def _target_config(source: Source, wanted: PreTrainedConfig) -> PreTrainedConfig:
    config = copy.deepcopy(wanted)
    if source.model is not None:
        config.dtype = source.model.dtype
    return config


def _tensors(source: Source, ledger: Ledger) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the target once, near its neighbours in the source."""
    position = {name: index for index, name in enumerate(source.names)}
    work: list[tuple[int, str | Step]] = [(position[name], name) for name in ledger.kept]
    for step in ledger.steps:
        work.append((min((position[name] for name in step.takes), default=len(position)), step))
    ordered = sorted(work, key=lambda item: item[0])
    for _, one in tracked(ordered, "converting", len(ordered)):
        if isinstance(one, str):
            yield one, source.read(one)
            continue
        given = dict(one.run({name: source.read(name) for name in one.takes}))
        ledger.check(one, given)
        while given:
            # Let go of each as soon as it is passed on.
            name = next(iter(given))
            yield name, given.pop(name)


@torch.no_grad()
def _write(
    source: Source, ledger: Ledger, config: PreTrainedConfig, folder: Path, shard_bytes: int, *, as_in_memory: bool
) -> ShardWriter:
    # A run goes on from names in memory: those that its own checkpoints have.
    add = _as_they_are if as_in_memory else ToDisk(ledger.target).add
    shards = ShardWriter(folder, shard_bytes)
    for name, tensor in _tensors(source, ledger):
        for on_disk, part in add(name, tensor).items():
            shards.add(on_disk, part)
    shards.close()
    config.save_pretrained(folder)
    if source.folder is not None:
        for file in beside(source.folder):
            shutil.copy2(file, folder / file.name)
    elif source.model is not None and source.model.can_generate():
        source.model.generation_config.save_pretrained(folder)
    return shards


def _as_they_are(name: str, tensor: Tensor) -> dict[str, Tensor]:
    return {name: tensor}


def beside(folder: Path) -> list[Path]:
    """The files of a model folder that go along with any conversion: tokenizer, generation settings, licence."""
    return sorted({file for pattern in _BESIDE for file in folder.glob(pattern) if file.is_file()})


@torch.no_grad()
def _build(source: Source, ledger: Ledger, config: PreTrainedConfig) -> PreTrainedModel:
    # A copy: the new model must not share weights with the old one.
    state = {name: tensor.detach().clone() for name, tensor in _tensors(source, ledger)}
    state |= {name: state[saved_as] for name, saved_as in ledger.target.tied.items()}
    model = probes.built(type(ledger.target.model), config, state)
    if source.model is not None:
        # Buffers that are not saved were built on the CPU.
        cast(nn.Module, model).to(source.model.device)
        if source.model.can_generate() and model.can_generate():
            model.generation_config = copy.deepcopy(source.model.generation_config)
    return model


def _receipt(source: Source, change: Change, ledger: Ledger) -> Receipt:
    return Receipt(
        method=change.method,
        source=source.where,
        target=type(ledger.target.model).__name__,
        tensors_in=len(source.names) + len(source.dropped),
        tensors_out=len(ledger.kept) + ledger.num_made,
        kept=len(ledger.kept),
        consumed=ledger.num_consumed,
        made=ledger.num_made,
        dropped=dict(ledger.dropped),
        promised=change.promises,
        num_params=ledger.target.num_params,
        notes=change.notes,
        stored_in=source.num_stored,
    )


def _size_of(model: PreTrainedModel) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())


def _size_wanted(source: Source, ledger: Ledger) -> int:
    """About how many bytes the target takes, in the types of what it is made from."""
    types = [source.names[name].dtype for name in source.names] or [torch.float32]
    usual = max(set(types), key=types.count)
    sizes = {name: source.names[name].dtype.itemsize for name in ledger.kept}
    tensors = ledger.target.tensors
    return sum(math.prod(info.shape) * sizes.get(name, usual.itemsize) for name, info in tensors.items())


@contextmanager
def _writing(out: Path, source: Source, ledger: Ledger) -> Iterator[Path]:
    """Give an empty sibling folder to fill, and put it in place afterwards, or leave nothing."""
    if out.exists() and (out.is_file() or any(out.iterdir())):
        raise ConfigError(f"{out} is there already. Name a folder that does not exist yet.")
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        wanted, free = _size_wanted(source, ledger), shutil.disk_usage(partial).free
        if wanted > free:
            raise CheckpointError(
                f"The target needs about {wanted / 1e9:.2f} GB, and the disk of {out} has {free / 1e9:.2f} GB free. "
                "Free some space, or give another path."
            )
        yield partial
        flush(partial)
        if out.exists():
            out.rmdir()
        partial.rename(out)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if is_disk_full(error):
            raise CheckpointError(f"The disk is full at {out}; nothing was left there. Free some space.") from error
        if isinstance(error, SafetensorError):
            raise CheckpointError(
                f"A file could not be read or written on the way to {out}, where nothing was left ({error}). Check the "
                "disks, and who may read and write there."
            ) from error
        raise
