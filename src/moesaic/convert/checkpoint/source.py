"""Checkpoints to convert from: a folder that is read tensor by tensor, or a model in memory.

Names and shapes are those of the model's own ``state_dict``, wherever it comes from and however it is stored.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from moesaic.convert.checkpoint.blueprint import Blueprint, TensorInfo, info_of
from moesaic.convert.checkpoint.disk import FromDisk, Group
from moesaic.convert.checkpoint.run_folder import Place, find_model
from moesaic.core.errors import CheckpointError, ConfigError

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


class Source(Protocol):
    """A checkpoint to read from.

    Attributes:
        where: what to call it in messages and receipts.
        config: of its model, with ``architectures``.
        names: every tensor by its name in the model's ``state_dict``; of tied weights one name.
        dropped: what is on disk and no model of this class reads, with the reason.
        blueprint: of its model.
        folder: where it lies; None for a model in memory.
        place: the same, with the training run that it is a checkpoint of; None for a model in memory.
        model: in memory; None for a folder.
        shard_bytes: size of its largest file if it has several; None for one file and for a model in memory.
        num_stored: tensors in its files; None for a model in memory.
    """

    where: str
    config: PreTrainedConfig
    names: Mapping[str, TensorInfo]
    dropped: Mapping[str, str]
    blueprint: Blueprint
    folder: Path | None
    place: Place | None
    model: PreTrainedModel | None
    shard_bytes: int | None
    num_stored: int | None

    def read(self, name: str) -> Tensor:
        """The tensor of that name."""


def open_source(where: str | Path | PreTrainedModel) -> Source:
    """Open a checkpoint: a Hugging Face folder, a run folder of ours (its newest good model), or a model in memory.

    Nothing is read yet but names and shapes. Pickled files are never read.

    Raises:
        CheckpointError: if the folder is damaged, incomplete, quantized, or holds no safetensors.
        ConfigError: if it is neither a folder nor a transformers model.
    """
    if isinstance(where, PreTrainedModel):
        return MemorySource(where)
    if not isinstance(where, str | Path):
        raise ConfigError(
            f"A conversion starts from a folder or a transformers model, got {type(where).__name__}. "
            "Pass a path, or the model itself."
        )
    return FolderSource(find_model(Path(where)))


class MemorySource:
    """A model in memory, which stays as it is.

    Args:
        model: of transformers, or ours.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.where = type(model).__name__
        self.config = copy.deepcopy(model.config)
        self.config.architectures = [type(model).__name__]
        self.blueprint = Blueprint.from_model(model)
        self.names = self.blueprint.tensors
        self.dropped: Mapping[str, str] = {}
        self.folder: Path | None = None
        self.place: Place | None = None
        self.model: PreTrainedModel | None = model
        self.shard_bytes: int | None = None
        self.num_stored: int | None = None
        self._state = model.state_dict()

    def read(self, name: str) -> Tensor:
        """The model's own tensor: copy it before you change it."""
        tensor: Tensor = self._state[name]
        return tensor


class FolderSource:
    """A folder with ``config.json`` and safetensors, mapped into memory and read when asked.

    Args:
        place: where the model lies.
    Raises:
        CheckpointError: see :func:`open_source`.
    """

    def __init__(self, place: Place) -> None:
        folder = place.folder
        self.folder: Path | None = folder
        self.place: Place | None = place
        self.where = str(folder)
        self.config = read_config(folder)
        self.model: PreTrainedModel | None = None
        self.blueprint = Blueprint.of(self.config)
        self._file_of, self._files = _open_files(folder)
        sizes = [(folder / file).stat().st_size for file in self._files]
        self.shard_bytes: int | None = max(sizes) if len(sizes) > 1 else None
        self.num_stored: int | None = len(self._file_of)
        found = {name: _info(self._files[file], name) for name, file in self._file_of.items()}
        disk = FromDisk(self.blueprint, found)
        self._group_of = disk.group_of
        self._last: tuple[Group, dict[str, Tensor]] | None = None
        self._alias: dict[str, str] = {}
        self.names: Mapping[str, TensorInfo] = dict(disk.tensors)
        self.dropped: Mapping[str, str] = disk.dropped
        self.names, self.dropped = self._untied()

    def read(self, name: str) -> Tensor:
        """Read one tensor, or the stack that it becomes in memory."""
        name = self._alias.get(name, name)
        group = self._group_of[name]
        if self._last is None or self._last[0] is not group:
            tensors = {one: self._files[self._file_of[one]].get_tensor(one) for one in group.takes}
            self._last = group, group.run(tensors, self.blueprint)
        made = self._last[1]
        if len(made) == 1:
            self._last = None
        return made[name]

    def _untied(self) -> tuple[dict[str, TensorInfo], dict[str, str]]:
        """Keep one name of tied weights that a folder holds twice, or under their other name."""
        names, dropped = dict(self.names), dict(self.dropped)
        for name, saved_as in self.blueprint.tied.items():
            if name not in names:
                continue
            if saved_as not in names:
                names[saved_as] = names.pop(name)
                self._alias[saved_as] = name
                continue
            if not torch.equal(self.read(name), self.read(saved_as)):
                raise CheckpointError(
                    f"{self.where} has tie_word_embeddings, or another tie, in its config.json, but {name} and "
                    f"{saved_as} differ. Set tie_word_embeddings to false if they shall."
                )
            del names[name]
            dropped[self._group_of[name].takes[0]] = f"tied to {saved_as}"
        return names, dropped


