"""What is known about a patient before it is judged: measurements as plain numbers, or why there is none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class LayerRouting:
    """What one layer did with the text, in evaluation.

    Attributes:
        layer: module path.
        load_E: rows that the router gave each expert, dropped ones counted, padding not.
        kept_E: those of them that an expert took.
        num_tokens: tokens that are not padding.
        unserved: tokens that no expert took.
        entropy: mean entropy of a token's probabilities, in nats.
        largest_logit: largest size of a finite logit.
        spread_E: standard deviation of each expert's logit over tokens.
        is_soft: whether every token meets every expert, so that loads say nothing.
        is_fixed: whether the router has no weights, so that its logits are none.
    """

    layer: str
    load_E: IntArray
    kept_E: IntArray
    num_tokens: int
    unserved: int
    entropy: float
    largest_logit: float
    spread_E: FloatArray
    is_soft: bool
    is_fixed: bool

    @property
    def num_experts(self) -> int:
        """E."""
        return len(self.load_E)

    @property
    def chooses(self) -> bool:
        """Whether loads say something of the router: not where choices are fixed, soft, or ties of equal logits."""
        return not self.is_soft and not self.is_fixed and bool(self.load_E.sum()) and bool(self.spread_E.max() > 0)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class LayerPrecision:
    """In which precision one router works, and what that changes.

    Attributes:
        layer: module path.
        stored: dtype of its weights, the narrowest if they differ; empty without weights.
        rerouted: share of tokens that get another set of experts when the same router works in full precision; None
            where it could not be worked out again.
        num_tokens: tokens that were compared.
        bias_stored: dtype of its selection bias; empty without.
    """

    layer: str
    stored: str
    rerouted: float | None
    num_tokens: int
    bias_stored: str


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class LayerBias:
    """The selection bias of one router.

    Attributes:
        layer: module path.
        bias_E: its values.
        decided: share of tokens that would get another set of experts without it; None where not worked out.
        spread: standard deviation of scores over experts, the mean over tokens; NaN where not worked out.
        on_softmax: whether it is added to a softmax; None where not known.
    """

    layer: str
    bias_E: FloatArray
    decided: float | None
    spread: float
    on_softmax: bool | None


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Repeat:
    """Two evaluations of the same text.

    Attributes:
        rerouted: share of tokens with another set of experts the second time, by layer.
        largest_difference: between the two outputs, relative to their size.
        moved: names of parameters and buffers that a forward changed.
        num_tokens: of the text.
    """

    rerouted: Mapping[str, float]
    largest_difference: float
    moved: tuple[str, ...]
    num_tokens: int


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Padding:
    """What padding does: the same sequences, filled up with different tokens behind a mask.

    Attributes:
        num_tokens, num_padding: in the batch.
        before: share of real tokens whose logits in the first MoE layer changed with the padding: nothing before it has
            experts, so that it came to them through attention.
        counted: tokens that a layer counted beyond those of the mask, by layer; those without are left out.
        rerouted: share of real tokens whose rows changed with the padding, by layer.
        losses: change of each balance loss, relative to its size, the largest of any layer.
    """

    num_tokens: int
    num_padding: int
    before: float
    counted: Mapping[str, int]
    rerouted: Mapping[str, float]
    losses: Mapping[str, float]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TermGradient:
    """One balance loss of one layer, in one real forward and backward in training mode.

    Attributes:
        name: of the loss.
        coefficient: what it is multiplied by.
        in_loss: the derivative of the training loss by it: 1 where it was simply added, None where it is not in it.
        on_router: norm of its gradient, coefficient included, on the router's weights; None where it is cut off.
    """

    name: str
    coefficient: float
    in_loss: float | None
    on_router: float | None


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class LayerGradients:
    """Who pulls one router.

    Attributes:
        layer: module path.
        is_frozen: none of its weights asks for a gradient.
        task: norm of the gradient of the task's loss alone on its weights; None without weights.
        beside: the same on the layer's other weights, to compare with.
        choices: experts that a token meets, on average.
        terms: its balance losses.
        is_rewarded: a loss teaches it by reward, so that it needs no gradient from the task.
    """

    layer: str
    is_frozen: bool
    task: float | None
    beside: float
    choices: float
    terms: tuple[TermGradient, ...]
    is_rewarded: bool


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Gradients:
    """Who pulls the routers of a model.

    Attributes:
        layers: one by one.
        loss: the training loss, and ``task`` the part of it without balance.
        controllers: names of the classes that balance without a gradient.
        own_balance: whether the model adds a balance loss of transformers, which pools its layers.
        why_none: where there is no balance of any kind, in words.
    """

    layers: tuple[LayerGradients, ...]
    loss: float
    task: float
    controllers: tuple[str, ...]
    own_balance: bool
    why_none: str


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class LayerExperts:
    """The weights of one layer's experts.

    Attributes:
        layer: module path.
        size_E: root mean square of each expert's weights.
        likeness: largest cosine between two experts' weights, on a sample of them.
        pair: the two.
        identical: pairs of experts that are equal to the bit.
        zero_rows: experts whose row of the router's weights is all zeros.
        num_experts: E.
    """

    layer: str
    size_E: FloatArray
    likeness: float
    pair: tuple[int, int]
    identical: tuple[tuple[int, int], ...]
    zero_rows: tuple[int, ...]
    num_experts: int


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Weights:
    """All weights of a model.

    Attributes:
        not_finite: names of parameters and buffers with a NaN or an infinity.
        num_weights: numbers that were looked at.
        experts: by layer, where experts keep weights that can be compared.
    """

    not_finite: tuple[str, ...]
    num_weights: int
    experts: tuple[LayerExperts, ...] = field(default_factory=tuple)
