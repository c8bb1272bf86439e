"""What two processes do for test_adopted_data_parallel.py: each trains an adopted model, with ``RANK`` set."""

import json
import sys
from pathlib import Path

import safetensors.torch
import torch
from transformers import TrainerCallback

import moesaic as mz
from moesaic.train import BalanceCallback, MoeTrainer, ranks
from tests.hf.families import tiny
from tests.hf.families.weights import SELECTION_BIAS
from tests.hf.test_accumulation import Rows, arguments
from tests.hf.test_adopt_training_losses import labelled

# A buffer and a frozen parameter as bias; experts that are modules of their own, most of them idle on a rank.
CASES = {
    "mixtral": {"switch": 0.5, "z": 0.1},
    "deepseek_v3": {"global-batch": 0.5, "bias": 1e-2},
    "ernie4_5_moe": {"z": 0.1, "bias": 1e-2},
    "switch_transformers": {"switch": 0.5},
}


def adopted(family):
    changes = {"dropout_rate": 0.0, "router_jitter_noise": 0.0} if family == "switch_transformers" else {}
    made = tiny(family, **changes)
    return mz.adopt(made.model, balance=CASES[family]).train(), made


def batches(family, made):
    """One for each rank; with different padding where the loss allows it."""
    if family == "switch_transformers":
        part = {**made.inputs, "labels": made.inputs["decoder_input_ids"]}
        return [part, {name: value.flip(0) for name, value in part.items()}]
    first = labelled(made)
    if family == "deepseek_v3":
        first = {**first, "attention_mask": torch.ones_like(first["attention_mask"]), "labels": first["input_ids"]}
    second = {name: value.clone() for name, value in first.items()}
    second["input_ids"] = 92 - second["input_ids"]
    if family != "deepseek_v3":
        second["attention_mask"][:, :3] = 0
    second["labels"] = second["input_ids"].masked_fill(second["attention_mask"] == 0, -100)
    return [first, second]


class Keep(TrainerCallback):
    """Keeps the gradients of the first step."""

    def __init__(self):
        self.gradients = {}

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradients = {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}


def one_step(family, out):
    """Gradients of a step of MoeTrainer, and the selection biases after it."""
    model, made = adopted(family)
    keep = Keep()
    args = arguments(out, ddp_find_unused_parameters=False, learning_rate=0.0)
    trainer = MoeTrainer(
        model=model,
        args=args,
        train_dataset=Rows(batches(family, made)),
        callbacks=[BalanceCallback(), keep],
    )
    trainer._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(trainer.train_dataset)
    trainer.train()
    moved = {f"bias {name}": value for name, value in model.state_dict().items() if SELECTION_BIAS.search(name)}
    return {**keep.gradients, **moved}


def main(out: Path) -> None:
    torch.set_num_threads(1)
    ranks.join()
    for family in CASES:
        safetensors.torch.save_file(one_step(family, out / "trainer"), out / f"{family}-{ranks.own()}.safetensors")
    (out / f"{ranks.own()}.json").write_text(json.dumps({}))


if __name__ == "__main__":
    main(Path(sys.argv[2]))
