"""``bench model``: whole language models in training, optimizer step and all."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM, OlmoeConfig, OlmoeForCausalLM

from moesaic.bench import goals
from moesaic.bench.case import COARSE, FINE, Case
from moesaic.bench.layer import Say
from moesaic.bench.machine import free_bytes, machine
from moesaic.bench.parity import TOLERANCES, relative_error
from moesaic.bench.result import Group, Line, Result
from moesaic.bench.timing import Work, clock_of, interleaved
from moesaic.hf import adopt, sparsify

TWIN, SPARSE, ADOPTED = "dense twin", "moesaic, sparsified", "moesaic, adopted"
IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")
RECIPES = {"coarse": "mixtral", "fine": "olmoe"}
"""By case: the design that sparsifies, whose family is adopted too."""
ABOUT = (
    "Tokens per second of a whole training step: zero_grad, forward with the loss, backward, and a step of fused "
    "AdamW. Random weights and random tokens.",
    "The dense twin is a Llama whose feed-forward networks are as wide as the experts that a token visits are "
    "together; the other model is the same one, sparsified by a recipe, balance loss included.",
    "The adopted model is one of transformers' own families with moesaic.adopt, beside the same model run by each of "
    "transformers' implementations of experts; what each computes was compared on a small model of the kind first.",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Modelling:
    """What to measure, and how.

    Attributes:
        cases: sizes of a layer; T is made of sequences of ``context`` tokens.
        dtypes: of each.
        layers: of a model.
        context: tokens of a sequence.
        vocab_size: kept small, so that experts, not the head, take the time.
        rounds: that count.
        device: where.
    """

    cases: Sequence[Case] = (COARSE, FINE)
    dtypes: Sequence[torch.dtype]
    layers: int = 4
    context: int = 256
    vocab_size: int = 4096
    rounds: int = 5
    device: torch.device


def model(
    plan: Modelling, *, say: Say = lambda _line: None, done: Callable[[Group], None] = lambda _group: None
) -> Result:
    """Train whole models in every case.

    Args:
        plan: what to measure.
        say: told what is being done.
        done: given each table as soon as it is there.
    """
    groups = []
    for case in plan.cases:
        for dtype in plan.dtypes:
            for group in (_sparsified(plan, case, dtype, say), _adopted(plan, case, dtype, say)):
                groups.append(group)
                done(group)
    return Result(verb="model", machine=machine(plan.device), rounds=plan.rounds, about=ABOUT, groups=tuple(groups))


def sizes(plan: Modelling, case: Case) -> dict[str, Any]:
    """What all configurations of a case share."""
    heads = max(1, case.width // 64)
    return {
        "vocab_size": plan.vocab_size,
        "hidden_size": case.width,
        "num_hidden_layers": plan.layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "max_position_embeddings": plan.context,
        "use_cache": False,
        "attn_implementation": "sdpa",
        # Mixtral and OLMoE have other defaults, and id 1 may be any token here.
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
    }


def family(plan: Modelling, case: Case) -> Any:
    """A fresh model of transformers: OLMoE's family for many small experts, Mixtral's for few large ones."""
    experts: dict[str, Any] = {"intermediate_size": case.hidden, "num_experts_per_tok": case.top_k}
    if RECIPES.get(case.name) == "olmoe":
        return OlmoeForCausalLM(OlmoeConfig(**sizes(plan, case), **experts, num_experts=case.num_experts))
    return MixtralForCausalLM(MixtralConfig(**sizes(plan, case), **experts, num_local_experts=case.num_experts))


def _llama(plan: Modelling, case: Case) -> Any:
    return LlamaForCausalLM(LlamaConfig(**sizes(plan, case), intermediate_size=case.active_hidden))


def _sparsified(plan: Modelling, case: Case, dtype: torch.dtype, say: Say) -> Group:
    torch.manual_seed(0)
    twin, sparse = _llama(plan, case), _llama(plan, case)
    recipe = RECIPES.get(case.name, "mixtral")
    sparsify(sparse, recipe, hidden=case.hidden, num_experts=case.num_experts, top_k=case.top_k)
    tokens_BP = _tokens(plan, case)
    works = {
        name: Work(run=partial(_step, one, _optimizer(one), tokens_BP))
        for name, one in ((SPARSE, _placed(sparse, dtype, plan)), (TWIN, _placed(twin, dtype, plan)))
    }
    what = f"{case.name}, {recipe} beside its dense twin, {_word(dtype)}"
    rates = _rates(works, tokens_BP, plan, lambda line: say(f"{what}: {line}"))
    share = _over(rates[SPARSE], rates[TWIN])
    lines = (
        Line(
            name=SPARSE,
            samples=rates[SPARSE],
            ratios=share,
            note=_params(sparse),
            goals=goals.of_sparse_model(median(share)) if _is_judged(plan, case) else (),
        ),
        Line(name=TWIN, samples=rates[TWIN], ratios=_over(rates[TWIN], rates[TWIN]), note=_params(twin)),
    )
    return Group(title=what, unit="tokens/s", limit=TWIN, lines=lines, facts=_facts(plan, case, dtype, "sparsified"))


def _adopted(plan: Modelling, case: Case, dtype: torch.dtype, say: Say) -> Group:
    torch.manual_seed(0)
    theirs = _placed(family(plan, case), dtype, plan)
    mine = adopt(copy.deepcopy(theirs))
    tokens_BP = _tokens(plan, case)
    what = f"{case.name}, an adopted {type(theirs).__name__.removesuffix('ForCausalLM')}, {_word(dtype)}"
    errors = agreement(plan, case)
    works = {ADOPTED: Work(run=partial(_step, mine, _optimizer(mine), tokens_BP))}
    # One model and one optimizer for all of transformers' implementations: only who runs the experts changes.
    optimizer = _optimizer(theirs)
    why_not = _too_large(plan, case, dtype)
    for implementation in IMPLEMENTATIONS:
        name = f"transformers {implementation}"
        if name not in why_not:
            select = partial(theirs.set_experts_implementation, implementation)
            works[name] = Work(run=partial(_step, theirs, optimizer, tokens_BP), before=select)
    for name, error in errors.items():
        if error > TOLERANCES[torch.float32]:
            why_not[name] = f"not timed, since it computes something else: off by {error:.1e}"
            works.pop(name, None)
    rates = _rates(works, tokens_BP, plan, lambda line: say(f"{what}: {line}"))
    best = max((name for name in rates if name != ADOPTED), key=lambda name: median(rates[name]), default="")
    lines = []
    for name in (ADOPTED, *(f"transformers {implementation}" for implementation in IMPLEMENTATIONS)):
        if name not in rates:
            lines.append(Line(name=name, note=why_not[name]))
            continue
        faster = _over(rates[name], rates[best]) if best else ()
        judged = name == ADOPTED and faster and _is_judged(plan, case)
        lines.append(
            Line(
                name=name,
                samples=rates[name],
                ratios=faster,
                note=f"off by {errors[name]:.0e} on a small model" if name in errors else "",
                goals=goals.of_adopted_model(median(faster)) if judged else (),
            )
        )
    known = _facts(plan, case, dtype, "adopted")
    return Group(title=what, unit="tokens/s", limit=best, lines=tuple(lines), facts=known)


def agreement(plan: Modelling, case: Case) -> dict[str, float]:
    """How far logits and gradients of each implementation are from the eager one's, on a small float32 model.

    Returns:
        By name, the largest error over all tensors as a part of each one's largest entry.
    """
    small = case.tiny(64)
    torch.manual_seed(0)
    few = Modelling(dtypes=(), layers=1, context=16, vocab_size=64, device=plan.device)
    theirs = family(few, small).to(plan.device).train()
    mine = adopt(copy.deepcopy(theirs))
    tokens_BP = _tokens(few, small)
    theirs.set_experts_implementation("eager")
    expected = _outcome(theirs, tokens_BP)
    found = {}
    for implementation in IMPLEMENTATIONS[1:]:
        theirs.set_experts_implementation(implementation)
        found[f"transformers {implementation}"] = _worst(_outcome(theirs, tokens_BP), expected)
    found[ADOPTED] = _worst(_outcome(mine, tokens_BP), expected)
    return found


def _outcome(model: Any, tokens_BP: Tensor) -> dict[str, Tensor | None]:
    model.zero_grad(set_to_none=True)
    output = model(input_ids=tokens_BP, labels=tokens_BP)
    torch.autograd.backward([output.loss])
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {"logits": output.logits.detach(), **gradients}


def _worst(found: Mapping[str, Tensor | None], expected: Mapping[str, Tensor | None]) -> float:
    return max(relative_error(found.get(name), value) for name, value in expected.items() if value is not None)


def _step(model: Any, optimizer: torch.optim.Optimizer, tokens_BP: Tensor) -> None:
    optimizer.zero_grad(set_to_none=True)
    loss: Tensor = model(input_ids=tokens_BP, labels=tokens_BP).loss
    torch.autograd.backward([loss])
    optimizer.step()


def _optimizer(model: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)


def _placed(model: Any, dtype: torch.dtype, plan: Modelling) -> Any:
    return model.to(dtype).to(plan.device).train()


def _tokens(plan: Modelling, case: Case) -> Tensor:
    random = torch.Generator().manual_seed(0)
    shape = (max(1, case.num_tokens // plan.context), plan.context)
    return torch.randint(plan.vocab_size, shape, generator=random).to(plan.device)


def _rates(works: Mapping[str, Work], tokens_BP: Tensor, plan: Modelling, say: Say) -> dict[str, tuple[float, ...]]:
    """Tokens per second in each round."""
    seconds = interleaved(works, rounds=plan.rounds, clock=clock_of(plan.device), say=say)
    return {name: tuple(tokens_BP.numel() / value for value in values) for name, values in seconds.items()}


def _over(values: Sequence[float], of: Sequence[float]) -> tuple[float, ...]:
    return tuple(value / other for value, other in zip(values, of, strict=True))


def _too_large(plan: Modelling, case: Case, dtype: torch.dtype) -> dict[str, str]:
    """``batched_mm`` keeps a copy of its expert's weights for every row of every layer."""
    needed = 3 * case.num_rows * case.width * case.hidden * dtype.itemsize * plan.layers
    free = free_bytes(plan.device)
    if needed <= free:
        return {}
    why = f"copies each row's weights: {needed / 2**30:.0f} GiB, of which {free / 2**30:.0f} are free"
    return {"transformers batched_mm": why}


def _is_judged(plan: Modelling, case: Case) -> bool:
    return plan.device.type == "cpu" and goals.has_goals(case, any_tokens=True)


def _params(model: Any) -> str:
    return f"{sum(parameter.numel() for parameter in model.parameters()) / 1e6:.1f} M parameters"


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _facts(plan: Modelling, case: Case, dtype: torch.dtype, mode: str) -> dict[str, str | int | float | bool]:
    return {
        "case": case.name,
        "mode": mode,
        "dtype": _word(dtype),
        "T": case.num_tokens,
        "context": plan.context,
        "layers": plan.layers,
        "D": case.width,
        "E": case.num_experts,
        "K": case.top_k,
        "F": case.hidden,
        "vocab_size": plan.vocab_size,
    }
