"""Balance losses of adopted models are those of each layer's own rows, worked out here in plain loops and float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

import moesaic as mz
from moesaic import hf
from moesaic.core.errors import ConfigError
from moesaic.hf.scope import listening
from moesaic.hf.watching import places
from tests.hf.families import choices, tiny, written_for_this_transformers

pytestmark = written_for_this_transformers

BALANCE = {"switch": 0.25, "z": 0.01, "sequence": 0.5, "global-batch": 2.0}


def labelled(made):
    ids, mask = made.inputs["input_ids"], made.inputs["attention_mask"]
    return {**made.inputs, "labels": ids.masked_fill(mask == 0, -100)}


class Losses:
    """Hears the balance losses of each layer."""

    wants_balance = True
    batch_load_E = None

    def __init__(self, model: nn.Module) -> None:
        self.places = places(model)
        self.by_layer: dict[str, dict[str, Tensor]] = {}

    def hear(self, place, report) -> None:
        self.by_layer.setdefault(place.layer, {}).update({name: loss.detach() for name, loss in report.losses.items()})


def softmax(logits: list[float]) -> list[float]:
    total = sum(math.exp(logit) for logit in logits)
    return [math.exp(logit) / total for logit in logits]


def sigmoid_shares(logits: list[float]) -> list[float]:
    scores = [1 / (1 + math.exp(-logit)) for logit in logits]
    return [score / sum(scores) for score in scores]


def linear(router: nn.Module, x: Tensor) -> Tensor:
    return x @ router.weight.double().T


def linear_with_bias(router: nn.Module, x: Tensor) -> Tensor:
    return x @ router.weight.double().T + router.bias.double()


def after_a_norm(router: nn.Module, x: Tensor) -> Tensor:
    x = x / (x.pow(2).mean(dim=-1, keepdim=True) + router.eps).sqrt()
    return (x * router.scale.double() * router.scalar_root_size) @ router.proj.weight.double().T


CASES = {
    "mixtral": (linear, softmax),
    "qwen3_moe": (linear, softmax),
    "qwen3_moe/normalized": (linear, softmax),
    "deepseek_v3": (linear, sigmoid_shares),
    "deepseek_v3/groups": (linear, sigmoid_shares),
    "gpt_oss": (linear_with_bias, softmax),
    "olmoe": (linear, softmax),
    "granitemoe": (linear, softmax),
    "gemma4": (after_a_norm, softmax),
}


def by_hand(logits: list[list[float]], rows: list[list[int]], where: list[int | None], share_of) -> dict[str, float]:
    """Every loss of one layer; ``where`` is the sequence of each token, None for padding."""
    num_experts = len(logits[0])

    def switch(tokens: list[int]) -> float:
        load = [sum(rows[t].count(e) for t in tokens) for e in range(num_experts)]
        mean = [sum(share_of(logits[t])[e] for t in tokens) / len(tokens) for e in range(num_experts)]
        return num_experts * sum(load[e] / sum(load) * mean[e] for e in range(num_experts))

    real = [t for t, sequence in enumerate(where) if sequence is not None]
    each = [[t for t in real if where[t] == sequence] for sequence in sorted({where[t] for t in real})]
    return {
        "switch": switch(real),
        "global-batch": switch(real),
        "sequence": sum(switch(tokens) for tokens in each) / len(each),
        "z": sum(math.log(sum(math.exp(logit) for logit in logits[t])) ** 2 for t in real) / len(real),
    }


@pytest.mark.parametrize("name", CASES)
def test_each_layer_has_the_losses_of_its_own_rows(name):
    logits_of, share_of = CASES[name]
    made = tiny(name)
    model, inputs = mz.adopt(made.model, balance=BALANCE), labelled(made)
    rows = {path.removesuffix(".experts"): experts for path, (experts, _) in choices(made).items()}
    read: dict[str, Tensor] = {}
    layers = hf.moe_layers(model)
    for path, layer in layers.items():
        layer.reporter.register_forward_pre_hook(lambda _, args, path=path: read.update({path: args[0]}))
    heard = Losses(model)
    with listening(heard):
        output = model.train()(**inputs)
    mask = inputs["attention_mask"]
    where = [s if mask[s, p] else None for s in range(mask.shape[0]) for p in range(mask.shape[1])]
    assert None in where
    assert set(heard.by_layer) == set(rows) == set(layers)
    total = 0.0
    for path, layer in layers.items():
        x = read[path].detach().double().reshape(mask.numel(), -1)
        expected = by_hand(logits_of(layer.reporter, x).tolist(), rows[path].tolist(), where, share_of)
        found = {loss: float(value) for loss, value in heard.by_layer[path].items()}
        assert found == pytest.approx(expected, rel=1e-5)
        total += sum(coefficient * expected[loss] for loss, coefficient in BALANCE.items())
    assert float(output.aux_loss.detach()) == pytest.approx(total, rel=1e-5)
    with torch.no_grad():
        own = model(**inputs).loss  # without gradients nothing is trained, so nothing is balanced
    assert float(output.loss.detach()) == pytest.approx(float(own) + total, rel=1e-5)


def test_two_layers_that_lean_to_opposite_experts_fool_transformers_and_not_us():
    made = tiny("mixtral", num_hidden_layers=2)
    model = mz.adopt(made.model, balance={"switch": 1.0})
    with torch.no_grad():
        for layer, sign in zip(model.model.layers, (1.0, -1.0), strict=True):
            layer.mlp.gate.weight.zero_()
            layer.mlp.gate.weight[:4], layer.mlp.gate.weight[4:] = 0.1 * sign, -0.1 * sign
            # Within the half that they lean to, tokens choose as they did not before: by their features.
            layer.mlp.gate.weight[:, :8] += torch.eye(8)
            layer.post_attention_layernorm.register_forward_hook(lambda _m, _a, output: output.abs())
    heard = Losses(model)
    with torch.no_grad(), listening(heard):
        theirs = model(**made.inputs, output_router_logits=True)
    logits = torch.cat(theirs.router_logits)
    assert torch.equal(
        theirs.aux_loss, load_balancing_loss_func(theirs.router_logits, 8, 2, made.inputs["attention_mask"])
    )
    ours = [float(losses["switch"]) for losses in heard.by_layer.values()]
    first, second = (one.topk(2).indices for one in theirs.router_logits)
    assert set(first.flatten().tolist()) <= {0, 1, 2, 3}
    assert set(second.flatten().tolist()) <= {4, 5, 6, 7}
    assert len(logits) == 2 * 14
    # Theirs is near K = 2, which it calls balanced; ours near E / 4 = 2 in each layer, where 1 is balanced.
    assert 1.9 < float(theirs.aux_loss) < 2.3
    assert min(ours) > 1.8


def test_at_perfect_balance_a_layer_has_1_where_transformers_has_k():
    made = tiny("mixtral", num_hidden_layers=1)
    model = mz.adopt(made.model, balance={"switch": 1.0})
    # Each token of eight prefers another pair of neighbours.
    logits_TE = 3 * (torch.eye(8) + torch.eye(8).roll(1, dims=1))
    gate = model.model.layers[0].mlp.gate
    with torch.no_grad():
        gate.weight.copy_(torch.cat([logits_TE.T, torch.zeros(8, 24)], dim=1))
    model.model.layers[0].post_attention_layernorm.register_forward_hook(lambda *_: torch.eye(8, 32)[None])
    heard = Losses(model)
    with torch.no_grad(), listening(heard):
        theirs = model(torch.arange(3, 11)[None], output_router_logits=True)
    assert float(heard.by_layer["model.layers.0.mlp"]["switch"]) == pytest.approx(1, abs=1e-6)
    assert float(theirs.aux_loss) == pytest.approx(2, abs=1e-6)


def test_a_forward_that_adds_the_models_own_balance_loss_is_refused():
    made = tiny("mixtral")
    model, inputs = mz.adopt(made.model, balance={"switch": 0.01}).train(), labelled(made)
    with pytest.raises(ConfigError) as error:
        model(**inputs, output_router_logits=True)
    assert str(error.value) == (
        "The model has added a balance loss of its own to its loss, pooled over layers, since this forward has "
        "output_router_logits=True; with balance it would be balanced twice. Leave it out: moesaic.hf.observe shows "
        "the router's logits."
    )
    del inputs["labels"]
    assert len(model(**inputs, output_router_logits=True).router_logits) == 3
    mz.adopt(model, balance=None)
    assert model(**labelled(made), output_router_logits=True).aux_loss is not None


# --- frozen routers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "gemma4", "dbrx", "llama4", "jetmoe", "zaya"])
def test_balance_with_frozen_routers_teaches_what_stands_below_them_and_no_router(family):
    made = tiny(family)
    model = hf.freeze_routers(mz.adopt(made.model, balance={"switch": 0.5, "z": 0.1})).train()
    frozen = {name for name, weight in model.named_parameters() if not weight.requires_grad}
    assert frozen
    before = {name: weight.detach().clone() for name, weight in model.named_parameters() if name in frozen}
    output = model(**labelled(made))
    output.aux_loss.backward(retain_graph=True)
    taught = [name for name, weight in model.named_parameters() if weight.grad is not None and weight.grad.any()]
    assert taught
    assert not frozen & set(taught)
    output.loss.backward()
    torch.optim.SGD([weight for weight in model.parameters() if weight.requires_grad], lr=0.1).step()
    assert all(torch.equal(model.get_parameter(name), weight) for name, weight in before.items())


def test_balance_that_can_teach_nothing_is_a_number_and_no_error():
    made = tiny("mixtral")
    model, inputs = mz.adopt(made.model, balance={"switch": 0.5}).train(), labelled(made)
    expected = float(model(**inputs).aux_loss.detach())
    model.requires_grad_(False)
    model.lm_head.requires_grad_(True)
    output = model(**inputs)
    assert not output.aux_loss.requires_grad
    assert float(output.aux_loss) == pytest.approx(expected)
    output.loss.backward()
    assert model.lm_head.weight.grad.any()
