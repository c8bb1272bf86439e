"""Modern language models: token choice with softmax or sigmoid scores, shared experts, devices and biases."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from tests.oracle import balance, dispatch, experts
from tests.oracle.case import Answer, Case, Oracle, Weights
from tests.oracle.router import Row, Table, best, route, softmax


def _routed(
    case: Case, weights: Weights, options: dict[str, Any], kept: list[bool], table: Table, activation: str = "silu"
) -> Tensor:
    stacks = (weights["experts.gate_EDF"], weights["experts.up_EDF"], weights["experts.down_EFD"])
    return experts.combine(case.x, table, kept, *stacks, options.get("activation", activation))


def _shared(case: Case, weights: Weights, options: dict[str, Any]) -> Tensor:
    gate, up, down = weights["shared.gate_DF"], weights["shared.up_DF"], weights["shared.down_FD"]
    token_gate = weights.get("shared.token_gate_D")
    return experts.shared(case.x, gate, up, down, token_gate, options.get("activation", "silu"))


def _dropless(
    case: Case, weights: Weights, options: dict[str, Any], normalize: str, activation: str = "silu"
) -> tuple[Tensor, Table, list[bool]]:
    table = route(case.x, weights["router.weight"], top_k=options["top_k"], score="softmax", normalize=normalize)
    kept = dispatch.keep_all(table, case.valid)
    return _routed(case, weights, options, kept, table, activation), table, kept


def deepseek_moe(case: Case, weights: Weights, options: dict[str, Any]) -> Answer:
    """Raw softmax scores, shared experts, the balance of each sequence."""
    y, table, kept = _dropless(case, weights, options, "scores")
    if options.get("num_shared", 2):
        y = y + _shared(case, weights, options)
    return Answer(y, table, kept, {"sequence": balance.sequence(table, case.tokens, case.sequences)})


def qwen1_5_moe(case: Case, weights: Weights, options: dict[str, Any]) -> Answer:
    """Raw softmax scores, and a shared expert behind a gate."""
    y, table, kept = _dropless(case, weights, options, "scores")
    y = y + _shared(case, weights, options)
    return Answer(y, table, kept, {"switch": balance.switch(table, case.tokens)})


def qwen3_moe(case: Case, weights: Weights, options: dict[str, Any]) -> Answer:
    """Renormalised softmax scores; a layer by itself takes its batch for the global one."""
    y, table, kept = _dropless(case, weights, options, "chosen")
    return Answer(y, table, kept, {"global-batch": balance.switch(table, case.tokens)})


def olmoe(case: Case, weights: Weights, options: dict[str, Any]) -> Answer:
    """Raw softmax scores; balance and z-loss."""
    y, table, kept = _dropless(case, weights, options, "scores")
    losses = {"switch": balance.switch(table, case.tokens), "z": balance.z(table, case.tokens)}
    return Answer(y, table, kept, losses)


def dbrx(case: Case, weights: Weights, options: dict[str, Any]) -> Answer:
    """Softmax scores over the L1 norm of the chosen ones."""
    y, table, kept = _dropless(case, weights, options, "chosen")
    return Answer(y, table, kept, {"switch": balance.switch(table, case.tokens)})


def jamba(case: Case, weights: Weights, options: dict[str, Any]) -> Answer:
    """Raw softmax scores."""
    y, table, kept = _dropless(case, weights, options, "scores")
    return Answer(y, table, kept, {"switch": balance.switch(table, case.tokens)})


def grok_1(case: Case, weights: Weights, options: dict[str, Any]) -> Answer:
    """Raw softmax scores, GELU-gated experts."""
    y, table, kept = _dropless(case, weights, options, "scores", "gelu_tanh")
    return Answer(y, table, kept, {"switch": balance.switch(table, case.tokens)})


def arctic(case: Case, weights: Weights, options: dict[str, Any]) -> Answer:
    """Renormalised softmax scores beside a dense network."""
    y, table, kept = _dropless(case, weights, options, "chosen")
    y = y + _shared(case, weights, options)
    return Answer(y, table, kept, {"switch": balance.switch(table, case.tokens)})


def llama4(case: Case, weights: Weights, options: dict[str, Any]) -> Answer:
    """Sigmoids of the largest logits times the experts' inputs; a shared expert."""
    table = route(case.x, weights["router.weight"], top_k=options["top_k"], score="sigmoid", normalize="scores")
    kept = dispatch.keep_all(table, case.valid)
    outputs = [0 * x for x in case.x]
    for row, keep in zip(table.rows, kept, strict=True):
        if keep:
            stacks = [weights[f"experts.{name}"][row.expert] for name in ("gate_EDF", "up_EDF", "down_EFD")]
            x = row.weight * case.x[row.token]
            outputs[row.token] = outputs[row.token] + experts.feed_forward(
                x, *stacks, options.get("activation", "silu")
            )
    y = torch.stack(outputs) if outputs else case.x * 1
    if options.get("num_shared", 1):
        y = y + _shared(case, weights, options)
    return Answer(y, table, kept, {"switch": balance.switch(table, case.tokens)})


