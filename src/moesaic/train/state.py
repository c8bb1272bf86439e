"""Optimizer, scheduler and random generators as safetensors and JSON: no pickle is written, none is read."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from moesaic.core.errors import CheckpointError

OPTIMIZER, SCHEDULER, RNG = "optimizer", "scheduler", "rng"


def save_optimizer(optimizer: torch.optim.Optimizer, folder: Path, model: nn.Module | None = None) -> None:
    """Write an optimizer's state: tensors to ``optimizer.safetensors``, the rest to ``optimizer.json``.

    Args:
        optimizer: its state is written.
        folder: to write to.
        model: whose parameters it moves; their names then tell which state belongs to which.
    """
    state = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    values: dict[str, dict[str, Any]] = {}
    for index, entries in state["state"].items():
        for key, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"{index}.{key}"] = value.detach().contiguous().cpu()
            else:
                values.setdefault(str(index), {})[key] = value
    rest = {"param_groups": state["param_groups"], "values": values, "names": _names(optimizer, model)}
    _write(folder, OPTIMIZER, tensors, rest)


def load_optimizer(optimizer: torch.optim.Optimizer, folder: Path, model: nn.Module | None = None) -> None:
    """Read back what :func:`save_optimizer` wrote.

    Args:
        optimizer: takes the state.
        folder: to read from.
        model: whose parameters it moves. State that was saved with names finds its parameter by name then, in whatever
            order they stand: a conversion may have changed it.
    Raises:
        CheckpointError: if it is missing, damaged, or belongs to another model.
    """
    tensors, rest = _read(folder, OPTIMIZER)
    own = optimizer.state_dict()
    names, saved_names = _names(optimizer, model), rest.get("names")
    if names is not None and saved_names is not None:
        tensors, rest = _by_name(tensors, rest, own, names, folder)
    if [len(group["params"]) for group in rest["param_groups"]] != [len(g["params"]) for g in own["param_groups"]]:
        raise CheckpointError(
            f"{folder / OPTIMIZER}.json has {_sizes(rest['param_groups'])} parameters in its groups, this model has "
            f"{_sizes(own['param_groups'])}. Resume with the settings that the run was started with."
        )
    state: dict[int, dict[str, Any]] = {int(index): dict(entries) for index, entries in rest["values"].items()}
    for name, tensor in tensors.items():
        index, key = name.split(".", 1)
        state.setdefault(int(index), {})[key] = tensor
    groups = [{key: _tuple(value) for key, value in group.items()} for group in rest["param_groups"]]
    for group in groups:
        group["params"] = list(group["params"])
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _names(optimizer: torch.optim.Optimizer, model: nn.Module | None) -> list[str] | None:
    """The names of an optimizer's parameters, in its order."""
    if model is None:
        return None
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]


def _by_name(
    tensors: dict[str, Tensor], rest: dict[str, Any], own: dict[str, Any], names: list[str], folder: Path
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Saved state in the order of an optimizer's own parameters, with the saved settings of each group.

    Raises:
        CheckpointError: naming the first parameter that only one of them has.
    """
    saved: list[str] = rest["names"]
    differing = sorted(set(names) ^ set(saved))
    if differing or len(rest["param_groups"]) != len(own["param_groups"]):
        first = differing[0] if differing else f"group {len(own['param_groups'])}"
        raise CheckpointError(
            f"{folder / OPTIMIZER}.json is of other parameters than this model has: {len(differing)} differ, the first "
            f"is {first}. Resume with the settings that the run was started with."
        )
    index_of = {str(saved.index(name)): str(index) for index, name in enumerate(names)}
    moved = {f"{index_of[key.split('.', 1)[0]]}.{key.split('.', 1)[1]}": tensor for key, tensor in tensors.items()}
    values = {index_of[index]: entries for index, entries in rest["values"].items()}
    groups = [
        {**group, "params": mine["params"]}
        for group, mine in zip(rest["param_groups"], own["param_groups"], strict=True)
    ]
    return moved, {**rest, "values": values, "param_groups": groups}


def save_scheduler(scheduler: Any, folder: Path) -> None:
    """Write a learning-rate schedule's state to ``scheduler.json``."""
    _write(folder, SCHEDULER, None, scheduler.state_dict())


def load_scheduler(scheduler: Any, folder: Path) -> None:
    """Read back what :func:`save_scheduler` wrote.

    Raises:
        CheckpointError: if it is missing or damaged.
    """
    scheduler.load_state_dict(read_json(folder / f"{SCHEDULER}.json"))


def save_rng(folder: Path, rank: int = 0) -> None:
    """Write the state of Python's, NumPy's and torch's random generators for one process."""
    version, words, gauss = random.getstate()
    legacy: Mapping[str, Any] = np.random.get_state(legacy=False)
    tensors = {"cpu": torch.random.get_rng_state(), "numpy": torch.from_numpy(legacy["state"]["key"].copy())}
    if torch.cuda.is_available():
        tensors["cuda"] = torch.cuda.random.get_rng_state()
    numpy = {"pos": int(legacy["state"]["pos"]), "has_gauss": int(legacy["has_gauss"]), "gauss": float(legacy["gauss"])}
    rest = {"python": {"version": version, "words": words, "gauss": gauss}, "numpy": numpy}
    _write(folder, _rng_name(rank), tensors, rest)


def load_rng(folder: Path, rank: int = 0) -> None:
    """Read back what :func:`save_rng` wrote.

    Raises:
        CheckpointError: if it is missing or damaged.
    """
    tensors, rest = _read(folder, _rng_name(rank))
    python, numpy = rest["python"], rest["numpy"]
    random.setstate((python["version"], tuple(python["words"]), python["gauss"]))
    np.random.set_state(("MT19937", tensors["numpy"].numpy(), numpy["pos"], numpy["has_gauss"], numpy["gauss"]))
    torch.random.set_rng_state(tensors["cpu"])
    if torch.cuda.is_available() and "cuda" in tensors:
        torch.cuda.random.set_rng_state(tensors["cuda"])


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file.

    Raises:
        CheckpointError: if it is missing, cut short or something else.
    """
    try:
        return safetensors.torch.load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{path} is not a readable safetensors file ({error}). Go back to an older checkpoint."
        ) from error


def _rng_name(rank: int) -> str:
    return RNG if rank == 0 else f"{RNG}-{rank}"


def _write(folder: Path, name: str, tensors: dict[str, Tensor] | None, rest: Mapping[str, Any]) -> None:
    try:
        text = json.dumps(rest)
    except TypeError as error:
        raise CheckpointError(
            f"the state of the {name} cannot be saved without pickle: {error}. "
            "Use one whose state is tensors and numbers."
        ) from error
    folder.mkdir(parents=True, exist_ok=True)
    if tensors is not None:
        safetensors.torch.save_file(tensors, folder / f"{name}.safetensors")
    (folder / f"{name}.json").write_text(text)


def _read(folder: Path, name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    return read_tensors(folder / f"{name}.safetensors"), read_json(folder / f"{name}.json")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file of a checkpoint.

    Raises:
        CheckpointError: if it is missing or damaged.
    """
    try:
        value: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not readable JSON ({error}). Go back to an older checkpoint.") from error
    return value


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _sizes(groups: list[dict[str, Any]]) -> str:
    return " + ".join(str(len(group["params"])) for group in groups)
