"""Examine a run or a model: measure, check, report."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesaic.core.errors import ConfigError, MoesaicError
from moesaic.doctor.finding import Finding, Report, Unknown
from moesaic.doctor.history import History, read_history

if TYPE_CHECKING:
    from torch import Tensor, nn

    from moesaic.doctor.measure.gradients import LossFunction
    from moesaic.doctor.patient import Patient
    from moesaic.doctor.vitals import Gradients, LayerBias, LayerPrecision, LayerRouting, Padding, Repeat, Weights

TOKENS = 8192
"""Tokens of held-out text that are read unless told otherwise: 1,024 rows for each of 8 experts and one choice."""

Progress = Callable[[int, int, str], None]
"""Called with steps done, steps in all, and what comes next."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Vitals:
    """Everything that was measured, or why it was not; what checks judge."""

    routed: Sequence[LayerRouting] | Unknown
    precision: Sequence[LayerPrecision] | Unknown
    biases: Sequence[LayerBias] | Unknown
    repeat: Repeat | Unknown
    padding: Padding | Unknown
    gradients: Gradients | Unknown
    weights: Weights | Unknown
    history: History | Unknown
    damaged: str = ""


def examine(
    subject: str | Path | nn.Module,
    *,
    data: str | None = None,
    tokens: int = TOKENS,
    batches: Sequence[Mapping[str, Tensor]] | None = None,
    tokenizer: Any = None,
    history: str | Path | None = None,
    loss: LossFunction | None = None,
    progress: Progress | None = None,
) -> Report:
    """Check a run or a model for what goes wrong in mixtures without a word.

    The model is run on text in evaluation mode, and once forward and backward in training mode; its weights, buffers,
    gradients and mode are afterwards as they were.

    Args:
        subject: a run folder, a model folder of ours or of transformers, a ``history.jsonl`` or its folder; or a model.
        data: text to run the model on; by default the run's own, held out, or what ships with the package.
        tokens: how many tokens of it to read, about.
        batches: instead of text: what the model is called with, ``input_ids``, ``attention_mask`` and ``labels``.
        tokenizer: reads text for a model that is given as a module; not needed with ``batches``.
        history: the ``history.jsonl`` of a model that is given as a module.
        loss: what is trained on, called with model and batch, if it is not ``output.loss``: so that a balance loss
            that a loop of your own leaves out is found.
        progress: called before each step.
    Returns:
        A finding for each check; checks that could not be made say so and why.
    Raises:
        CheckpointError: if a path holds nothing to examine.
        DataError: if text or history that was asked for cannot be read.
        ConfigError: if there are no MoE layers, or a model is given without batches and tokenizer.
    """
    from moesaic.doctor.patient import Patient, find_patient

    if isinstance(subject, str | Path):
        patient = find_patient(Path(subject))
    else:
        past = Unknown("no history was given") if history is None else read_history(Path(history))
        model: Any = subject
        patient = Patient(name=type(subject).__name__, model=model, tokenizer=tokenizer, history=past)
    if isinstance(patient.model, Unknown):
        vitals, read = _without_model(patient.model, patient), ""
    else:
        vitals, read = _measure(patient, data, tokens, batches, loss, progress or _silent)
    return Report(subject=patient.name, read=read, findings=judge(vitals))


def judge(vitals: Vitals) -> tuple[Finding, ...]:
    """Every check on what was measured, in the order in which to read them."""
    from moesaic.doctor.checks import living, load, loss, strength, weights

    it = vitals
    return (
        weights.weights_finite(it.weights, it.history, it.damaged),
        loss.balance_attached(it.gradients),
        loss.router_learns(it.gradients),
        load.dead_experts(it.routed, it.history),
        load.overfull_experts(it.routed, it.history),
        load.dropped_rows(it.routed, it.history),
        strength.not_too_strong(it.gradients, it.routed, it.history),
        strength.not_too_weak(it.gradients, it.routed, it.history),
        living.selection_bias(it.biases, it.history),
        living.router_logits(it.routed, it.history),
        living.router_precision(it.precision),
        living.evaluation_repeats(it.repeat),
        living.padding_ignored(it.padding),
        weights.experts_differ(it.weights),
        weights.router_rows(it.weights, it.routed),
    )


def _without_model(why: Unknown, patient: Patient) -> Vitals:
    return Vitals(
        routed=why,
        precision=why,
        biases=why,
        repeat=why,
        padding=why,
        gradients=why,
        weights=why,
        history=patient.history,
        damaged=patient.damaged,
    )


def _measure(
    patient: Patient,
    data: str | None,
    tokens: int,
    batches: Sequence[Mapping[str, Tensor]] | None,
    loss: LossFunction | None,
    progress: Progress,
) -> tuple[Vitals, str]:
    """Run the model in every way that a check needs."""
    from moesaic.doctor.measure.gradients import examine_gradients
    from moesaic.doctor.measure.padding import examine_padding, lengths
    from moesaic.doctor.measure.repeat import examine_repeat
    from moesaic.doctor.measure.routing import examine_routing
    from moesaic.doctor.measure.weights import examine_weights
    from moesaic.hf.watching import adopted

    model: Any = patient.model
    with adopted(model):
        weights = examine_weights(model)
        if weights.not_finite:
            why = Unknown("weights hold NaN or infinity, and what comes of them says nothing")
            vitals = _without_model(why, patient)
            return _with(vitals, weights=weights), ""
        given, read = _batches(patient, data, tokens, batches)
        total = len(given) + 3
        count = iter(range(1, total + 1))
        progress(0, total, "loads and logits")
        routed, precision, biases = examine_routing(
            model, given, done=lambda: progress(next(count), total, "loads and logits")
        )
        repeat = examine_repeat(model, given[0])
        progress(next(count), total, "padding")
        padding: Padding | Unknown = Unknown("it needs input_ids and an attention_mask of two sequences or more")
        if lengths(given[0]):
            padding = examine_padding(model, given[0])
        progress(next(count), total, "gradients")
        gradients: Gradients | Unknown = Unknown("the batches have no labels, so there is no loss to follow back")
        if "labels" in given[0] or loss is not None:
            gradients = examine_gradients(model, given[0], loss=loss)
        progress(total, total, "done")
    vitals = Vitals(
        routed=routed,
        precision=precision,
        biases=biases,
        repeat=repeat,
        padding=padding,
        gradients=gradients,
        weights=weights,
        history=patient.history,
    )
    return vitals, read


def _batches(
    patient: Patient, data: str | None, tokens: int, batches: Sequence[Mapping[str, Tensor]] | None
) -> tuple[Sequence[Mapping[str, Tensor]], str]:
    from moesaic.doctor.patient import held_out

    if batches is not None:
        if not batches:
            raise ConfigError("batches must hold at least one batch, got none. Leave it out to read text.")
        return batches, f"{len(batches)} batches that were given"
    if patient.tokenizer is None:
        raise ConfigError(
            "The doctor runs a model on text: a model needs batches= or tokenizer=, got neither. "
            "Pass batches of input_ids, attention_mask and labels."
        )
    try:
        return held_out(patient, data, tokens)
    except MoesaicError as error:
        if data is not None or patient.config is None:
            raise
        raise type(error)(f"{error} Or name other text with --data.") from error


def _with(vitals: Vitals, **changes: Any) -> Vitals:
    from dataclasses import replace

    return replace(vitals, **changes)


def _silent(_done: int, _total: int, _what: str) -> None:
    pass
