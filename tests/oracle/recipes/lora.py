"""Low-rank changes of a frozen network as experts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.oracle import balance, dispatch
from tests.oracle.case import Answer, Case, Oracle, Weights
from tests.oracle.experts import ACTIVATIONS
from tests.oracle.recipes.soft import all_rows, answer, normal, sequences_of, zeros
from tests.oracle.router import Table, route, softmax


def times(x: Tensor, matrix: Tensor) -> Tensor:
    return (x[:, None] * matrix).sum(dim=0)


def change(x: Tensor, weights: Weights, name: str, expert: int, scale: float) -> Tensor:
    """One expert's low-rank map."""
    into, out = weights[f"experts.{name}.into_EDR"], weights[f"experts.{name}.out_ERF"]
    return scale * times(times(x, into[expert]), out[expert])


def base(weights: Weights, name: str) -> Tensor:
    return weights[f"experts.base.{name}"]


def mixlora(case: Case, weights: Weights, options: dict[str, Any]) -> Answer:
    """Each expert is the network with changed matrices; the two best, renormalised."""
    scale = options.get("alpha", 32.0) / options.get("rank", 16)
    act = ACTIVATIONS[options.get("activation", "silu")]
    table = route(case.x, weights["router.weight"], top_k=options["top_k"], score="softmax", normalize="chosen")
    kept = dispatch.keep_all(table, case.valid)
    y = [case.x[t] * 0 for t in range(len(case.valid))]
    for row, keep in zip(table.rows, kept, strict=True):
        if keep:
            x, e = case.x[row.token], row.expert
            gate = times(x, base(weights, "gate_DF")) + change(x, weights, "gate", e, scale)
            up = times(x, base(weights, "up_DF")) + change(x, weights, "up", e, scale)
            hidden = act(gate) * up
            made = times(hidden, base(weights, "down_FD")) + change(hidden, weights, "down", e, scale)
            y[row.token] = y[row.token] + row.weight * made
    losses = {"switch": balance.switch(table, case.tokens)}
    return Answer(torch.stack(y) if y else case.x * 1, table, kept, losses)


def squared_variation(values: list[Tensor]) -> Tensor:
    """Unbiased variance over squared mean."""
    mean = sum(values) / len(values)
    return sum((value - mean) ** 2 for value in values) / (len(values) - 1) / mean**2


def localized(case: Case, shares: list[list[Tensor]], delta: float) -> Tensor:
    """How unevenly the weights, raised where kinds match, spread over sequences and experts."""
    num_experts = len(shares[0]) if shares else 0
    sums = []
    for tokens in sequences_of(case):
        for e in range(num_experts):
            total = torch.zeros((), dtype=torch.float64)
            for t in tokens:
                match = (case.domains[t] % 2 == 1) == (e < num_experts // 2)
                total = total + (1 + delta if match else 1 - delta) * shares[t][e]
            sums.append(total)
    return squared_variation(sums) if sums else torch.zeros((), dtype=torch.float64)


def lora_moe(case: Case, weights: Weights, options: dict[str, Any]) -> Answer:
    """Each linear map adds a softmax mixture of all its changes."""
    num_experts = options["num_experts"]
    scale = options.get("alpha", 32.0) / options.get("rank", 4)
    act = ACTIVATIONS[options.get("activation", "silu")]
    shares: dict[str, list[list[Tensor]]] = {"gate": [], "up": [], "down": []}

    def linear(x: Tensor, name: str, matrix: str) -> Tensor:
        router = weights[f"router.{name}.weight"]
        mix = softmax([(x * router[e]).sum() for e in range(num_experts)])
        shares[name].append(mix)
        return times(x, base(weights, matrix)) + sum(
            mix[e] * change(x, weights, name, e, scale) for e in range(num_experts)
        )

    y, table = [], Table()
    for t, is_valid in enumerate(case.valid):
        x = case.x[t]
        made = linear(act(linear(x, "gate", "gate_DF")) * linear(x, "up", "up_DF"), "down", "down_FD")
        y.append(made if is_valid else 0 * made)
        mean = [sum(shares[name][t][e] for name in shares) / 3 for e in range(num_experts)]
        table.scores.append(mean)
        table.logits.append([share.log() for share in mean])
        all_rows(table, t, mean if is_valid else zeros(num_experts))
    loss = sum(localized(case, shares[name], 0.1) for name in shares) + 0 * case.x.sum()
    return answer(case, y, table, {"localized": loss})


def mole(case: Case, weights: Weights, options: dict[str, Any]) -> Answer:
    """A gate on all experts' outputs weighs them; their sum is added to the network's."""
    num_experts = options["num_experts"]
    scale = options.get("alpha", 16.0) / options.get("rank", 8)
    act = ACTIVATIONS[options.get("activation", "silu")]
    y, table = [], Table()
    for t, is_valid in enumerate(case.valid):
        x, made = case.x[t], []
        for e in range(num_experts):
            hidden = act(change(x, weights, "gate", e, scale)) * change(x, weights, "up", e, scale)
            made.append(change(hidden, weights, "down", e, scale))
        joined = torch.cat(made)
        joined = normal(joined, torch.ones_like(joined), torch.zeros_like(joined))
        temperature = weights["log_temperature"].exp()
        logits = [(joined * weights["router.weight"][e]).sum() / temperature for e in range(num_experts)]
        shares = softmax(logits)
        hidden = act(times(x, base(weights, "gate_DF"))) * times(x, base(weights, "up_DF"))
        total = times(hidden, base(weights, "down_FD")) + sum(shares[e] * made[e] for e in range(num_experts))
        y.append(total if is_valid else 0 * total)
        table.logits.append(logits)
        table.scores.append(shares)
        all_rows(table, t, shares if is_valid else zeros(num_experts))
    loss = 0 * sum((line[0] for line in table.scores), start=torch.zeros((), dtype=torch.float64))
    for e in range(num_experts if case.tokens else 0):
        loss = loss - (sum(table.scores[t][e] for t in case.tokens) / len(case.tokens)).log()
    return answer(case, y, table, {"product": loss})


ORACLES: dict[str, Oracle] = {"lora-moe": lora_moe, "mixlora": mixlora, "mole": mole}
