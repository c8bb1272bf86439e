"""Choosing and sorting in C: the same numbers as PyTorch's, and only where C may be called."""

import warnings

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from moesaic import MoELayer, Plan
from moesaic.dispatch import Capacity, Sort
from moesaic.experts import GatedExperts
from moesaic.kernels.native import calls
from moesaic.kernels.sort_rows import sort_rows
from moesaic.routers import TopKRouter, select_top_k
from tests.oracle.router import best

# Few different values, so that ties are common; signed zeros, infinities and numbers one bit apart.
VALUES = [-float("inf"), -1e38, -1.0000001, -1.0, -1e-45, -0.0, 0.0, 1e-45, 0.5, 1.0, 1.0000001, 1e38, float("inf")]
with_compiled = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.mark.usefixtures("compiled")
@with_compiled
@given(st.data())
def test_the_best_agree_with_plain_loops_on_every_tie_zero_and_infinity(data):
    num_experts = data.draw(st.integers(1, 70))
    top_k = data.draw(st.integers(1, min(num_experts, calls.MOST_CHOICES)))
    lines = data.draw(
        st.lists(st.lists(st.sampled_from(VALUES), min_size=num_experts, max_size=num_experts), min_size=0, max_size=3)
    )
    score_TE = torch.tensor(lines).reshape(len(lines), num_experts)
    chosen_TK = calls.top_k(score_TE, top_k)
    assert chosen_TK.dtype == torch.int64
    assert chosen_TK.tolist() == [best(line, top_k) for line in score_TE.tolist()]


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("shape", [(1, 64, 8), (700, 64, 8), (513, 256, 8), (40, 1000, 64)], ids=str)
def test_the_best_are_those_that_sorting_all_finds_nan_first_on_any_number_of_threads(shape):
    num_tokens, num_experts, top_k = shape
    score_TE = torch.randn(num_tokens, 2 * num_experts)[:, :num_experts].round(decimals=1)
    score_TE[0, 1::7] = float("nan")
    score_TE[-1, 3] = -float("nan")
    sorted_TK = torch.sort(score_TE, dim=-1, descending=True, stable=True).indices[:, :top_k]
    before = torch.get_num_threads()
    try:
        for num_threads in (1, 2, 3):
            torch.set_num_threads(num_threads)
            assert torch.equal(calls.top_k(score_TE, top_k), sorted_TK)
    finally:
        torch.set_num_threads(before)


@pytest.mark.usefixtures("compiled")
def test_what_c_cannot_choose_from_is_left_to_pytorch():
    score_TE = torch.randn(5, 80)
    assert calls.top_k(score_TE, 8) is not None
    assert calls.top_k(score_TE.double(), 8) is None
    assert calls.top_k(score_TE.bfloat16(), 8) is None
    assert calls.top_k(score_TE.t().contiguous().t(), 8) is None
    assert calls.top_k(score_TE, 65) is None
    assert calls.top_k(score_TE, 0) is None
    assert calls.top_k(score_TE[:, :7], 8) is None
    assert calls.top_k(score_TE.to("meta"), 8) is None
    assert select_top_k(score_TE, 80).shape == (5, 80)


@pytest.mark.usefixtures("compiled")
@with_compiled
@given(st.data())
def test_rows_are_sorted_as_the_plan_itself_sorts_them(data):
    num_experts = data.draw(st.integers(1, 9))
    rows = data.draw(st.lists(st.tuples(st.integers(0, num_experts - 1), st.booleans()), max_size=40))
    expert_N = torch.tensor([expert for expert, _ in rows], dtype=torch.int64)
    kept_N = torch.tensor([kept for _, kept in rows], dtype=torch.bool)
    token_N, weight_N = torch.arange(len(rows)) // 2, torch.rand(len(rows))
    assert calls.sort_rows(expert_N, token_N, kept_N, num_experts) is not None
    ours = sort_rows(expert_N, token_N, weight_N, num_experts, kept_N)
    plain = Plan.from_rows(expert_N, token_N, weight_N, num_experts, kept_N)
    for name in ("row_N", "token_N", "weight_N", "load_E", "offset_E", "kept_N"):
        assert torch.equal(getattr(ours, name), getattr(plain, name)), name


