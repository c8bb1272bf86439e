"""What the routers do with text in evaluation: loads, logits, precision, and what their selection bias decides."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from moesaic.core.routing import Routing
from moesaic.doctor.measure.layers import Batch, Heard, Home, chosen_TE, homes, run, undisturbed
from moesaic.doctor.vitals import LayerBias, LayerPrecision, LayerRouting
from moesaic.hf.native.router import AdoptedRouter, Reporter
from moesaic.hf.scope import listening
from moesaic.routers import TopKRouter
from moesaic.routers.scores import softmax
from moesaic.routers.select import select_top_k


@dataclass
class _Sums:
    """Of one layer, over batches."""

    home: Home
    load_E: Any = 0
    kept_E: Any = 0
    num_tokens: int = 0
    unserved: int = 0
    num_rows: int = 0
    entropy: float = 0.0
    largest: float = 0.0
    logit_E: Any = 0
    square_E: Any = 0
    compared: int = 0
    rerouted: int = 0
    unbiased: int = 0
    decided: int = 0
    spread: float = 0.0
    on_softmax: bool | None = None
    inputs: list[tuple[Any, ...]] = field(default_factory=list)


def examine_routing(
    model: nn.Module, batches: Sequence[Batch], *, done: Any = None
) -> tuple[list[LayerRouting], list[LayerPrecision], list[LayerBias]]:
    """Run a model over batches in evaluation mode and measure its routers; once for all of it.

    Args:
        model: with MoE layers of ours, or adopted ones.
        batches: what it is called with.
        done: called after each batch.
    """
    sums = {home.layer: _Sums(home=home) for home in homes(model)}
    with undisturbed(model, training=False), torch.no_grad(), _catching(sums):
        for batch in batches:
            heard = Heard(model, balance=False)
            with listening(heard):
                run(model, batch)
            for layer, reports in heard.reports.items():
                for report in reports:
                    _add(sums[layer], report.routing)
            for one in sums.values():
                _compare(one, [report.routing for report in heard.reports[one.home.layer]])
                one.inputs.clear()
            if done is not None:
                done()
    ran = [one for one in sums.values() if one.num_tokens]
    return [_routing(one) for one in ran], [_precision(one) for one in ran], [b for b in map(_bias, ran) if b]


@contextmanager
def _catching(sums: dict[str, _Sums]) -> Iterator[None]:
    """Keep what routers are called with."""
    with ExitStack() as stack:
        for one in sums.values():
            router = one.home.router if one.home.native is None else one.home.native.reporter
            if router is None:
                continue

            def keep(_module: nn.Module, args: tuple[Any, ...], one: _Sums = one) -> None:
                one.inputs.append(args)

            handle = router.register_forward_pre_hook(keep)
            stack.callback(handle.remove)
        yield


def _add(one: _Sums, routing: Routing) -> None:
    valid_T = routing.valid_T
    tokens = int(valid_T.sum())
    logits_TE = routing.logits_TE[valid_T].double()
    finite_TE = torch.where(logits_TE.isfinite(), logits_TE, 0)
    kept_N = routing.valid_N & routing.kept_N
    kept_E = torch.bincount(routing.expert_N[kept_N], minlength=routing.num_experts)
    served_T = torch.zeros_like(valid_T).index_put((routing.token_N[kept_N],), torch.tensor(True, device=kept_N.device))
    one.load_E = one.load_E + routing.load_E.cpu().numpy()
    one.kept_E = one.kept_E + kept_E.cpu().numpy()
    one.num_tokens += tokens
    one.unserved += int((valid_T & ~served_T).sum())
    one.num_rows += int(routing.valid_N.sum())
    one.entropy += float(torch.special.entr(routing.probability_TE[valid_T].double()).sum())
    one.largest = max(one.largest, float(finite_TE.abs().max()) if tokens else 0.0)
    one.logit_E = one.logit_E + finite_TE.sum(dim=0).cpu().numpy()
    one.square_E = one.square_E + finite_TE.square().sum(dim=0).cpu().numpy()
    one.spread += float(routing.scores_TE[valid_T].double().std(dim=-1).sum()) if routing.num_experts > 1 else 0.0


def _compare(one: _Sums, routings: Sequence[Routing]) -> None:
    """Route the same tokens again in full precision, and without the selection bias."""
    # A copy of a router has its hooks too, and would add to them.
    given = tuple(one.inputs)
    if len(given) != len(routings):
        return
    for args, routing in zip(given, routings, strict=True):
        was_TE = _mask(routing)
        exact_TE = _exact(one.home, args)
        if exact_TE is not None and exact_TE.shape == was_TE.shape:
            valid_T = routing.valid_T
            one.compared += int(valid_T.sum())
            one.rerouted += int((exact_TE != was_TE).any(dim=-1)[valid_T].sum())
        _compare_bias(one, routing)


def _compare_bias(one: _Sums, routing: Routing) -> None:
    """Choose again by the scores alone; both choices are worked out anew, so that they differ in the bias alone."""
    bias_E, home = one.home.bias_E, one.home
    if bias_E is None:
        return
    if home.native is not None:
        spec = home.native.spec
        if not spec.is_learned:
            return
        one.on_softmax = spec.score == "softmax"
        with_TK, without_TK = (
            select_top_k(spec.selection(routing.logits_TE, routing.scores_TE, bias), spec.top_k)
            for bias in (bias_E, torch.zeros_like(bias_E))
        )
    elif isinstance(home.router, TopKRouter):
        router = home.router
        one.on_softmax = router.score is softmax
        with_TK = router.choose(routing.logits_TE, routing.scores_TE)
        bare = copy.deepcopy(router)
        cast(Tensor, bare.bias_E).zero_()
        without_TK = bare.choose(routing.logits_TE, routing.scores_TE)
    else:
        return
    differ_T = (with_TK.sort(dim=-1).values != without_TK.sort(dim=-1).values).any(dim=-1)
    one.unbiased += int(routing.valid_T.sum())
    one.decided += int(differ_T[routing.valid_T].sum())


def _mask(routing: Routing) -> Tensor:
    return chosen_TE(routing.expert_N, routing.token_N, routing.num_tokens, routing.num_experts)


def _exact(home: Home, args: tuple[Any, ...]) -> Tensor | None:
    """The choice of a router that computes in float64, or float32 in families of transformers; None where it cannot."""
    if home.native is not None:
        return _exact_native(home.native.reporter, args[0])
    router = copy.deepcopy(home.router)
    assert router is not None
    router = router.double()
    x_TD, *rest = args
    routing = router(x_TD.double(), *rest)
    return _mask(routing) if isinstance(routing, Routing) else None


def _exact_native(reporter: Reporter, hidden_states: Tensor) -> Tensor | None:
    spec, row = reporter.adoption.spec, reporter.adoption.row
    if not isinstance(reporter, AdoptedRouter) or row.logits is None or not spec.is_learned:
        return None
    spec = replace(spec, precision="float32")
    passed = row.selection_bias is not None and row.selection_bias.startswith("block.")
    if passed:
        return None
    x_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
    logits_TE = row.logits(row, reporter, x_TD, spec)
    expert_TK = spec.choose(logits_TE, spec.scores(logits_TE), row.bias_of(reporter, reporter))
    token_TK = torch.arange(len(expert_TK), device=expert_TK.device)[:, None].expand_as(expert_TK)
    return chosen_TE(expert_TK.reshape(-1), token_TK.reshape(-1), len(expert_TK), spec.num_experts)


def _routing(one: _Sums) -> LayerRouting:
    variance_E = one.square_E / one.num_tokens - (one.logit_E / one.num_tokens) ** 2
    num_experts = len(one.load_E)
    return LayerRouting(
        layer=one.home.layer,
        load_E=np.asarray(one.load_E),
        kept_E=np.asarray(one.kept_E),
        num_tokens=one.num_tokens,
        unserved=one.unserved,
        entropy=one.entropy / one.num_tokens,
        largest_logit=one.largest,
        spread_E=np.sqrt(np.clip(variance_E, 0, None)),
        is_soft=one.num_rows == one.num_tokens * num_experts,
        is_fixed=one.home.router is not None and not one.home.router_weights,
    )


def _precision(one: _Sums) -> LayerPrecision:
    weights = [weight.dtype for weight in one.home.router_weights if weight.is_floating_point()]
    bias_E = one.home.bias_E
    return LayerPrecision(
        layer=one.home.layer,
        stored=_name(min(weights, key=lambda dtype: dtype.itemsize)) if weights else "",
        rerouted=one.rerouted / one.compared if one.compared else None,
        num_tokens=one.compared,
        bias_stored="" if bias_E is None else _name(bias_E.dtype),
    )


def _bias(one: _Sums) -> LayerBias | None:
    bias_E = one.home.bias_E
    if bias_E is None:
        return None
    return LayerBias(
        layer=one.home.layer,
        bias_E=bias_E.detach().double().cpu().numpy(),
        decided=one.decided / one.unbiased if one.unbiased else None,
        spread=one.spread / one.num_tokens,
        on_softmax=one.on_softmax,
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
