"""DeepSpeed's gating functions on our router's logits: rows, capacity, weights, loss, outputs, gradients.

The functions are those of ``deepspeed/moe/sharded_moe.py``. Where DeepSpeed follows another convention, a test of its
own says which, and by what factor or rule ours becomes theirs.
"""

import math
from dataclasses import dataclass, replace
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from moesaic import MoELayer, Routing, balance, recipes
from moesaic.core.init import normal
from moesaic.dispatch import Capacity, Sort
from moesaic.experts import MLPExperts
from moesaic.routers import TopKRouter
from tests.tolerances import assert_close

pytestmark = pytest.mark.parity
deepspeed = pytest.importorskip(
    "deepspeed.moe.sharded_moe", reason="DeepSpeed is not installed: `make parity` installs it and runs this file"
)

D, F = 16, 12
SEEDS = range(6)
# Tokens, experts, capacity factor, least capacity. Some overflow nearly every expert, some none.
DRAWS = [(1, 4, 1.0, 0), (7, 3, 1.0, 0), (63, 8, 0.5, 4), (64, 8, 1.0, 4), (63, 5, 1.25, 0), (48, 16, 1.25, 4)]
draws = pytest.mark.parametrize(("num_tokens", "num_experts", "factor", "minimum"), DRAWS)
seeds = pytest.mark.parametrize("seed", SEEDS)


@dataclass(frozen=True)
class Gate:
    """What a gating function returns."""

    loss: Tensor
    combine_TEC: Tensor
    dispatch_TEC: Tensor
    load_E: Tensor

    @property
    def capacity(self) -> int:
        return self.combine_TEC.shape[2]

    @property
    def kept_TE(self) -> Tensor:
        return self.dispatch_TEC.any(dim=-1)

    @property
    def weight_TE(self) -> Tensor:
        return self.combine_TEC.sum(dim=-1)

    def output(self, x_TD: Tensor, experts: MLPExperts) -> Tensor:
        """DeepSpeed's MOELayer with these experts, in the einsums of its comments."""
        x_ECD = torch.einsum("tec,td->ecd", self.dispatch_TEC.to(x_TD), x_TD)
        hidden_ECF = torch.einsum("ecd,edf->ecf", x_ECD, experts.up_EDF).relu()
        return torch.einsum("tec,ecd->td", self.combine_TEC, torch.einsum("ecf,efd->ecd", hidden_ECF, experts.down_EFD))


def top_1(logits_TE: Tensor, factor: float, minimum: int, **options) -> Gate:
    return Gate(*deepspeed.top1gating(logits_TE, factor, minimum, **options))


def top_2(logits_TE: Tensor, factor: float, minimum: int, *, second_expert_sampling=False, **options) -> Gate:
    options["top2_2nd_expert_sampling"] = second_expert_sampling
    return Gate(*deepspeed.top2gating(logits_TE, factor, minimum, **options))


def dense(routing: Routing, value_N: Tensor) -> Tensor:
    """Values of rows as (T, E), 0 where a token did not choose an expert."""
    return value_N.new_zeros(routing.logits_TE.shape).index_put((routing.token_N, routing.expert_N), value_N)


def switch(num_experts: int, factor: float, minimum: int) -> MoELayer:
    """The recipe in evaluation, which has no jitter, with weights large enough to have preferences."""
    options = {"capacity_factor": factor, "eval_capacity_factor": factor, "min_capacity": minimum, "init_std": 0.5}
    return recipes.get("switch").layer(D, hidden=F, num_experts=num_experts, **options).eval()


def gshard(num_experts: int, factor: float, minimum: int) -> MoELayer:
    """The recipe in evaluation, which keeps both choices; ``factor`` is DeepSpeed's, which counts K: half of ours."""
    options = {"capacity_factor": 2 * factor, "eval_capacity_factor": 2 * factor, "min_capacity": minimum}
    return recipes.get("gshard").layer(D, hidden=F, num_experts=num_experts, init_std=0.5, **options).eval()


@pytest.fixture
def earliest_first(monkeypatch):
    """Random token selection draws a number for each row and keeps the largest; here earlier tokens draw larger ones.

    Without it ``use_rts=False`` leaves the choice among the rows of an overfull expert to how ``torch.topk`` breaks
    ties, which is not by position; see the test of that name.
    """

    def falling(shape: torch.Size) -> Tensor:
        return torch.linspace(1.0, 0.5, shape[0])[:, None].expand(shape)

    monkeypatch.setitem(deepspeed.exp_selection_uniform_map, torch.device("cpu"), falling)


