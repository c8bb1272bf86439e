"""Training that goes on from given weights, the same way for a dense model and for a mixture."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch

from moesaic.lab.pretrained.plan import Plan
from moesaic.lab.small import StepTimes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from moesaic.data import TokenBlocks


def autocast(plan: Plan) -> AbstractContextManager[Any]:
    """What models of the experiment run in."""
    if plan.dtype == "float32":
        return nullcontext()
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.autocast(kind, dtype=torch.bfloat16)


def go_on(
    model: PreTrainedModel,
    blocks: TokenBlocks,
    plan: Plan,
    *,
    look: Callable[[int], None] = lambda _step: None,
    say: Callable[[int, float], None] = lambda _step, _loss: None,
) -> float:
    """Train a model further, in place, as ``moesaic train --init`` would with the plan's numbers.

    Args:
        model: what is trained; what the plan does not name trainable is frozen.
        blocks: what it reads, in an order that depends on the seed alone.
        plan: the numbers.
        look: called after each step of ``plan.look_steps``, and before the first, to measure the model.
        say: called after each step with its number and the loss.
    Returns:
        Tokens per second, from the median step.
    Raises:
        NotFiniteError: if a loss is NaN or infinite.
    """
    from transformers import TrainerCallback, set_seed
    from transformers.trainer_callback import PrinterCallback

    from moesaic.train import BalanceCallback, FiniteGuard, MoeTrainer
    from moesaic.train.build import training_arguments
    from moesaic.train.order import collate_with_domains
    from moesaic.train.quiet import quiet_transformers
    from moesaic.train.start import freeze

    class Look(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step in plan.look_steps:
                look(state.global_step)

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if logs and "loss" in logs:
                say(state.global_step, float(logs["loss"]))

    set_seed(plan.seed)
    freeze(model, plan.trainable)
    look(0)
    times = StepTimes()
    with quiet_transformers(), TemporaryDirectory() as folder:
        args = training_arguments(train_config(plan, Path(folder)), Path(folder))
        args.save_strategy = args.eval_strategy = "no"
        trainer = MoeTrainer(
            model=model,
            args=args,
            train_dataset=blocks,
            data_collator=collate_with_domains,
            # The clock first: looking is not training.
            callbacks=[times.callback(), FiniteGuard(), BalanceCallback(), Look()],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return plan.tokens_per_step / statistics.median(times.seconds)


def train_config(plan: Plan, folder: Path) -> Any:
    """The settings of ``moesaic train`` that a run stands for."""
    from moesaic.train import TrainConfig

    return TrainConfig(
        out=folder,
        context=plan.context,
        batch_size=plan.batch_size,
        steps=plan.steps,
        lr=plan.lr,
        warmup=plan.warmup,
        weight_decay=0.0,
        dtype=plan.dtype,
        seed=plan.seed,
        log_every=1,
    )
