import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from moesaic.core import checkpoint
from moesaic.data import TokenBlocks, load_corpus, load_tokenizer
from moesaic.train import FiniteGuard, NotFiniteError, resume, train
from moesaic.train.build import build_model
from moesaic.train.finite import first_not_finite
from moesaic.train.order import collate
from moesaic.train.trainer import MoeTrainer


@pytest.fixture
def model(tiny):
    return build_model("moe", tiny(), load_tokenizer("bytes"))


def batch():
    ids = torch.arange(20)[None] + 97
    return {"input_ids": ids, "labels": ids}


def test_weights_that_are_not_finite_are_named(model):
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight[0, 0] = float("nan")
    assert first_not_finite(model, batch()) == (
        "the first weights that are not finite are model.layers.1.self_attn.q_proj.weight"
    )


def test_the_first_layer_that_overflows_is_named(model):
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight.fill_(3e38)
    assert first_not_finite(model, batch()) == (
        "the first layer whose output is not finite is model.layers.1.self_attn.v_proj"
    )


def test_a_gradient_that_is_not_finite_is_named_from_the_loss_down(model):
    model(**batch()).loss.backward()
    assert first_not_finite(model, batch()) == "every layer's output is finite, so it arose in the loss itself"
    model.model.layers[0].self_attn.k_proj.weight.grad[0, 0] = float("inf")
    assert first_not_finite(model, None) == (
        "the first gradient that is not finite, counted from the loss, is that of "
        "model.layers.0.self_attn.k_proj.weight"
    )


def poison_at(monkeypatch, step):
    """Break a weight before a step's second micro-batch."""
    real, calls = MoeTrainer.training_step, []

    def training_step(self, model, *args, **kwargs):
        calls.append(1)
        if len(calls) == 2 * step:
            with torch.no_grad():
                model.model.layers[1].mlp.moe.router.weight[0, 0] = float("inf")
        return real(self, model, *args, **kwargs)

    monkeypatch.setattr(MoeTrainer, "training_step", training_step)


def test_a_run_stops_before_the_step_and_names_step_layer_and_checkpoint(tiny, monkeypatch):
    config = tiny()
    with monkeypatch.context() as patch:
        poison_at(patch, 5)
        with pytest.raises(NotFiniteError) as error:
            train(config)
    assert str(error.value) == (
        "The loss of step 5 is nan; the first weights that are not finite are model.layers.1.mlp.moe.router.weight. "
        f"The step was not taken; the last good checkpoint is {config.out}/checkpoints/checkpoint-3. "
        "Try a lower learning rate, a longer warmup or a smaller clip."
    )
    assert checkpoint.last_good(config.out / "checkpoints").step == 3
    resume(config.out)


class Burst(TrainerCallback):
    """Makes one gradient infinite, the losses being finite."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if state.global_step == 2:
            model.lm_head.weight.grad[0, 0] = float("inf")


def test_the_guard_stops_a_plain_trainer_too(tiny, text, tmp_path, model):
    tokenizer = load_tokenizer("bytes")
    blocks = TokenBlocks(load_corpus(text).train, tokenizer, 24)
    before = {}

    class Keep(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            before.update({name: tensor.clone() for name, tensor in model.state_dict().items()})

    args = TrainingArguments(
        output_dir=str(tmp_path / "plain"), max_steps=5, report_to="none", save_steps=2, disable_tqdm=True,
        per_device_train_batch_size=2, use_cpu=True, dataloader_pin_memory=False, remove_unused_columns=False,
    )  # fmt: skip
    trainer = Trainer(
        model=model, args=args, train_dataset=blocks, data_collator=collate, callbacks=[Keep(), Burst(), FiniteGuard()]
    )
    with pytest.raises(NotFiniteError) as error:
        trainer.train()
    assert str(error.value).startswith(
        "A gradient of step 3 is not finite; the first gradient that is not finite, counted from the loss, is that of "
        f"lm_head.weight. The step was not taken; the last good checkpoint is {tmp_path}/plain/checkpoint-2. "
    )
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