def assert_same_backward(
    layer: MoELayer, x_TD: Tensor, ours: tuple[Tensor, Tensor], gate: Gate, router_ED: Tensor
) -> None:
    """Gradients of ``(y * probe).sum() + loss``, where ``ours`` is y and loss."""
    y_TD, loss = ours
    probe_TD = torch.randn_like(y_TD)
    weights = (layer.router.weight, layer.experts.up_EDF, layer.experts.down_EFD)
    actual = torch.autograd.grad((y_TD * probe_TD).sum() + loss, (x_TD, *weights))
    theirs = (gate.output(x_TD, layer.experts) * probe_TD).sum() + gate.loss
    expected = torch.autograd.grad(theirs, (x_TD, router_ED, *weights[1:]))
    for mine, other, what in zip(actual, expected, ("input", "router", "up", "down"), strict=True):
        assert_close(mine, other, f"gradient of {what}")


# --- top-1: switch --------------------------------------------------------------------------------------------------


@draws
@seeds
@pytest.mark.usefixtures("earliest_first")
def test_switch_agrees_in_rows_capacity_weights_loss_outputs_and_gradients(
    num_tokens, num_experts, factor, minimum, seed
):
    torch.manual_seed(seed)
    layer = switch(num_experts, factor, minimum)
    x_TD = torch.randn(num_tokens, D, requires_grad=True)
    router_ED = layer.router.weight.detach().clone().requires_grad_()
    y_TD, routing = layer(x_TD)
    gate = top_1(x_TD @ router_ED.t(), factor, minimum, use_rts=True)

    assert gate.capacity == layer.dispatch.capacity(routing)
    assert torch.equal(gate.load_E, routing.load_E)  # before dropping, here and there
    kept_N = routing.kept_N
    assert torch.equal(gate.kept_TE, dense(routing, kept_N))
    assert factor > 0.5 or not kept_N.all(), "this draw is here to drop rows"
    assert_close(dense(routing, routing.weight_N * kept_N), gate.weight_TE, "weights")
    loss = balance.switch_loss(routing)
    assert_close(loss, gate.loss, "loss, factor 1")
    assert_close(y_TD, gate.output(x_TD, layer.experts), "outputs")
    assert_same_backward(layer, x_TD, (y_TD, loss), gate, router_ED)


def test_without_random_token_selection_deepspeed_keeps_as_many_rows_but_not_the_earliest():
    """``use_rts=False`` takes ``torch.topk`` of a mask of ones, whose ties fall anyhow; Switch keeps the earliest."""
    differ = 0
    for seed in SEEDS:
        torch.manual_seed(seed)
        layer = switch(4, 0.5, 0)
        _, routing = layer(torch.randn(64, D))
        theirs_TE = top_1(routing.logits_TE.detach(), 0.5, 0, use_rts=False).kept_TE
        ours_TE = dense(routing, routing.kept_N)
        assert torch.equal(theirs_TE.sum(dim=0), ours_TE.sum(dim=0))
        fits_E = routing.load_E <= layer.dispatch.capacity(routing)
        assert torch.equal(theirs_TE[:, fits_E], ours_TE[:, fits_E])
        differ += not torch.equal(theirs_TE, ours_TE)
    assert differ > 0, "DeepSpeed now keeps the earliest: compare with use_rts=False above, without the fixture"


@seeds
def test_random_token_selection_is_our_random_dropping_to_the_same_numbers(seed):
    """Both draw one uniform number for each token and expert, and keep the largest of an overfull expert."""
    torch.manual_seed(seed)
    layer = switch(4, 0.5, 0)
    _, routing = layer(torch.randn(64, D))
    torch.manual_seed(seed)
    theirs_TE = top_1(routing.logits_TE.detach(), 0.5, 0, use_rts=True).kept_TE
    torch.manual_seed(seed)
    kept_N = Capacity(0.5, minimum=0, drop="random")(routing).kept_N
    assert not torch.equal(kept_N, routing.kept_N)
    assert torch.equal(theirs_TE, dense(routing, kept_N))


