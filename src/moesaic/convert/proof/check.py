"""See that a converted folder is still what its receipt says."""

from __future__ import annotations

from pathlib import Path

from moesaic.convert.checkpoint.run_folder import find_model
from moesaic.convert.checkpoint.source import open_source
from moesaic.convert.proof.receipt import RECEIPT, Receipt, describe_files
from moesaic.core.errors import CheckpointError


def check_folder(folder: str | Path) -> Receipt:
    """Compare every file of a folder with its receipt, and its tensors with what its configuration describes.

    Files that came later are no fault.

    Raises:
        CheckpointError: naming the first file that is missing or changed, or the first tensor that is out of place.
    """
    folder = Path(folder)
    folder = find_model(folder).folder
    receipt = Receipt.load(folder)
    found = describe_files(folder)
    for name, wanted in receipt.files.items():
        if name not in found:
            raise CheckpointError(f"{folder} lacks {name}, which its {RECEIPT} lists. Convert the model again.")
        for what in ("size_bytes", "sha256"):
            if found[name][what] != wanted[what]:
                raise CheckpointError(
                    f"{folder / name} is not what was written: its {what} is {found[name][what]}, and "
                    f"{wanted[what]} in {RECEIPT}. Convert the model again, or copy the folder again."
                )
    source = open_source(folder)
    names, tensors = source.names, source.blueprint.tensors
    wrong = sorted(
        name
        for name in names.keys() | tensors.keys()
        if name not in names or name not in tensors or names[name].shape != tensors[name].shape
    )
    if wrong:
        raise CheckpointError(
            f"The tensors in {folder} are not those that its config.json describes: {len(wrong)} differ, the first is "
            f"{wrong[0]}. Convert the model again."
        )
    return receipt
