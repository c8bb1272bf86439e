"""Routers of adaptive, dense, annealed and drawn choices at the ends of what they may be given."""

import pytest
import torch

from moesaic import MoELayer
from moesaic.experts import MLPExperts
from moesaic.routers import (
    AnnealedRouter,
    AttentionRouter,
    CosineRouter,
    DenseRouter,
    PolicyRouter,
    ReLURouter,
    TopPRouter,
)

BUILD = {
    "top-p": lambda width, num_experts, top_k: TopPRouter(width, num_experts, p=0.6),
    "relu": lambda width, num_experts, top_k: ReLURouter(width, num_experts, top_k=top_k),
    "cosine": lambda width, num_experts, top_k: CosineRouter(width, num_experts, top_k=top_k, inner_width=4),
    "attention": lambda width, num_experts, top_k: AttentionRouter(width, num_experts, top_k=top_k),
    "dense": lambda width, num_experts, top_k: DenseRouter(width, num_experts),
    "dense-sparse": lambda width, num_experts, top_k: DenseRouter(width, num_experts, eval_top_k=top_k),
    "annealed": lambda width, num_experts, top_k: AnnealedRouter(width, num_experts, top_k=top_k),
    "policy": lambda width, num_experts, top_k: PolicyRouter(width, num_experts, top_k=top_k),
}
LINEAR = ("top-p", "relu", "dense", "dense-sparse", "annealed", "policy")  # a logit for each expert straight from x
every_router = pytest.mark.parametrize("name", BUILD)
both_modes = pytest.mark.parametrize("training", [True, False], ids=["training", "evaluating"])


def _check(router, x_TD, num_experts):
    routing = router(x_TD)
    assert routing.weight_N.isfinite().all()
    assert not routing.scores_TE.isnan().any()
    assert (routing.scores_TE >= 0).all()
    assert (routing.weight_N >= 0).all()
    assert routing.expert_N.dtype == routing.token_N.dtype == torch.int64
    pairs = routing.token_N * num_experts + routing.expert_N
    assert len(set(pairs.tolist())) == routing.num_rows
    (routing.weight_N.sum() + routing.probability_TE.sum()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in router.parameters())
    return routing


@both_modes
@every_router
def test_huge_logits_neither_crash_nor_give_nan(name, training):
    router = BUILD[name](6, 8, 2).train(training)
    torch.nn.init.normal_(router.weight, std=1e4)
    _check(router, torch.randn(30, 6).requires_grad_(), 8)


@both_modes
@pytest.mark.parametrize("name", LINEAR)
def test_a_forbidden_expert_is_never_taken_unless_all_are(name, training):
    router = BUILD[name](6, 8, 2).train(training)
    routing = _check_masked(router, torch.tensor([0.0, -torch.inf] * 4))
    taken = set(routing.expert_N[routing.weight_N > 0].tolist())
    assert taken <= {0, 2, 4, 6}


def _check_masked(router, mask_E):
    linear = router.logits
    router.logits = lambda x_TD: linear(x_TD) + mask_E
    return _check(router, torch.randn(30, 6), 8)


@both_modes
@every_router
def test_logits_that_are_all_equal_are_served_from_the_lowest_expert_on(name, training):
    router = BUILD[name](6, 8, 2).train(training)
    torch.nn.init.zeros_(router.weight)
    routing = _check(router, torch.randn(5, 6), 8)
    if training and name in ("annealed", "policy"):
        return  # drawn
    experts = {"top-p": 5, "relu": 0, "dense": 8}.get(name, 8 if training and name == "dense-sparse" else 2)
    assert routing.expert_N.tolist() == list(range(experts)) * 5


@both_modes
@pytest.mark.parametrize("num_tokens", [0, 1, 4096])
@every_router
def test_no_token_one_token_and_many(name, num_tokens, training):
    router = BUILD[name](6, 8, 2).train(training)
    torch.nn.init.normal_(router.weight, std=0.5)
    routing = _check(router, torch.randn(num_tokens, 6), 8)
    assert routing.num_tokens == num_tokens
    assert routing.num_rows <= num_tokens * 8


@both_modes
@every_router
def test_one_expert_takes_every_token(name, training):
    router = BUILD[name](6, 1, 1).train(training)
    torch.nn.init.normal_(router.weight, std=0.5)
    routing = _check(router, torch.randn(12, 6), 1)
    if name != "relu":
        assert routing.token_N.tolist() == list(range(12))


@both_modes
@every_router
def test_as_many_choices_as_experts(name, training):
    router = BUILD[name](6, 4, 4).train(training)
    torch.nn.init.normal_(router.weight, std=0.5)
    routing = _check(router, torch.randn(12, 6), 4)
    if name not in ("top-p", "relu"):
        assert routing.num_rows == 48


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@every_router
def test_a_narrow_model_routes_in_float32(name, dtype):
    router = BUILD[name](6, 8, 2).to(dtype)
    routing = router(torch.randn(20, 6, dtype=dtype))
    assert routing.logits_TE.dtype == routing.weight_N.dtype == routing.scores_TE.dtype == torch.float32


@every_router
def test_evaluation_of_one_token_is_that_of_a_batch(name):
    """Causal: a token's rows depend on no other token."""
    router = BUILD[name](6, 8, 2).double().eval()
    torch.nn.init.normal_(router.weight, std=0.5)
    x_TD = torch.randn(20, 6, dtype=torch.float64)
    whole = router(x_TD)
    for t in (0, 7, 19):
        alone = router(x_TD[t : t + 1])
        here = whole.token_N == t
        assert alone.expert_N.tolist() == whole.expert_N[here].tolist()
        assert torch.allclose(alone.weight_N, whole.weight_N[here], rtol=1e-12)


@both_modes
@every_router
def test_a_state_dict_goes_there_and_back(name, training):
    router, other = BUILD[name](6, 8, 2).train(training), BUILD[name](6, 8, 2).train(training)
    other.load_state_dict(router.state_dict())
    x_TD = torch.randn(20, 6)
    tables = []
    for each in (router, other):
        torch.manual_seed(2)
        tables.append(each(x_TD))
    assert torch.equal(tables[0].expert_N, tables[1].expert_N)
    assert torch.equal(tables[0].weight_N, tables[1].weight_N)


@every_router
def test_padding_takes_no_row_of_work_and_moves_no_other_token(name):
    layer = MoELayer(BUILD[name](6, 8, 2), MLPExperts(8, 6, 4)).double().eval()
    torch.nn.init.normal_(layer.router.weight, std=0.5)
    x_TD, valid_T = torch.randn(20, 6, dtype=torch.float64), torch.arange(20) % 3 != 1
    y_TD, routing = layer(x_TD, valid_T)
    assert y_TD[~valid_T].abs().max() == 0
    assert not routing.kept_N[~routing.valid_N].any()
    assert int(routing.load_E.sum()) == int(routing.valid_N.sum())
    assert torch.allclose(layer(x_TD[valid_T])[0], y_TD[valid_T], atol=1e-14)
