"""One model's training in one process: from scratch, or from its last good checkpoint."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from transformers import TrainerCallback, set_seed
from transformers.trainer_callback import PrinterCallback

from moesaic.core import checkpoint
from moesaic.core.errors import MoesaicError, StoppedElsewhereError
from moesaic.train import folder, history, ranks
from moesaic.train.balance import BalanceCallback
from moesaic.train.board import Board
from moesaic.train.build import build_model, training_arguments
from moesaic.train.evaluate import Evaluation
from moesaic.train.finite import FiniteGuard
from moesaic.train.history import HistoryCallback
from moesaic.train.interrupt import InterruptCallback, TrainingStoppedError
from moesaic.train.material import Material
from moesaic.train.order import collate_with_domains
from moesaic.train.progress import ProgressCallback
from moesaic.train.trainer import MoeTrainer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Summary = dict[str, dict[str, Any]]


class Session:
    """Trains the model of one run folder.

    Args:
        run: the folder.
        material: what it reads.
        console: where to say what happens.
        resume_with: the folder to name when saying how to go on; that of the pair for one of its members.

    Attributes:
        interrupted: a signal to stop came when there was nothing left to stop.
    """

    def __init__(self, run: folder.Run, material: Material, *, console: Console, resume_with: Path):
        self.run, self.config, self.material, self.console = run, run.config, material, console
        self.how_to_go_on = folder.how_to_go_on(resume_with)
        self.start = checkpoint.LastGood(path=None, step=0, skipped=())
        self.interrupted = False

    def train(self) -> Summary:
        """Train to the end and write the model and its figures."""
        config = self.config
        set_seed(config.seed)
        model = build_model(self.run.kind, config, self.material.tokenizer)
        self.start = ranks.from_first(self._find_start)
        with ExitStack() as stack:
            callbacks, interrupt = self._callbacks(stack)
            trainer = self._trainer(model, callbacks)
            if not ranks.is_first():
                # The weights are those of rank 0, the noise is each rank's own.
                set_seed(config.seed + ranks.own())
            try:
                trainer.train(resume_from_checkpoint=None if self.start.path is None else str(self.start.path))
            except KeyboardInterrupt as error:
                raise self._stopped_at_once() from error
            if interrupt.requested and trainer.state.global_step < config.steps:
                with ranks.together():
                    raise self._stopped(trainer.state.global_step)
            self.interrupted = interrupt.requested
            evaluation = trainer.last_evaluation or self.material.last_evaluator(model)
            return ranks.from_first(lambda: self._finish(model, evaluation))

    def _find_start(self) -> checkpoint.LastGood:
        path = self.run.folder
        self.start = checkpoint.last_good(path / folder.CHECKPOINTS)
        self._say_where_to_start()
        history.truncate(path / folder.HISTORY, self.start.step)
        return self.start

    def _say_where_to_start(self) -> None:
        for line in self.start.skipped:
            self.console.print(f"Skipped a damaged checkpoint: {line}", highlight=False, soft_wrap=True)
        if self.start.path is not None:
            self.console.print(f"Going on from {self.start.path}.", highlight=False, soft_wrap=True)

    def _callbacks(self, stack: ExitStack) -> tuple[list[TrainerCallback], InterruptCallback]:
        path = self.run.folder
        progress = ProgressCallback(self._label(), self.console)
        sinks: list[history.Sink] = [progress.show]
        if ranks.is_first() and Board.available():
            board = Board(path / folder.BOARD, start=self.start.step)
            stack.callback(board.close)
            sinks.append(board)
        records = HistoryCallback(path / folder.HISTORY, tokens_per_step=self._tokens_per_step(), sinks=sinks)
        balance, interrupt = BalanceCallback(), InterruptCallback()
        for close in (progress.close, balance.close, records.close, interrupt.restore):
            stack.callback(close)
        return [FiniteGuard(), balance, records, progress, interrupt], interrupt

    def _label(self) -> str:
        if self.config.init is not None:
            return f"{'MoE' if self.run.kind == 'moe' else 'dense model'} from {self.config.init}"
        return f"MoE ({self.config.recipe})" if self.run.kind == "moe" else "dense twin"

    def _tokens_per_step(self) -> int:
        return self.config.tokens_per_step * ranks.count()

    def _trainer(self, model: PreTrainedModel, callbacks: list[TrainerCallback]) -> MoeTrainer:
        trainer = MoeTrainer(
            model=model,
            args=training_arguments(self.config, self.run.folder / folder.CHECKPOINTS),
            train_dataset=self.material.blocks,
            eval_dataset=self.material.last_evaluator.blocks,
            data_collator=collate_with_domains,
            processing_class=self.material.tokenizer,
            callbacks=callbacks,
            evaluator=self.material.evaluator,
            last_evaluator=self.material.last_evaluator,
            keep=self.config.keep,
        )
        trainer.remove_callback(PrinterCallback)
        return trainer

    def _finish(self, model: PreTrainedModel, evaluation: Evaluation) -> Summary:
        from moesaic.hf import active_params

        path = self.run.folder
        with checkpoint.replacing(path / folder.MODEL) as partial:
            model.save_pretrained(partial)
            self.material.tokenizer.save_pretrained(partial)
        figures = {
            "bits_per_byte": dict(evaluation.bits_per_byte),
            "total_params": sum(parameter.numel() for parameter in model.parameters()),
            "active_params": active_params(model),
            "tokens": self.config.steps * self._tokens_per_step(),
            "tokens_per_s": history.tokens_per_s(history.read(path / folder.HISTORY)),
            "load_max_over_mean": evaluation.load_max_over_mean,
            "drop_rate": evaluation.drop_rate,
        }
        summary = {self.run.kind: figures}
        checkpoint.write_atomically(path / folder.SUMMARY, json.dumps(summary, indent=1) + "\n")
        return summary

    def _stopped(self, step: int) -> TrainingStoppedError:
        saved = self.run.folder / folder.CHECKPOINTS / f"{checkpoint.PREFIX}{step}"
        return TrainingStoppedError(
            f"Stopped at step {step} of {self.config.steps} as asked; {saved} is saved. Go on with: {self.how_to_go_on}"
        )

    def _stopped_at_once(self) -> MoesaicError:
        if not ranks.is_first():
            return StoppedElsewhereError("Stopped at once as asked; rank 0 says how to go on.")
        last = checkpoint.describe_last(self.run.folder / folder.CHECKPOINTS)
        return TrainingStoppedError(f"Stopped at once as asked; {last}. Go on with: {self.how_to_go_on}")
