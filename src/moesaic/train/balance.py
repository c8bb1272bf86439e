"""Step the balance controllers once per optimizer step, on the load of the whole batch; let no loss get lost."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from moesaic.core.errors import ConfigError
from moesaic.train import ranks

if TYPE_CHECKING:
    from moesaic.hf import Seen


class BalanceCallback(TrainerCallback):
    """Step every balance controller of a sparse model after each optimizer step.

    The load is that of the whole step: summed over its micro-batches and over all ranks, padding left out.
    Evaluation moves nothing, nor does the second forward of gradient checkpointing. The controllers' state is the
    routers' bias buffers, saved with the model. Works in any ``transformers.Trainer``.

    Raises:
        ConfigError: when training begins, if label smoothing would leave the balance losses out.
    """

    def __init__(self) -> None:
        self._controllers: dict[str, Any] = {}
        self._loads: dict[str, Tensor] = {}
        self._stack = ExitStack()

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Find the controllers, and begin to count if there are any."""
        from moesaic.hf import bias_controllers, observe

        assert model is not None
        check_balance_is_in_the_loss(model, args)
        self.close()
        self._controllers = dict(bias_controllers(model))
        if self._controllers:
            self._stack.enter_context(observe(model, self._count))

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin a new count."""
        self._loads.clear()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Step the controllers on the load of the step."""
        if self._loads and ranks.count() > 1:
            self._sum_over_ranks()
        for layer, load_E in self._loads.items():
            self._controllers[layer].step(load_E)
        self._loads.clear()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop counting."""
        self.close()

    def close(self) -> None:
        """Stop counting; for training that ends with an exception."""
        self._stack.close()
        self._controllers = {}
        self._loads.clear()

    def _sum_over_ranks(self) -> None:
        loads = list(self._loads.values())
        total = torch.cat(loads)
        dist.all_reduce(total)
        self._loads = dict(zip(self._loads, torch.split(total, [len(load_E) for load_E in loads]), strict=True))

    def _count(self, seen: Seen) -> None:
        if seen.training and seen.layer in self._controllers:
            load_E = seen.routing.load_E
            before_E = self._loads.get(seen.layer)
            self._loads[seen.layer] = load_E if before_E is None else before_E + load_E


def check_balance_is_in_the_loss(model: nn.Module, args: TrainingArguments) -> None:
    """See that a Trainer with these arguments trains on ``output.loss``, which has the balance losses.

    With label smoothing it keeps the labels from the model and works out a loss of its own from the logits.

    Raises:
        ConfigError: naming the balance losses that would reach no router.
    """
    from moesaic.hf.layers import blocks

    names = sorted({term.name for block in blocks(model).values() for term in block.terms if term.coefficient})
    if names and args.label_smoothing_factor:
        raise ConfigError(
            f"the balance losses of this model ({', '.join(names)}) need label_smoothing_factor=0, got "
            f"{args.label_smoothing_factor}: with it the Trainer works out a loss from the logits, and they would "
            "reach no router. Leave smoothing out, or smooth in a compute_loss_func that adds output.aux_loss."
        )
