"""The receipt of a conversion: what went in, what came out, and how far the two models are apart."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from moesaic.core.errors import CheckpointError

RECEIPT = "receipt.json"
FORMAT_VERSION = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Receipt:
    """What a conversion did.

    Attributes:
        method: what was done.
        source: what was read.
        target: the class of the model that was made.
        tensors_in: tensors of the source, as its model holds them; files may have one for each expert where the model
            has a stack.
        tensors_out: tensors of the target, likewise.
        kept: tensors that went over as they are.
        consumed: source tensors that steps took.
        made: target tensors that steps gave.
        dropped: source tensors without a place in the target, with the reason.
        num_params: parameters of the target.
        size_bytes: of all its weights.
        stored_in: tensors in the source's files; None for a model in memory.
        stored_out: tensors in the target's files, likewise.
        largest_logit_difference: absolute, on the probe; None where there was no probe, or the logits are
            not of the same things.
        largest_logit: of the source on the probe; None without one.
        equal_routes: share of (layer, token) that go to the same experts in both models; None where one of them is
            dense, or they have other experts.
        probe_tokens: tokens of the probe that are no padding; 0 without one.
        probe_dtype: precision in which both models ran; None without a probe.
        promised: the difference that the method allows itself, times the largest logit if that is above 1; None if it
            promises nothing.
        notes: what the method has to say.
        optimizer: what became of the optimizer's state; None if the source has none.
        files: size and checksum of each file beside this one; empty for a model in memory.
    """

    method: str
    source: str
    target: str
    tensors_in: int
    tensors_out: int
    kept: int
    consumed: int
    made: int
    dropped: Mapping[str, str]
    promised: float | None
    num_params: int
    size_bytes: int = 0
    stored_in: int | None = None
    stored_out: int | None = None
    largest_logit_difference: float | None = None
    largest_logit: float | None = None
    equal_routes: float | None = None
    probe_tokens: int = 0
    probe_dtype: str | None = None
    notes: tuple[str, ...] = ()
    optimizer: str | None = None
    files: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def to_json(self) -> str:
        """As JSON, with a line for each field."""
        return json.dumps({"format_version": FORMAT_VERSION, **asdict(self)}, indent=1) + "\n"

    def __str__(self) -> str:
        moved = f"{self.kept} kept, {self.consumed} consumed, {self.made} made, {len(self.dropped)} dropped"
        size = f"{self.size_bytes / 1e9:.2f} GB" if self.size_bytes >= 1e8 else f"{self.size_bytes / 1e6:.2f} MB"
        return f"{self.method}: {self.tensors_in} tensors in, {self.tensors_out} out ({moved}), {size}; {self._gap}."

    @property
    def _gap(self) -> str:
        if not self.probe_tokens:
            return "not probed"
        told = []
        if self.largest_logit_difference is not None:
            promised = "nothing promised" if self.promised is None else f"promised {self.promised:.0e}"
            told.append(f"largest logit difference {self.largest_logit_difference:.1e} ({promised})")
        if self.equal_routes is not None:
            told.append(f"{self.equal_routes:.2%} of routes equal")
        return (", ".join(told) or "nothing to compare") + f", on {self.probe_tokens} tokens in {self.probe_dtype}"

    @classmethod
    def load(cls, folder: Path) -> Receipt:
        """Read the receipt of a folder.

        Raises:
            CheckpointError: if there is none, or it is damaged or of another version.
        """
        try:
            values = json.loads((folder / RECEIPT).read_text(encoding="utf-8"))
            version = values.pop("format_version")
            if version != FORMAT_VERSION:
                raise CheckpointError(
                    f"{folder / RECEIPT} is of format {version}, this version of Moesaic reads format {FORMAT_VERSION}."
                )
            return cls(**values | {"notes": tuple(values["notes"])})
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{folder} has no readable {RECEIPT} ({error}). Name a folder that moesaic convert has written."
            ) from error


def describe_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and checksum of every file of a folder but its receipt."""
    found = {}
    for file in sorted(folder.rglob("*")):
        if file.is_file() and file.name != RECEIPT:
            with file.open("rb") as stream:
                digest = hashlib.file_digest(stream, "sha256").hexdigest()
            found[str(file.relative_to(folder))] = {"size_bytes": file.stat().st_size, "sha256": digest}
    return found
