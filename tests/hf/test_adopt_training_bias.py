"""Loss-free balancing of adopted models: the bias that transformers holds, and never updates, is moved and saved."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import Trainer

import moesaic as mz
from moesaic import hf
from moesaic.core.errors import ConfigError
from moesaic.telemetry import RoutingSummary
from moesaic.train import BalanceCallback
from tests.hf.families import choices, tiny, written_for_this_transformers
from tests.hf.families.weights import SELECTION_BIAS
from tests.hf.test_accumulation import Rows, arguments
from tests.hf.test_adopt_every_family import valid
from tests.hf.test_adopt_training_losses import labelled
from tests.hf.test_adopt_training_steps import uneven
from tests.hf.tiny import CHECKPOINTING

pytestmark = written_for_this_transformers

RATE = 1e-3
# A buffer of the router; a frozen parameter (1, E) in a module of its own; a buffer or a parameter of the block, passed
# on to the router; beside experts that compute nothing, or a skip; in two routers of one block, or in some layers only.
FAMILIES = (
    "deepseek_v3",
    "deepseek_v3/groups",
    "glm4_moe",
    "ernie4_5_moe",
    "ernie4_5_vl_moe",
    "minimax_m2",
    "hy_v3",
    "lfm2_moe",
    "afmoe",
    "zaya",
    "longcat_flash",
    "deepseek_v4",
    "inkling",
    "laguna",
)


def biases(model: nn.Module) -> dict[str, Tensor]:
    """By the names that the family has for them, in the order of the layers."""
    return {name: value.clone() for name, value in model.state_dict().items() if SELECTION_BIAS.search(name)}


def steered(family: str, rate: float = RATE, **changes):
    made = tiny(family, **changes)
    return mz.adopt(made.model, balance={"bias": rate}), made


def one_step(model, *batches) -> None:
    """What a loop of one's own does: count over the micro-batches of a step, then step each controller once."""
    seen: dict[str, RoutingSummary] = {}

    def count(one: hf.Seen) -> None:
        new = RoutingSummary.of(one.routing)
        seen[one.layer] = seen[one.layer] + new if one.layer in seen else new

    with hf.observe(model, count), torch.no_grad():
        for inputs in batches:
            model(**inputs)
    for controller in hf.controllers(model):
        controller.step(seen)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_moves_the_models_own_bias_by_the_rate_towards_even_loads(family, dtype):
    made = tiny(family)
    for name, value in made.model.state_dict().items():
        if SELECTION_BIAS.search(name):
            value.add_(1.0)  # where bfloat16 has no number between 1 and 1.0078; a bias in common chooses nothing
    model = mz.adopt(made.model.to(dtype), balance={"bias": RATE}).train()
    before = biases(model)
    assert before
    chosen = {path: rows for path, rows in choices(made).items() if has_bias(before, path)}
    one_step(model, made.inputs)
    after = biases(model)
    assert len(chosen) == len(before)
    for (name, bias), (path, (expert_TK, weight_TK)) in zip(before.items(), chosen.items(), strict=True):
        assert after[name].dtype == bias.dtype == torch.float32
        load_E = torch.zeros(bias.numel(), dtype=torch.float64)
        for experts, weights, counted in zip(expert_TK, weight_TK, valid(made, path, len(expert_TK)), strict=True):
            for expert, weight in zip(experts.tolist(), weights.tolist(), strict=True):
                # ZAYA hides a skip behind expert 0 with weight 0.
                load_E[-1 if family == "zaya" and weight == 0 else expert] += bool(counted)
        moved = (after[name] - bias).double().reshape(-1)
        torch.testing.assert_close(moved, expected_move(load_E, family), rtol=0, atol=3e-7)
        assert float(moved.abs().max()) > RATE / 2
        assert float(moved[-1] if family == "zaya" else moved.sum().abs()) < 1e-6


