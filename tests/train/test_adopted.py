"""Our trainer, and transformers' own, on a model that was adopted: figures, refusals, checkpoints, resume."""

import pytest
import safetensors.torch
import torch
from torch.utils.data import SequentialSampler
from transformers import Trainer

import moesaic as mz
from moesaic import hf
from moesaic.core.errors import ConfigError
from moesaic.train import BalanceCallback, FiniteGuard, HistoryCallback, InterruptCallback, MoeTrainer, history
from tests.hf.families import tiny, written_for_this_transformers
from tests.hf.families.weights import SELECTION_BIAS
from tests.hf.test_accumulation import Rows, arguments
from tests.hf.test_adopt_training_losses import labelled
from tests.hf.test_adopt_training_steps import uneven
from tests.hf.tiny import gradients

pytestmark = written_for_this_transformers


class InOrder(MoeTrainer):
    """Reads the batches as they come, as the loops here do."""

    def _get_train_sampler(self, train_dataset=None):
        return SequentialSampler(self.train_dataset)


def adopted(family, balance, dtype=torch.float32, **changes):
    made = tiny(family, **changes)
    return mz.adopt(made.model.to(dtype), balance=balance).train(), made


def trained(kind, family, folder, *, steps=4, resume=None, balance=None, dtype=torch.float32):
    model, made = adopted(family, {"switch": 0.1} if balance is None else balance, dtype)
    args = arguments(
        folder, max_steps=steps, optim="adamw_torch", learning_rate=1e-2, save_strategy="steps", save_steps=2
    )
    trainer = kind(model=model, args=args, train_dataset=Rows(uneven(made)), callbacks=[BalanceCallback()])
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return model, made


@pytest.mark.parametrize(
    ("kind", "family", "balance", "dtype"),
    [
        (Trainer, "mixtral", {"switch": 0.1}, torch.float32),
        (Trainer, "deepseek_v3", {"bias": 1e-3}, torch.bfloat16),
        (InOrder, "mixtral", {"switch": 0.1}, torch.float32),
        (InOrder, "ernie4_5_moe", {"switch": 0.1, "bias": 1e-3}, torch.float32),
        (InOrder, "kimi_linear", {"bias": 1e-3}, torch.bfloat16),
    ],
)
def test_a_run_that_resumes_ends_with_the_same_bits(kind, family, balance, dtype, tmp_path):
    settings = {"balance": balance, "dtype": dtype}
    whole, _ = trained(kind, family, tmp_path / "whole", **settings)
    half, _ = trained(kind, family, tmp_path / "half", steps=2, **settings)
    again, _ = trained(kind, family, tmp_path / "half", resume=tmp_path / "half" / "checkpoint-2", **settings)
    expected, found = whole.state_dict(), again.state_dict()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []
    experts = next(name for name in expected if "experts" in name and expected[name].is_floating_point())
    assert not torch.equal(half.state_dict()[experts], expected[experts])
    biases = [value for name, value in found.items() if SELECTION_BIAS.search(name)]
    assert bool(biases) == (family != "mixtral")
    if "bias" in balance:
        assert {value.dtype for value in biases} == {torch.float32}


def test_weights_are_taken_under_the_names_that_the_family_has_on_disk(tmp_path):
    model, _ = adopted("mixtral", {"switch": 0.1})
    model.save_pretrained(tmp_path)
    on_disk = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert "model.layers.0.mlp.experts.0.w1.weight" in on_disk or len(on_disk) > len(model.state_dict())
    other = mz.adopt(tiny("mixtral", seed=1).model)
    assert str(other.load_state_dict(on_disk)) == "<All keys matched successfully>"
    assert all(torch.equal(other.state_dict()[name], value) for name, value in model.state_dict().items())
    router = "model.layers.1.mlp.gate.weight"
    kept = tiny("mixtral", seed=1).model.state_dict()[router]
    other = mz.adopt(tiny("mixtral", seed=1).model)
    part = {name: value for name, value in on_disk.items() if "layers.1" not in name or "gate" not in name}
    result = other.load_state_dict(part | {"of.another": torch.zeros(1)}, strict=False)
    assert result.missing_keys == [router]
    assert result.unexpected_keys == ["of.another"]
    assert torch.equal(other.state_dict()[router], kept)
    with pytest.raises(RuntimeError, match="another"):
        other.load_state_dict(on_disk | {"of.another": torch.zeros(1)})


