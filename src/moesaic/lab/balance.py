"""Is balance real? A router that starts badly skewed, with each balance term and without."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from moesaic import recipes
from moesaic.balance import BiasRule, LossTerm, Rule
from moesaic.balance.named import named
from moesaic.core.context import Context
from moesaic.core.routing import Routing
from moesaic.recipes.recipe import Layer
from moesaic.routers import LinearRouter

WIDTH, NUM_EXPERTS, TOKENS = 32, 8, 512


@dataclass(frozen=True, kw_only=True, slots=True)
class BalanceResult:
    """How uneven the load was: the busiest expert's over the mean.

    Attributes:
        recipe: whose layer it was.
        term: what balanced it.
        counts: what was to be even, as in :class:`Trial`.
        steps: of the training.
        before: before the first step.
        without: after the last step of a training without the term, over fresh batches.
        after: the same with the term.
        note: what else there is to know.
    """

    recipe: str
    term: str
    counts: str
    steps: int
    before: float
    without: float
    after: float
    note: str

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """One balance term on the design that it was made for.

    Attributes:
        recipe: whose layer.
        terms: losses and rules by their names in :data:`moesaic.balance.TERMS`, at a strength that acts within the
            steps.
        rules: more rules, for what a name and a number do not say.
        counts: what is to be even. "rows": those that experts get. "weights": their sums, where every token visits
            every expert. "devices": rows of the groups of experts that live together. "visits": tokens that have a
            row in such a group.
        options: of the recipe, beside its sizes.
        gap: how much higher the favoured experts' logits are at the start, on average.
        steps: AdamW steps.
        note: why the term does not bring the load back, or what else there is to know.
    """

    recipe: str
    terms: Mapping[str, float] = field(default_factory=dict)
    rules: tuple[Rule, ...] = ()
    counts: Literal["rows", "weights", "devices", "visits"] = "rows"
    options: Mapping[str, Any] = field(default_factory=dict)
    gap: float = 6.0
    steps: int = 300
    note: str = ""


TRIALS: Mapping[str, Trial] = {
    "importance CV²": Trial(recipe="shazeer-2017", terms={"importance": 0.1}),
    "load CV²": Trial(recipe="shazeer-2017", terms={"load": 0.1}),
    "GShard": Trial(recipe="gshard", terms={"gshard": 0.01}),
    "Switch": Trial(recipe="switch", terms={"switch": 0.01}),
    "expert-level": Trial(recipe="deepseek-moe", terms={"switch": 0.01}),
    "device-level": Trial(recipe="deepseek-v2", terms={"device": 0.05}, counts="devices"),
    "communication-level": Trial(recipe="deepseek-v2", terms={"communication": 0.1}, counts="visits"),
    "sequence-wise": Trial(recipe="deepseek-v3", terms={"sequence": 0.01}),
    "global-batch": Trial(recipe="qwen3-moe", terms={"global-batch": 0.01}),
    "adaptive coefficient": Trial(recipe="skywork", terms={"adaptive-even-gate": 1.0, "drops": 0.01}),
    "heterogeneous": Trial(recipe="moe++", terms={"heterogeneous": 0.5}),
    "ReLU L1 with sparsity": Trial(
        recipe="relu",
        terms={"adaptive-l1": 1.0, "sparsity": 1.2},
        note=(
            "does not in so few steps: it presses until experts are as few as wished, whichever they are (2.1 and 2.5 "
            "after 4,000 steps, two seeds); without it all stay in use"
        ),
    ),
    "active share": Trial(recipe="evo-moe", terms={"active-share": 0.3}, options={"temperature": 0.3}),
    "mutual information": Trial(recipe="ds-moe", terms={"mutual-information": 0.1}, counts="weights"),
    "localised": Trial(recipe="lora-moe", terms={"localized": 1.0}, counts="weights"),
    "product": Trial(
        recipe="mole",
        terms={"product": 0.5},
        counts="weights",
        gap=20.0,
        note="from a gap of 20: one of 6 closes by itself",
    ),
    "loss-free bias": Trial(recipe="deepseek-v3", terms={"bias": 0.01}),
    "loss-free bias, proportional": Trial(recipe="deepseek-v3", rules=(BiasRule(rate=0.01, rule="proportional"),)),
    "loss-free bias, published rate": Trial(
        recipe="deepseek-v3",
        terms={"bias": 0.001},
        steps=800,
        note="a tenth of the rate, so more steps",
    ),
}
"""Each term that is there to balance, under the name that the field has for it. Terms that are there for other things
are not among them: z (small logits), entropy (few experts), depth and threshold (causal inference), reinforce."""


def every_term(
    *, steps: int | None = None, seed: int = 0, done: Callable[[BalanceResult], None] = lambda _one: None
) -> list[BalanceResult]:
    """Run every trial with its terms and without.

    Args:
        steps: AdamW steps of each training; None for each trial's own.
        seed: of weights and data.
        done: called after each trial.
    """
    results = []
    for name, trial in TRIALS.items():
        trial = trial if steps is None else replace(trial, steps=steps)
        before, after = rebalance(trial, seed=seed)
        _, without = rebalance(replace(trial, terms={}, rules=()), seed=seed)
        results.append(
            BalanceResult(
                recipe=trial.recipe,
                term=name,
                counts=trial.counts,
                steps=trial.steps,
                before=before,
                without=without,
                after=after,
                note=trial.note,
            )
        )
        done(results[-1])
    return results


def rebalance(trial: Trial, *, seed: int = 0) -> tuple[float, float]:
    """Train a layer whose router favours two of eight experts: its max/mean load before and after.

    The tokens have a direction in common, and the first two experts' router weights point along it: the skew of a
    collapsed router. The task is to give what a random network would give, so that without a term nothing calls the
    router back.

    Args:
        trial: the design, and the terms at their strength; none to see what happens without.
        seed: of weights and data.
    """
    torch.manual_seed(seed)
    layer: Any = recipes.get(trial.recipe).layer(
        WIDTH, hidden=WIDTH, num_experts=NUM_EXPERTS, **_choices(trial.recipe), **trial.options
    )
    teacher = torch.nn.Sequential(torch.nn.Linear(WIDTH, 2 * WIDTH), torch.nn.ReLU(), torch.nn.Linear(2 * WIDTH, WIDTH))
    common_D = torch.randn(WIDTH)
    common_D = 2 * common_D / common_D.norm()
    _skew(layer, common_D, trial.gap)
    terms = (*named(trial.terms), *trial.rules)
    losses = [term for term in terms if isinstance(term, LossTerm)]
    controllers = [one for term in terms if not isinstance(term, LossTerm) for one in term.build([layer])]
    before = _imbalance(layer, common_D, trial.counts)
    optimizer = torch.optim.AdamW([p for p in layer.parameters() if p.requires_grad], lr=3e-3, weight_decay=0.0)
    for _ in range(trial.steps):
        x_TD, context = _batch(common_D)
        y_TD, routing = layer(x_TD, None, context)
        loss = (y_TD - teacher(x_TD).detach()).square().mean() + sum(term(routing) for term in losses)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        kept_E = torch.bincount(routing.expert_N[routing.kept_N], minlength=NUM_EXPERTS)
        for controller in controllers:
            controller.step(routing.load_E, kept_E=kept_E, num_tokens=TOKENS)
    return before, _imbalance(layer, common_D, trial.counts)


def page(results: Sequence[BalanceResult]) -> str:
    """What was measured, as a page."""
    what = {"rows": "rows", "weights": "sums of weights", "devices": "rows, by device", "visits": "visits of devices"}
    lines = [
        "# Balance terms from a collapsed router",
        "",
        "Is balance real? By `moesaic lab balance`: a layer whose router sends nearly everything to two of eight",
        "experts is trained on a task that does not care which expert does it, with each balance term on the design",
        "that it was made for, and without. The figures are the busiest expert's load over the mean, over fresh",
        "batches: 4 where two of eight experts share everything, 1 where all have the same. Strengths are chosen so",
        "that a term acts within so few steps; published ones are mostly smaller and have a long training to act.",
        "",
        "| term | recipe | what is counted | steps | at the start | without the term | with it | |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {one.term} | `{one.recipe}` | {what[one.counts]} | {one.steps} | {one.before:.2f} | {one.without:.2f} "
        f"| **{one.after:.2f}** | {one.note} |"
        for one in results
    ]
    return "\n".join(lines) + "\n"


def _choices(recipe: str) -> dict[str, int]:
    """One choice where one was published, else two; four devices of two experts where experts live on devices."""
    published = recipes.get(recipe).options
    wanted = {"top_k": min(2, published.get("top_k") or 2), "num_devices": 4}
    return {name: value for name, value in wanted.items() if name in published}


@torch.no_grad()
def _skew(layer: Any, common_D: Tensor, gap: float) -> None:
    """Turn each router's first two experts along what its inputs have in common, so that their logits are higher."""
    for name, parameter in layer.named_parameters():
        if name.startswith("experts.") and not parameter.any():
            # Low-rank experts that change nothing yet give a router nothing to tell them by.
            torch.nn.init.normal_(parameter, std=0.3)
    inputs: dict[LinearRouter, Tensor] = {}
    routers = [module for module in layer.modules() if isinstance(module, LinearRouter)]
    for router in routers:
        object.__setattr__(router, "logits", partial(_noting, inputs, router))
    x_TD, context = _batch(common_D)
    layer(x_TD, None, context)
    for router in routers:
        object.__delattr__(router, "logits")
        mean_D = inputs[router].mean(dim=0)
        router.weight[:2] += gap * mean_D / mean_D.square().sum()


