"""Our callbacks in a user's own transformers Trainer, and what they count."""

import pytest
import torch
from transformers import Trainer, TrainingArguments

from moesaic import ConfigError, hf
from moesaic.data import TokenBlocks, load_corpus, load_tokenizer
from moesaic.dispatch import Capacity, Sort
from moesaic.train import BalanceCallback, HistoryCallback, InterruptCallback, MoeTrainer, ProgressCallback, history
from moesaic.train.build import build_model
from moesaic.train.order import collate
from moesaic.train.progress import figures
from tests.hf.tiny import CHECKPOINTING


@pytest.fixture
def plain(tiny, text, tmp_path):
    """Makes a plain Trainer on a sparse model with a bias controller."""
    tokenizer = load_tokenizer("bytes")
    corpus = load_corpus(text)
    blocks, held_out = (TokenBlocks(documents, tokenizer, 24) for documents in (corpus.train, corpus.held_out))

    def trainer(callbacks, recipe="deepseek-v3", **arguments):
        settings = {"max_steps": 4, "per_device_train_batch_size": 3, "gradient_accumulation_steps": 2}
        quiet = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "dataloader_pin_memory": False}
        output = {"output_dir": str(tmp_path / "plain"), "save_strategy": "no", "remove_unused_columns": False}
        torch.manual_seed(0)
        return Trainer(
            model=build_model("moe", tiny(recipe=recipe, top_k=2), tokenizer),
            args=TrainingArguments(**{**settings, **quiet, **output, **arguments}),
            train_dataset=blocks,
            eval_dataset=held_out,
            data_collator=collate,
            callbacks=callbacks,
        )

    return trainer


def biases(model):
    return {name: layer.router.bias_E.clone() for name, layer in hf.moe_layers(model).items()}


def test_controllers_step_once_per_optimizer_step_on_the_load_of_all_micro_batches(plain, monkeypatch):
    stepped = []
    from moesaic.balance import BiasController

    real = BiasController.step

    def step(self, load_E, *, kept_E, num_tokens):
        stepped.append((load_E.clone(), kept_E.clone(), num_tokens))
        real(self, load_E)

    monkeypatch.setattr(BiasController, "step", step)
    trainer = plain([BalanceCallback()])
    trainer.train()
    # 4 steps, 2 layers; each step routes 2 micro-batches of 3 sequences of 24 tokens to 2 experts.
    num_tokens = 2 * 3 * 24
    assert [(int(load_E.sum()), int(kept_E.sum()), count) for load_E, kept_E, count in stepped] == [
        (2 * num_tokens, 2 * num_tokens, num_tokens)
    ] * 8
    for bias_E in biases(trainer.model).values():
        assert bias_E.dtype == torch.float32
        assert bias_E.abs().max() > 0
        assert bias_E.sum().abs() < 1e-6


def test_the_load_of_the_global_batch_grows_with_each_micro_batch_and_begins_anew_with_each_step(plain, monkeypatch):
    from moesaic.hf import GlobalBatch

    real, seen = GlobalBatch.batch_load_E, []

    def batch_load_E(self, block, load_E):
        total_E = real(self, block, load_E)
        seen.append(int(total_E.sum()))
        return total_E

    monkeypatch.setattr(GlobalBatch, "batch_load_E", batch_load_E)
    callback = BalanceCallback()
    trainer = plain([callback], recipe="qwen3-moe", eval_strategy="steps", eval_steps=2)
    trainer.train()
    rows = 3 * 24 * 2
    assert seen == [rows, rows, 2 * rows, 2 * rows] * 4
    callback.close()
    trainer.model.train()(torch.randint(256, (3, 24)))
    assert len(seen) == 4 * 4


def test_one_controller_for_all_layers_gets_their_loads_end_to_end(plain, monkeypatch):
    from moesaic.balance import SparsityController

    real, stepped, coefficients = SparsityController.step, [], []

    def step(self, load_E, *, kept_E, num_tokens):
        stepped.append((len(load_E), len(kept_E), num_tokens))
        real(self, load_E, num_tokens=num_tokens)
        coefficients.append([float(layer.coefficient) for layer in self.layers])

    monkeypatch.setattr(SparsityController, "step", step)
    trainer = plain([BalanceCallback()], recipe="relu")
    trainer.train()
    assert stepped == [(2 * 4, 2 * 4, 2 * 2 * 3 * 24)] * 4
    assert all(first == second for first, second in coefficients)
    assert len({first for first, _ in coefficients}) > 1


def test_rows_that_a_capacity_drops_move_the_coefficient_of_their_layer(plain):
    trainer = plain([BalanceCallback()], recipe="skywork", learning_rate=0.0)
    layers = list(hf.moe_layers(trainer.model).values())
    layers[0].dispatch = Capacity(0.25, minimum=1)
    layers[1].dispatch = Sort()
    before = [float(layer.coefficient) for layer in layers]
    trainer.train()
    assert before[0] == before[1]
    assert float(layers[0].coefficient) > float(layers[1].coefficient)


