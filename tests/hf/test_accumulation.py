"""The same gradient however the batch is cut, in a loop of one's own and in transformers' Trainer."""

from dataclasses import replace

import pytest
import torch
from torch.utils.data import Dataset
from transformers import LlamaForSequenceClassification, Trainer, TrainingArguments

from moesaic.balance import z_loss
from moesaic.hf import observe, sparsify
from tests.hf.test_forward import sparse
from tests.hf.tiny import CHECKPOINTING, OPTIONS, batch, build, gradients


def uneven(family):
    """Two batches in which different numbers of tokens are predicted."""
    first, second = batch(family, sequences=2), batch(family, sequences=2)
    if family != "vit":
        second["labels"][:, 3:] = -100
        second["attention_mask"][:, 4:] = 0
    return [first, second]


def predicted(inputs, family):
    labels = inputs["labels"]
    return int((labels[..., 1:] if family in ("llama", "gpt2") else labels).ne(-100).sum())


@pytest.mark.parametrize("family", ["llama", "gpt2", "vit"])
def test_accumulated_gradients_are_the_mean_over_calls_weighted_by_predicted_tokens(family):
    model, parts = sparse(family, aux_coefficients={"switch": 1.0}).train(), uneven(family)
    counts = [predicted(part, family) for part in parts]
    total = torch.tensor(sum(counts))
    for part in parts:
        model(**part, num_items_in_batch=total).loss.backward()
    accumulated = gradients(model)
    model.zero_grad()
    for part, count in zip(parts, counts, strict=True):
        (model(**part).loss * count / total).backward()
    assert counts[0] != counts[1] or family == "vit"
    torch.testing.assert_close(accumulated, gradients(model))


def test_a_per_token_loss_accumulates_to_that_of_one_big_batch():
    model = sparse("llama").train()
    for layer in model.model.layers:  # the switch loss is a statistic of its batch; the z-loss is a mean over tokens
        layer.mlp.terms = (replace(layer.mlp.terms[0], loss=z_loss, coefficient=0.1),)
    whole = batch("llama", sequences=4)
    model(**whole).loss.backward()
    expected = gradients(model)
    model.zero_grad()
    for half in (slice(0, 2), slice(2, 4)):
        part = {name: value[half] for name, value in whole.items()}
        model(**part, num_items_in_batch=4 * 6).loss.backward()
    torch.testing.assert_close(gradients(model), expected)


def test_shifted_labels_that_the_caller_brings_are_counted_as_they_are():
    model, inputs = sparse("llama", aux_coefficients={"switch": 1.0}).train(), batch("llama")
    shifted = torch.nn.functional.pad(inputs["labels"], (0, 1), value=-100)[:, 1:].contiguous()
    given = model(**inputs, shift_labels=shifted, num_items_in_batch=36).loss
    torch.testing.assert_close(given, model(**inputs, num_items_in_batch=36).loss)


@pytest.mark.parametrize("model", [sparse("t5"), LlamaForSequenceClassification(build("llama").config)])
def test_a_model_whose_loss_is_not_divided_keeps_its_balance_losses_whole(model):
    # transformers' T5 and its classifiers pass num_items_in_batch to nobody.
    is_t5 = model.config.is_encoder_decoder
    model = (model if is_t5 else sparsify(model, "mixtral", **OPTIONS["mixtral"])).train()
    inputs = batch("t5") if is_t5 else batch("llama") | {"labels": torch.tensor([0, 1, 1])}
    torch.testing.assert_close(model(**inputs, num_items_in_batch=50).loss, model(**inputs).loss)


class Rows(Dataset):
    def __init__(self, parts):
        self.rows = [{name: value[i] for name, value in part.items()} for part in parts for i in range(2)]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


def arguments(folder, **changes):
    return TrainingArguments(
        str(folder),
        **{
            "per_device_train_batch_size": 2,
            "max_steps": 1,
            "learning_rate": 1.0,
            "max_grad_norm": 0.0,
            "optim": "sgd",
            "use_cpu": True,
            "report_to": "none",
            "save_strategy": "no",
            "disable_tqdm": True,
            "lr_scheduler_type": "constant",
            "train_sampling_strategy": "sequential",
            "dataloader_pin_memory": False,
            **changes,
        },
    )


@pytest.mark.parametrize("family", ["llama", "vit"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_trainer_takes_the_step_that_a_loop_would(family, checkpointing, tmp_path):
    model, parts = sparse(family, aux_coefficients={"switch": 1.0}).train(), uneven(family)
    counts = [predicted(part, family) for part in parts]
    for part, count in zip(parts, counts, strict=True):
        (model(**part).loss * count / sum(counts)).backward()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    expected = {name: before[name] - gradient for name, gradient in gradients(model).items()}
    model.zero_grad()
    args = arguments(tmp_path, gradient_accumulation_steps=2, **{f"{CHECKPOINTING}_checkpointing": checkpointing})
    seen = []
    trainer = Trainer(model, args, train_dataset=Rows(parts))
    with observe(model, seen.append):
        trainer.train()
    assert trainer.model_accepts_loss_kwargs
    assert len(seen) == 4
    trained = {name: parameter.detach() for name, parameter in model.named_parameters() if name in expected}
    torch.testing.assert_close(trained, expected, atol=1e-6, rtol=1e-5)


def test_trainer_evaluates_without_balance_losses_and_keeps_the_columns_that_the_model_reads(tmp_path):
    model, parts = sparse("llama"), uneven("llama")[:1]
    trainer = Trainer(model, arguments(tmp_path), eval_dataset=Rows(parts))
    trainer._set_signature_columns_if_needed()
    assert {"input_ids", "attention_mask", "labels"} <= set(trainer._signature_columns)
    with torch.no_grad():
        expected = model(**parts[0]).loss
    assert trainer.evaluate()["eval_loss"] == pytest.approx(float(expected), rel=1e-5)


def test_label_smoothing_shifts_labels_as_for_the_dense_model(tmp_path):
    model, parts = sparse("llama").train(), uneven("llama")
    trainer = Trainer(model, arguments(tmp_path, label_smoothing_factor=1e-9))
    smoothed = trainer.compute_loss(model, dict(parts[0]))
    with torch.no_grad():
        torch.testing.assert_close(smoothed.detach(), model(**parts[0]).loss)