@pytest.mark.usefixtures("compiled")
def test_rows_that_are_left_out_may_name_any_expert_and_others_only_those_there_are():
    expert_N, token_N, weight_N = torch.tensor([1, -7, 0, 99]), torch.arange(4), torch.rand(4)
    kept_N = torch.tensor([True, False, True, False])
    assert sort_rows(expert_N, token_N, weight_N, 2, kept_N).row_N.tolist() == [2, 0, 1, 3]
    for wrong in (-1, 3):
        with pytest.raises((IndexError, RuntimeError)):
            sort_rows(torch.tensor([0, wrong]), token_N[:2], weight_N[:2], 2, torch.ones(2, dtype=torch.bool))


@pytest.mark.usefixtures("compiled")
def test_rows_that_c_would_misread_are_left_to_pytorch():
    expert_N, kept_N = torch.tensor([1, 0, 1, 0]), torch.ones(4, dtype=torch.bool)
    token_N = torch.arange(4)
    assert calls.sort_rows(expert_N, token_N, kept_N, 2) is not None
    assert calls.sort_rows(expert_N.int(), token_N, kept_N, 2) is None
    assert calls.sort_rows(expert_N, token_N.int(), kept_N, 2) is None
    assert calls.sort_rows(expert_N, token_N, kept_N.int(), 2) is None
    assert calls.sort_rows(expert_N[::2], token_N[:2], kept_N[:2], 2) is None
    assert calls.sort_rows(expert_N, token_N[:3], kept_N, 2) is None


@pytest.mark.usefixtures("compiled")
def test_who_traces_counts_compiles_or_maps_operations_is_not_passed_by():
    score_TE = torch.randn(6, 9)
    seen = []

    def choose(score_TE):
        seen.append(calls.callable_on(score_TE) is not None)
        return select_top_k(score_TE, 2)

    expected_TK = choose(score_TE)
    assert seen == [True]
    seen.clear()
    with FlopCounterMode(display=False):
        choose(score_TE)
    assert torch.equal(torch.vmap(choose)(score_TE[:, None])[:, 0], expected_TK)
    assert torch.equal(make_fx(choose)(score_TE)(score_TE), expected_TK)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's own, of what it deprecates
        torch.func.jvp(lambda score_TE: score_TE.gather(1, choose(score_TE)), (score_TE,), (score_TE,))
        torch.jit.trace(choose, (score_TE,), check_trace=False)
    assert len(seen) == 5
    assert not any(seen)
    assert torch.equal(torch.compile(select_top_k, backend="eager", fullgraph=True)(score_TE, 2), expected_TK)


@pytest.mark.parametrize("dispatch", [Sort(), Capacity(1.0)], ids=lambda one: type(one).__name__)
@pytest.mark.parametrize("bias", [False, True], ids=["logits", "bias"])
def test_a_layer_trains_bit_by_bit_as_it_does_without_c(request, dispatch, bias):
    """All but the experts, which stay with PyTorch here."""

    def bits():
        torch.manual_seed(1)
        router = TopKRouter(16, 8, top_k=2, selection_bias=bias)
        layer = MoELayer(router, GatedExperts(8, 16, 12, kernel="torch"), dispatch=dispatch)
        x_TD = torch.randn(50, 16, requires_grad=True)
        valid_T = torch.arange(50) % 7 != 3
        y_TD, routing = layer(x_TD, valid_T)
        (y_TD.square().sum() + routing.weight_N.square().sum()).backward()
        return [y_TD, routing.expert_N, routing.kept_N, x_TD.grad, *(one.grad for one in layer.parameters())]

    plain = bits()
    request.getfixturevalue("compiled")
    assert calls.callable_on(plain[0].detach()) is not None
    for ours, theirs in zip(bits(), plain, strict=True):
        assert torch.equal(ours, theirs)
