"""The shapes themselves, a file for each house that published them."""

from moesaic.zoo.models import (
    deepseek,
    deepspeed,
    early,
    google,
    grown,
    hybrid,
    mistral,
    open_models,
    qwen,
    scaled,
)
from moesaic.zoo.shape import ModelShape

MODELS: tuple[ModelShape, ...] = (
    *early.MODELS,
    *google.MODELS,
    *scaled.MODELS,
    *deepspeed.MODELS,
    *grown.MODELS,
    *mistral.MODELS,
    *deepseek.MODELS,
    *qwen.MODELS,
    *hybrid.MODELS,
    *open_models.MODELS,
)
