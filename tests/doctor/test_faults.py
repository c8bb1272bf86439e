"""Seeded faults: each is put into a real model that was healthy, and found by its own check."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM

import moesaic as mz
from moesaic.balance import LossTerm, switch_loss, z_loss
from moesaic.core.errors import ConfigError
from moesaic.core.routing import Routing
from moesaic.doctor import examine
from tests.doctor.patients import batches, complaints, examined, patient, verdicts


def first(model):
    """The first MoE layer, and the block that it stands in."""
    block = next(module for module in model.modules() if hasattr(module, "moe"))
    return block.moe


def blocks(model):
    return [module for module in model.modules() if hasattr(module, "moe")]


# --- healthy ----------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:In recipe:UserWarning")
@pytest.mark.parametrize("recipe", ["mixtral", "deepseek-v3", "switch", "expert-choice", "olmoe", "hash", "soft-moe"])
def test_a_model_without_a_fault_is_not_called_sick_and_no_check_warns(recipe):
    report = examined(patient(recipe))
    assert complaints(report) == {}, str(report)
    assert report.verdict == "healthy"


def test_an_examination_leaves_the_model_as_it_was():
    model = patient("deepseek-v3").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    examined(model)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model.training
    assert torch.equal(state, torch.get_rng_state())


# --- losses -----------------------------------------------------------------------------------------------------------


def test_a_balance_loss_of_a_detached_routing_is_found():
    model = patient()

    def detached(routing: Routing) -> Tensor:
        return switch_loss(replace(routing, logits_TE=routing.logits_TE.detach(), scores_TE=routing.scores_TE.detach()))

    for block in blocks(model):
        block.terms = tuple(LossTerm(name=term.name, loss=detached, coefficient=0.01) for term in block.terms)
    report = examined(model)
    assert complaints(report) == {"balance loss attached": "sick"}
    assert "2 of 2 balance losses are not part of the training loss" in report["balance loss attached"].words


def test_a_loop_that_leaves_the_balance_loss_out_is_found_and_one_that_adds_it_is_healthy():
    model = patient()

    def task(model, batch):
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())

    def whole(model, batch):
        with mz.hf.balance(model) as terms:
            loss = task(model, batch)
        return loss + terms.total

    assert complaints(examined(model, loss=task)) == {"balance loss attached": "sick"}
    assert complaints(examined(model, loss=whole)) == {}


def test_a_loss_that_reaches_the_training_loss_and_not_the_router_is_found():
    model = patient()
    for block in blocks(model):
        other = block.moe.experts.down_EFD
        loss = lambda routing, other=other: switch_loss(_cut(routing)) + other.square().mean()  # noqa: E731
        block.terms = (LossTerm(name="switch", loss=loss, coefficient=0.01),)
    report = examined(model)
    assert report["balance loss attached"].verdict == "sick"
    assert "reaches no weight of the router" in report["balance loss attached"].words


def _cut(routing: Routing) -> Routing:
    return replace(routing, logits_TE=routing.logits_TE.detach(), scores_TE=routing.scores_TE.detach())


def test_one_choice_with_a_weight_of_one_is_found_in_a_mixture_of_transformers():
    report = examined(native(num_experts_per_tok=1))
    assert complaints(report) == {"router learns from the task": "sick"}
    assert "weight is 1 whatever the router says" in report["router learns from the task"].words
    assert complaints(examined(native(num_experts_per_tok=2))) == {}


def native(**changes):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    numbers = {"vocab_size": 61, "num_local_experts": 4, "num_key_value_heads": 1, "initializer_range": 0.3}
    config = MixtralConfig(**sizes, **numbers, **{"output_router_logits": True, **changes})
    return MixtralForCausalLM(config)


def test_a_mixture_of_transformers_that_leaves_its_balance_loss_out_is_not_called_healthy():
    report = examined(native(output_router_logits=False))
    finding = report["balance loss attached"]
    assert finding.verdict == "not checked"
    assert "router_aux_loss_coef=0.001 and output_router_logits=False" in finding.words
    assert verdicts(examined(native()))["balance loss attached"] == "healthy"


def test_frozen_routers_are_found():
    model = patient()
    first(model).router.requires_grad_(False)
    report = examined(model)
    assert complaints(report) == {"router learns from the task": "warning"}
    assert report["router learns from the task"].words.startswith("1 of 2 routers are frozen")


# --- load -------------------------------------------------------------------------------------------------------------


def test_a_dead_expert_is_found():
    model = patient("gpt-oss")
    with torch.no_grad():
        first(model).router.logit_bias_E[2] = -20
    report = examined(model)
    assert set(complaints(report)) == {"dead experts"}
    assert report["dead experts"].words == ("1 expert of 8 got no row of held-out text: model.layers.0.mlp expert 2.")


def test_a_layer_that_sends_everything_to_one_expert_is_found():
    model = patient("gpt-oss", num_experts=8)
    with torch.no_grad():
        first(model).router.logit_bias_E[3:5] = 20
    report = examined(model)
    assert report["overfull experts"].verdict == "sick"
    assert report["dead experts"].verdict == "sick"


def test_rows_that_capacity_drops_are_found():
    report = examined(patient("switch", capacity_factor=0.4, eval_capacity_factor=0.4))
    assert report["dropped rows"].verdict == "sick"
    assert set(complaints(report)) == {"dropped rows"}


# --- routers ----------------------------------------------------------------------------------------------------------


def test_router_weights_in_bfloat16_are_found():
    model = patient()
    first(model).router.to(torch.bfloat16)
    report = examined(model)
    assert complaints(report) == {"router precision": "warning"}
    assert "1 of 2 routers are stored in bfloat16" in report["router precision"].words


def test_a_router_that_computes_in_bfloat16_is_found_by_whom_it_sends_elsewhere():
    model = patient(num_experts=32, top_k=4)
    router = first(model).router
    exact = router.logits
    router.logits = lambda x_TD: (
        exact(x_TD.bfloat16().to(x_TD)).bfloat16().to(x_TD) if x_TD.dtype != torch.float64 else exact(x_TD)
    )
    report = examined(model)
    assert report["router precision"].verdict in ("warning", "sick")
    assert "computes in low precision" in report["router precision"].words


class Jittery(nn.Module):
    """A router that draws its noise in evaluation too."""

    def __init__(self, router: nn.Module) -> None:
        super().__init__()
        self.inner = router
        self.num_experts = router.num_experts

    @property
    def experts_per_token(self) -> float:
        return self.inner.experts_per_token

    def forward(self, x_TD, *rest):
        return self.inner(x_TD * torch.empty_like(x_TD).uniform_(0.9, 1.1), *rest)


def test_noise_in_evaluation_is_found():
    model = patient()
    layer = first(model)
    layer.router = Jittery(layer.router)
    report = examined(model)
    assert report["evaluation repeats"].verdict == "sick"
    assert "alive in evaluation" in report["evaluation repeats"].words


def test_dropout_in_evaluation_is_found():
    model = patient()
    model.lm_head.register_forward_hook(lambda _module, _inputs, output: F.dropout(output, 0.1, training=True))
    report = examined(model)
    assert complaints(report) == {"evaluation repeats": "sick"}


def test_a_counter_that_a_forward_moves_in_evaluation_is_found():
    model = patient("deepseek-v3")
    router = first(model).router

    def step(module, _inputs, _output):
        module.bias_E += 1e-3

    router.register_forward_hook(step)
    report = examined(model)
    assert report["evaluation repeats"].verdict == "sick"
    assert "An evaluation changed 1 tensors of the model" in report["evaluation repeats"].words


def test_padding_that_a_layer_takes_for_tokens_is_found():
    model = patient()
    layer = first(model)
    with_mask = layer.forward
    layer.forward = lambda x_TD, valid_T=None, *rest: with_mask(x_TD, None, *rest)
    report = examined(model)
    assert set(complaints(report)) == {"padding ignored"}
    assert "in its load" in report["padding ignored"].words


def test_padding_that_takes_capacity_is_found():
    model = patient("switch", eval_capacity_factor=0.6, min_capacity=1)
    for block in blocks(model):
        dispatch = block.moe.dispatch
        whole = dispatch.forward
        dispatch.forward = lambda routing, whole=whole: whole(
            replace(routing, valid_T=torch.ones_like(routing.valid_T), kept_N=torch.ones_like(routing.kept_N))
        )
    assert examined(model)["padding ignored"].verdict == "sick"


def test_padding_in_a_balance_loss_alone_is_found():
    model = patient()

    def careless(routing: Routing) -> Tensor:
        return z_loss(replace(routing, valid_T=torch.ones_like(routing.valid_T)))

    for block in blocks(model):
        block.terms = (LossTerm(name="z", loss=careless, coefficient=1e-3),)
    report = examined(model)
    assert complaints(report) == {"padding ignored": "sick"}
    assert "the balance loss z changes by" in report["padding ignored"].words


def test_large_logits_are_found():
    model = patient()
    with torch.no_grad():
        first(model).router.weight.mul_(200)
    assert examined(model)["router logits"].verdict == "sick"


def test_a_row_of_the_router_that_is_zero_is_found():
    model = patient()
    with torch.no_grad():
        first(model).router.weight[1] = 0
    report = examined(model)
    assert report["router rows"].verdict == "sick"
    assert report["router rows"].words == (
        "The logit of 1 expert is the same for every token: model.layers.0.mlp expert 1."
    )


def test_a_bias_in_half_precision_and_one_that_has_drifted_are_found():
    model = patient("deepseek-v3")
    router = first(model).router
    router.bias_E = torch.full((4,), 3.0) + torch.arange(4) * 0.01
    report = examined(model)
    assert complaints(report) == {"selection bias": "warning"}
    assert "has drifted: its mean is 3.01" in report["selection bias"].words
    router.bias_E = torch.zeros(4, dtype=torch.bfloat16)
    assert examined(model)["router precision"].verdict == "sick"


# --- weights ----------------------------------------------------------------------------------------------------------


def test_a_weight_that_is_no_number_is_found_and_nothing_else_is_claimed():
    model = patient()
    with torch.no_grad():
        first(model).experts.up_EDF[1, 0, 0] = float("nan")
    report = examined(model)
    assert complaints(report) == {"numbers finite": "sick"}
    assert report["numbers finite"].words == (
        "NaN or infinity stands in 1 tensor: model.layers.0.mlp.moe.experts.up_EDF."
    )
    assert {finding.verdict for finding in report.findings[1:]} == {"not checked"}


def test_two_equal_experts_are_found():
    model = patient()
    with torch.no_grad():
        for weight in first(model).experts.parameters():
            weight[3] = weight[0]
    report = examined(model)
    assert complaints(report) == {"experts differ": "warning"}
    assert "model.layers.0.mlp experts 0 and 3" in report["experts differ"].words


def test_an_expert_that_was_lost_is_found():
    model = patient()
    with torch.no_grad():
        for weight in first(model).experts.parameters():
            weight[2] = 0
    report = examined(model)
    assert report["experts differ"].verdict == "sick"
    with torch.no_grad():
        for weight in first(model).experts.parameters():
            weight[2] = 0.001 * torch.randn_like(weight[2])
    assert "of another size than their siblings'" in examined(model)["experts differ"].words


# --- what cannot be examined ------------------------------------------------------------------------------------------


def test_a_dense_model_and_a_model_without_text_are_refused():
    from tests.hf import tiny

    with pytest.raises(ConfigError, match="has no MoE layers"):
        examined(tiny.build("llama"))
    with pytest.raises(ConfigError) as error:
        examine(patient())
    assert str(error.value) == (
        "The doctor runs a model on text: a model needs batches= or tokenizer=, got neither. "
        "Pass batches of input_ids, attention_mask and labels."
    )


def test_batches_without_labels_or_mask_leave_those_checks_out():
    ids = batches(1)[0]["input_ids"]
    report = examine(patient(), batches=[{"input_ids": ids}])
    assert verdicts(report)["balance loss attached"] == "not checked"
    assert verdicts(report)["padding ignored"] == "not checked"
    assert "no labels" in report["balance loss attached"].words
