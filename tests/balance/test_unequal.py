"""The losses of MoE++, LoRAMoE and MoLE."""

import math
from dataclasses import replace

import pytest
import torch

from moesaic import ConfigError, Routing
from moesaic.balance import LocalizedLoss, heterogeneous_loss, product_loss, switch_loss
from tests.laws.settings import some_padding
from tests.tolerances import assert_close


def _routing(num_tokens: int = 20, num_experts: int = 6, top_k: int = 2, valid_T=None, **extras) -> Routing:
    logits_TE = torch.randn(num_tokens, num_experts, dtype=torch.float64, requires_grad=True)
    scores_TE = logits_TE.softmax(dim=-1)
    weight_TK, expert_TK = scores_TE.topk(top_k)
    routing = Routing.from_choices(expert_TK, weight_TK, logits_TE, scores_TE, valid_T)
    return replace(routing, extras=extras, sequence_T=torch.arange(num_tokens) // 5)


def test_with_tau_one_the_heterogeneous_loss_is_the_switch_loss_in_other_units():
    """Reference 18.6, example 2: plain balance, f over tokens and not rows, no factor E."""
    routing = _routing(eta_E=torch.ones(6))
    assert_close(heterogeneous_loss(routing), switch_loss(routing) * 2 / 6, "loss")


def test_with_tau_near_zero_everything_on_cheap_experts_is_free():
    """Reference 18.6, example 2."""
    scores_TE = torch.tensor([[0.0, 0.0, 1.0]]).expand(10, 3)
    expert_TK = torch.full((10, 1), 2)
    cheap = Routing.from_choices(expert_TK, torch.ones(10, 1), scores_TE.log(), scores_TE)
    for tau in (1e-6, 0.5, 1.0):
        loss = heterogeneous_loss(replace(cheap, extras={"eta_E": torch.tensor([1.0, 1.0, tau])}))
        assert float(loss) == pytest.approx(tau)


@pytest.mark.parametrize(("num_ffn", "num_special", "tau", "top_k"), [(8, 4, 0.75, 2), (3, 1, 0.5, 1)])
def test_the_heterogeneous_loss_has_the_value_at_balance_that_it_states(num_ffn, num_special, tau, top_k):
    num_experts = num_ffn + num_special
    expert_TK = (torch.arange(num_experts)[:, None] + torch.arange(top_k)) % num_experts
    logits_TE = torch.zeros(num_experts, num_experts)
    eta_E = torch.tensor([1.0] * num_ffn + [tau] * num_special)
    routing = Routing.from_choices(expert_TK, torch.ones(expert_TK.shape), logits_TE, logits_TE.softmax(dim=-1))
    loss = heterogeneous_loss(replace(routing, extras={"eta_E": eta_E}))
    assert float(loss) == pytest.approx(top_k * (num_ffn + tau * num_special) / num_experts**2)


def test_the_heterogeneous_loss_asks_for_its_router():
    with pytest.raises(ConfigError) as error:
        heterogeneous_loss(_routing())
    assert str(error.value) == (
        "the heterogeneous loss needs routing.extras['eta_E'], which this routing does not have. It comes from "
        "routers.ResidualRouter: use the two together, or another loss."
    )


def _even(num_experts: int, domain_T: torch.Tensor | None, weight_TE: torch.Tensor) -> Routing:
    """Two sequences of four tokens, with these weights."""
    routing = Routing.from_mask(torch.ones(8, num_experts, dtype=torch.bool), weight_TE, weight_TE.log(), weight_TE)
    extras = {} if domain_T is None else {"domain_T": domain_T}
    return replace(routing, sequence_T=torch.arange(8) // 4, extras=extras)


def test_the_localized_loss_is_the_variance_over_squared_mean_of_what_sequences_give_experts():
    """Reference 12.4, by hand: two sequences, of domain 1 and 0, two experts."""
    weight_TE = torch.tensor([[0.75, 0.25]] * 4 + [[0.5, 0.5]] * 4)
    routing = _even(2, torch.tensor([1] * 4 + [0] * 4), weight_TE)
    z = torch.tensor([3 * 1.1, 1 * 0.9, 2 * 0.9, 2 * 1.1])
    assert float(LocalizedLoss(delta=0.1)(routing)) == pytest.approx(float(z.var() / z.mean() ** 2))
    paper = LocalizedLoss(delta=0.1, measure="dispersion")
    assert float(paper(routing)) == pytest.approx(float(z.var() / z.mean()))


def test_without_delta_or_domains_the_localized_loss_is_plain_balance():
    """Reference 12.4."""
    weight_TE = torch.rand(8, 4).softmax(dim=-1)
    domain_T = torch.tensor([1] * 4 + [0] * 4)
    plain = LocalizedLoss(delta=0.0)(_even(4, domain_T, weight_TE))
    assert float(plain) == pytest.approx(float(LocalizedLoss(delta=0.3)(_even(4, None, weight_TE))))
    assert float(LocalizedLoss(delta=0.0)(_even(4, domain_T, torch.full((8, 4), 0.25)))) == pytest.approx(0, abs=1e-9)


def test_the_localized_loss_is_smallest_where_matching_experts_have_less_weight():
    """Reference 12.4, sign check: taken at its word the constraint asks for Q proportional to 1 / I."""
    domain_T = torch.tensor([1] * 4 + [0] * 4)
    match_TE = torch.tensor([[1.5, 1.5, 0.5, 0.5]] * 4 + [[0.5, 0.5, 1.5, 1.5]] * 4)
    inverse_TE = (1 / match_TE) / (1 / match_TE).sum(dim=1, keepdim=True)
    loss = LocalizedLoss(delta=0.5)
    assert float(loss(_even(4, domain_T, inverse_TE))) == pytest.approx(0, abs=1e-9)
    assert float(loss(_even(4, domain_T, match_TE / 4))) > float(loss(_even(4, domain_T, torch.full((8, 4), 0.25))))


def test_the_localized_loss_of_several_routers_is_their_sum():
    linear_GTE = torch.rand(3, 8, 4).softmax(dim=-1)
    each = [float(LocalizedLoss()(_even(4, None, linear_GTE[g]))) for g in range(3)]
    together = replace(_even(4, None, linear_GTE.mean(dim=0)), extras={"linear_GTE": linear_GTE})
    assert float(LocalizedLoss()(together)) == pytest.approx(sum(each))


def test_measured_as_the_code_does_the_localized_loss_does_not_grow_with_the_tokens():
    weight_TE = torch.rand(8, 4).softmax(dim=-1)
    routing, domain_T = _even(4, None, weight_TE), torch.arange(16) // 8
    twice = Routing.from_mask(
        torch.ones(16, 4, dtype=torch.bool),
        *[weight_TE.repeat_interleave(2, dim=0)] * 3,
    )
    twice = replace(twice, sequence_T=domain_T)
    assert float(LocalizedLoss()(twice)) == pytest.approx(float(LocalizedLoss()(routing)))
    paper = LocalizedLoss(measure="dispersion")
    assert float(paper(twice)) == pytest.approx(2 * float(paper(routing)))


def test_impossible_numbers_are_refused():
    with pytest.raises(ConfigError) as error:
        LocalizedLoss(delta=1.5)
    assert str(error.value) == "delta must be at least 0 and below 1, got 1.5. LoRAMoE uses 0.1."
    with pytest.raises(ConfigError) as error:
        LocalizedLoss(measure="range")
    assert str(error.value) == "measure must be 'cv2' or 'dispersion', got 'range'. The code has 'cv2'."


def test_the_product_loss_is_smallest_where_every_mean_is_equal():
    """Reference 12.3: N ln N at q = 1/N."""
    logits_TE = torch.zeros(10, 4, dtype=torch.float64)
    expert_TK = torch.zeros(10, 1, dtype=torch.int64)
    even = Routing.from_choices(expert_TK, torch.ones(10, 1), logits_TE, logits_TE.softmax(dim=-1))
    assert float(product_loss(even)) == pytest.approx(4 * math.log(4))
    for _ in range(5):
        other_TE = torch.randn(10, 4, dtype=torch.float64)
        other = replace(even, logits_TE=other_TE, scores_TE=other_TE.softmax(dim=-1))
        mean_E = other.scores_TE.mean(dim=0)
        assert float(product_loss(other)) == pytest.approx(-float(mean_E.log().sum()))
        assert float(product_loss(other)) > 4 * math.log(4)


def test_the_product_loss_stays_finite_and_alive_where_an_expert_s_mean_underflows():
    logits_TE = torch.tensor([[0.0, -1e4]] * 5, requires_grad=True)
    expert_TK = torch.zeros(5, 1, dtype=torch.int64)
    routing = Routing.from_choices(expert_TK, torch.ones(5, 1), logits_TE, logits_TE.softmax(dim=-1))
    product_loss(routing).backward()
    assert logits_TE.grad.isfinite().all()
    assert (logits_TE.grad[:, 1] < 0).all(), "the idle expert is raised"


LOSSES = [heterogeneous_loss, LocalizedLoss(), LocalizedLoss(measure="dispersion"), product_loss]


@pytest.mark.parametrize("loss", LOSSES, ids=["heterogeneous", "localized", "dispersion", "product"])
def test_padding_takes_no_part_and_no_token_gives_an_attached_zero(loss):
    valid_T = some_padding(20)
    eta_E = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.5, 0.5])
    routing = _routing(valid_T=valid_T, eta_E=eta_E, domain_T=torch.arange(20) // 5)
    keep_N = routing.valid_N
    alone = Routing.from_choices(
        routing.expert_N[keep_N].view(-1, 2),
        routing.weight_N[keep_N].view(-1, 2),
        routing.logits_TE[valid_T],
        routing.scores_TE[valid_T],
    )
    extras = {"eta_E": eta_E, "domain_T": routing.extras["domain_T"][valid_T]}
    alone = replace(alone, extras=extras, sequence_T=routing.sequence_T[valid_T])
    assert_close(loss(routing), loss(alone), "loss")
    (grad_TE,) = torch.autograd.grad(loss(routing), routing.logits_TE)
    assert grad_TE[~valid_T].abs().sum() == 0
    assert grad_TE[valid_T].abs().sum() > 0
    for empty in (_routing(0, eta_E=eta_E), _routing(valid_T=torch.zeros(20, dtype=torch.bool), eta_E=eta_E)):
        zero = loss(empty)
        (grad_TE,) = torch.autograd.grad(zero, empty.logits_TE)
        assert float(zero.detach()) == 0
        assert grad_TE.abs().sum() == 0