def gpt_oss(case: Case, weights: Weights, options: dict[str, Any]) -> Answer:
    """Biased logits choose and weigh; experts with biases and bounds."""
    table = Table()
    bias = weights["router.logit_bias_E"]
    for t, x in enumerate(case.x):
        logits = [(x * weight).sum() + b for weight, b in zip(weights["router.weight"], bias, strict=True)]
        chosen = best([logit.item() for logit in logits], options["top_k"])
        for choice, (e, weight) in enumerate(zip(chosen, softmax([logits[e] for e in chosen]), strict=True)):
            table.rows.append(Row(token=t, choice=choice, expert=e, weight=weight))
        table.logits.append(logits)
        table.scores.append(softmax(logits))
    kept = dispatch.keep_all(table, case.valid)
    alpha, limit = options.get("alpha", 1.702), options.get("limit", 7.0)
    outputs = [0 * x for x in case.x]
    for row, keep in zip(table.rows, kept, strict=True):
        if keep:
            part = {name: weights[f"experts.{name}"][row.expert] for name in _GPT_OSS_WEIGHTS}
            x = case.x[row.token][:, None]
            gate = (x * part["gate_EDF"]).sum(dim=0) + part["gate_bias_EF"]
            up = (x * part["up_EDF"]).sum(dim=0) + part["up_bias_EF"]
            gate = torch.where(gate > limit, limit, gate)
            up = torch.where(up > limit, limit, torch.where(up < -limit, -limit, up))
            hidden = gate / (1 + (-alpha * gate).exp()) * (up + 1)
            y = (hidden[:, None] * part["down_EFD"]).sum(dim=0) + part["down_bias_ED"]
            outputs[row.token] = outputs[row.token] + row.weight * y
    y = torch.stack(outputs) if outputs else case.x * 1
    return Answer(y, table, kept, {"switch": balance.switch(table, case.tokens)})


_GPT_OSS_WEIGHTS = ("gate_EDF", "gate_bias_EF", "up_EDF", "up_bias_EF", "down_EFD", "down_bias_ED")


def skywork(case: Case, weights: Weights, options: dict[str, Any]) -> Answer:
    """Logits brought to mean 0 and one spread, softmax over the chosen; a capacity in training."""
    table, top_k, num_experts = Table(), options["top_k"], options["num_experts"]
    bias = weights["router.logit_bias_E"]
    for t, x in enumerate(case.x):
        logits = [(x * weight).sum() + b for weight, b in zip(weights["router.weight"], bias, strict=True)]
        mean = sum(logits) / num_experts
        variance = sum((logit - mean) ** 2 for logit in logits) / num_experts
        sharpness = options.get("sharpness", 1.0)
        normalized = [sharpness * (logit - mean) / (variance + 1e-6) ** 0.5 for logit in logits]
        chosen = best([value.item() for value in normalized], top_k)
        weight = softmax([normalized[e] for e in chosen])
        table.rows.extend(Row(t, k, e, w) for k, (e, w) in enumerate(zip(chosen, weight, strict=True)))
        table.logits.append(logits)
        table.scores.append(softmax(normalized))
    kept = dispatch.keep_all(table, case.valid)
    if case.training:
        factor, minimum = options.get("capacity_factor", 1.25), options.get("min_capacity", 4)
        room = {"num_experts": num_experts, "factor": factor, "minimum": minimum, "drop": "position"}
        kept = dispatch.keep_by_capacity(table, case.valid, **room)
    y = _routed(case, weights, options, kept, table)
    loss = sum(0 * score for scores in table.scores for score in scores) + torch.zeros((), dtype=torch.float64)
    for e in range(num_experts if case.tokens else 0):
        loss = loss + (1 / num_experts - sum(table.scores[t][e] for t in case.tokens) / len(case.tokens)) ** 2
    return Answer(y, table, kept, {"even-gate": loss})


