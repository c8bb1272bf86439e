"""The state of an optimizer, carried through a conversion by the same maps as the weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from moesaic.convert.checkpoint.ledger import Ledger
from moesaic.convert.checkpoint.source import Source, open_tensors
from moesaic.convert.steps import Step
from moesaic.core.errors import CheckpointError

# As training names them.
TENSORS, REST = "optimizer.safetensors", "optimizer.json"
STEP = "step"


def has_state(folder: Path) -> bool:
    """Whether a model folder has an optimizer's state beside the weights."""
    return (folder / TENSORS).is_file() and (folder / REST).is_file()


def move_optimizer(source: Source, ledger: Ledger, out: Path) -> str:
    """Write the state that belongs to the target's parameters, and say what became of it.

    Moments follow the weights: kept ones stay, those of a step go through its map for moments, and what is new starts
    from zero, as in an optimizer that has taken no step.

    Args:
        source: a folder with an optimizer's state.
        ledger: of the conversion.
        out: folder to write to.
    Raises:
        CheckpointError: if the state cannot be read, or is of other parameters.
    """
    assert source.folder is not None
    state = _State(source.folder)
    if state.names is None:
        return "its state does not tell which parameter it belongs to, and does not go along: go on from new moments"
    trained = [name for name, parameter in ledger.target.model.named_parameters() if parameter.requires_grad]
    wanted = [name for name in trained if name in ledger.target.tensors]
    made = _Made(wanted=set(wanted))
    for name in ledger.kept:
        if name in made.wanted and name in state.index:
            made.keep(name, state)
    for step in ledger.steps:
        made.map(step, source, state)
    for name in wanted:
        made.settle(name, ledger.target.tensors[name].shape)
    made.write(out, state, wanted)
    new = f", {len(made.new)} start from zero" if made.new else ""
    return f"moments of {len(wanted) - len(made.new)} parameters went along{new}"


class _State:
    """What training saved: tensors named ``<index>.<key>``, and the settings of each group."""

    def __init__(self, folder: Path) -> None:
        try:
            self.rest: dict[str, Any] = json.loads((folder / REST).read_text(encoding="utf-8"))
            self._file = open_tensors(folder / TENSORS)
            groups: list[dict[str, Any]] = self.rest["param_groups"]
            self.names: list[str] | None = self.rest.get("names")
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(
                f"The optimizer's state in {folder} cannot be read ({error}). Go back to an older checkpoint."
            ) from error
        self.index = {name: str(index) for index, name in enumerate(self.names or ())}
        self.group_of = {str(index): number for number, group in enumerate(groups) for index in group["params"]}
        self.keys_of: dict[str, list[str]] = {}
        for tensor in self._file.keys():  # noqa: SIM118
            index, key = tensor.split(".", 1)
            self.keys_of.setdefault(index, []).append(key)

    def read(self, name: str) -> dict[str, Tensor]:
        """All tensors of one parameter's state, by key."""
        index = self.index[name]
        return {key: self._file.get_tensor(f"{index}.{key}") for key in self.keys_of.get(index, ())}

    def values(self, name: str) -> dict[str, Any]:
        """What is no tensor of one parameter's state."""
        return dict(self.rest["values"].get(self.index[name], {}))


class _Made:
    """The target's state, as it grows.

    Args:
        wanted: parameters of the target that are trained.
    """

    def __init__(self, wanted: set[str]) -> None:
        self.wanted = wanted
        self.tensors: dict[str, dict[str, Tensor]] = {}
        self.values: dict[str, dict[str, Any]] = {}
        self.group: dict[str, int] = {}
        self.new: list[str] = []
        self.keys: dict[str, torch.dtype] = {}

    def keep(self, name: str, state: _State) -> None:
        """A parameter that went over as it was."""
        self.tensors[name] = state.read(name)
        self.values[name] = state.values(name)
        self.group[name] = state.group_of[state.index[name]]
        self.keys |= {key: tensor.dtype for key, tensor in self.tensors[name].items()}

    def map(self, step: Step, source: Source, state: _State) -> None:
        """Parameters that a step made; those that come from nothing that was trained are new."""
        trained = [name for name in step.takes if name in state.index and state.keys_of.get(state.index[name])]
        gives = [name for name in step.gives if name in self.wanted]
        if step.moments is None or not trained or not gives:
            return
        before = {name: state.read(name) for name in trained}
        like = before[trained[0]]
        for key in (key for key, tensor in like.items() if tensor.ndim or key != STEP):
            moments = {
                name: before[name][key] if name in before else torch.zeros(source.names[name].shape)
                for name in step.takes
            }
            given = step.moments(moments)
            for name in gives:
                self.tensors.setdefault(name, {})[key] = given[name].clone().contiguous()
        self.keys |= {key: tensor.dtype for key, tensor in like.items()}
        for name in gives:
            if not any(tensor.any() for tensor in self.tensors[name].values()):
                # New, whatever else the step made: its first step shall be the first.
                del self.tensors[name]
                continue
            if STEP in like:
                self.tensors[name][STEP] = like[STEP].clone()
            self.values[name] = state.values(trained[0])
            self.group[name] = state.group_of[state.index[trained[0]]]

    def settle(self, name: str, shape: tuple[int, ...]) -> None:
        """Check a parameter's state; a new one gets that of no step.

        Raises:
            CheckpointError: if a map for moments gave another shape than the weight has.
        """
        if name not in self.tensors:
            self.new.append(name)
            self.tensors[name] = {
                key: torch.zeros((), dtype=dtype) if key == STEP else torch.zeros(shape, dtype=dtype)
                for key, dtype in self.keys.items()
            }
            self.values[name] = {}
            self.group[name] = 0 if len(shape) > 1 else 1
        for key, tensor in self.tensors[name].items():
            if key != STEP and tensor.shape != shape:
                raise CheckpointError(
                    f"The conversion gives {name} the shape {shape} and its {key} the shape {tuple(tensor.shape)}. "
                    "This is a fault of the method: its map for moments must be that of the weights."
                )

    def write(self, out: Path, state: _State, names: list[str]) -> None:
        """Write the state in the form in which training saves it."""
        tensors = {
            f"{index}.{key}": tensor for index, name in enumerate(names) for key, tensor in self.tensors[name].items()
        }
        groups = state.rest["param_groups"]
        rest = {
            "param_groups": [
                {**group, "params": [i for i, name in enumerate(names) if self._number(name, groups) == number]}
                for number, group in enumerate(groups)
            ],
            "values": {str(index): self.values[name] for index, name in enumerate(names) if self.values[name]},
            "names": names,
        }
        safetensors.torch.save_file(tensors, out / TENSORS)
        (out / REST).write_text(json.dumps(rest), encoding="utf-8")

    def _number(self, name: str, groups: list[Mapping[str, Any]]) -> int:
        return min(self.group[name], len(groups) - 1)