class JoinedSource:
    """Several checkpoints as one: tensors of the second and later ones have names that start with "1:", "2:" and so on.

    Configuration, files and probe are those of the first.

    Args:
        sources: at least one.
    """

    def __init__(self, sources: Sequence[Source]) -> None:
        first = sources[0]
        self.sources = tuple(sources)
        self.where = " + ".join(source.where for source in sources)
        self.config, self.blueprint = first.config, first.blueprint
        self.folder, self.model, self.shard_bytes = first.folder, first.model, first.shard_bytes
        # One state of an optimizer cannot be that of several models.
        self.place: Place | None = None
        stored = [source.num_stored for source in sources]
        self.num_stored = None if None in stored else sum(count for count in stored if count is not None)
        self.names: Mapping[str, TensorInfo] = {
            _prefixed(index, name): info for index, source in enumerate(sources) for name, info in source.names.items()
        }
        self.dropped: Mapping[str, str] = {
            _prefixed(index, name): why for index, source in enumerate(sources) for name, why in source.dropped.items()
        }

    def read(self, name: str) -> Tensor:
        """The tensor of that name."""
        number, colon, rest = name.partition(":")
        return self.sources[int(number)].read(rest) if colon else self.sources[0].read(name)


def joined(sources: Sequence[Source]) -> Source:
    """Join several checkpoints into one to convert from; see :class:`JoinedSource`."""
    return JoinedSource(sources)


def _prefixed(index: int, name: str) -> str:
    return f"{index}:{name}" if index else name


def read_config(folder: Path) -> PreTrainedConfig:
    """Read the configuration of a model folder.

    Raises:
        CheckpointError: if it is not readable, or of a quantized model.
    """
    from transformers import AutoConfig

    from moesaic.hf.register import register

    register()
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(str(folder), local_files_only=True)
    except CheckpointError:
        raise
    except Exception as error:  # transformers raises what it likes
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise CheckpointError(
            f"{folder} has no readable config.json ({reason}). Name the folder of a Hugging Face model or a run."
        ) from error
    if getattr(config, "quantization_config", None) is not None:
        raise CheckpointError(
            f"{folder} holds a quantized model, whose tensors are codes and not weights. "
            "Convert the model that it was made from, and quantize the result."
        )
    return config


def _open_files(folder: Path) -> tuple[dict[str, str], dict[str, Any]]:
    """The file that holds each tensor, and the files, opened."""
    if (folder / INDEX).is_file():
        try:
            file_of: dict[str, str] = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{folder / INDEX} cannot be read. Copy the folder again.") from error
        files = {file: open_tensors(folder / file) for file in sorted(set(file_of.values()))}
        held = {name: file for file, handle in files.items() for name in handle.keys()}  # noqa: SIM118
        wrong = sorted(name for name in held.keys() | file_of.keys() if held.get(name) != file_of.get(name))
        if wrong:
            raise CheckpointError(
                f"{folder / INDEX} and the files differ in {len(wrong)} tensors, the first is {wrong[0]}: in "
                f"{file_of.get(wrong[0])} by the index, in {held.get(wrong[0])} in fact. Copy the folder again."
            )
        return file_of, files
    if (folder / SINGLE).is_file():
        handle = open_tensors(folder / SINGLE)
        return dict.fromkeys(handle.keys(), SINGLE), {SINGLE: handle}
    present = ", ".join(sorted(file.name for file in folder.iterdir())) or "nothing"
    raise CheckpointError(
        f"{folder} must hold the weights as safetensors ({SINGLE}, or files that {INDEX} names), got {present}. "
        "Other formats can run code when they are read: save the model again with save_pretrained."
    )


def open_tensors(file: Path) -> Any:
    """Open a file of tensors to read them one by one.

    Raises:
        CheckpointError: if it is damaged or missing.
    """
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{file} is damaged, cut short or missing ({error}). Copy it again from where it was saved."
        ) from error


def _info(handle: Any, name: str) -> TensorInfo:
    part = handle.get_slice(name)
    dtype = _DTYPES.get(part.get_dtype())
    if dtype is None:
        raise CheckpointError(
            f"Tensor {name} is of type {part.get_dtype()}, readable are {', '.join(_DTYPES)}. "
            "Convert the model in a format that holds plain numbers."
        )
    return TensorInfo(shape=tuple(part.get_shape()), dtype=dtype)


__all__ = ["FolderSource", "JoinedSource", "MemorySource", "Source", "info_of", "joined", "open_source", "read_config"]