def deepseek_v2(case: Case, weights: Weights, options: dict[str, Any]) -> Answer:
    """Raw scores within the best devices; each device drops its weakest rows in training; three losses."""
    num_experts, top_k = options["num_experts"], options["top_k"]
    devices = options.get("num_devices") or max(d for d in range(1, 9) if num_experts % d == 0)
    size = num_experts // devices
    visits = options.get("devices_per_token") or min(devices, max(3, math.ceil(top_k / size)))
    table = route(
        case.x,
        weights["router.weight"],
        top_k=top_k,
        score="softmax",
        normalize="scores",
        scale=options.get("scale", 16.0),
        groups=(devices, visits, 1),
    )
    kept = dispatch.keep_all(table, case.valid)
    if case.training:
        kept = _keep_by_device(table, case, options, devices, size)
    y = _routed(case, weights, options, kept, table)
    if options.get("num_shared", 2):
        y = y + _shared(case, weights, options)
    losses = {"expert": balance.sequence(table, case.tokens, case.sequences)}
    losses["device"], losses["communication"] = _device_losses(table, case, devices, size, min(visits, top_k))
    return Answer(y, table, kept, losses)


def _keep_by_device(table: Table, case: Case, options: dict[str, Any], devices: int, size: int) -> list[bool]:
    share = Fraction(str(options.get("never_dropped", 0.1)))
    spared = [
        math.floor((s + 1) * share + Fraction(1, 2)) > math.floor(s * share + Fraction(1, 2)) for s in case.sequences
    ]
    rows = [index for index, row in enumerate(table.rows) if case.valid[row.token]]
    budget = math.ceil(Fraction(str(options.get("capacity_factor", 1.0))) * len(rows) / devices)
    kept = [False] * len(table.rows)
    for device in range(devices):
        mine = [index for index in rows if table.rows[index].expert // size == device]
        mine.sort(key=lambda i: (not spared[table.rows[i].token], -table.rows[i].weight.item(), table.rows[i].token))
        for place, index in enumerate(mine):
            kept[index] = place < budget or spared[table.rows[index].token]
    return kept


def _device_losses(table: Table, case: Case, devices: int, size: int, visits: int) -> tuple[Tensor, Tensor]:
    num_experts = devices * size
    by_device, by_visit = [], []
    for name in sorted({case.sequences[t] for t in case.tokens}):
        tokens = [t for t in case.tokens if case.sequences[t] == name]
        rows = [row for row in table.rows if row.token in tokens]
        mean = [sum(table.scores[t][e] for t in tokens) / len(tokens) for e in range(num_experts)]
        frequency = [num_experts / len(rows) * sum(row.expert == e for row in rows) for e in range(num_experts)]
        device_loss, communication_loss = 0.0, 0.0
        for device in range(devices):
            members = range(device * size, (device + 1) * size)
            probability = sum(mean[e] for e in members)
            device_loss = device_loss + sum(frequency[e] for e in members) / size * probability
            sent = len({row.token for row in rows if row.expert in members})
            communication_loss = communication_loss + devices / (visits * len(tokens)) * sent * probability
        by_device.append(device_loss)
        by_visit.append(communication_loss)
    if not by_device:
        zero = sum(0 * score for scores in table.scores for score in scores) + torch.zeros((), dtype=torch.float64)
        return zero, zero
    return sum(by_device) / len(by_device), sum(by_visit) / len(by_visit)


ORACLES: dict[str, Oracle] = {
    "deepseek-moe": deepseek_moe,
    "grok-1": grok_1,
    "dbrx": dbrx,
    "qwen1.5-moe": qwen1_5_moe,
    "jamba": jamba,
    "arctic": arctic,
    "deepseek-v2": deepseek_v2,
    "skywork": skywork,
    "olmoe": olmoe,
    "llama4": llama4,
    "qwen3-moe": qwen3_moe,
    "gpt-oss": gpt_oss,
}
