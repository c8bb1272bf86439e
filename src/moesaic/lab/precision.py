"""What low precision does to routing: logits that grow, choices that change. The figures that the papers argue with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moesaic.lab.small import Setup, build, material_of, measure, trained

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, kw_only=True, slots=True)
class PrecisionResult:
    """One run in bfloat16.

    Attributes:
        recipe: its name.
        variant: what was done to it: "z-loss" or "no z-loss"; "router float32" or "router bfloat16".
        seed: of the run.
        squared_logsumexp: mean over tokens of ``logsumexp(logits)^2``, before training and after, mean over layers.
        largest_logit: the largest absolute logit, before and after.
        changed_choices: share of tokens of the trained model that go to other experts when the router's product is
            rounded to bfloat16.
        bits_per_byte: held out.
    """

    recipe: str
    variant: str
    seed: int
    squared_logsumexp: tuple[float, float]
    largest_logit: tuple[float, float]
    changed_choices: float
    bits_per_byte: float

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)


def precision(*, seeds: Sequence[int] = (0, 1, 2), setup: Setup | None = None) -> list[PrecisionResult]:
    """Train ``st-moe`` with and without its z-loss, and ``mixtral`` with a router in either precision, in bfloat16.

    Args:
        seeds: of the runs.
        setup: the numbers; bfloat16 whatever it says.
    """
    setup = replace(setup or Setup(lr=1e-2), dtype="bfloat16")
    results = []
    for seed in seeds:
        for variant, coefficient in (("z-loss", 1e-3), ("no z-loss", 0.0)):
            options = {"aux_coefficients": {"z": coefficient}}
            results.append(_run("st-moe", variant, seed, setup, rounded=False, options=options))
        for variant, rounded in (("router float32", False), ("router bfloat16", True)):
            results.append(_run("mixtral", variant, seed, setup, rounded=rounded, options={}))
    return results


def _run(
    name: str, variant: str, seed: int, setup: Setup, *, rounded: bool, options: dict[str, Any]
) -> PrecisionResult:
    material = material_of(setup)
    torch.manual_seed(seed)
    before = _logits(build(name, setup, material, **options), setup)
    model = trained(name, seed, setup, prepare=round_routers if rounded else lambda _model: None, **options)
    after = _logits(model, setup)
    bits, _ = measure(model, material)
    return PrecisionResult(
        recipe=name,
        variant=variant,
        seed=seed,
        squared_logsumexp=(_squared(before), _squared(after)),
        largest_logit=(_largest(before), _largest(after)),
        changed_choices=changed_choices(model, setup),
        bits_per_byte=bits,
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


def _routers(model: PreTrainedModel) -> list[Any]:
    from moesaic.hf import moe_layers

    return [layer.router for layer in moe_layers(model).values()]


@torch.no_grad()
def _router_inputs(model: PreTrainedModel, setup: Setup) -> list[tuple[Any, Tensor]]:
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
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
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
