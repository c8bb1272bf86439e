"""Load a sparse model so that no tensor is lost and no expert is left at random values."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from moesaic.core.errors import CheckpointError
from moesaic.hf.block import SparseBlock

_NAMES_SHOWN = 5


def load_checked(load: Callable[..., Any], name: str, source: Any, *args: Any, **kwargs: Any) -> Any:
    """Run ``load``, a ``from_pretrained``, and refuse what does not fit.

    A folder may be read with another head than it was saved with. Then tensors of heads are transformers' business,
    as they are when ``ignore_mismatched_sizes`` is passed; those below the heads are not.

    Args:
        load: the ``from_pretrained`` of the dense class, bound.
        name: of the class that is loaded.
        source: folder, or name on a hub.
        args: for ``load``.
        kwargs: for ``load``.
    Raises:
        CheckpointError: if tensors are missing, left over or of another shape, or cannot be read.
    """
    _require_safetensors(source, kwargs)
    wants_info = kwargs.pop("output_loading_info", False)
    lenient = kwargs.pop("ignore_mismatched_sizes", False)
    try:
        model, info = load(
            source, *args, output_loading_info=True, ignore_mismatched_sizes=True, use_safetensors=True, **kwargs
        )
    except (SafetensorError, FileNotFoundError) as error:
        raise CheckpointError(
            f"The weights in {source} are damaged, cut short or incomplete ({error}). Copy the folder again from "
            "where it was saved, or go back to an earlier checkpoint."
        ) from error
    saved_as = model.config.architectures or [name]
    _check(model, info, source, only_below_heads=lenient or name not in saved_as)
    for part in model.modules():
        if isinstance(part, SparseBlock):
            part.freeze()
    return (model, info) if wants_info else model


def _require_safetensors(source: Any, kwargs: dict[str, Any]) -> None:
    if kwargs.pop("use_safetensors", None) is False:
        raise CheckpointError(
            "Sparse models are read from safetensors only, got use_safetensors=False: other files can run code when "
            "they are read. Save the model again with save_pretrained."
        )
    if source is None or kwargs.get("state_dict") is not None or kwargs.get("gguf_file") is not None:
        return
    folder = Path(source) / kwargs.get("subfolder", "")
    if folder.is_dir() and not any(folder.glob("*.safetensors")):
        present = ", ".join(sorted(file.name for file in folder.iterdir())) or "nothing"
        raise CheckpointError(
            f"{folder} must hold the weights as safetensors, got {present}. Save the model again with save_pretrained."
        )


def _check(model: Any, info: dict[str, Any], source: Any, *, only_below_heads: bool) -> None:
    missing, unexpected = set(info["missing_keys"]), set(info["unexpected_keys"])
    misshapen = {key: (tuple(saved), tuple(built)) for key, saved, built in info["mismatched_keys"]}
    if only_below_heads:
        prefix = model.base_model_prefix + "." if model.base_model is not model else ""
        missing = {key for key in missing if key.startswith(prefix)}
        misshapen = {key: shapes for key, shapes in misshapen.items() if key.startswith(prefix)}
        unexpected = {key for key in unexpected if any(f"{path}." in key for path in model.config.moesaic["layers"])}
    faults = []
    if missing:
        faults.append(f"missing are {_listed(missing)}")
    if unexpected:
        faults.append(f"left over are {_listed(unexpected)}")
    if misshapen:
        shapes = {f"{key} (saved {saved}, built {built})" for key, (saved, built) in misshapen.items()}
        faults.append(f"of another shape are {_listed(shapes)}")
    if faults:
        raise CheckpointError(
            f"The weights in {source} must be those that its config.json describes, but {'; '.join(faults)}. "
            "Copy the folder again from where it was saved."
        )


def _listed(keys: set[str]) -> str:
    shown = sorted(keys)[:_NAMES_SHOWN]
    rest = len(keys) - len(shown)
    return ", ".join(shown) + (f" and {rest} more" if rest else "")