@pytest.mark.parametrize("top_k", [1, 2])
def test_capacity_is_ours_but_for_a_slot_that_rounding_to_float32_buys_deepspeed(top_k):
    """Both are ``max(minimum, ceil(T / E * factor * K))``; with ``per="token"`` our factor is theirs times K.

    DeepSpeed multiplies in float32, where 25 / 2 * 1.2 comes out above 15. Ours is the exact figure.
    """
    bought = []
    for num_tokens in range(1, 130):
        expert_TK = torch.zeros(num_tokens, top_k, dtype=torch.int64)
        for num_experts in (2, 3, 8, 60, 64):
            logits_TE = torch.zeros(1, 1).expand(num_tokens, num_experts)
            routing = Routing.from_choices(expert_TK, torch.ones(expert_TK.shape), logits_TE, logits_TE)
            for factor in (0.5, 1.0, 1.1, 1.2, 1.25, 1.5, 2.0):
                exact = math.ceil(Fraction(num_tokens * top_k, num_experts) * Fraction(str(factor)))
                arguments = (logits_TE, torch.tensor(factor * top_k), torch.tensor(4))
                theirs = int(deepspeed._capacity(*arguments))
                ours = int(Capacity(factor, minimum=4).capacity(routing))
                assert ours == max(4, exact)
                assert ours == int(Capacity(factor * top_k, minimum=4, per="token").capacity(routing))
                assert theirs in (ours, ours + 1)
                if theirs > ours:
                    bought.append((num_tokens * top_k, num_experts, factor))
    assert {factor for *_, factor in bought} == {1.2}
    assert (25 * top_k, 2, 1.2) in bought


def test_deepspeed_refuses_a_batch_smaller_than_the_least_capacity_and_ours_keeps_all_of_it():
    layer = switch(4, 1.0, 8)
    _, routing = layer(torch.randn(7, D))
    assert routing.kept_N.all()
    with pytest.raises(AssertionError, match="greater than min_capacity"):
        top_1(routing.logits_TE.detach(), 1.0, 8, use_rts=False)


@pytest.mark.parametrize("gating", [top_1, top_2])
def test_drop_tokens_false_is_dispatch_sort(gating):
    torch.manual_seed(1)
    layer = (switch if gating is top_1 else gshard)(4, 0.25, 0)
    layer.dispatch = Sort()
    _, routing = layer(torch.randn(63, D))
    gate = gating(routing.logits_TE.detach(), 0.25, 0, drop_tokens=False)
    assert gate.capacity == routing.load_E.max()
    assert torch.equal(gate.kept_TE, dense(routing, routing.kept_N))
    assert routing.kept_N.all()
    assert_close(dense(routing, routing.weight_N), gate.weight_TE, "weights")


# --- top-2: gshard --------------------------------------------------------------------------------------------------


@draws
@seeds
def test_gshard_with_twice_deepspeeds_factor_agrees_in_rows_capacity_and_loss(
    num_tokens, num_experts, factor, minimum, seed
):
    """GShard's factor leaves K out: its 2.0 is DeepSpeed's 1.0."""
    torch.manual_seed(seed)
    layer = gshard(num_experts, factor, minimum)
    _, routing = layer(torch.randn(num_tokens, D))
    gate = top_2(routing.logits_TE.detach(), factor, minimum)

    assert gate.capacity == layer.dispatch.capacity(routing)
    assert torch.equal(gate.load_E, routing.load_E)
    assert torch.equal(gate.kept_TE, dense(routing, routing.kept_N))
    assert factor > 0.5 or not routing.kept_N.all(), "this draw is here to drop rows"
    assert_close(balance.gshard_loss(routing), gate.loss, "loss, factor 1")


