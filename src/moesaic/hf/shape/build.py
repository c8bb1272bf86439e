"""Build the model that a configuration describes, without memory for its weights and without the network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from moesaic.core.errors import CheckpointError, ConfigError
from moesaic.hf.auto import MoesaicConfig
from moesaic.hf.config import MODEL_TYPE

# The mappings that are asked in turn for a model whose configuration does not name its class.
_MAPPINGS = (
    modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING,
    modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    modeling_auto.MODEL_MAPPING,
)


def read_config(source: str | Path) -> PreTrainedConfig:
    """Read a ``config.json``, or that of a folder; nothing is fetched and no code of the file's is run.

    Args:
        source: path of the file or of the folder.

    Raises:
        CheckpointError: if there is no such file, or it is not JSON.
        ConfigError: if transformers knows no model of its type.
    """
    path = Path(source)
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise CheckpointError(
            f"A configuration was expected at {file}, got no such file. Give a config.json, a folder that holds one, "
            "or one of the names that moesaic zoo lists."
        )
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file} must be JSON, but: {error}. Copy the file again.") from error
    kind = fields.get("model_type") if isinstance(fields, dict) else None
    if kind == MODEL_TYPE:
        return cast(PreTrainedConfig, MoesaicConfig.from_dict(fields))
    if kind not in transformers.CONFIG_MAPPING:
        raise ConfigError(
            f"{file} must have a model_type that transformers {transformers.__version__} knows, got {kind!r}. "
            "Install a version that has it, or give the configuration of another model."
        )
    return AutoConfig.for_model(**fields)


def on_meta(config: PreTrainedConfig) -> PreTrainedModel:
    """Build a configuration's model with weights that have shapes and no values.

    Raises:
        ConfigError: if transformers has no model of this configuration.
    """
    kind = _class_of(config)
    with torch.device("meta"):
        return cast(PreTrainedModel, kind(config))


def _class_of(config: PreTrainedConfig) -> Any:
    for name in config.architectures or ():
        found = getattr(transformers, name, None)
        if found is not None:
            return found
    for mapping in _MAPPINGS:
        if type(config) in mapping:
            return mapping[type(config)]
    raise ConfigError(
        f"A configuration must be of a model that transformers builds, got {type(config).__name__}. "
        "Give the configuration of a language model, or one that names its class in architectures."
    )
