import pytest
import torch

from moesaic import ConfigError
from moesaic.balance import threshold_loss
from moesaic.core.init import normal
from moesaic.routers import BatchwiseRouter


def router_of(num_experts=4, top_k=2, width=5, std=0.7) -> BatchwiseRouter:
    return BatchwiseRouter(width, num_experts, top_k=top_k, init=normal(std))


@pytest.mark.parametrize(
    ("num_tokens", "num_valid", "expected"), [(40, 40, 20), (40, 30, 15), (41, 41, 20), (1, 1, 1), (9, 0, 0)]
)
def test_every_expert_keeps_exactly_m_valid_tokens(num_tokens, num_valid, expected):
    """Reference 3.4 and section 24: perfect balance by construction."""
    torch.manual_seed(0)
    routing = router_of()(torch.randn(num_tokens, 5), torch.arange(num_tokens) < num_valid)
    assert routing.load_E.tolist() == [expected] * 4
    assert (routing.token_N < num_valid).all()


def test_experts_keep_the_tokens_whose_gates_are_largest_for_them():
    torch.manual_seed(0)
    routing = router_of()(torch.randn(40, 5))
    for e in range(4):
        kept = set(routing.token_N[routing.expert_N == e].tolist())
        assert kept == set(routing.scores_TE[:, e].topk(20).indices.tolist())


def test_weights_are_the_gates_of_a_token_s_experts_divided_by_their_sum():
    torch.manual_seed(0)
    routing = router_of()(torch.randn(40, 5))
    for t in range(40):
        rows = (routing.token_N == t).nonzero().flatten().tolist()
        gates = routing.scores_TE[t, routing.expert_N[rows]]
        assert routing.weight_N[rows].tolist() == pytest.approx((gates / gates.sum()).tolist(), rel=1e-5)
    counts = torch.bincount(routing.token_N, minlength=40)
    assert counts.double().mean() == 2.0
    assert counts.min() < 2 < counts.max()


def test_of_equal_tokens_the_earliest_are_kept():
    routing = router_of()(torch.zeros(10, 5))
    assert sorted(set(routing.token_N.tolist())) == [0, 1, 2, 3, 4]


def test_in_evaluation_each_token_goes_by_the_thresholds_alone():
    torch.manual_seed(0)
    router = router_of().eval()
    with torch.no_grad():
        router.threshold_E.copy_(torch.tensor([0.1, 0.3, 0.9, 0.0]))
    x_TD = torch.randn(40, 5)
    routing = router(x_TD)
    chosen_TE = torch.zeros(40, 4, dtype=torch.bool)
    chosen_TE[routing.token_N, routing.expert_N] = True
    assert torch.equal(chosen_TE, routing.scores_TE > router.threshold_E)
    alone = router(x_TD[7:8])
    assert alone.expert_N.tolist() == routing.expert_N[routing.token_N == 7].tolist()


def test_a_gate_must_exceed_its_threshold():
    """Reference 3.4: strictly above, so that an undecided gate takes nobody."""
    router = BatchwiseRouter(5, 4, top_k=2, init=normal(0)).eval()
    assert router(torch.randn(3, 5)).num_rows == 0


def test_thresholds_start_at_the_mean_gate():
    assert BatchwiseRouter(5, 8, top_k=2).threshold_E.tolist() == [0.125] * 8


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("logit", [1e4, -1e4, 0.0, float("-inf")])
def test_extreme_logits_give_numbers_and_numbers_as_gradients(logit, training, monkeypatch):
    router = router_of().train(training)
    leaf_TE = torch.randn(8, 4)
    leaf_TE[:, 1] = logit
    leaf_TE.requires_grad_()
    monkeypatch.setattr(BatchwiseRouter, "logits", lambda _router, _x_TD: leaf_TE * 1)
    routing = router(torch.ones(8, 5))
    (threshold_loss(routing) + routing.weight_N.square().sum()).backward()
    assert routing.weight_N.isfinite().all()
    assert leaf_TE.grad.isfinite().all()
    assert router.threshold_E.grad.isfinite().all()


def test_a_token_that_only_an_expert_ruled_out_for_it_had_to_take_still_has_a_weight(monkeypatch):
    """Expert 1 has a gate of 0 for everybody and keeps the earliest two; nobody else wants those."""
    leaf_TE = torch.zeros(8, 4)
    leaf_TE[:, 1] = float("-inf")
    for e, tokens in ((0, (2, 3)), (2, (4, 5)), (3, (6, 7))):
        leaf_TE[list(tokens), e] = 5.0
    leaf_TE.requires_grad_()
    monkeypatch.setattr(BatchwiseRouter, "logits", lambda _router, _x_TD: leaf_TE * 1)
    routing = router_of(top_k=1)(torch.ones(8, 5))
    assert routing.expert_N.tolist() == [1, 1, 0, 0, 2, 2, 3, 3]
    routing.weight_N.square().sum().backward()
    assert routing.weight_N.isfinite().all()
    assert leaf_TE.grad.isfinite().all()


@pytest.mark.parametrize(("num_tokens", "num_experts", "top_k"), [(0, 4, 2), (5, 1, 1), (5, 4, 4), (3, 4, 1)])
def test_no_tokens_one_expert_and_as_many_choices_as_experts(num_tokens, num_experts, top_k):
    router = router_of(num_experts, top_k)
    routing = router(torch.randn(num_tokens, 5))
    per_expert = max(1, top_k * num_tokens // num_experts) if num_tokens else 0
    assert routing.load_E.tolist() == [per_expert] * num_experts
    (threshold_loss(routing) + routing.weight_N.sum()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in router.parameters())


def test_more_choices_than_experts_are_refused():
    with pytest.raises(ConfigError) as error:
        router_of(top_k=5)
    assert str(error.value) == "top_k must be between 1 and num_experts=4, got 5. Lower top_k, or add experts."
