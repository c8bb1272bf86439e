"""Whether tokens of a sparse model may see later ones: such a model can be trained, but not generated from."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any, cast

from transformers import PreTrainedModel

from moesaic import recipes
from moesaic.core.errors import ConfigError
from moesaic.hf.spec import SparseSpec


def warn_of_later_tokens(model: PreTrainedModel, spec: SparseSpec) -> None:
    """Say so if a causal language model would get layers in which a token's experts depend on later tokens.

    Args:
        model: dense.
        spec: what goes where.
    """
    if _sees_later_tokens(model, spec):
        warnings.warn(
            f"In recipe {spec.recipe} a token's experts depend on later tokens of its sequence, in evaluation too. "
            f"{type(model).__name__} predicts later tokens: its losses, held-out ones too, see part of the answer "
            "and do not compare with those of other models, and generate is refused. Use the recipe in encoders.",
            UserWarning,
            stacklevel=3,
        )


def refusing(generate: Callable[..., Any]) -> Callable[..., Any]:
    """``generate``, refused where tokens would need later ones that are not written yet."""

    @functools.wraps(generate)
    def checked(self: Any, *args: Any, **kwargs: Any) -> Any:
        spec = SparseSpec.from_dict(self.config.moesaic)
        if _sees_later_tokens(self, spec):
            raise ConfigError(
                f"generate needs layers in which a token does not depend on later ones, got recipe {spec.recipe}, in "
                "which it does, in evaluation too. Use a recipe whose causality is 'causal' or 'in evaluation'."
            )
        return generate(self, *args, **kwargs)

    return checked


def _sees_later_tokens(model: PreTrainedModel, spec: SparseSpec) -> bool:
    if recipes.get(spec.recipe).causality != "never" or not model.can_generate():
        return False
    if not model.config.is_encoder_decoder:
        return True
    # An encoder may look ahead.
    base = cast(PreTrainedModel, model.base_model)
    encoder = next((path for path, module in base.named_modules() if module is base.get_encoder()), "")
    return any(not path.startswith(f"{encoder}.") for path in spec.layers)
