"""The transformers Trainer with safe checkpoints, a seeded order of the data, and bits per byte as evaluation."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler
from transformers import Trainer

from moesaic.core import checkpoint
from moesaic.core.errors import CheckpointError
from moesaic.train import ranks, state
from moesaic.train.balance import check_balance_is_in_the_loss
from moesaic.train.evaluate import Evaluation, Evaluator
from moesaic.train.order import SeededOrder

WEIGHTS = "model.safetensors"
TRAINER_STATE = "trainer_state.json"
WINDOW = "window"

# The matrix and the vector of a state space that Mamba's authors keep from decay.
_NOT_DECAYED = ("A_log", "D")


class MoeTrainer(Trainer):
    """A ``transformers.Trainer`` that checkpoints atomically, without pickle, and resumes bit-exactly.

    What is particular to MoE comes as callbacks, which work in a plain Trainer too: ``BalanceCallback``,
    ``HistoryCallback``, ``FiniteGuard``, ``InterruptCallback``.

    Args:
        evaluator: measures held-out bits per byte during training; None to evaluate as the Trainer does.
        last_evaluator: used at the last step; by default ``evaluator``.
        keep: checkpoints to keep.
        **kwargs: as for ``transformers.Trainer``.

    Attributes:
        last_evaluation: what ``last_evaluator`` measured, once it has.
    Raises:
        ConfigError: if label smoothing would leave the balance losses out.
    """

    def __init__(
        self,
        *,
        evaluator: Evaluator | None = None,
        last_evaluator: Evaluator | None = None,
        keep: int = 2,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        assert isinstance(self.model, nn.Module)
        check_balance_is_in_the_loss(self.model, self.args)
        if getattr(getattr(self.model, "config", None), "is_encoder_decoder", False):
            # T5 takes any keyword, so the Trainer tells it the labels of all micro-batches and leaves it to divide its
            # loss by them. It does not: gradients would be the sum over micro-batches and not their mean.
            self.model_accepts_loss_kwargs = False
        self.evaluator = evaluator
        self.last_evaluator = last_evaluator or evaluator
        self.keep = keep
        self.last_evaluation: Evaluation | None = None
        self._is_checkpointing = False

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The model's loss; routers that ask which domain a sequence belongs to are told, if ``inputs`` do."""
        from moesaic.hf import domains

        domain_B = inputs.get("domain")
        with nullcontext() if domain_B is None else domains(domain_B):
            inputs = {name: value for name, value in inputs.items() if name != "domain"}
            return super().compute_loss(model, inputs, *args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Measure bits per byte, log it, and tell the callbacks."""
        if self.evaluator is None or self.last_evaluator is None:
            return super().evaluate(*args, **kwargs)
        assert isinstance(self.model, nn.Module)
        result = self.evaluator(self.model)
        if self.state.global_step >= self.state.max_steps:
            # The history's last point is of the same text as the points before it, or its curve would jump.
            same = self.last_evaluator is self.evaluator
            self.last_evaluation = result if same else self.last_evaluator(self.model)
        metrics = {f"eval_bits_per_byte_{name}": value for name, value in result.bits_per_byte.items()}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Name the parameters that decay: matrices, but for those of a state space."""
        names: list[str] = super().get_decay_parameter_names(model)
        return [name for name in names if name.rpartition(".")[2] not in _NOT_DECAYED]

    def _get_train_sampler(self, train_dataset: Dataset[Any] | None = None) -> Sampler[int] | None:
        dataset: Any = self.train_dataset if train_dataset is None else train_dataset
        if self.args.max_steps <= 0:
            return super()._get_train_sampler(dataset)
        batches = self.args.max_steps * self.args.gradient_accumulation_steps * max(1, self.args.world_size)
        length = batches * self._train_batch_size
        return SeededOrder(len(dataset), length=length, seed=self.args.data_seed or self.args.seed)

    def _init_training_state(self, max_steps: int, *args: Any, **kwargs: Any) -> tuple[int, int]:
        where = super()._init_training_state(max_steps, *args, **kwargs)
        # A checkpoint brings its own intervals; those of this run count.
        compute_steps: Any = self.state.compute_steps
        compute_steps(self.args, max_steps)
        return where

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial))
        step = self.state.global_step
        partial = checkpoint.partial_folder(folder, step)
        # Rank 0 makes the folder, all write what is theirs, rank 0 puts it in place; if one fails, all do.
        with ExitStack() as stack:
            with ranks.together():
                if ranks.is_first():
                    stack.enter_context(checkpoint.writing(folder, step))
            with ranks.together():
                self._save_rng_state(str(partial))
                self._window_file(partial).write_text(json.dumps(self._window()))
                if ranks.is_first():
                    with self._names_in_memory():
                        self.save_model(str(partial), _internal_call=True)
                    self._save_optimizer_and_scheduler(str(partial))
                    self.state.save_to_json(str(partial / TRAINER_STATE))
            with ranks.together():
                stack.close()
        if ranks.is_first():
            checkpoint.prune(folder, self.keep, saved=step)

    @contextmanager
    def _names_in_memory(self) -> Iterator[None]:
        """Save under the names that the model has in memory, of which resuming finds each.

        A family may have others on disk, such as a tensor for each expert; transformers reads both.
        """
        self._is_checkpointing = True
        try:
            yield
        finally:
            self._is_checkpointing = False

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        folder = str(output_dir or self.args.output_dir)
        unwrapped = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        names = {"save_original_format": False} if self._is_checkpointing else {}
        unwrapped.save_pretrained(folder, state_dict=state_dict, is_main_process=self.args.should_save, **names)
        if self.processing_class is not None and self.args.should_save:
            self.processing_class.save_pretrained(folder)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        assert self.optimizer is not None
        state.save_optimizer(self.optimizer, Path(output_dir), self._named())
        state.save_scheduler(self.lr_scheduler, Path(output_dir))

    def _save_rng_state(self, output_dir: str) -> None:
        state.save_rng(Path(output_dir), ranks.own())

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        path = Path(resume_from_checkpoint)
        checkpoint.verify(path)
        target = self.model if model is None else model
        assert isinstance(target, nn.Module)
        load_weights(target, path)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None and self.optimizer is not None:
            state.load_optimizer(self.optimizer, Path(checkpoint), self._named())
            state.load_scheduler(self.lr_scheduler, Path(checkpoint))

    def _named(self) -> nn.Module:
        assert isinstance(self.model, nn.Module)
        return self.model

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        state.load_rng(Path(checkpoint), ranks.own())
        # The Trainer has reset these by now, and takes its first step next: so the next logged loss is the mean over
        # the same steps as without the interruption.
        window = state.read_json(self._window_file(Path(checkpoint)))
        self._tr_loss.fill_(window["loss_sum"])
        self._globalstep_last_logged = window["last_logged_step"]

    def _window(self) -> dict[str, float]:
        return {"loss_sum": float(self._tr_loss), "last_logged_step": self._globalstep_last_logged}

    def _window_file(self, folder: Path) -> Path:
        # Named as the ranks' random generators are.
        return folder / (f"{WINDOW}-{ranks.own()}.json" if ranks.own() else f"{WINDOW}.json")


@torch.no_grad()
def load_weights(model: nn.Module, folder: Path) -> None:
    """Load ``model.safetensors`` of a checkpoint into a model of the same shape, every tensor exactly once.

    Raises:
        CheckpointError: naming tensors that are missing, unknown or of another shape.
    """
    saved = state.read_tensors(folder / WEIGHTS)
    own = model.state_dict()
    filled = {own[name].data_ptr() for name in saved if name in own}
    # Tied weights are saved once, under one of their names.
    missing = [name for name, tensor in own.items() if name not in saved and tensor.data_ptr() not in filled]
    unknown = [name for name in saved if name not in own]
    shapes = [name for name, tensor in saved.items() if name in own and own[name].shape != tensor.shape]
    for what, names in (("lacks", missing), ("has unknown", unknown), ("has in another shape", shapes)):
        if names:
            raise CheckpointError(
                f"{folder} {what} {len(names)} tensors, the first is {names[0]}. "
                "Resume with the settings that the run was started with."
            )
    for name, tensor in saved.items():
        own[name].copy_(tensor)
