from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from moesaic.convert.shrink.distillation import distill
from moesaic.core.errors import ConfigError
from moesaic.hf import sparsify
from tests.convert.plain import VOCABULARY, native
from tests.hf.tiny import build


def batches(count: int = 3, *, padded: bool = False) -> list[dict[str, Tensor]]:
    made = []
    for _ in range(count):
        ids = torch.randint(3, VOCABULARY, (2, 6))
        mask = torch.ones_like(ids)
        if padded:
            mask[1, 4:] = 0
        made.append({"input_ids": ids, "attention_mask": mask})
    return made


BLOCKS = {f"model.layers.{layer}.mlp": f"model.layers.{layer}.mlp" for layer in (0, 1)}


def pair() -> tuple[Any, Any]:
    teacher = sparsify(build("llama"), "mixtral", num_experts=4, top_k=2, init_std=0.3).eval()
    return teacher, build("llama")


def test_the_gap_is_that_of_plain_sums_without_padding():
    teacher, student = pair()
    given = batches(padded=True)
    done = distill(teacher, student, given, steps=1, learning_rate=0.0, blocks=BLOCKS)
    assert done.before == done.after
    blocks, nats = [], []
    for batch in given:
        valid = batch["attention_mask"].bool()
        read: dict[int, tuple[Tensor, Tensor]] = {}
        handles = [
            block.mlp.register_forward_hook(lambda _m, args, out, i=i, read=read: read.update({i: (args[0], out)}))
            for i, block in enumerate(teacher.model.layers)
        ]
        with torch.no_grad():
            p = teacher(**batch).logits.softmax(dim=-1)[valid]
            log_q = student(**batch).logits.log_softmax(dim=-1)[valid]
            nats.append(float((p * (p.log() - log_q)).sum(dim=-1).mean()))
            errors = []
            for i, (x, y) in read.items():
                off = (student.model.layers[i].mlp(x) - y)[valid]
                errors.append(float(off.square().sum() / y[valid].square().sum()))
            blocks.append(sum(errors) / 2)
        for handle in handles:
            handle.remove()
    assert done.before.blocks == pytest.approx(sum(blocks) / 3, rel=1e-5)
    assert done.before.logits == pytest.approx(sum(nats) / 3, rel=1e-4)


def test_a_student_comes_closer_and_only_its_blocks_are_trained():
    teacher, student = pair()
    before, of_teacher = copy.deepcopy(student.state_dict()), copy.deepcopy(teacher.state_dict())
    told: list[tuple[int, float]] = []
    done = distill(
        teacher, student, batches(), steps=40, learning_rate=1e-2, blocks=BLOCKS, on_step=lambda *now: told.append(now)
    )
    assert done.after.blocks < 0.6 * done.before.blocks
    assert done.after.logits < done.before.logits
    assert [step for step, _ in told] == list(range(40))
    for name, tensor in student.state_dict().items():
        assert torch.equal(tensor, before[name]) == (".mlp." not in name), name
    assert all(torch.equal(tensor, of_teacher[name]) for name, tensor in teacher.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in student.parameters())


def test_without_blocks_all_weights_learn_from_predictions_alone_and_a_temperature_softens_them():
    teacher, student = pair()
    done = distill(teacher, student, batches(), steps=40, learning_rate=1e-2, temperature=2.0)
    assert done.before.blocks == done.after.blocks == 0
    assert done.after.logits < 0.5 * done.before.logits
    assert str(done).startswith("distilled for 40 steps: divergence of predictions ")


def test_a_student_of_half_precision_is_trained_in_float32_and_goes_back():
    teacher, student = pair()
    student = student.to(torch.bfloat16).train()
    student.model.embed_tokens.weight.requires_grad_(False)
    done = distill(teacher, student, batches(), steps=30, learning_rate=1e-2, blocks=BLOCKS)
    assert {tensor.dtype for tensor in student.parameters()} == {torch.bfloat16}
    assert student.training
    assert not student.model.embed_tokens.weight.requires_grad
    assert done.after.blocks < done.before.blocks


def test_a_teacher_whose_blocks_return_more_than_their_output_teaches_too():
    teacher = native("gpt_oss").float()
    student = build("llama", head_dim=8, num_key_value_heads=2)
    done = distill(teacher, student, batches(), steps=20, learning_rate=1e-2, blocks=BLOCKS, logits_weight=0.0)
    assert done.after.blocks < done.before.blocks
    assert math.isfinite(done.after.logits)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batches": [], "steps": 3}, "got 0 batches, 3 steps and temperature 1.0. 200 steps are a beginning."),
        ({"steps": 0}, "got 1 batches, 0 steps and temperature 1.0."),
        ({"steps": 1, "temperature": 0.0}, "got 1 batches, 1 steps and temperature 0.0."),
        ({"steps": 1, "logits_weight": 0.0}, "got blocks_weight=1.0 with 0 pairs of blocks and logits_weight=0.0."),
        (
            {"steps": 1, "blocks": BLOCKS, "blocks_weight": -1.0},
            "got blocks_weight=-1.0 with 2 pairs of blocks and logits_weight=1.0.",
        ),
        (
            {"steps": 1, "student": build("llama", vocab_size=50)},
            "must have the same vocabulary, got 61 and 50 tokens.",
        ),
    ],
)
def test_what_cannot_be_distilled_is_refused(arguments, message):
    teacher, student = pair()
    arguments = {"batches": batches(1), "student": student} | arguments
    with pytest.raises(ConfigError) as error:
        distill(teacher, **arguments)
    assert message in str(error.value)
