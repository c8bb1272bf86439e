"""How the router classes of transformers are read: a row for each, from attributes of a loaded model to its spec."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moesaic.hf.native.router_spec import RouterSpec
from moesaic.routers.groups import GroupLimit


def linear_logits(row: Row, router: nn.Module, x_TD: Tensor, spec: RouterSpec) -> Tensor:
    """Logits of a router that is one linear map, in the precision that its spec names."""
    weight_ED = cast(Tensor, attribute(router, row.weight))
    bias_E = None if row.logit_bias is None else cast(Tensor, attribute(router, row.logit_bias))
    if spec.precision == "float32":
        # Within autocast too, whose products are in half precision.
        with torch.autocast(x_TD.device.type, enabled=False):
            return spec.finish(F.linear(x_TD.float(), weight_ED.float(), None if bias_E is None else bias_E.float()))
    if spec.precision == "weight":
        x_TD = x_TD.to(weight_ED.dtype)
    return spec.finish(F.linear(x_TD, weight_ED, bias_E))


Logits = Callable[["Row", nn.Module, Tensor, RouterSpec], Tensor]
Reader = Callable[[nn.Module, nn.Module], Mapping[str, Any]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """Where a router class keeps what its spec needs. Names are attribute paths on the router.

    Attributes:
        spec: fields of the spec that hold for every model of the class.
        top_k: where K is; a number where it is fixed.
        weight: where the linear map is.
        reads: where a weight is whose second dimension is the width of what the router reads; None for ``weight``.
        logit_bias: where its bias is; None if it has none.
        selection_bias: where the bias is that steers selection; begins with ``block.`` where the block around the
            router keeps it and passes it on. None if there is none.
        pinned_bias: an entry of it that the family sets anew whenever it loads weights; None if there is none.
        normalize_if: a flag that turns normalisation off.
        scale: where the factor of all weights is.
        eps: where the epsilon is.
        expert_scale: where the learned factor of each expert is.
        global_scale: where the learned factor of all weights is.
        groups: where number of groups and groups kept are; a group's score is the sum of its two best.
        read: more fields of the spec, from router and block.
        logits: how logits come from tokens, one linear map unless said; None where they need more than the tokens.
        takes: dimensions of the tokens that the router's forward takes: 2 (T, D), or 3 with a batch before.
        returns_logits: whether what the router's forward returns first are logits.
        parts: how many the router's forward returns, of which the first three are logits, weights and experts; 0 where
            it returns something else, which a class in ``blocks.py`` understands.
    """

    spec: Mapping[str, Any] = field(default_factory=dict)
    top_k: str | int = "top_k"
    weight: str = "weight"
    reads: str | None = None
    logit_bias: str | None = None
    selection_bias: str | None = None
    pinned_bias: int | None = None
    normalize_if: str | None = None
    scale: str | None = None
    eps: str | None = None
    expert_scale: str | None = None
    global_scale: str | None = None
    groups: tuple[str, str] | None = None
    read: Reader | None = None
    logits: Logits | None = linear_logits
    takes: int = 2
    returns_logits: bool = True
    parts: int = 3

    def spec_of(self, router: nn.Module, block: nn.Module) -> RouterSpec:
        """The spec of a loaded router.

        Args:
            router: of the class that the row is of.
            block: the module around it.
        Raises:
            ConfigError: if its numbers contradict each other.
        """
        fields: dict[str, Any] = dict(self.spec)
        fields["num_experts"] = attribute(router, self.weight).shape[0]
        fields["top_k"] = self.top_k if isinstance(self.top_k, int) else int(attribute(router, self.top_k))
        if self.normalize_if is not None and not attribute(router, self.normalize_if):
            fields["normalize"] = None
        if self.scale is not None:
            fields["scale"] = float(attribute(router, self.scale))
        if self.eps is not None:
            fields["eps"] = float(attribute(router, self.eps))
        fields["expert_scale"] = self.expert_scale is not None
        fields["global_scale"] = self.global_scale is not None
        fields["selection_bias"] = self.selection_bias is not None
        if self.groups is not None:
            num_groups, kept = (attribute(router, name) for name in self.groups)
            fields["groups"] = groups_of(num_groups, kept, 2)
        if self.read is not None:
            fields |= self.read(router, block)
        return RouterSpec(**fields)

    def width_of(self, router: nn.Module) -> int:
        """The width of the tokens that the router reads."""
        return cast(Tensor, attribute(router, self.reads or self.weight)).shape[1]

    def bias_of(self, router: nn.Module, block: nn.Module) -> Tensor | None:
        """The selection bias (E,), a view of what the model keeps; None where there is none."""
        if self.selection_bias is None:
            return None
        inside, name = (block, self.selection_bias.removeprefix("block.")), self.selection_bias
        module, path = inside if name.startswith("block.") else (router, name)
        # A model whose configuration turns the bias off has none.
        bias: Tensor | None = module.state_dict(keep_vars=True).get(path)
        return None if bias is None else bias.reshape(-1)

    def scale_of(self, router: nn.Module) -> Tensor | None:
        """The learned factor of each expert (E,), or of all (1,); None where there is none."""
        path = self.expert_scale or self.global_scale
        return None if path is None else cast(Tensor, attribute(router, path))


def attribute(module: nn.Module, path: str) -> Any:
    """What stands at a dotted path of attributes."""
    value: Any = module
    for name in path.split("."):
        value = getattr(value, name)
    return value


def groups_of(num_groups: Any, kept: Any, best: int) -> GroupLimit | None:
    """The limit that a configuration's numbers say; None where every group may be used."""
    if num_groups is None or kept is None or num_groups == 1:
        return None  # one group is all
    return GroupLimit(num_groups=num_groups, groups_kept=kept, best_per_group=best)  # type: ignore[arg-type]
