"""Who computes something else is not timed: outputs and every gradient against the plainest code in a wider dtype."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moesaic.bench.case import Case
from moesaic.bench.contender import Absent, Contender, Entrant
from moesaic.bench.draw import Draw, draw
from moesaic.bench.machine import free_bytes
from moesaic.core.plan import Plan
from moesaic.core.routing import Routing
from moesaic.kernels.activations import silu
from moesaic.kernels.grouped_ffn import grouped_ffn_reference

TOLERANCES = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 1e-2}
"""Largest error of a tensor, as a part of its largest entry. Sums run over up to tens of thousands of rows, and peers
add a token's K outputs up in bfloat16."""

Truth = Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """How near one contender came to the truth.

    Attributes:
        worst: the largest error over all tensors, as a part of each one's largest entry.
        where: the tensor that has it.
        allowed: the tolerance.
    """

    worst: float
    where: str
    allowed: float

    @property
    def passed(self) -> bool:
        """Whether it may be timed."""
        return self.worst <= self.allowed


def truth_of(drawn: Draw, *, training: bool = True) -> Truth:
    """Outputs and gradients of a draw: the reference kernel in float64, of half precision in float32.

    Args:
        drawn: what to compute.
        training: whether gradients are wanted.
    """
    wide = torch.float64 if drawn.dtype in (torch.float32, torch.float64) else torch.float32
    x_TD = _leaf(drawn.x_TD, wide)
    weight_TK = _leaf(drawn.weight_TK, wide)
    stacks = {name: _leaf(value, wide) for name, value in drawn.experts.named_parameters()}
    shared = {} if drawn.shared is None else {n: _leaf(value, wide) for n, value in drawn.shared.named_parameters()}
    with torch.set_grad_enabled(training):
        routing = Routing.from_choices(drawn.expert_TK, weight_TK, drawn.logits_TE, drawn.logits_TE)
        plan = Plan.from_kept(routing, routing.valid_N)
        y_TD = grouped_ffn_reference(x_TD, plan, stacks["gate_EDF"], stacks["up_EDF"], stacks["down_EFD"], silu)
        if shared:
            hidden_TF = torch.nn.functional.silu(x_TD @ shared["gate_DF"]) * (x_TD @ shared["up_DF"])
            y_TD = y_TD + (hidden_TF @ shared["down_FD"]) * (x_TD @ shared["token_gate_D"])[:, None].sigmoid()
    found = {"y_TD": y_TD.detach()}
    if training:
        torch.autograd.backward(y_TD, drawn.grad_y_TD.to(wide))
        leaves = {"x_TD": x_TD, "weight_TK": weight_TK, **stacks, **{f"shared.{n}": v for n, v in shared.items()}}
        found |= {f"gradient of {name}": _gradient(leaf) for name, leaf in leaves.items()}
    return found


def compare(contender: Contender, drawn: Draw, truth: Truth) -> Verdict:
    """Run a contender once and compare what it gives with the truth."""
    training = len(truth) > 1
    contender.clear()
    with torch.set_grad_enabled(training):
        y_TD = contender.forward()
    found: dict[str, Tensor | None] = {"y_TD": y_TD.detach()}
    if training:
        torch.autograd.backward(y_TD, drawn.grad_y_TD)
        assert contender.gradients is not None
        found |= {f"gradient of {name}": value for name, value in contender.gradients().items()}
    errors = {name: relative_error(found.get(name), expected) for name, expected in truth.items()}
    contender.clear()
    worst = max(errors, key=lambda name: errors[name])
    return Verdict(worst=errors[worst], where=worst, allowed=TOLERANCES[drawn.dtype])


def checked(
    drawn: Draw,
    build: Callable[[Draw], Sequence[Entrant]],
    *,
    training: bool,
    itself: bool = True,
    say: Callable[[str], None] = lambda _line: None,
) -> tuple[list[Entrant], dict[str, Verdict]]:
    """Let pass who agrees with the truth, on a small draw of the same kind and on the draw itself where it fits.

    What breaks, or is not there, becomes absent with its reason; so does what computes something else.

    Args:
        drawn: what will be timed.
        build: makes the contenders of a draw, the same ones in the same order for every draw.
        training: whether gradients are compared too.
        itself: whether the draw itself is tried, beside the small one.
        say: told what is being done.
    Returns:
        The entrants, in order, and the verdict of each that was compared, on the largest draw that it was.
    """
    entrants = list(build(drawn))
    verdicts: dict[str, Verdict] = {}
    draws = [draw(drawn.case.tiny(), dtype=drawn.dtype, device=drawn.device)]
    if itself and truth_bytes(drawn.case, drawn.dtype, training=training) <= free_bytes(drawn.device):
        draws.append(drawn)
    for one in draws:
        truth = truth_of(one, training=training)
        rivals = entrants if one is drawn else list(build(one))
        for index, rival in enumerate(rivals):
            if isinstance(entrants[index], Absent) or isinstance(rival, Absent) or rival.gradients is None:
                continue
            say(f"parity of {rival.name}, T={one.case.num_tokens}")
            entrants[index] = _judged(entrants[index], rival, one, truth, verdicts)
    return entrants, verdicts


def truth_bytes(case: Case, dtype: torch.dtype, *, training: bool) -> int:
    """About what :func:`truth_of` allocates: weights and their gradients, and what autograd keeps of each row."""
    item = 8 if dtype in (torch.float32, torch.float64) else 4
    weights = 3 * case.num_experts * case.width * case.hidden
    per_row = 3 * case.width + 5 * case.hidden
    return item * (weights * (3 if training else 1) + case.num_rows * per_row * (1 if training else 0))


def _judged(entrant: Entrant, rival: Contender, drawn: Draw, truth: Truth, verdicts: dict[str, Verdict]) -> Entrant:
    """The entrant if its twin on this draw passes, or the reason why it is out."""
    try:
        verdict = compare(rival, drawn, truth)
    except Exception as error:
        return Absent(name=rival.name, why=f"broke: {type(error).__name__}: {' '.join(str(error).split())[:160]}")
    verdicts[rival.name] = verdict
    if verdict.passed:
        return entrant
    what = f"{verdict.where} is off by {verdict.worst:.1e} of its largest entry, allowed {verdict.allowed:.0e}"
    if verdict.worst == float("inf"):
        what = f"{verdict.where} is missing or not finite"
    return Absent(name=rival.name, why=f"not timed, since it computes something else: {what}")


def _leaf(value: Tensor, dtype: torch.dtype) -> Tensor:
    return value.detach().to(dtype, copy=True).requires_grad_()


def _gradient(leaf: Tensor) -> Tensor:
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


def relative_error(found: Tensor | None, expected: Tensor) -> float:
    """Largest difference as a part of the largest expected entry; infinite where there is nothing, or no number."""
    if found is None or found.shape != expected.shape:
        return float("inf")
    # By first index, so that no third copy of all experts is made.
    scale = max((float(part.abs().max()) for part in expected), default=0.0)
    worst = max((float((a.to(b.dtype) - b).abs().max()) for a, b in zip(found, expected, strict=True)), default=0.0)
    return float("inf") if worst != worst else worst / max(scale, 1e-30)
