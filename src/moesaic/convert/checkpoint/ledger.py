"""The books of a conversion: every source tensor is used once, every target tensor is made once, or nothing happens."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from moesaic.convert.checkpoint.blueprint import Blueprint, TensorInfo
from moesaic.convert.checkpoint.source import Source
from moesaic.convert.steps import Change, Step
from moesaic.core.errors import CheckpointError

_NAMES_SHOWN = 5


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Ledger:
    """What becomes of each tensor, settled before the first is read.

    Attributes:
        kept: names of tensors that go over as they are, in the source's order.
        steps: the others, each where the first tensor that it takes stands in the source's order.
        dropped: names of source tensors that have no place in the target, with the reason.
        target: what the target must hold.
    """

    kept: tuple[str, ...]
    steps: tuple[Step, ...]
    dropped: Mapping[str, str]
    target: Blueprint

    @classmethod
    def of(cls, source: Source, change: Change, target: Blueprint) -> Ledger:
        """Settle the books.

        Raises:
            CheckpointError: naming the first tensors that are missing, taken or made twice, left over or misshapen.
        """
        taken = [name for step in change.steps for name in step.takes]
        made = [name for step in change.steps for name in step.gives]
        _refuse(source, "takes tensors that the source does not have", (n for n in taken if n not in source.names))
        _refuse(source, "takes tensors twice", _repeated(taken))
        gone = set(taken)
        kept = tuple(name for name in source.names if name not in gone)
        _refuse(source, "makes tensors twice, or makes what it also keeps", _repeated([*kept, *made]))
        there = {*kept, *made}
        missing = (name for name in target.tensors if name not in there and not target.may_lack(name))
        _refuse(source, "leaves tensors of the target missing", missing)
        _refuse(source, "leaves tensors over that the target does not have", there - target.tensors.keys())
        shapes = (
            f"{name} {source.names[name].shape}, needed {target.tensors[name].shape}"
            for name in kept
            if source.names[name].shape != target.tensors[name].shape
        )
        _refuse(source, "keeps tensors whose shape does not fit the target", shapes)
        position = {name: index for index, name in enumerate(source.names)}
        steps = sorted(
            change.steps, key=lambda step: min((position[name] for name in step.takes), default=len(position))
        )
        reasons = {name: step.why or change.method for step in change.steps if not step.gives for name in step.takes}
        return cls(kept=kept, steps=tuple(steps), dropped={**source.dropped, **reasons}, target=target)

    @property
    def num_consumed(self) -> int:
        """Source tensors that steps took."""
        return sum(len(step.takes) for step in self.steps)

    @property
    def num_made(self) -> int:
        """Target tensors that steps gave."""
        return sum(len(step.gives) for step in self.steps)

    def check(self, step: Step, given: Mapping[str, Tensor]) -> None:
        """See that a step gave what it said, in the shapes of the target.

        Raises:
            CheckpointError: naming the first tensors that it did not give, or that are misshapen.
        """
        target: Mapping[str, TensorInfo] = self.target.tensors
        if set(given) != set(step.gives):
            _fail("A step gave other tensors than it said", sorted(set(given) ^ set(step.gives)))
        wrong = [
            f"{name} {tuple(tensor.shape)}, needed {target[name].shape}"
            for name, tensor in given.items()
            if tuple(tensor.shape) != target[name].shape
        ]
        if wrong:
            _fail("A step gave tensors whose shape does not fit the target", wrong)


def _refuse(source: Source, what: str, names: Iterable[str]) -> None:
    found = sorted(names)
    if found:
        _fail(f"The conversion of {source.where} {what}", found)


def _fail(what: str, names: list[str]) -> None:
    rest = len(names) - _NAMES_SHOWN
    listed = ", ".join(names[:_NAMES_SHOWN]) + (f" and {rest} more" if rest > 0 else "")
    raise CheckpointError(
        f"{what}: {listed}. Every tensor must be used once and have its place; check that the folder is complete and "
        "that its config.json describes it."
    )


def _repeated(names: Iterable[str]) -> set[str]:
    seen: set[str] = set()
    return {name for name in names if name in seen or seen.add(name)}  # type: ignore[func-returns-value]
