"""What low precision does to routing: logits that grow, choices that change. The figures that the papers argue with."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moesaic.lab.small import Setup
from moesaic.lab.text import bits_per_byte, build, material_of, trained

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, kw_only=True, slots=True)
class PrecisionResult:
    """One run in bfloat16.

    Attributes:
        recipe: its name.
        variant: what was done to it: "z-loss" or "no z-loss"; "router float32" or "router bfloat16".
        seed: of the run.
        num_experts: E.
        squared_logsumexp: mean over tokens of ``logsumexp(logits)^2``, before training and after, mean over layers.
        largest_logit: the largest absolute logit, before and after.
        changed_choices: share of tokens of the trained model that go to other experts when the router's product is
            rounded to bfloat16.
        bits_per_byte: held out.
    """

    recipe: str
    variant: str
    seed: int
    num_experts: int
    squared_logsumexp: tuple[float, float]
    largest_logit: tuple[float, float]
    changed_choices: float
    bits_per_byte: float

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """One thing to try.

    Attributes:
        recipe: its name.
        name: what is done to it.
        z_loss: coefficient of the z-loss; None for the recipe's balance losses as they are.
        rounded: whether routers work in bfloat16.
        num_experts: E; None for that of the setup.
        top_k: K; None for that of the setup.
    """

    recipe: str
    name: str
    z_loss: float | None = None
    rounded: bool = False
    num_experts: int | None = None
    top_k: int | None = None


VARIANTS = (
    Variant(recipe="st-moe", name="z-loss", z_loss=1e-3),
    Variant(recipe="st-moe", name="no z-loss", z_loss=0.0),
    Variant(recipe="mixtral", name="router float32"),
    Variant(recipe="mixtral", name="router bfloat16", rounded=True),
    # As many experts as published: the more there are, the closer the last chosen and the first left out.
    Variant(recipe="olmoe", name="router float32", num_experts=64, top_k=8),
    Variant(recipe="olmoe", name="router bfloat16", rounded=True, num_experts=64, top_k=8),
)


def every_variant(
    *,
    seeds: Sequence[int] = (0, 1, 2),
    setup: Setup | None = None,
    variants: Sequence[Variant] = VARIANTS,
    done: Callable[[PrecisionResult], None] = lambda _one: None,
) -> list[PrecisionResult]:
    """Train in bfloat16: with and without a z-loss, and with a router in either precision.

    Args:
        seeds: of the runs.
        setup: the numbers; bfloat16 whatever it says.
        variants: what to try.
        done: called after each run.
    """
    setup = replace(setup or Setup(lr=1e-2), dtype="bfloat16")
    results = []
    for variant in variants:
        for seed in seeds:
            results.append(_run(variant, seed, setup))
            done(results[-1])
    return results


def _run(variant: Variant, seed: int, setup: Setup) -> PrecisionResult:
    name = variant.recipe
    setup = replace(setup, num_experts=variant.num_experts or setup.num_experts)
    options: dict[str, Any] = {} if variant.top_k is None else {"top_k": variant.top_k}
    if variant.z_loss is not None:
        options["aux_coefficients"] = {"z": variant.z_loss}
    torch.manual_seed(seed)
    before = _logits(build(name, setup, material_of(setup), **options), setup)
    prepare = round_routers if variant.rounded else lambda _model: None
    model, _ = trained(name, seed, setup, prepare=prepare, **options)
    after = _logits(model, setup)
    return PrecisionResult(
        recipe=name,
        variant=variant.name,
        seed=seed,
        num_experts=setup.num_experts,
        squared_logsumexp=(_squared(before), _squared(after)),
        largest_logit=(_largest(before), _largest(after)),
        changed_choices=changed_choices(model, setup),
        bits_per_byte=bits_per_byte(model, setup),
    )


def round_routers(model: PreTrainedModel) -> None:
    """Let every router of a model take its product in bfloat16, as a model that is cast as a whole does."""
    for router in _routers(model):
        # An attribute of the instance hides the method: this model alone is changed.
        object.__setattr__(router, "logits", lambda x_TD, router=router: rounded_logits(router, x_TD))


def rounded_logits(router: Any, x_TD: Tensor) -> Tensor:
    """``x W^T`` with inputs, weights and result in bfloat16 (T, E), handed on as float32."""
    with torch.autocast(x_TD.device.type, enabled=False):
        return F.linear(x_TD.bfloat16(), router.weight.bfloat16()).float()


def changed_choices(model: PreTrainedModel, setup: Setup) -> float:
    """Share of tokens, over layers, whose set of experts differs between a float32 and a bfloat16 product."""
    from moesaic.routers import LinearRouter, select_top_k

    changed, total = 0, 0
    for router, x_TD in _router_inputs(model, setup):
        exact = select_top_k(LinearRouter.logits(router, x_TD), router.top_k).sort(dim=-1).values
        rough = select_top_k(rounded_logits(router, x_TD), router.top_k).sort(dim=-1).values
        changed += int((exact != rough).any(dim=-1).sum())
        total += x_TD.shape[0]
    return changed / total


def _routers(model: nn.Module) -> list[Any]:
    from moesaic.hf import moe_layers

    layers: Iterable[Any] = moe_layers(model).values()
    return [layer.router for layer in layers]


@torch.no_grad()
def _router_inputs(model: nn.Module, setup: Setup) -> list[tuple[Any, Tensor]]:
    """What each router reads on a few blocks of text, in evaluation."""
    from moesaic.train.order import collate

    blocks = material_of(setup).blocks
    batch = collate([blocks[index * len(blocks) // 16] for index in range(16)])
    seen: list[tuple[Any, Tensor]] = []
    hooks = [
        router.register_forward_pre_hook(lambda module, inputs: seen.append((module, inputs[0].detach().float())))
        for router in _routers(model)
    ]
    was_training = model.training
    model.eval()
    with torch.autocast("cpu", torch.bfloat16):
        model(**batch)
    model.train(was_training)
    for hook in hooks:
        hook.remove()
    return seen


def _logits(model: PreTrainedModel, setup: Setup) -> list[Tensor]:
    from moesaic.routers import LinearRouter

    return [LinearRouter.logits(router.eval(), x_TD).detach() for router, x_TD in _router_inputs(model, setup)]


def _squared(logits: list[Tensor]) -> float:
    return float(torch.stack([logits_TE.logsumexp(dim=-1).square().mean() for logits_TE in logits]).mean())


def _largest(logits: list[Tensor]) -> float:
    return max(float(logits_TE.abs().max()) for logits_TE in logits)


def page(results: Sequence[PrecisionResult], setup: Setup) -> str:
    """What was measured, as a page: the mean over seeds of each variant."""
    lines = [
        "# Precision of the router",
        "",
        f"Small language models trained in bfloat16 autocast by `moesaic lab precision`: {setup.steps} steps of "
        f"{setup.tokens_per_step:,}",
        f"tokens at a learning rate of {setup.lr}, the mean over {len({one.seed for one in results})} seeds.",
        "",
        "- **Does the z-loss keep logits small?** Compare the mean of `logsumexp(logits)^2` over tokens, which it",
        "  shrinks, before training and after.",
        "- **Whom does a router in bfloat16 send elsewhere?** The share of tokens of the trained model whose set of",
        "  experts is another when the router's product is rounded to bfloat16, the mean over layers. Routers of",
        "  Moesaic work in float32 whatever the model's type; in rows named `router bfloat16` they were made not to.",
        "",
        "| recipe | experts | variant | logsumexp², before to after | largest logit | other choices | bits per byte |",
        "|---|---|---|---|---|---|---|",
    ]
    groups: dict[tuple[str, str], list[PrecisionResult]] = {}
    for one in results:
        groups.setdefault((one.recipe, one.variant), []).append(one)
    for (recipe, variant), runs in groups.items():
        squared, largest = (
            [fmean(getattr(one, name)[when] for one in runs) for when in (0, 1)]
            for name in ("squared_logsumexp", "largest_logit")
        )
        lines.append(
            f"| `{recipe}` | {runs[0].num_experts} | {variant} | {squared[0]:.2f} to {squared[1]:.2f} "
            f"| {largest[0]:.2f} to {largest[1]:.2f} | {fmean(one.changed_choices for one in runs):.2%} "
            f"| {fmean(one.bits_per_byte for one in runs):.3f} |"
        )
    return "\n".join(lines) + "\n"