def expected_move(load_E: Tensor, family: str) -> Tensor:
    """One step of the rate towards the mean, adding up to 0."""
    sign_E = (load_E.double().mean() - load_E).sign()
    move_E = RATE * (sign_E - sign_E.mean())
    # Transformers sets the bias of ZAYA's skip to -1 whenever it loads weights: the others move about it.
    return move_E - move_E[-1] if family == "zaya" else move_E


def has_bias(names, path: str) -> bool:
    """Whether one of the biases stands in the layer that a module of experts stands in."""
    return any(name.startswith(f"{path.rpartition('.')[0]}.") for name in names)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_bias_is_saved_with_the_model_and_comes_back(family, tmp_path):
    kind = type(tiny(family).model)
    model, made = steered(family)
    for _ in range(2):
        one_step(model.train(), made.inputs)
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    kept = biases(model)
    loaded = kind.from_pretrained(tmp_path, dtype=torch.float32)
    assert type(loaded) is kind
    assert {name: value.dtype for name, value in kept.items()} == dict.fromkeys(kept, torch.float32)
    for name, bias in biases(loaded).items():
        assert torch.equal(bias, kept[name])
    # Some families' own classes round it where they are loaded in half precision; a step is not lost to that.
    for name, bias in biases(kind.from_pretrained(tmp_path, dtype=torch.bfloat16)).items():
        torch.testing.assert_close(bias.float(), kept[name], rtol=2**-8, atol=0)


CASTS = {
    "to": lambda model: model.to(torch.bfloat16),
    "bfloat16": lambda model: model.bfloat16(),
    "half": lambda model: model.half(),
    "double": lambda model: model.double(),
    "inside": lambda model: nn.Sequential(model).to(torch.bfloat16),
    "part": lambda model: model.get_decoder().to(torch.bfloat16),
}


@pytest.mark.parametrize("family", ["deepseek_v3", "ernie4_5_moe", "minimax_m2", "afmoe", "zaya"])
def test_a_cast_after_adoption_leaves_the_bias_exact_and_all_else_cast(family):
    for cast in CASTS.values():
        model, made = steered(family)
        one_step(model.train(), made.inputs)
        before, norm = biases(model), model.get_decoder().norm.weight.dtype
        cast(model)
        assert all(torch.equal(bias, before[name]) for name, bias in biases(model).items())
        assert model.get_decoder().norm.weight.dtype != norm
    hf.release(model).to(torch.bfloat16)
    assert {bias.dtype for bias in biases(model).values()} == {torch.bfloat16}


def test_a_model_that_is_watched_and_not_steered_is_cast_as_its_family_is():
    model = mz.adopt(tiny("deepseek_v3").model, balance={"switch": 0.1}).to(torch.bfloat16)
    assert {bias.dtype for bias in biases(model).values()} == {torch.bfloat16}
    assert hf.controllers(model) == []


@pytest.mark.parametrize("family", ["deepseek_v3", "ernie4_5_moe", "lfm2_moe", "minimax_m2", "longcat_flash"])
def test_a_collapsed_router_is_evened_out_over_the_steps(family):
    model, _ = steered(family, rate=0.02)
    torch.manual_seed(0)
    inputs = {"input_ids": torch.randint(3, 90, (4, 32))}
    for layer in hf.moe_layers(model).values():
        with torch.no_grad():  # all tokens to the last two
            layer.router.bias_E.zero_()
            layer.router.bias_E[-2:] = 1.0
    before = imbalance(model, inputs)
    for _ in range(30):
        one_step(model.train(), inputs)
    after = imbalance(model, inputs)
    experts = next(iter(hf.moe_layers(model).values())).num_experts
    assert min(before) == experts / 2  # two experts have all
    assert max(after) < 1.8, (before, after)


def imbalance(model, inputs) -> list[float]:
    """The load of each layer's busiest expert over the mean."""
    loads: list[Tensor] = []
    with hf.observe(model, lambda one: loads.append(one.routing.load_E.double())), torch.no_grad():
        model(**inputs)
    return [float(load_E.max() / load_E.mean()) for load_E in loads]


