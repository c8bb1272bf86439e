"""Train one model to give what another gives: a plain loop, for students of a few thousand steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from moesaic.convert.progress import tracked
from moesaic.convert.shrink.calibration import Batch, model_inputs
from moesaic.core.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class Gap:
    """How far a student is from its teacher on some text.

    Attributes:
        blocks: squared distance of the outputs of paired blocks that read the same, over the squared length of the
            teacher's; mean over pairs. 0 where there are no pairs.
        logits: Kullback-Leibler divergence from the teacher's prediction of a token to the student's, in nats.
    """

    blocks: float
    logits: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Distilled:
    """What distilling did.

    Attributes:
        steps: of the optimizer.
        before: gap on all batches before the first step.
        after: the same afterwards.
    """

    steps: int
    before: Gap
    after: Gap

    def __str__(self) -> str:
        return (
            f"distilled for {self.steps} steps: divergence of predictions {self.before.logits:.3g} to "
            f"{self.after.logits:.3g} nats a token, relative error of blocks {self.before.blocks:.3g} to "
            f"{self.after.blocks:.3g}, on the text that it was trained on"
        )


def distill(
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    batches: Sequence[Batch],
    *,
    steps: int,
    learning_rate: float = 1e-3,
    blocks: Mapping[str, str] | None = None,
    blocks_weight: float = 1.0,
    logits_weight: float = 1.0,
    temperature: float = 1.0,
    on_step: Callable[[int, float], None] | None = None,
) -> Distilled:
    """Train a student in place to give what a teacher gives.

    Two losses. Paired blocks read the same, what the teacher's block reads, and the student's is pulled to what the
    teacher's gives: each pair learns on its own. And the student's predictions are pulled to the teacher's. AdamW
    without decay, learning rate falling to 0 as a cosine, batches in their order, again and again.

    Args:
        teacher: left as it is.
        student: of the same vocabulary; trained in float32 or wider, and of its own type again afterwards.
        batches: what both are called with; padding that ``attention_mask`` names counts for nothing.
        steps: of the optimizer.
        learning_rate: the first.
        blocks: paths of the teacher's blocks and the student's; only these are trained. None trains all weights, on
            predictions alone.
        blocks_weight: of the first loss.
        logits_weight: of the second; 0 leaves the student's forward out.
        temperature: logits of both are divided by it, and the loss multiplied by its square.
        on_step: called with the step's number and loss.
    Raises:
        ConfigError: if there is nothing to train on or for, or the two differ in vocabulary.

    Source: Hinton et al. 2015, "Distilling the Knowledge in a Neural Network", section 2.
    """
    _check(teacher, student, batches, steps, temperature, blocks, blocks_weight, logits_weight)
    pairs = dict(blocks or {})
    parts: list[nn.Module] = [student.get_submodule(path) for path in pairs.values()] or [student]
    dtype, modes = student.dtype, {part: part.training for part in (*teacher.modules(), *student.modules())}
    wanted = {name: parameter.requires_grad for name, parameter in student.named_parameters()}
    # Steps of a thousandth of a weight vanish in half precision.
    wide = torch.promote_types(dtype, torch.float32)
    nn.Module.to(student, dtype=wide)
    teacher.train(False)
    student.train(False)  # No dropout: the student is to give what the teacher gives, not what half of it gives.
    student.requires_grad_(False)
    trained = list(dict.fromkeys(parameter for part in parts for parameter in part.parameters()))
    for parameter in trained:
        parameter.requires_grad_(True)
    loop = _Loop(teacher, student, pairs, blocks_weight, logits_weight, temperature)
    try:
        before = loop.gap(batches)
        optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for step in tracked(range(steps), "distilling", steps):
            loss = loop.loss(batches[step % len(batches)])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            if on_step is not None:
                on_step(step, float(loss.detach()))
        after = loop.gap(batches)
    finally:
        nn.Module.to(student, dtype=dtype)
        for part, training in modes.items():
            part.training = training
        for name, parameter in student.named_parameters():
            parameter.requires_grad_(wanted[name])
            parameter.grad = None
    return Distilled(steps=steps, before=before, after=after)


class _Loop:
    def __init__(
        self,
        teacher: PreTrainedModel,
        student: PreTrainedModel,
        pairs: Mapping[str, str],
        blocks_weight: float,
        logits_weight: float,
        temperature: float,
    ) -> None:
        self.teacher, self.student, self.pairs = teacher, student, pairs
        self.blocks_weight, self.logits_weight, self.temperature = blocks_weight, logits_weight, temperature

    def loss(self, batch: Batch) -> Tensor:
        """Both losses of a batch, each times its weight."""
        blocks, logits = self._losses(batch, with_logits=self.logits_weight > 0, temperature=self.temperature)
        return self.blocks_weight * blocks + self.logits_weight * logits

    @torch.no_grad()
    def gap(self, batches: Sequence[Batch]) -> Gap:
        """Both losses over all batches, unweighted, at temperature 1."""
        both = [self._losses(batch, with_logits=True, temperature=1.0) for batch in batches]
        blocks, logits = (sum(float(one[kind]) for one in both) / len(both) for kind in (0, 1))
        return Gap(blocks=blocks, logits=logits)

    def _losses(self, batch: Batch, *, with_logits: bool, temperature: float) -> tuple[Tensor, Tensor]:
        inputs = model_inputs(self.teacher, batch)
        mask = inputs.get("attention_mask")
        valid_T = None if mask is None else (mask != 0).reshape(-1)
        with torch.no_grad(), _watching(self.teacher, self.pairs) as seen:
            wanted = self.teacher(**inputs).logits.float()
        device, dtype = self.student.device, self.student.dtype
        errors = [
            _relative_error(self.student.get_submodule(path)(seen[of][0].to(device, dtype)), seen[of][1], valid_T)
            for of, path in self.pairs.items()
        ]
        nothing = torch.zeros((), device=device)
        blocks = torch.stack(errors).mean() if errors else nothing
        if not with_logits:
            return blocks, nothing
        given = self.student(**model_inputs(self.student, batch)).logits.float()
        return blocks, _divergence(wanted.to(device), given, valid_T, temperature)


def _relative_error(given: Any, wanted: Tensor, valid_T: Tensor | None) -> Tensor:
    given = given[0] if isinstance(given, tuple) else given
    given = given.reshape(-1, given.shape[-1])
    wanted = wanted.to(given).reshape(given.shape)
    if valid_T is not None:
        given, wanted = given[valid_T], wanted[valid_T]
    error: Tensor = (given - wanted).square().sum() / wanted.square().sum().clamp_min(1e-12)
    return error


def _divergence(wanted: Tensor, given: Tensor, valid_T: Tensor | None, temperature: float) -> Tensor:
    wanted, given = (one.reshape(-1, one.shape[-1]) / temperature for one in (wanted, given))
    if valid_T is not None:
        wanted, given = wanted[valid_T], given[valid_T]
    nats: Tensor = F.kl_div(
        given.log_softmax(dim=-1), wanted.log_softmax(dim=-1), reduction="batchmean", log_target=True
    )
    return nats * (temperature * temperature)


@contextmanager
def _watching(model: nn.Module, paths: Mapping[str, str]) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """What each block reads and gives in the forward within."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def hook(path: str) -> Callable[..., None]:
        def after(_block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            read = args[0] if args else next(iter(kwargs.values()))
            seen[path] = read, (output[0] if isinstance(output, tuple) else output)

        return after

    handles = [model.get_submodule(path).register_forward_hook(hook(path), with_kwargs=True) for path in paths]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _check(
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    batches: Sequence[Batch],
    steps: int,
    temperature: float,
    blocks: Mapping[str, str] | None,
    blocks_weight: float,
    logits_weight: float,
) -> None:
    if not batches or steps < 1 or temperature <= 0:
        raise ConfigError(
            f"distill needs at least one batch, one step and a temperature above 0, got {len(batches)} batches, "
            f"{steps} steps and temperature {temperature}. 200 steps are a beginning."
        )
    if min(blocks_weight, logits_weight) < 0 or (logits_weight == 0 and (not blocks or blocks_weight == 0)):
        raise ConfigError(
            f"distill needs something to train for, got blocks_weight={blocks_weight} with {len(blocks or {})} pairs "
            f"of blocks and logits_weight={logits_weight}. Leave both weights out for 1 and 1."
        )
    sizes = [model.config.get_text_config().vocab_size for model in (teacher, student)]
    if sizes[0] != sizes[1]:
        raise ConfigError(
            f"Teacher and student must have the same vocabulary, got {sizes[0]} and {sizes[1]} tokens. "
            "Distill into a student of the teacher's tokenizer."
        )
