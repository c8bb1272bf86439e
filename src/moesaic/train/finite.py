"""Stop before a NaN or an infinity reaches the weights, and say where it came from."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from moesaic.core.checkpoint import describe_last
from moesaic.core.errors import MoesaicError
from moesaic.train import ranks


class NotFiniteError(MoesaicError):
    """A loss or a gradient was NaN or infinite; the weights are as they were before that step."""


class FiniteGuard(TrainerCallback):
    """Check each step's losses and gradients before the optimizer uses them.

    Works in any ``transformers.Trainer``: the losses are read off the model's outputs.

    Raises:
        NotFiniteError: naming the step, the first layer whose weights, outputs or gradients are not finite, and the
            last good checkpoint.
    """

    def __init__(self) -> None:
        self._losses: list[Tensor] = []
        self._batches: list[dict[str, Any]] = []
        self._handle: torch.utils.hooks.RemovableHandle | None = None

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Start reading losses."""
        if model is not None and self._handle is None:
            self._handle = model.register_forward_hook(self._keep, with_kwargs=True)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Forget the last step."""
        self._losses.clear()
        self._batches.clear()

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Let the step go on only with finite losses and gradients."""
        assert model is not None
        step = state.global_step + 1
        losses = torch.stack(self._losses) if self._losses else torch.zeros(0)
        bad_losses = (~losses.isfinite()).nonzero().flatten().tolist()
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        is_bad_gradient = bool(gradients) and not bool(torch.stack(torch._foreach_norm(gradients)).isfinite().all())
        if not ranks.any_of(bool(bad_losses) or is_bad_gradient, args.device):
            return
        # One rank's bad loss is in every rank's gradient: the rank that has it knows more.
        has_bad_loss = ranks.any_of(bool(bad_losses), args.device)
        with ranks.together():
            if bad_losses:
                first = bad_losses[0]
                self._stop(f"The loss of step {step} is {losses[first].item()}", model, self._batches[first], args)
            if not has_bad_loss:
                self._stop(f"A gradient of step {step} is not finite", model, None, args)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop reading losses."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def _keep(self, module: nn.Module, inputs: Any, kwargs: dict[str, Any], output: Any) -> None:
        loss = getattr(output, "loss", None)
        if module.training and loss is not None:
            self._losses.append(loss.detach().float().reshape(()))
            self._batches.append(kwargs)

    def _stop(self, what: str, model: nn.Module, batch: dict[str, Any] | None, args: TrainingArguments) -> None:
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
        where = first_not_finite(model, batch)
        raise NotFiniteError(
            f"{what}; {where}. The step was not taken; {describe_last(Path(args.output_dir or '.'))}. "
            "Try a lower learning rate, a longer warmup or a smaller clip."
        )


def first_not_finite(model: nn.Module, batch: dict[str, Any] | None) -> str:
    """Say which layer is the first with weights, outputs or gradients that are not finite.

    Args:
        model: the model, as it was when the step went wrong.
        batch: the forward arguments of that step; None to look at weights and gradients only.
    """
    for name, parameter in model.named_parameters():
        if not bool(parameter.isfinite().all()):
            return f"the first weights that are not finite are {name}"
    if batch is not None:
        with _watching_outputs(model) as found, torch.no_grad():
            model(**batch)
        if found:
            return f"the first layer whose output is not finite is {found[0]}"
    for name, parameter in reversed(list(model.named_parameters())):
        if parameter.grad is not None and not bool(parameter.grad.isfinite().all()):
            return f"the first gradient that is not finite, counted from the loss, is that of {name}"
    return "every layer's output is finite, so it arose in the loss itself"


@contextmanager
def _watching_outputs(model: nn.Module) -> Iterator[list[str]]:
    found: list[str] = []

    def hook(name: str) -> Any:
        def look(module: nn.Module, inputs: Any, output: Any) -> None:
            leaves = (leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor))
            # Masks hold -inf by design; layers' outputs are floats that must be finite.
            if any(leaf.is_floating_point() and not bool(leaf.isfinite().all()) for leaf in leaves):
                found.append(name)

        return look

    handles = [module.register_forward_hook(hook(name)) for name, module in model.named_modules() if name]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
