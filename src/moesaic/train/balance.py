"""Step the balance controllers once per optimizer step, on the load of the whole batch; let no loss get lost."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from moesaic.core.errors import ConfigError
from moesaic.train import ranks

if TYPE_CHECKING:
    from moesaic.hf import GlobalBatch, Seen, Steered
    from moesaic.telemetry.summary import RoutingSummary


class BalanceCallback(TrainerCallback):
    """Step every balance controller of a sparse model after each optimizer step.

    Loads, kept rows and tokens are those of the whole step: summed over its micro-batches and over all ranks, padding
    left out. So is the load that a loss over the global batch reads, as far as the step has come. Evaluation moves
    nothing, nor does the second forward of gradient checkpointing. The controllers' state is buffers of the layers,
    saved with the model. Works in any ``transformers.Trainer``.

    Raises:
        ConfigError: when training begins, if label smoothing would leave the balance losses out.
    """

    def __init__(self) -> None:
        self._steered: list[Steered] = []
        self._counted: set[str] = set()
        self._seen: dict[str, RoutingSummary] = {}
        self._batch: GlobalBatch | None = None
        self._stack = ExitStack()

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Find the controllers and the losses over the global batch, and begin to count if there are any."""
        from moesaic.hf import controllers, global_batch, observe, uses_global_batch

        assert model is not None
        check_balance_is_in_the_loss(model, args)
        self.close()
        self._steered = controllers(model)
        self._counted = {layer for steered in self._steered for layer in steered.layers}
        if self._steered:
            self._stack.enter_context(observe(model, self._count))
        if uses_global_batch(model):
            self._batch = self._stack.enter_context(global_batch(model))

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin a new count."""
        self._begin()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Step the controllers on the counts of the step."""
        if self._seen and ranks.count() > 1:
            self._sum_over_ranks()
        for steered in self._steered:
            steered.step(self._seen)
        self._begin()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop counting."""
        self.close()

    def close(self) -> None:
        """Stop counting; for training that ends with an exception."""
        self._stack.close()
        self._steered, self._batch = [], None
        self._seen.clear()

    def _begin(self) -> None:
        self._seen.clear()
        if self._batch is not None:
            self._batch.step()

    def _sum_over_ranks(self) -> None:
        from moesaic.hf.reports import summed_over_ranks

        names = ("load_E", "kept_E", "num_tokens")
        mine = [getattr(summary, name) for summary in self._seen.values() for name in names]
        total = iter(summed_over_ranks(mine))
        self._seen = {
            layer: replace(summary, **{name: next(total) for name in names}) for layer, summary in self._seen.items()
        }

    def _count(self, seen: Seen) -> None:
        from moesaic.telemetry.summary import RoutingSummary

        if seen.training and seen.layer in self._counted:
            new, old = RoutingSummary.of(seen.routing), self._seen.get(seen.layer)
            self._seen[seen.layer] = new if old is None else old + new


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