def test_gradient_checkpointing_counts_nothing_twice(plain):
    checkpointed = {f"{CHECKPOINTING}_checkpointing": True}
    first, second = plain([BalanceCallback()]), plain([BalanceCallback()], **checkpointed)
    first.train()
    second.train()
    left, right = biases(first.model), biases(second.model)
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_evaluation_moves_no_controller(plain):
    without, with_it = plain([BalanceCallback()]), plain([BalanceCallback()], eval_strategy="steps", eval_steps=1)
    without.train()
    with_it.train()
    left, right = biases(without.model), biases(with_it.model)
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_a_model_without_controllers_or_without_experts_is_left_alone(plain, tiny):
    plain([BalanceCallback()], recipe="mixtral").train()
    trainer = plain([BalanceCallback()])
    trainer.model = build_model("dense", tiny(), load_tokenizer("bytes"))
    trainer.model_wrapped = trainer.model
    trainer.train()
    assert trainer.state.global_step == trainer.state.max_steps > 0


LOST_TO_SMOOTHING = (
    "the balance losses of this model (switch) need label_smoothing_factor=0, got 0.2: with it the Trainer works out a "
    "loss from the logits, and they would reach no router. Leave smoothing out, or smooth in a compute_loss_func that "
    "adds output.aux_loss."
)


def test_label_smoothing_that_would_leave_the_balance_losses_out_is_refused_before_the_first_step(plain):
    trainer = plain([BalanceCallback()], recipe="mixtral", label_smoothing_factor=0.2)
    with pytest.raises(ConfigError) as error:
        trainer.train()
    assert str(error.value) == LOST_TO_SMOOTHING
    assert trainer.state.global_step == 0
    with pytest.raises(ConfigError) as error:
        MoeTrainer(model=trainer.model, args=trainer.args)
    assert str(error.value) == LOST_TO_SMOOTHING


def test_label_smoothing_goes_with_a_model_that_has_no_balance_losses(plain, tiny):
    trainer = plain([BalanceCallback()], recipe="mixtral", label_smoothing_factor=0.2, max_steps=1)
    dense = build_model("dense", tiny(), load_tokenizer("bytes"))
    off = build_model("moe", tiny(recipe="mixtral", aux_coefficients={"switch": 0.0}), load_tokenizer("bytes"))
    for model in (dense, off):
        trainer.model = trainer.model_wrapped = model
        trainer.train()
        assert trainer.state.global_step == 1


def test_a_loss_of_ones_own_that_adds_aux_loss_pulls_on_the_routers(plain):
    pulls = []
    for with_balance in (False, True):
        trainer = plain([BalanceCallback()], recipe="mixtral", gradient_accumulation_steps=1, max_steps=1)

        def loss(output, labels, num_items_in_batch, with_balance=with_balance):
            return 0 * output.logits.sum() + (output.aux_loss if with_balance else 0)

        trainer.compute_loss_func = loss
        before = [layer.router.weight.clone() for layer in hf.moe_layers(trainer.model).values()]
        trainer.train()
        after = [layer.router.weight for layer in hf.moe_layers(trainer.model).values()]
        pulls.append([not torch.equal(left, right) for left, right in zip(before, after, strict=True)])
    assert pulls == [[False, False], [True, True]]


def test_the_history_of_a_plain_trainer_has_the_figures_of_each_layer(plain, tmp_path):
    path, shown = tmp_path / "history.jsonl", []
    callbacks = [
        HistoryCallback(path, tokens_per_step=144, sinks=[shown.append]),
        InterruptCallback(),
        ProgressCallback("plain"),
    ]
    trainer = plain(callbacks, recipe="switch", logging_steps=3)
    trainer.train()
    lines = history.read(path)
    assert lines == shown
    assert [(line["kind"], line["step"], line["tokens"]) for line in lines] == [("train", 3, 432), ("train", 4, 576)]
    layers = list(hf.moe_layers(trainer.model))
    for line in lines:
        assert line["loss"] > 0
        assert line["grad_norm"] > 0
        assert line["tokens_per_s"] > 0
        assert line["aux"]["switch"] >= 0.99
        for figure in ("load", "load_max_over_mean", "drop_rate", "router_entropy"):
            assert list(line[figure]) == layers
        for layer in layers:
            assert sum(line["load"][layer]) == pytest.approx(1, abs=1e-5)
            assert max(line["load"][layer]) * 4 == pytest.approx(line["load_max_over_mean"][layer], abs=1e-4)


def test_a_line_of_figures_shows_the_worst_layer():
    line = {"loss": 1.25, "tokens_per_s": 12345.6, "load_max_over_mean": {"a": 1.5, "b": 2.25}}
    assert figures({**line, "drop_rate": {"a": 0.125, "b": 0.0}}) == (
        "loss 1.250  12,346 tokens/s  load max/mean 2.25  dropped 12.5%"
    )
    assert figures({"loss": 1.25, "tokens_per_s": 12345.6}) == "loss 1.250  12,346 tokens/s"