def test_a_checkpoint_and_a_saved_model_are_both_read_as_the_family(tmp_path):
    kind = type(tiny("deepseek_v3").model)
    model, made = trained(InOrder, "deepseek_v3", tmp_path, steps=2, balance={"bias": 1e-3})
    InOrder(model=model, args=arguments(tmp_path), train_dataset=Rows(uneven(made))).save_model(tmp_path / "saved")
    names = set(safetensors.torch.load_file(tmp_path / "saved" / "model.safetensors"))
    assert names - set(model.state_dict())  # a tensor for each expert, as others expect
    with torch.no_grad():
        expected = model.eval()(**made.inputs).logits
        for folder in ("saved", "checkpoint-2"):
            again = kind.from_pretrained(tmp_path / folder, dtype=torch.float32).eval()
            assert type(again) is kind
            torch.testing.assert_close(again(**made.inputs).logits, expected, rtol=1e-5, atol=1e-6)


def test_the_history_has_the_figures_of_each_layer(tmp_path):
    model, made = adopted("zaya", {"switch": 0.5, "bias": 1e-3})
    path = tmp_path / "history.jsonl"
    callbacks = [
        FiniteGuard(),
        BalanceCallback(),
        HistoryCallback(path, tokens_per_step=28, sinks=[]),
        InterruptCallback(),
    ]
    args = arguments(tmp_path, max_steps=2, gradient_accumulation_steps=2, logging_steps=1, learning_rate=1e-3)
    InOrder(model=model, args=args, train_dataset=Rows(uneven(made)), callbacks=callbacks).train()
    lines = history.read(path)
    layers = list(hf.moe_layers(model))
    assert [line["step"] for line in lines] == [1, 2]
    for line in lines:
        assert line["aux"]["switch"] >= 0.5
        for figure in ("load", "load_max_over_mean", "drop_rate", "router_entropy"):
            assert list(line[figure]) == layers
        for layer in layers:
            assert len(line["load"][layer]) == 5  # four experts and the skip
            assert sum(line["load"][layer]) == pytest.approx(1, abs=1e-5)


def test_label_smoothing_that_would_leave_the_balance_losses_out_is_refused(tmp_path):
    model, made = adopted("olmoe", {"switch": 0.1})
    args = arguments(tmp_path, label_smoothing_factor=0.2)
    with pytest.raises(ConfigError) as error:
        MoeTrainer(model=model, args=args)
    assert str(error.value).startswith(
        "the balance losses of this model (switch) need label_smoothing_factor=0, got 0.2: with it"
    )
    trainer = Trainer(model, args, train_dataset=Rows([labelled(made)]), callbacks=[BalanceCallback()])
    with pytest.raises(ConfigError):
        trainer.train()
    assert trainer.state.global_step == 0
    InOrder(model=mz.adopt(model), args=args, train_dataset=Rows([labelled(made)])).train()


def test_gradients_of_an_encoder_decoder_are_the_mean_over_micro_batches(tmp_path):
    model, made = adopted("switch_transformers", {"switch": 0.5, "z": 0.1}, dropout_rate=0.0, router_jitter_noise=0.0)
    first = {**made.inputs, "labels": made.inputs["decoder_input_ids"]}
    second = {name: value.flip(0) for name, value in first.items()}
    for part in (first, second):
        (model(**part).loss / 2).backward()
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    expected = {name: before[name] - 0.01 * gradient for name, gradient in gradients(model).items()}
    model.zero_grad()
    args = arguments(tmp_path, gradient_accumulation_steps=2, learning_rate=0.01)
    trainer = InOrder(model=model, args=args, train_dataset=Rows([first, second]))
    trainer.train()
    assert not trainer.model_accepts_loss_kwargs
    found = {name: weight.detach() for name, weight in model.named_parameters() if name in expected}
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
