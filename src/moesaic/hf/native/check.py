"""Does a spec say what a router computes, and do our kernels give what the family's own experts give? By numbers."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from moesaic.core.errors import ConfigError
from moesaic.hf.native.router import Decision, unpacked
from moesaic.hf.native.router_spec import RouterSpec
from moesaic.hf.native.table import Row

_TOKENS = 64
_TOLERANCE = 1e-5
# Two experts that score within this of each other may stand in either order.
_TIE = 1e-5


def check_router(router: nn.Module, block: nn.Module, row: Row, path: str) -> None:
    """Route random tokens through a copy of a router and through its spec, with its weights and with others.

    Others, because what has not been trained yet hides differences: a bias of zeros steers nothing. The global random
    generator is left as it was.

    Args:
        router: of the model.
        block: the module around it.
        row: how the router is read.
        path: of the router, for the message.
    Raises:
        ConfigError: naming the first difference.
    """
    if any(weight.is_meta for weight in router.parameters()):
        raise ConfigError(
            f"The router at {path} has no weights yet (they are on the meta device), so it cannot be checked. "
            "Load the weights first."
        )
    bias_E = row.bias_of(router, block)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.default_generator.manual_seed(0)
        trial = copy.deepcopy(router).float().cpu().eval()
        bias_E = None if bias_E is None else bias_E.detach().float().cpu().clone()
        _compare(trial, block, bias_E, row, path)
        if row.spec_of(router, block).is_learned:
            _redraw(trial)
            if bias_E is not None:
                bias_E.normal_(std=0.3)
                own = row.bias_of(trial, block) if not _is_passed(row) else None
                if own is not None:
                    own.copy_(bias_E)
            _compare(trial, block, bias_E, row, path)


def _compare(trial: Any, block: nn.Module, bias_E: Tensor | None, row: Row, path: str) -> None:
    spec = row.spec_of(trial, block)
    x_TD = torch.randn(_TOKENS, row.width_of(trial), device="cpu")
    more: tuple[Tensor, ...] = ()
    if _is_passed(row):
        more = () if bias_E is None else (bias_E,)
    elif spec.policy == "table":
        more = (torch.randint(trial.tid2eid.shape[0], (1, _TOKENS), device="cpu"),)
    native_class = getattr(type(trial), "native_class", type(trial))
    given = native_class.forward(trial, x_TD[None] if row.takes == 3 else x_TD.clone(), *more)
    theirs = unpacked(given, trial, x_TD, spec, row)
    # The same precision as the copy's.
    logits_TE = theirs.logits_TE if row.logits is None else row.logits(row, trial, x_TD, spec)
    scores_TE = spec.scores(logits_TE)
    expert_TK = spec.choose(logits_TE, scores_TE, bias_E) if spec.is_learned else theirs.expert_TK
    weight_TK, _ = spec.weights(logits_TE, scores_TE, expert_TK, row.scale_of(trial))
    ours = Decision(logits_TE=spec.routed(logits_TE), weight_TK=weight_TK, expert_TK=expert_TK)
    difference = first_difference(theirs, ours, _clear(spec, logits_TE, scores_TE, bias_E))
    if difference is not None:
        raise ConfigError(
            f"The router at {path} ({type(trial).__name__}) is not what its description in Moesaic says: {difference}. "
            "Its code may have changed: use a transformers version that Moesaic is tested with, and report it."
        )


def first_difference(theirs: Decision, ours: Decision, clear_T: Tensor) -> str | None:
    """In words, where two decisions differ first: logits, then choices, then weights; None if they agree.

    Args:
        theirs: the model's own.
        ours: the spec's.
        clear_T: tokens whose choice does not hang on rounding.
    """
    if theirs.logits_TE.shape != ours.logits_TE.shape:
        return f"its logits are {tuple(theirs.logits_TE.shape)}, the spec's {tuple(ours.logits_TE.shape)}"
    if theirs.expert_TK.shape != ours.expert_TK.shape:
        return f"it chooses {theirs.expert_TK.shape[1]} experts for a token, the spec {ours.expert_TK.shape[1]}"
    found = _first(theirs.logits_TE, ours.logits_TE)
    if found is not None:
        return f"the logit of token {found[0]} and expert {found[1]} is {found[2]}, the spec's {found[3]}"
    own_TK, other_TK = (one.expert_TK.sort(dim=-1).values for one in (theirs, ours))
    for t in ((own_TK != other_TK).any(dim=-1) & clear_T).nonzero()[:1, 0].tolist():
        return f"it sends token {t} to experts {own_TK[t].tolist()}, the spec to {other_TK[t].tolist()}"
    dense = [
        torch.zeros_like(one.logits_TE).scatter(1, one.expert_TK, one.weight_TK.float())[clear_T]
        for one in (theirs, ours)
    ]
    found = _first(*dense)
    if found is not None:
        return f"the weight of expert {found[1]} for a token is {found[2]}, the spec's {found[3]}"
    return None


def check_module(theirs: nn.Module, native_class: type[nn.Module], inputs: tuple[Any, ...], path: str) -> None:
    """Run a few tokens through a module in its own class and in ours.

    Args:
        theirs: already of our class.
        native_class: its own.
        inputs: of its forward.
        path: for the message.
    Raises:
        ConfigError: if the outputs differ by more than rounding.
    """
    training = theirs.training
    theirs.eval()
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            wanted = native_class.forward(theirs, *(_copy(one) for one in inputs))
            found = type(theirs).forward(theirs, *(_copy(one) for one in inputs))
    finally:
        theirs.train(training)
    wanted, found = (one[0] if isinstance(one, tuple) else one for one in (wanted, found))
    compare_outputs(wanted, found, path, native_class.__name__)


def compare_outputs(wanted: Tensor, found: Tensor, path: str, name: str) -> None:
    """Refuse outputs that differ by more than rounding in the model's precision.

    Raises:
        ConfigError: naming the module and the largest difference.
    """
    largest = float(wanted.abs().max()) if wanted.numel() else 0.0
    apart = float((wanted.float() - found.float()).abs().max()) if wanted.numel() else 0.0
    allowed = {torch.float64: 1e-9, torch.float32: 1e-5}.get(wanted.dtype, 3e-2) * max(1.0, largest)
    if not apart <= allowed:
        raise ConfigError(
            f"{name} at {path} does not compute what Moesaic's kernels for it do: outputs differ by {apart:.3g} "
            f"(at most {allowed:.1g} would be rounding). Adopt the model with kernel=None, and report it."
        )


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _is_passed(row: Row) -> bool:
    return row.selection_bias is not None and row.selection_bias.startswith("block.")


def _redraw(router: nn.Module) -> None:
    for weight in [*router.parameters(), *router.buffers()]:
        if weight.is_floating_point():
            width = weight.shape[-1] if weight.ndim > 1 else 1
            weight.copy_(torch.randn_like(weight) * (2 / math.sqrt(width) if weight.ndim > 1 else 0.3))
            if weight.ndim < 2:
                weight.add_(1)  # scales and norms


def _clear(spec: RouterSpec, logits_TE: Tensor, scores_TE: Tensor, bias_E: Tensor | None) -> Tensor:
    """Tokens whose K-th and next best candidates, and groups, are well apart."""
    clear_T = _edge(spec.selection(logits_TE, scores_TE, bias_E), spec.top_k) > _TIE
    if spec.groups is None:
        return clear_T
    # Between two groups, any two experts may decide.
    best_TE = replace(spec, groups=None).selection(logits_TE, scores_TE, bias_E).sort(dim=-1, descending=True).values
    return clear_T & ((best_TE[:, :-1] - best_TE[:, 1:]).min(dim=-1).values > _TIE)


def _edge(by_TE: Tensor, top_k: int) -> Tensor:
    """How far the last choice is from the first expert that is not chosen."""
    if top_k == by_TE.shape[1]:
        return torch.full((by_TE.shape[0],), math.inf, device="cpu")
    best_TE = by_TE.topk(top_k + 1, dim=-1).values
    return best_TE[:, top_k - 1] - best_TE[:, top_k]


def _first(theirs: Tensor, ours: Tensor) -> tuple[int, int, str, str] | None:
    apart = (theirs.float() - ours.float()).abs() > _TOLERANCE * theirs.float().abs().clamp_min(1)
    if not apart.any():
        return None
    t, e = apart.nonzero()[0].tolist()
    return t, e, f"{float(theirs[t, e]):.6g}", f"{float(ours[t, e]):.6g}"
