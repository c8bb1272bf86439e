"""A perfectly balanced table, and what each loss is worth on it, as its docstring says."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import replace

import torch

from moesaic import Routing
from moesaic.balance import LossTerm

# None: the loss has no value that balance alone decides (its own tests say what it has).
VALUE_AT_BALANCE: dict[str, float | Callable[[int, int], float] | None] = {
    "switch_loss": 1.0,
    "sequence_loss": 1.0,
    "gshard_loss": 1.0,
    "importance_cv2": 0.0,
    "load_cv2": None,
    "threshold_loss": None,
    "z_loss": lambda num_experts, _top_k: math.log(num_experts) ** 2,
    "entropy_loss": lambda num_experts, _top_k: math.log(num_experts),
    "mutual_information_loss": 0.0,
    "active_share_loss": lambda _num_experts, top_k: top_k,
    "l1_loss": None,
    "depth_loss": math.log(2),
    "device_loss": 1.0,
    "communication_loss": 1.0,
    "global_batch_loss": 1.0,
    "even_gate_loss": 0.0,
    "reinforce_loss": None,
    "LocalizedLoss": 0.0,
    "product_loss": lambda num_experts, _top_k: num_experts * math.log(num_experts),
    # eta of 1 for half of the experts, of 0.75 for the others.
    "heterogeneous_loss": lambda num_experts, top_k: top_k * 0.875 / num_experts,
}


def balanced(num_experts: int, top_k: int) -> Routing:
    """E tokens of one sequence; token t takes experts t, t+1, ..., and every probability is 1/E."""
    expert_TK = (torch.arange(num_experts)[:, None] + torch.arange(top_k)).remainder(num_experts)
    logits_TE = torch.zeros(num_experts, num_experts, dtype=torch.float64)
    weight_TK = torch.full((num_experts, top_k), 1 / top_k, dtype=torch.float64)
    routing = Routing.from_choices(expert_TK, weight_TK, logits_TE, logits_TE.softmax(dim=-1))
    # Every other expert on the same device: the two choices of a token are on two.
    eta_E = torch.where(torch.arange(num_experts) < num_experts // 2, 1.0, 0.75)
    extras = {"eta_E": eta_E, "device_E": torch.arange(num_experts) % 2, "devices_per_token": torch.tensor(2)}
    return replace(routing, extras=extras)


def loss_name(term: LossTerm) -> str:
    """The name of the function behind a term."""
    loss = term.loss
    while isinstance(loss, functools.partial):
        loss = loss.func
    return getattr(loss, "__name__", type(loss).__name__)
