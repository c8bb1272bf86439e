"""How alike the experts of a layer are: in their weights, and in what they make of the same tokens, beside chance."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from moesaic.hf.layers import moe_layers
from moesaic.hf.native.work import Each
from moesaic.hf.watching import on_our_kernels, places
from moesaic.probe.losses import Steps, in_evaluation
from moesaic.probe.text import HeldOut
from moesaic.probe.work import AtWork, at_work, matrices, routes_attention

Stacks = tuple[Tensor | None, Tensor, Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class Pairs:
    """One measure of likeness over all pairs of experts of a layer.

    Attributes:
        value: for each expert and each other; 1 on the diagonal.
        mean: over pairs of two.
        chance: the same mean over experts whose weights are shuffled entry by entry; None where they cannot be run.
        chance_low: the lowest of those pairs.
        chance_high: the highest.
    """

    value: tuple[tuple[float, ...], ...]
    mean: float
    chance: float | None
    chance_low: float | None
    chance_high: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Likeness:
    """How alike the experts of one layer are.

    Attributes:
        layer: index in depth order.
        layer_name: module path.
        num_experts: E.
        num_tokens: that outputs were compared on; 0 where none were.
        weights: cosine of the experts' matrices, the mean over gate, up and down; None if not asked for.
        aligned: the same once the hidden units of one expert are put in the order that fits the other best.
        outputs: cosine of what two experts make of a token, the mean over tokens; None if not asked for.
        cka: linear centred kernel alignment of their outputs.
    """

    layer: int
    layer_name: str
    num_experts: int
    num_tokens: int
    weights: Pairs | None
    aligned: Pairs | None
    outputs: Pairs | None
    cka: Pairs | None

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)

    def rows(self) -> list[dict[str, Any]]:
        """A line for each measure and pair of two experts, for a table."""
        measures = {"weights": self.weights, "aligned": self.aligned, "outputs": self.outputs, "cka": self.cka}
        return [
            {
                "layer": self.layer,
                "layer_name": self.layer_name,
                "measure": name,
                "first": first,
                "second": second,
                "value": pairs.value[first][second],
                "chance": pairs.chance,
                "chance_low": pairs.chance_low,
                "chance_high": pairs.chance_high,
            }
            for name, pairs in measures.items()
            if pairs is not None
            for first in range(self.num_experts)
            for second in range(first + 1, self.num_experts)
        ]


@torch.no_grad()
def likeness(
    model: nn.Module,
    text: HeldOut | None = None,
    *,
    weights: bool = True,
    align: bool = True,
    num_tokens: int = 512,
    seed: int = 0,
    step: Steps = lambda _done, _all: None,
) -> list[Likeness]:
    """Compare the experts of each layer pair by pair; layers whose experts are heads of attention are left out.

    Hidden units have no order of their own, so two experts may compute the same and share no number at its place.
    ``aligned`` puts them in the order with the largest cosine (the assignment problem, solved exactly); experts of
    chance gain by that too, so read it beside its ``chance``. Outputs need no order.

    Source: Kornblith et al. 2019, "Similarity of Neural Network Representations Revisited", linear CKA.

    Args:
        model: with MoE layers, ours or transformers'; it is left as it was.
        text: whose first blocks the experts read; None to compare weights alone.
        weights: compare weights.
        align: compare weights in the best order of hidden units too; a layer of E experts solves E (E - 1) / 2
            assignment problems of F units.
        num_tokens: that every expert works on, at most.
        seed: of what is shuffled.
        step: called after each layer.
    Raises:
        ConfigError: if the model has no MoE layers, or experts whose weights or outputs cannot be told apart.
    """
    with on_our_kernels(model), in_evaluation(model):
        places(model)  # refuses a model without layers
        layers = moe_layers(model)
        seen = {} if text is None else _seen(model, text, num_tokens, seed)
        result = []
        for index, (path, layer) in enumerate(layers.items()):
            if routes_attention(layer):
                continue
            stacks = _wide(matrices(layer, path)) if weights else None
            work = seen.get(path)
            by_weight = None if stacks is None else _by_weight(stacks, seed, _cosine)
            outputs, cka = (None, None) if work is None else _by_output(work, num_tokens)
            result.append(
                Likeness(
                    layer=index,
                    layer_name=path,
                    num_experts=len(stacks[1]) if stacks is not None else work.num_experts if work else 0,
                    num_tokens=0 if work is None else len(_sample(work.x_TD, num_tokens)),
                    weights=by_weight,
                    aligned=_by_weight(stacks, seed, _aligned) if stacks is not None and align else None,
                    outputs=outputs,
                    cka=cka,
                )
            )
            step(index + 1, len(layers))
    return result


def _seen(model: Any, text: HeldOut, num_tokens: int, seed: int) -> dict[str, AtWork]:
    """What experts read of as many blocks as hold the tokens."""
    # Blocks enough for the tokens, without their padding.
    enough = int((text.valid_BP.sum(dim=1).cumsum(dim=0) < num_tokens).sum()) + 1
    batch = next(text.batches(enough))
    device = next(model.parameters()).device
    mask_BP = batch.valid_BP.to(device)
    with at_work(model, mask_BP.reshape(-1), seed) as seen:
        model(input_ids=batch.input_ids_BP.to(device), attention_mask=mask_BP.long(), use_cache=False)
    return seen


def _sample(x_TD: Tensor, num_tokens: int) -> Tensor:
    """Evenly spread tokens."""
    count = min(num_tokens, len(x_TD))
    place_T = torch.arange(count, device=x_TD.device) * len(x_TD) // max(count, 1)
    return x_TD.index_select(0, place_T)


def _wide(stacks: Stacks) -> Stacks:
    gate_EDF, up_EDF, down_EFD = stacks
    return None if gate_EDF is None else gate_EDF.float(), up_EDF.float(), down_EFD.float()


def _by_weight(stacks: Stacks, seed: int, measure: Callable[[list[Tensor], list[Tensor]], float]) -> Pairs:
    """All pairs under one measure, and those of shuffled weights."""
    parts = [one for one in stacks if one is not None]
    # Each expert's matrices with the hidden units first: (F, D) of length 1.
    oriented = [[_unit(part[e] if part is stacks[2] else part[e].t()) for part in parts] for e in range(len(stacks[1]))]
    generator = torch.Generator().manual_seed(seed)
    random = [
        [one.reshape(-1)[torch.randperm(one.numel(), generator=generator)].view_as(one) for one in expert]
        for expert in oriented[: min(len(oriented), 8)]
    ]
    return _pairs(_table(oriented, measure), _table(random, measure))


def _unit(matrix: Tensor) -> Tensor:
    length: Tensor = torch.linalg.vector_norm(matrix)
    return (matrix / length.clamp_min(torch.finfo(matrix.dtype).tiny)).cpu()


def _table(
    experts: list[list[Tensor]], measure: Callable[[list[Tensor], list[Tensor]], float]
) -> npt.NDArray[np.float64]:
    value = np.eye(len(experts))
    for first in range(len(experts)):
        for second in range(first + 1, len(experts)):
            value[first, second] = value[second, first] = measure(experts[first], experts[second])
    return value


def _cosine(first: list[Tensor], second: list[Tensor]) -> float:
    return float(np.mean([float((a * b).sum()) for a, b in zip(first, second, strict=True)]))


def _aligned(first: list[Tensor], second: list[Tensor]) -> float:
    from scipy.optimize import linear_sum_assignment

    gain_FF = torch.stack([a @ b.t() for a, b in zip(first, second, strict=True)]).mean(dim=0).double().numpy()
    rows, columns = linear_sum_assignment(gain_FF, maximize=True)
    return float(gain_FF[rows, columns].sum())


def _by_output(work: AtWork, num_tokens: int) -> tuple[Pairs, Pairs]:
    x_TD = _sample(work.x_TD, num_tokens)
    output_ETD = _outputs(work.each, x_TD, work.num_experts)
    random = None if work.random is None else _outputs(work.random, x_TD, work.num_experts)
    return (
        _pairs(_output_cosine(output_ETD), None if random is None else _output_cosine(random)),
        _pairs(_linear_cka(output_ETD), None if random is None else _linear_cka(random)),
    )


def _outputs(each: Each, x_TD: Tensor, num_experts: int) -> Tensor:
    """What every expert makes of every token (E, T, D)."""
    one_T = torch.ones(len(x_TD), device=x_TD.device)
    return torch.stack(
        [
            each(x_TD, torch.full((len(x_TD),), e, dtype=torch.int64, device=x_TD.device), one_T).float()
            for e in range(num_experts)
        ]
    )


def _output_cosine(output_ETD: Tensor) -> npt.NDArray[np.float64]:
    unit_ETD = torch.nn.functional.normalize(output_ETD, dim=-1)
    return np.asarray((torch.einsum("etd,ftd->ef", unit_ETD, unit_ETD) / output_ETD.shape[1]).double().cpu().numpy())


def _linear_cka(output_ETD: Tensor) -> npt.NDArray[np.float64]:
    """The cosine of centred Gram matrices, which is linear CKA."""
    centred_ETD = output_ETD - output_ETD.mean(dim=1, keepdim=True)
    gram = torch.einsum("etd,eud->etu", centred_ETD, centred_ETD).flatten(1).double()
    gram = torch.nn.functional.normalize(gram, dim=-1)
    return np.asarray((gram @ gram.t()).cpu().numpy())


def _pairs(value: npt.NDArray[np.float64], random: npt.NDArray[np.float64] | None) -> Pairs:
    mine, chance = _two(value), np.zeros(0) if random is None else _two(random)
    return Pairs(
        value=tuple(tuple(float(one) for one in line) for line in value),
        mean=float(mine.mean()) if len(mine) else 1.0,
        chance=float(chance.mean()) if len(chance) else None,
        chance_low=float(chance.min()) if len(chance) else None,
        chance_high=float(chance.max()) if len(chance) else None,
    )


def _two(value: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return value[np.triu_indices(len(value), 1)]
