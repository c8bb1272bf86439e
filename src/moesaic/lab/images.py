"""A small vision transformer on scikit-learn's digits: where designs that look at all tokens at once belong."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from moesaic.core.errors import BackendError
from moesaic.lab.small import (
    TWIN,
    Outcome,
    Setup,
    changed_options,
    fit,
    hidden_of_equal_activity,
    measured,
    options_of,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

IMAGE_SIZE, PATCH_SIZE, NUM_CLASSES, HELD_OUT = 8, 2, 10, 450
COMPARED = ("switch", "mixtral")
"""Token-choice designs that the others are seen beside."""


def image_setup(setup: Setup) -> Setup:
    """The numbers of the classifier: as many steps and experts, but of a width that suits 8 by 8 pixels."""
    num_tokens = 1 + (IMAGE_SIZE // PATCH_SIZE) ** 2  # the class token, and one for each patch
    return replace(setup, width=32, layers=4, active_hidden=64, context=num_tokens, batch_size=64)


def needs_digits() -> None:
    """See that the images can be read.

    Raises:
        BackendError: naming the extra that brings them.
    """
    if find_spec("sklearn") is None:
        raise BackendError(
            "Images need scikit-learn's digits, got no scikit-learn. Install it with: pip install 'moesaic[lab]'"
        )


def run_images(name: str, seed: int, setup: Setup) -> Outcome:
    """Train a classifier whose second half of layers is MoE, or its dense twin, and measure it.

    Args:
        name: of the recipe, or ``twin``.
        seed: of weights, noise and the order of the images.
        setup: the numbers, from :func:`image_setup`.
    Raises:
        BackendError: without scikit-learn.
        ConfigError: if the recipe cannot be built that small.
    """
    from transformers import set_seed

    data, held_out = digits()
    set_seed(seed)
    model = build_classifier(name, setup)
    tokens_per_s = fit(model, data, setup, seed=seed, collate=_stack)
    return Outcome(
        kind="images",
        recipe=name,
        seed=seed,
        tokens_per_s=tokens_per_s,
        hidden=setup.active_hidden if name == TWIN else hidden_of_equal_activity(name, setup),
        options={} if name == TWIN else changed_options(name, setup),
        **measured(model, lambda: accuracy(model, held_out), setup),
    )


@cache
def digits() -> tuple[list[dict[str, Tensor]], list[dict[str, Tensor]]]:
    """scikit-learn's 1,797 handwritten digits: those to train on, and 450 drawn once, the same for all, to hold out.

    Raises:
        BackendError: without scikit-learn.
    """
    needs_digits()
    from sklearn.datasets import load_digits

    loaded: Any = load_digits()
    pixels = torch.tensor(loaded.images, dtype=torch.float32)[:, None] / 16
    items = [
        {"pixel_values": image, "labels": torch.tensor(int(label))}
        for image, label in zip(pixels, loaded.target, strict=True)
    ]
    order = torch.randperm(len(items), generator=torch.Generator().manual_seed(0)).tolist()
    return [items[index] for index in order[HELD_OUT:]], [items[index] for index in order[:HELD_OUT]]


def build_classifier(name: str, setup: Setup) -> PreTrainedModel:
    """The untrained vision transformer, dense or with MoE in the second half of its layers."""
    from transformers import ViTConfig, ViTForImageClassification

    from moesaic.hf import sparsify

    sizes: dict[str, Any] = {"num_labels": NUM_CLASSES}
    config = ViTConfig(
        hidden_size=setup.width,
        num_hidden_layers=setup.layers,
        num_attention_heads=4,
        # Two maps in place of a gated network's three.
        intermediate_size=setup.active_hidden * 3 // 2,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.02 * max(1.0, math.sqrt(768 / setup.width)),
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        num_channels=1,
        **sizes,
    )
    model = ViTForImageClassification(config)
    if name == TWIN:
        return model
    second_half = list(range(setup.layers // 2, setup.layers))
    hidden = hidden_of_equal_activity(name, setup)
    return sparsify(model, name, layers=second_half, hidden=hidden, **options_of(name, setup))


@torch.no_grad()
def accuracy(model: nn.Module, held_out: Sequence[dict[str, Tensor]]) -> float:
    """Share of images that the model tells rightly, read in batches of 64 as in training."""
    model.eval()
    right = 0
    for start in range(0, len(held_out), 64):
        batch = _stack(held_out[start : start + 64])
        right += int((model(**batch).logits.argmax(dim=-1) == batch["labels"]).sum())
    return right / len(held_out)


def _stack(items: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([item[name] for item in items]) for name in items[0]}