def _noting(inputs: dict[LinearRouter, Tensor], router: LinearRouter, x_TD: Tensor) -> Tensor:
    inputs[router] = x_TD
    return LinearRouter.logits(router, x_TD)


def _batch(common_D: Tensor) -> tuple[Tensor, Context]:
    x_TD = torch.randn(TOKENS, WIDTH) + common_D
    sequence_T = torch.arange(TOKENS) // 64
    return x_TD, Context(sequence_T=sequence_T, id_T=torch.randint(64, (TOKENS,)), domain_T=sequence_T % 2)


@torch.no_grad()
def _imbalance(layer: Layer, common_D: Tensor, counts: str) -> float:
    """The most that an expert or device gets over the mean, over eight fresh batches, routed as in training."""
    got = []
    for _ in range(8):
        x_TD, context = _batch(common_D)
        got.append(_counted(layer(x_TD, None, context)[1], counts))
    total = torch.stack(got).sum(dim=0)
    return float(total.max() / total.mean())


def _counted(routing: Routing, counts: str) -> Tensor:
    """What each expert, or each device, gets."""
    if counts == "weights":
        return routing.importance_E.double()
    if counts == "rows":
        return routing.load_E.double()
    device_E = routing.extras["device_E"]
    num_devices = int(device_E.max()) + 1
    rows_TG = torch.zeros(routing.num_tokens, num_devices, dtype=torch.float64)
    rows_TG.index_put_((routing.token_N, device_E[routing.expert_N]), torch.ones(()).double(), accumulate=True)
    return (rows_TG.clamp_max(1) if counts == "visits" else rows_TG).sum(dim=0)
