"""Step the balance controllers once per optimizer step, on the load of the whole batch."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

if TYPE_CHECKING:
    from moesaic.hf import Seen


class BalanceCallback(TrainerCallback):
    """Step every balance controller of a sparse model after each optimizer step.

    The load is that of the whole step: summed over its micro-batches and over all ranks, padding left out.
    Evaluation moves nothing, nor does the second forward of gradient checkpointing. The controllers' state is the
    routers' bias buffers, saved with the model. Works in any ``transformers.Trainer``.
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
        for layer, load_E in self._loads.items():
            if dist.is_initialized():
                dist.all_reduce(load_E)
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

    def _count(self, seen: Seen) -> None:
        if seen.training and seen.layer in self._controllers:
            load_E = seen.routing.load_E
            before_E = self._loads.get(seen.layer)
            self._loads[seen.layer] = load_E if before_E is None else before_E + load_E