@pytest.mark.parametrize(
    ("family", "router", "path"),
    [
        ("mixtral", "MixtralTopKRouter", "model.layers.0.mlp.gate"),
        ("gpt_oss", "GptOssTopKRouter", "model.layers.0.mlp.router"),
        ("gemma4", "Gemma4TextRouter", "model.language_model.layers.0.router"),
        ("dbrx", "DbrxRouter", "transformer.blocks.0.ffn"),
        ("jetmoe", "JetMoeTopKGating", "model.layers.0.mlp.router"),
        ("switch_transformers", "SwitchTransformersTop1Router", "encoder.block.0.layer.1.mlp"),
        ("lfm2_moe/no-bias", "Lfm2MoeTopKRouter", "model.layers.1.feed_forward.gate"),
    ],
)
def test_a_family_without_a_bias_is_refused_by_name(family, router, path):
    model = tiny(family).model
    with pytest.raises(ConfigError) as error:
        mz.adopt(model, balance={"bias": RATE})
    assert str(error.value) == (
        f"Loss-free balancing moves a selection bias, and {router} at {path} has none: what it learned could not be "
        "saved with the model. Use a balance loss."
    )
    assert not hf.is_sparse(model)


# --- in transformers' Trainer ---------------------------------------------------------------------------------------


def trained(family, folder, *, steps=2, evaluates=False, checkpointing=False):
    """The biases before a plain Trainer's run and after, and what the run saw."""
    model, made = steered(family)
    before, parts, seen = biases(model), uneven(made), []
    settings = {"eval_strategy": "steps", "eval_steps": 1} if evaluates else {}
    args = arguments(
        folder,
        gradient_accumulation_steps=2,
        max_steps=steps,
        learning_rate=0.0,
        **{f"{CHECKPOINTING}_checkpointing": checkpointing},
        **settings,
    )
    trainer = Trainer(model, args, train_dataset=Rows(parts), eval_dataset=Rows(parts), callbacks=[BalanceCallback()])
    with hf.observe(model, seen.append):
        trainer.train()
    return before, biases(model), [one for one in seen if one.training], model


@pytest.mark.parametrize("family", ["deepseek_v3", "ernie4_5_moe", "minimax_m2", "zaya"])
def test_a_trainer_steps_once_per_optimizer_step_on_the_load_of_all_its_micro_batches(family, tmp_path):
    before, after, seen, model = trained(family, tmp_path)
    for layer, (name, bias) in zip(hf.moe_layers(model), before.items(), strict=True):
        loads = [one.routing.load_E.double() for one in seen if one.layer == layer]
        assert len(loads) == 4
        moved = torch.zeros(bias.numel(), dtype=torch.float64)
        for load_E in (loads[0] + loads[1], loads[2] + loads[3]):
            assert int(load_E.sum()) == 20 * (1 if family == "zaya" else 2)  # 12 tokens and 8
            moved += expected_move(load_E, family)
        torch.testing.assert_close((after[name] - bias).double().reshape(-1), moved, rtol=0, atol=1e-6)


def test_neither_evaluation_nor_recomputed_activations_move_it(tmp_path):
    _, plain, _, _ = trained("deepseek_v3", tmp_path)
    _, evaluated, _, _ = trained("deepseek_v3", tmp_path, evaluates=True)
    _, recomputed, _, _ = trained("deepseek_v3", tmp_path, checkpointing=True)
    for name, bias in plain.items():
        assert torch.equal(evaluated[name], bias)
        assert torch.equal(recomputed[name], bias)


def test_balance_losses_and_the_bias_go_together_in_one_loop():
    made = tiny("deepseek_v3")
    model = mz.adopt(made.model, balance={"bias": RATE, "sequence": 1e-2}).train()
    before = biases(model)
    model(**labelled(made)).loss.backward()
    assert all(layer.reporter.weight.grad.any() for layer in hf.moe_layers(model).values())
    one_step(model, made.inputs)
    assert all(not torch.equal(bias, before[name]) for name, bias in biases(model).items())
