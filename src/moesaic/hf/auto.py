"""What transformers' Auto classes are told: how to read a sparse model's folder, and which classes build it.

This is read as soon as transformers' configurations are: what models need is imported late.
"""

from __future__ import annotations

import inspect
from typing import Any

from transformers import PreTrainedConfig

from moesaic.core.errors import CheckpointError
from moesaic.hf.config import MODEL_TYPE, sparse_config_class
from moesaic.hf.spec import SparseSpec


class MoesaicConfig(PreTrainedConfig):  # type: ignore[no-untyped-call]
    """What transformers finds under ``model_type: moesaic``: reads the file, gives the subclass that belongs to it."""

    model_type = MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """The configuration of a sparse model, of a class derived from its dense model's configuration.

        Raises:
            CheckpointError: if the entry is damaged, of a newer version, or of a model that transformers lacks.
        """
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING

        SparseSpec.from_dict(config_dict.get("moesaic"))
        base = config_dict.get("base_model_type")
        if not isinstance(base, str) or base not in CONFIG_MAPPING:
            raise CheckpointError(
                f"This model's config.json names the dense model {base!r}, which transformers does not have. "
                "Update transformers, or copy the folder again from where it was saved."
            )
        config_class = sparse_config_class(CONFIG_MAPPING[base])
        join_auto_classes(config_class)
        return config_class.from_dict(config_dict, **kwargs)


def join_auto_classes(config_class: type[Any]) -> None:
    """Let each Auto class that knows the dense model know the sparse one."""
    import transformers.models.auto.modeling_auto as auto

    from moesaic.hf import lstm
    from moesaic.hf.modeling import sparse_class

    lstm.join_auto_classes()
    dense = config_class.dense_class
    for auto_class in vars(auto).values():
        mapping = getattr(auto_class, "_model_mapping", None)
        if mapping is None or not inspect.isclass(auto_class) or dense not in mapping:
            continue
        known = mapping[dense]
        sparse = tuple(map(sparse_class, known)) if isinstance(known, tuple | list) else sparse_class(known)
        mapping.register(config_class, sparse, exist_ok=True)
