"""Chosen experts under transformers' Trainer: saved, resumed to the bit, and the others still where they were."""

import copy

import pytest
import torch
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from moesaic.hf import check_trains, lora, train_only, undo_train_only
from tests.hf.test_peft import assert_only, chosen_of, experts_of, native, sparse
from tests.hf.tiny import CHECKPOINTING

peft = pytest.importorskip("peft")
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
    # The data loader is told to pin memory where there is none to pin it for.
    pytest.mark.filterwarnings("ignore:.*pin_memory:UserWarning"),
]

FAMILIES = {"native": lambda: native("mixtral"), "ours": lambda: sparse("deepseek-v3", balance={"switch": 0.1})}


class Rows(Dataset):
    def __init__(self, inputs):
        self.rows = [{name: value[i] for name, value in inputs.items()} for i in range(2)] * 6

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


def trainer_of(model, inputs, folder, **changes):
    settings = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 3,
        "save_steps": 1,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "logging_strategy": "no",
        "dataloader_pin_memory": False,
        **changes,
    }
    return Trainer(model, TrainingArguments(str(folder), **settings), train_dataset=Rows(inputs))


@pytest.mark.parametrize("recomputes", [False, True])
@pytest.mark.parametrize("make", FAMILIES.values(), ids=FAMILIES)
def test_an_adapter_is_trained_saved_and_resumed(make, recomputes, tmp_path):
    model, inputs = make()
    base, before, chosen = copy.deepcopy(model), experts_of(model), chosen_of(model, [0, 1, 3], ["up"])
    asked = {"rank": 2, "experts": [0, 1, 3], "projections": ["up"]}
    settings = {f"{CHECKPOINTING}_checkpointing": recomputes}
    torch.manual_seed(1)
    adapted = lora(model, **asked)
    trainer_of(adapted, inputs, tmp_path, **settings).train()
    expected = adapted.eval()(**inputs).logits

    torch.manual_seed(2)  # other first matrices, which the checkpoint replaces
    again = lora(copy.deepcopy(base), **asked)
    trainer_of(again, inputs, tmp_path, **settings).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert torch.equal(again.eval()(**inputs).logits, expected)
    check_trains(again, inputs)

    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "checkpoint-3")
    assert torch.equal(loaded.eval()(**inputs).logits, expected)
    assert_only(before, experts_of(loaded.merge_and_unload()), chosen)


@pytest.mark.parametrize("make", FAMILIES.values(), ids=FAMILIES)
def test_chosen_weights_are_trained_saved_and_resumed(make, tmp_path):
    model, inputs = make()
    base, before, chosen = copy.deepcopy(model), experts_of(model), chosen_of(model, [0, 1, 3], ["up"])
    asked = {"experts": [0, 1, 3], "projections": ["up"]}
    trainer_of(train_only(model, **asked), inputs, tmp_path).train()
    expected = model.eval()(**inputs).logits

    # Not from ``base``: transformers 5.23's Trainer does not find the experts of a native folder by their names on
    # disk, and goes on from those that the model has.
    again = train_only(type(base).from_pretrained(tmp_path / "checkpoint-2"), **asked)
    trainer_of(again, inputs, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert torch.equal(again.eval()(**inputs).logits, expected)

    loaded = type(base).from_pretrained(tmp_path / "checkpoint-3")
    assert torch.equal(loaded(**inputs).logits, expected)
    assert_only(before, experts_of(loaded), chosen)
    assert_only(before, experts_of(undo_train_only(again)), chosen)
