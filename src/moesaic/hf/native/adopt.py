"""Put Moesaic under a model that is a mixture already: watched, balanced, and run by our kernels, as itself."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from moesaic.balance import BalanceTerm, BiasRule, LossTerm, Rule, check, named
from moesaic.core.errors import ConfigError
from moesaic.hf.config import made_once
from moesaic.hf.framed import FramedModel, framed_forward, keep_frames_in
from moesaic.hf.native.check import check_module, check_router, compare_outputs
from moesaic.hf.native.exact import kept_exact, make_exact
from moesaic.hf.native.experts import IMPLEMENTATION, Form, experts_forward, form_of
from moesaic.hf.native.found import Found, find, is_interface, native_class, row_of
from moesaic.hf.native.router import Adopted, AdoptedRouter, Adoption, adopted_class
from moesaic.hf.native.rows import ROWS
from moesaic.hf.native.spec_router import RoutedOnly, SpecRouter
from moesaic.hf.native.surgery import SURGERY, choices
from moesaic.hf.native.table import attribute
from moesaic.hf.native.undo import undo_to_now
from moesaic.hf.wrapped import is_wrapped
from moesaic.kernels.grouped_ffn import require_known

Model = TypeVar("Model", bound=nn.Module)

_TRIED_TOKENS = 4


class AdoptedModel(FramedModel):  # type: ignore[no-untyped-call]
    """A model of transformers whose MoE layers are adopted; it goes by the name of its own class, and saves as it."""

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As the model's own class does: what is loaded is not adopted."""
        return cls.dense_class.from_pretrained(*args, **kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        with kept_exact(self):
            return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As the model's own class does; names that the family has on disk are understood too.

        transformers' Trainer resumes with those, and by itself leaves stacked experts as they are, with a warning.
        """
        own = self.state_dict()
        if own.keys() - state_dict.keys() and state_dict.keys() - own.keys():
            state_dict = _from_disk(self, state_dict, own)
        return super().load_state_dict(state_dict, strict=strict, assign=assign)

    def __reduce_ex__(self, _protocol: Any) -> tuple[Any, ...]:
        return _new_model, (type(self).dense_class,), self.__dict__


def adopt(
    model: Model,
    *,
    kernel: str | None = "auto",
    balance: Mapping[str, float] | None = None,
    float32_router: bool = False,
) -> Model:
    """Put our kernels, losses and telemetry under the MoE layers of a transformers model, in place.

    The model stays what it is: weights are shared and not copied, ``state_dict``, ``save_pretrained``, ``generate``,
    PEFT, activation checkpointing and Trainer work as before, and outputs are the same up to rounding. What it gains:
    :func:`moesaic.record` and :func:`moesaic.hf.observe` see its true routing, balance losses join ``output.loss`` in
    training, controllers can step its selection biases, and its experts run on our kernels.

    Every router is compared by numbers with what Moesaic knows of its family, and every kernel with the family's own
    experts, before anything changes. Adopting again changes the settings; :func:`release` undoes all of it.

    Args:
        model: of any MoE family of transformers, or a module around one.
        kernel: "auto" or a kernel's name; None leaves the experts to transformers.
        balance: names of :data:`moesaic.balance.TERMS` with their numbers, for every layer, as in
            ``{"switch": 0.01, "z": 1e-3, "bias": 1e-3}``; None for none.
        float32_router: compute router logits and scores in float32, whatever the model's precision.
    Returns:
        The same model.
    Raises:
        ConfigError: if it has no MoE layers, one that Moesaic cannot describe, a router that computes something else
            than its description, or if a term of ``balance`` does nothing; the model is untouched then.
    """
    if kernel is not None:
        require_known(kernel)
    routers, others, interface = find(model)
    adoptions = _described(model, routers, balance, float32_router)
    for one in routers:
        router, row = row_of(one)
        if row.parts:
            check_router(router, one.block, row, one.path)
    forms = {one.module: form_of(one.module, kernel) for one in interface} if kernel is not None else {}
    for one in interface:
        if kernel is not None:
            _try_interface(one, forms[one.module])
    models = [part for part in model.modules() if isinstance(part, PreTrainedModel)]
    for part in models:
        keep_frames_in(part)
    _operate(model, routers, others, adoptions, kernel)
    for module, form in forms.items():
        module.__dict__["_moesaic"] = form
    _choose_implementation(models, kernel)
    for part in models:
        if any(isinstance(inner, Adopted) for inner in part.modules()) and not isinstance(part, FramedModel):
            part.__class__ = adopted_model_class(type(part))
    return model


def check_adoptable(model: nn.Module, *, balance: Mapping[str, float] | None = None) -> None:
    """See that :func:`adopt` takes a model, as far as can be told without weights: it may be on the meta device.

    Raises:
        ConfigError: as :func:`adopt` does, but for what it compares by numbers.
    """
    routers, _, _ = find(model)
    _described(model, routers, balance, float32=False)


def release(model: Model) -> Model:
    """Undo :func:`adopt`: every module is of its own class again, and transformers runs the experts.

    Selection biases that were made float32 stay so.
    """
    for part in model.modules():
        if isinstance(part, Adopted):
            part.__dict__.pop("_moesaic", None)
            part.__class__ = type(part).native_class  # type: ignore[assignment]
        elif isinstance(part, AdoptedModel):
            part.__class__ = type(part).dense_class  # type: ignore[assignment]
        elif "_moesaic" in part.__dict__:
            del part.__dict__["_moesaic"]
    _choose_implementation([part for part in model.modules() if isinstance(part, PreTrainedModel)], None)
    return model


def is_native_mixture(model: nn.Module) -> bool:
    """Whether a model has MoE layers of transformers that could be, or are, adopted."""
    return any(native_class(part).__name__ in ROWS for part in model.modules())


def kernel_reports(model: nn.Module) -> dict[str, str]:
    """Which kernel the experts of each adopted layer run on, and why, by module path."""
    reports = {}
    for path, part in model.named_modules():
        form = part.__dict__.get("_moesaic")
        if isinstance(form, Form):
            reports[path] = form.report(part)
    return reports


@made_once
def adopted_model_class(native: type[PreTrainedModel]) -> type[Any]:
    """The class of adopted models whose own class is ``native``."""
    # transformers keeps what belongs to a class under its printed name: ours prints as the model's own does.
    namespace = {
        "__module__": native.__module__,
        "__qualname__": native.__qualname__,
        "__doc__": native.__doc__,
        "dense_class": native,
        "forward": framed_forward(native),
    }
    return type(native.__name__, (AdoptedModel, native), namespace)


def _described(
    model: nn.Module, routers: list[Found], balance: Mapping[str, float] | None, float32: bool
) -> dict[nn.Module, Adoption]:
    """What is kept with each router, checked but for its numbers."""
    terms = named(balance or {})
    adoptions = {one.module: _adoption(one, terms, float32) for one in routers}
    for one in routers:
        _check_terms(one, adoptions[one.module])
    if terms:
        _check_balance(model, terms, adoptions)
    return adoptions


def _adoption(one: Found, terms: tuple[Any, ...], float32: bool) -> Adoption:
    router, row = row_of(one)
    block = one.block if router is one.module else one.module
    spec = row.spec_of(router, block)
    if float32 and (spec.policy == "sparsemixer" or row.logits is None or one.native.__name__ == "DogeCDMoE"):
        raise ConfigError(
            f"float32_router needs a router that Moesaic computes itself, got {one.native.__name__} at {one.path}, "
            "whose own code routes. Leave float32_router out."
        )
    if float32 and spec.capacity:
        raise ConfigError(
            f"float32_router is what {one.native.__name__} at {one.path} has already: its router_dtype says so. "
            "Leave float32_router out."
        )
    if terms and not spec.is_learned:
        terms = ()  # its choices are fixed: nothing can move them
    return Adoption(
        spec=spec,
        row=row,
        float32=float32,
        terms=tuple(term for term in terms if isinstance(term, LossTerm)),
        rules=tuple(cast(Rule, term) for term in terms if not isinstance(term, LossTerm)),
    )


def _check_terms(one: Found, adoption: Adoption) -> None:
    router, row = row_of(one)
    for rule in adoption.rules:
        if not isinstance(rule, BiasRule):
            raise ConfigError(
                f"A model of transformers has no place for what {type(rule).__name__} moves. Use losses or bias."
            )
        if row.selection_bias is None or not adoption.spec.selection_bias:
            raise ConfigError(
                f"Loss-free balancing moves a selection bias, and {type(router).__name__} at {one.path} has none: what "
                "it learned could not be saved with the model. Use a balance loss."
            )
    if adoption.terms and one.native.__name__ == "NllbMoeSparseMLP":
        raise ConfigError(
            "Balance losses need experts that are run as the router chose, got NLLB-MoE, of which transformers runs "
            f"experts 0 and 1 only (at {one.path}: its mask of first choices is taken for expert numbers). "
            "Leave balance out."
        )


def _check_balance(model: nn.Module, terms: tuple[BalanceTerm, ...], adoptions: Mapping[nn.Module, Adoption]) -> None:
    """Refuse terms that would do nothing, or that the model has already."""
    own = [part for part in model.modules() if getattr(getattr(part, "config", None), "output_router_logits", False)]
    if own and any(isinstance(term, LossTerm) for term in terms):
        raise ConfigError(
            "The model adds a balance loss of its own, pooled over layers, since its config has "
            "output_router_logits=True; with balance it would be balanced twice. Set it to False."
        )
    # The factors of experts and shared gates change weights, which only SpecRouter's makers know; choices stay.
    plain = {
        replace(one.spec, expert_scale=False, global_scale=False, shared_gates=0)
        for one in adoptions.values()
        if one.spec.is_learned
    }
    if not plain:
        raise ConfigError(
            "Balance needs routers that choose by learned scores, got a model whose choices are all fixed. Leave "
            "balance out."
        )
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        for spec in plain:
            check(terms, RoutedOnly(SpecRouter(8, spec)), 8)


def _try_interface(one: Found, form: Form) -> None:
    """A few tokens through the experts as their class runs them, and as we do."""
    module: Any = one.module
    if any(weight.is_meta for weight in module.parameters()):
        return
    x_TD = _tokens(module, form)
    if x_TD is None:
        return
    expert_TK, weight_TK = choices(module, x_TD)
    plain = type(module).forward.__wrapped__
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        wanted = plain(module, x_TD, expert_TK, weight_TK)
        module.__dict__["_moesaic"], before = form, module.__dict__.get("_moesaic")
        try:
            found = experts_forward(module, x_TD, expert_TK, weight_TK)
        finally:
            module.__dict__.pop("_moesaic")
            if before is not None:
                module.__dict__["_moesaic"] = before
    compare_outputs(wanted, found, one.path, type(module).__name__)


def _tokens(module: Any, form: Form | None = None, width: int | None = None) -> Tensor | None:
    """A few tokens that a module of experts can read; drawn apart from the global generator."""
    weight = next(iter(module.parameters()))
    if width is None:
        if form is None:
            return None
        width = int(form.views(module)[1].shape[1])
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(_TRIED_TOKENS, width, generator=generator)
    return drawn.to(weight.device, weight.dtype if weight.is_floating_point() else torch.float32)


def _operate(
    model: nn.Module,
    routers: list[Found],
    others: list[Found],
    adoptions: Mapping[nn.Module, Adoption],
    kernel: str | None,
) -> None:
    """Change classes, try what no interface reaches, and take all back if one computes otherwise."""
    undo = undo_to_now(model)
    try:
        for one in [*others, *routers]:
            _change(one, adoptions.get(one.module), kernel)
        for one in [*others, *routers]:
            _try_surgery(one, kernel)
    except BaseException:
        undo()
        raise


def _change(one: Found, adoption: Adoption | None, kernel: str | None) -> None:
    """Give one module our class, and what goes with it."""
    surgery = SURGERY.get(one.native.__name__)
    if adoption is not None:
        one.module.__dict__["_moesaic"] = adoption
        if any(isinstance(rule, BiasRule) for rule in adoption.rules):
            router, row = row_of(one)
            make_exact(row, router, one.block)
    if surgery is not None and surgery.form is not None:
        holder = attribute(one.module, surgery.holder) if surgery.holder else one.module
        if kernel is not None and not is_wrapped(holder):
            holder.__dict__["_moesaic"] = surgery.form(holder, kernel)
        elif surgery.reads is None:  # nothing but experts, which stay transformers'
            one.module.__class__ = one.native
            return
        else:
            holder.__dict__.pop("_moesaic", None)
    one.module.__class__ = adopted_class(one.native, AdoptedRouter if surgery is None else surgery.kind)


def _try_surgery(one: Found, kernel: str | None) -> None:
    surgery = SURGERY.get(one.native.__name__)
    if surgery is None or surgery.probe is None or (kernel is None and surgery.reads is None):
        return
    if any(weight.is_meta for weight in one.module.parameters()):
        return
    width = _width(one)
    x_TD = _tokens(one.module, width=width)
    assert x_TD is not None
    check_module(one.module, one.native, surgery.probe(one.module, x_TD), one.path)


def _width(one: Found) -> int:
    module: Any = one.module
    for name in ("input_size", "hidden_size", "hidden_dim"):  # JetMoE's hidden_size is F
        if isinstance(getattr(module, name, None), int):
            return int(getattr(module, name))
    router, row = row_of(one) if SURGERY[one.native.__name__].reads is not None else (module, None)
    if one.native.__name__ == "VitPoseBackboneMoeMLP":
        return int(module.fc1.in_features)
    assert row is not None
    return row.width_of(router)


def _choose_implementation(models: list[PreTrainedModel], kernel: str | None) -> None:
    """Tell transformers' interface, model by model, who runs the experts; configurations that are shared are copied."""
    if IMPLEMENTATION not in ALL_EXPERTS_FUNCTIONS.keys():  # noqa: SIM118  (the interface iterates otherwise)
        ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, experts_forward)
    seen = {id(part.config): part for part in models}
    for part in seen.values():
        for inner in part.modules():
            if not is_interface(inner):
                continue
            config = cast(Any, inner).config
            if kernel is not None and config._experts_implementation_internal != IMPLEMENTATION:
                inner.__dict__.setdefault("_moesaic_before", config._experts_implementation_internal)
                config._experts_implementation_internal = IMPLEMENTATION
            elif kernel is None and config._experts_implementation_internal == IMPLEMENTATION:
                config._experts_implementation_internal = inner.__dict__.pop("_moesaic_before", "grouped_mm")


def _from_disk(model: AdoptedModel, saved: Mapping[str, Any], own: Mapping[str, Tensor]) -> dict[str, Any]:
    """Tensors under the names in memory, as transformers translates them; what it cannot keeps its name."""
    load: Any = type(model).dense_class.from_pretrained
    read, info = load(
        None,
        config=copy.deepcopy(model.config),
        state_dict=dict(saved),
        dtype=model.dtype,
        output_loading_info=True,
    )
    known = {name: value for name, value in read.state_dict().items() if name not in info["missing_keys"]}
    # What needs no translation keeps its precision, and what nobody knows its name, for whoever reports it.
    return known | {name: saved[name] for name in saved if name in own or name in info["unexpected_keys"]}


def _new_model(native: type[PreTrainedModel]) -> PreTrainedModel:
    made: type[PreTrainedModel] = adopted_model_class(native)
    return made.__new__(made)