@draws
@seeds
def test_deepspeed_divides_top_2_weights_by_the_sum_of_those_kept_and_ours_by_the_sum_of_both(
    num_tokens, num_experts, factor, minimum, seed
):
    """A token that lost one of its two rows weighs the other with 1 in DeepSpeed; GShard's algorithm 1 does not."""
    torch.manual_seed(seed)
    layer = gshard(num_experts, factor, minimum)
    x_TD = torch.randn(num_tokens, D, requires_grad=True)
    router_ED = layer.router.weight.detach().clone().requires_grad_()
    y_TD, routing = layer(x_TD)
    gate = top_2(x_TD @ router_ED.t(), factor, minimum)
    kept_N = routing.kept_N
    ours_TE = dense(routing, routing.weight_N * kept_N)
    kept_weight_T1 = ours_TE.sum(dim=-1, keepdim=True)

    assert_close(ours_TE / kept_weight_T1.clamp_min(1e-9), gate.weight_TE, "weights over the weight kept")
    lost_one_T = dense(routing, kept_N).sum(dim=-1) == 1
    assert (kept_weight_T1[lost_one_T] < 1).all()
    assert ((gate.weight_TE[lost_one_T].sum(dim=-1) - 1).abs() < 1e-5).all()
    assert factor > 0.5 or lost_one_T.any(), "this draw is here to lose rows"
    # Ours with their weights is theirs.
    y_TD = y_TD / kept_weight_T1.clamp_min(1e-9)
    assert_close(y_TD, gate.output(x_TD, layer.experts), "outputs")
    assert_same_backward(layer, x_TD, (y_TD, balance.gshard_loss(routing)), gate, router_ED)


def test_deepspeed_samples_the_second_expert_by_probability_and_overwrites_the_logits_it_was_given():
    """GShard takes the second best, and in training uses it with probability ``min(1, 2 g2)``."""
    torch.manual_seed(0)
    num_tokens = 20_000
    logits_TE = torch.tensor([2.0, 1.0, 0.5, -1.0]).repeat(num_tokens, 1)
    given_TE = logits_TE.clone()
    gate = top_2(given_TE, 0.001, 0, second_expert_sampling=True)  # the counts are from before dropping
    assert not torch.equal(given_TE, logits_TE), "DeepSpeed adds its noise in place"
    share_E = gate.load_E / num_tokens
    assert share_E[0] == 1
    expected_E = logits_TE[0, 1:].softmax(dim=-1)  # Gumbel-max over what is left
    deviation_E = (expected_E * (1 - expected_E) / num_tokens).sqrt()
    assert ((share_E[1:] - expected_E).abs() < 4 * deviation_E).all()


# --- top-k ----------------------------------------------------------------------------------------------------------


def top_k_layer(num_experts: int, top_k: int, factor: float, drop: str) -> MoELayer:
    router = TopKRouter(D, num_experts, top_k=top_k, normalize="scores", init=normal(0.5))
    experts = MLPExperts(num_experts, D, F)
    return MoELayer(router, experts, dispatch=Capacity(factor, minimum=0, drop=drop)).eval()


@seeds
@pytest.mark.parametrize("factor", [0.5, 1.0])
@pytest.mark.parametrize("top_k", [1, 3])
def test_top_k_with_drop_policy_probs_is_dropping_by_score_and_its_loss_is_switch_loss(top_k, factor, seed):
    """Unlike top-1 and top-2 this function counts every choice in its loss and divides by K: ours, factor 1."""
    torch.manual_seed(seed)
    layer = top_k_layer(8, top_k, factor, "score")
    _, routing = layer(torch.randn(63, D))
    gate = Gate(*deepspeed.topkgating(routing.logits_TE.detach(), top_k, factor, 0, drop_policy="probs"))
    assert gate.capacity == layer.dispatch.capacity(routing)
    assert torch.equal(gate.load_E, routing.load_E)
    assert not routing.kept_N.all()
    assert torch.equal(gate.kept_TE, dense(routing, routing.kept_N))
    assert_close(balance.switch_loss(routing), gate.loss, "loss, factor 1")
    kept_TE = dense(routing, routing.weight_N * routing.kept_N)
    kept_TE = kept_TE / kept_TE.sum(dim=-1, keepdim=True).clamp_min(1e-9)
    assert_close(kept_TE, gate.weight_TE, "weights over the weight kept, as in top-2")


@seeds
def test_top_k_with_drop_policy_position_serves_tokens_in_order_whatever_the_choice(seed):
    """Ours, GShard's and DeepSpeed's own top-2 serve all first choices before any second one."""
    torch.manual_seed(seed)
    layer = top_k_layer(8, 3, 0.5, "position")
    _, routing = layer(torch.randn(63, D))
    theirs_TE = Gate(*deepspeed.topkgating(routing.logits_TE.detach(), 3, 0.5, 0, drop_policy="position")).kept_TE
    assert not torch.equal(theirs_TE, dense(routing, routing.kept_N))
    rankless = replace(routing, choice_N=torch.zeros_like(routing.choice_N))
    assert torch.equal(theirs_TE, dense(routing, layer.dispatch(rankless).kept_N))
