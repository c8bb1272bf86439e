"""What is written down of a family: the class that users load, and what its config wants beyond the small sizes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from tests.hf.families.inputs import text

Inputs = Callable[[PreTrainedModel, int], dict[str, Tensor]]


@dataclass(frozen=True, kw_only=True)
class Family:
    """How a tiny model of a family is made.

    Args:
        architecture: the class in the family's modeling module.
        changes: values for its config that win over ``sizes.SMALL``; a dict for a config inside it.
        home: the config inside which speaks of experts, when it is not the model's own.
        num_layers_moe: how many modules route tokens to experts.
        inputs: what a forward takes, from the model and a seed.
    """

    architecture: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    home: str | None = None
    num_layers_moe: int = 2
    inputs: Inputs = text


def causal(prefix: str, *, num_layers_moe: int = 2, **changes: Any) -> Family:
    """A language model whose config is its own."""
    return Family(architecture=f"{prefix}ForCausalLM", changes=changes, num_layers_moe=num_layers_moe)


def conditional(prefix: str, *, num_layers_moe: int = 2, inputs: Inputs = text, **changes: Any) -> Family:
    """A model of images and text whose experts are in the text part; it is given text unless ``inputs`` says more."""
    return Family(
        architecture=f"{prefix}ForConditionalGeneration",
        changes=changes,
        home="text_config",
        num_layers_moe=num_layers_moe,
        inputs=inputs,
    )


ROPE = {"rope_type": "default", "rope_theta": 10_000.0}
# Stretched by as much as the 64 positions here are more than 32; transformers warns of any other factor.
YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 2.0, "original_max_position_embeddings": 32}
LINEAR = ["linear_attention", "full_attention", "linear_attention"]
SPARSE_AFTER_DENSE = ["dense", "sparse", "sparse"]
