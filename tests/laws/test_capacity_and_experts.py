"""Laws of dropping, of idle experts and of sums, for every recipe."""

from dataclasses import replace

import pytest
import torch

from moesaic import Plan, Routing
from moesaic.experts import GatedExperts, MLPExperts, SequentialExperts
from moesaic.kernels.activations import activation
from moesaic.kernels.grouped_ffn import KERNELS, grouped_ffn_torch
from moesaic.routers import select_top_k
from moesaic.telemetry.summary import RoutingSummary
from tests.kernels.case import IN_FLOAT64
from tests.laws.settings import (
    TOKEN_CHOICE,
    TOKEN_CHOICE_NAMES,
    WIDTH,
    Setting,
    every_setting,
    some_padding,
    tokens,
)

DROPPING = [setting for setting in TOKEN_CHOICE if not setting.is_dropless]
every_kernel = pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
CPU = torch.device("cpu")


@every_setting()
def test_which_rows_are_dropped_is_known_row_by_row_and_reported(setting):
    """Trap 14. First choices before second ones, then the earliest tokens, until the expert is full."""
    layer = setting.layer(**({"capacity_factor": 0.5, "min_capacity": 1} if setting in DROPPING else {}))
    valid_T = some_padding(40)
    y_TD, routing = layer(tokens(40), valid_T)
    room = int(layer.dispatch.capacity(routing)) if setting in DROPPING else routing.num_rows
    expected, taken = [False] * routing.num_rows, [0] * setting.num_experts
    for choice in range(setting.top_k):
        for token in range(40):
            row = token * setting.top_k + choice
            expert = int(routing.expert_N[row])
            if valid_T[token] and taken[expert] < room:
                expected[row] = True
                taken[expert] += 1
    assert routing.kept_N.tolist() == expected
    dropped = int(valid_T.sum()) * setting.top_k - sum(expected)
    assert RoutingSummary.of(routing).drop_rate == dropped / int(routing.load_E.sum())
    assert (dropped > 0) == (setting in DROPPING)
    assert y_TD.isfinite().all()


@every_setting(*[setting for setting in DROPPING if setting.layer().shared is None])
def test_a_token_that_lost_all_its_rows_gets_zeros_and_passes_through_the_residual(setting):
    """Trap 14."""
    layer = setting.layer(capacity_factor=0.25, min_capacity=1)
    x_TD = tokens(40)
    y_TD, routing = layer(x_TD)
    kept_T = routing.kept_N.view(40, -1).any(dim=-1)
    assert 0 < int(kept_T.sum()) < 40
    assert torch.equal((x_TD + y_TD)[~kept_T], x_TD[~kept_T])
    assert (y_TD[kept_T].abs().sum(dim=-1) > 0).float().mean() > 0.8  # ReLU experts may give a few zeros themselves


def test_law_14_is_tried_on_a_recipe_that_drops():
    """Trap 24: the law above would pass in silence if no setting dropped anything."""
    assert {setting.recipe_name for setting in DROPPING} >= {"switch"}


@pytest.mark.parametrize("num_tokens", [0, 1])
@pytest.mark.parametrize("kernel", ["auto", *(kernel.name for kernel in IN_FLOAT64)])
@every_setting()
def test_an_expert_without_rows_gets_zero_gradients_and_not_none(setting, kernel, num_tokens):
    """Trap 15."""
    layer = setting.layer(kernel=kernel)
    x_TD = tokens(num_tokens).requires_grad_()
    y_TD, routing = layer(x_TD)
    (y_TD.sum() + setting.aux_loss(routing)).backward()
    busy = set(routing.expert_N.tolist())
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        if name.startswith("experts."):
            for e in set(range(setting.num_experts)) - busy:
                assert parameter.grad[e].abs().sum() == 0, (name, e)
    assert x_TD.grad.shape == (num_tokens, WIDTH)


def test_sequential_experts_without_rows_get_zero_gradients_even_where_a_weight_is_nan():
    """Trap 15."""
    experts = SequentialExperts([torch.nn.Linear(WIDTH, WIDTH) for _ in range(3)])
    with torch.no_grad():
        experts[2].weight.fill_(float("nan"))
    scores_TE = torch.zeros(4, 3)
    routing = Routing.from_choices(torch.zeros(4, 1, dtype=torch.int64), torch.ones(4, 1), scores_TE, scores_TE)
    y_TD = experts(tokens(4), Plan.from_kept(routing, routing.kept_N))
    y_TD.sum().backward()
    assert y_TD.isfinite().all()
    assert [float(expert.weight.grad.abs().sum()) > 0 for expert in experts] == [True, False, False]
    assert experts[2].weight.grad.isfinite().all()


def test_no_index_of_a_table_with_more_rows_than_int32_counts_is_narrower_than_int64():
    """Trap 16, by construction: on the meta device, where a table of 2^32 rows costs nothing."""
    with torch.device("meta"):
        expert_TK = torch.empty(2**31, 2, dtype=torch.int64)
        weight_TK = torch.empty(2**31, 2)
        scores_TE = torch.empty(2**31, 4)
        routing = Routing.from_choices(expert_TK, weight_TK, scores_TE, scores_TE)
        assert routing.num_rows == 2**32
        plan = Plan.from_kept(routing, routing.kept_N)
        chosen_TK = select_top_k(scores_TE, 2)
    for name in ("expert_N", "token_N", "choice_N"):
        assert getattr(routing, name).dtype == torch.int64, name
        assert getattr(routing, name).shape == (2**32,), name
    for name in ("row_N", "token_N", "load_E", "offset_E"):
        assert getattr(plan, name).dtype == torch.int64, name
    assert routing.load_E.dtype == torch.int64
    assert chosen_TK.dtype == torch.int64


def test_a_table_handed_in_with_narrow_indices_is_widened():
    """Trap 16."""
    scores_TE = torch.zeros(3, 2)
    routing = Routing.from_choices(torch.zeros(3, 1, dtype=torch.int32), torch.ones(3, 1), scores_TE, scores_TE)
    assert routing.expert_N.dtype == torch.int64


def test_loads_beyond_2_to_the_31_add_up():
    """Trap 16."""
    scores_TE = torch.full((1, 2), 0.5)
    routing = Routing.from_choices(torch.tensor([[0]]), torch.ones(1, 1), scores_TE, scores_TE)
    summary = RoutingSummary.of(routing)
    for _ in range(33):
        summary = summary + summary
    assert summary.load_E.tolist() == [2**33, 0]
    assert int(summary.num_tokens) == 2**33
    assert summary.load_max_over_mean == 2.0


@pytest.mark.parametrize("kernel", IN_FLOAT64, ids=lambda kernel: kernel.name)
def test_an_expert_whose_weights_lie_beyond_2_to_the_31_elements_is_read_where_it_lies(kernel, tmp_path):
    """Trap 16. Sparse files stand in for the weights: 2 x 4 GiB of holes, of which only one expert is written."""
    num_experts, width, hidden = 2**15 + 1, 256, 256
    assert (num_experts - 1) * width * hidden >= 2**31
    stacks = []
    for name in ("up", "down"):
        path = tmp_path / name
        size = num_experts * width * hidden
        with path.open("wb") as file:
            file.truncate(2 * size)
        flat = torch.from_file(str(path), shared=True, size=size, dtype=torch.bfloat16)
        stacks.append(flat.view(num_experts, width, hidden))
    last = num_experts - 1
    small = [torch.randn(width, hidden).bfloat16() / 16 for _ in stacks]
    for stack, weight in zip(stacks, small, strict=True):
        stack[last].copy_(weight)
    x_TD = torch.randn(5, width).bfloat16()

    def plan(expert: int, of: int) -> Plan:
        offset_E = torch.zeros(of, dtype=torch.int64)
        offset_E[expert:] = 5
        every_T = torch.arange(5)
        return Plan(
            row_N=every_T,
            token_N=every_T,
            weight_N=torch.ones(5),
            load_E=offset_E.diff(prepend=offset_E.new_zeros(1)),
            offset_E=offset_E,
            kept_N=torch.ones(5, dtype=torch.bool),
        )

    if kernel.name == "reference":  # its loop visits every expert: start it at the last few
        keep = slice(last - 3, last + 1)
        y_TD = kernel.run(x_TD, plan(3, 4), None, stacks[0][keep], stacks[1][keep], activation("relu"))
    else:
        y_TD = kernel.run(x_TD, plan(last, num_experts), None, *stacks, activation("relu"))
    expected_TD = kernel.run(x_TD, plan(0, 1), None, *(weight[None] for weight in small), activation("relu"))
    assert expected_TD.abs().sum() > 1
    assert torch.equal(y_TD, expected_TD)


@every_setting()
def test_the_combine_sum_is_bitwise_the_same_every_time(setting):
    """Trap 17."""
    layer = setting.deterministic_layer()
    x_TD = tokens(60).requires_grad_()
    results = []
    for _ in range(3):
        layer.zero_grad()
        x_TD.grad = None
        y_TD, _ = layer(x_TD)
        y_TD.square().sum().backward()
        results.append([y_TD.detach(), x_TD.grad, *(p.grad.clone() for p in layer.parameters())])
    for again in results[1:]:
        assert all(torch.equal(ours, first) for ours, first in zip(again, results[0], strict=True))


def _check_the_sum_is_in_float32(run) -> None:
    """One expert gives 1, sixteen give 2^-9 each: in bfloat16 every such step is rounded away, in float32 none."""
    num_experts = 17
    # Eight numbers, each on its own: some kernels take whole 16 bytes.
    down_EFD = torch.eye(8, dtype=torch.bfloat16).repeat(num_experts, 1, 1)
    up_EDF = 2.0**-9 * down_EFD
    up_EDF[0] = down_EFD[0]
    x_TD = torch.ones(3, 8, dtype=torch.bfloat16)
    scores_TE = torch.zeros(3, num_experts)
    expert_TK = torch.arange(num_experts).expand(3, -1)
    routing = Routing.from_choices(expert_TK, torch.ones(3, num_experts), scores_TE, scores_TE)
    y_TD = run(x_TD, Plan.from_kept(routing, routing.kept_N), up_EDF, down_EFD)
    assert y_TD.dtype == torch.bfloat16
    assert y_TD.flatten().tolist() == [1 + 16 * 2.0**-9] * 24, "the sum was rounded on the way"


def _skip_unless_bfloat16_runs(kernel) -> None:
    why_not = kernel.cannot(CPU, torch.bfloat16)
    if why_not is not None:
        pytest.skip(f"kernel {kernel.name} cannot run here: {why_not}")


@every_kernel
def test_every_kernel_adds_up_in_float32(kernel):
    """Trap 17."""
    _skip_unless_bfloat16_runs(kernel)
    _check_the_sum_is_in_float32(
        lambda x_TD, plan, up_EDF, down_EFD: kernel.run(x_TD, plan, None, up_EDF, down_EFD, activation("relu"))
    )


@pytest.mark.parametrize("name", ["grouped_mm", "reference"])
def test_the_law_of_sums_fails_when_a_kernel_adds_up_in_its_own_dtype(name, monkeypatch):
    """Trap 17, the mutant, of the kernels that ask PyTorch what is wider."""
    (kernel,) = (kernel for kernel in KERNELS if kernel.name == name)
    monkeypatch.setattr(torch, "promote_types", lambda dtype, _other: dtype)
    with pytest.raises(AssertionError, match="rounded on the way"):
        _check_the_sum_is_in_float32(
            lambda x_TD, plan, up_EDF, down_EFD: kernel.run(x_TD, plan, None, up_EDF, down_EFD, activation("relu"))
        )


def _three_tokens_to(weights: list[float]) -> Plan:
    """A plan that sends three tokens to every expert, with these weights."""
    scores_TE = torch.zeros(3, len(weights))
    expert_TK = torch.arange(len(weights)).expand(3, -1)
    routing = Routing.from_choices(expert_TK, torch.tensor(weights).expand(3, -1), scores_TE, scores_TE)
    return Plan.from_kept(routing, routing.kept_N)


@every_kernel
def test_every_kernel_multiplies_by_the_weight_in_float32(kernel):
    """Trap 17: one expert gives 1, the other -1; rounded to bfloat16 their weights would be equal."""
    _skip_unless_bfloat16_runs(kernel)
    one_EDF = torch.eye(8, dtype=torch.bfloat16).repeat(2, 1, 1)
    down_EFD = torch.stack([one_EDF[0], -one_EDF[1]])
    x_TD = torch.ones(3, 8, dtype=torch.bfloat16)
    y_TD = kernel.run(x_TD, _three_tokens_to([1 + 2.0**-10, 1.0]), None, one_EDF, down_EFD, activation("relu"))
    assert y_TD.flatten().tolist() == [2.0**-10] * 24


def test_the_torch_kernel_adds_up_the_router_s_gradient_in_float32():
    """Trap 17: <dy down, hidden> is 1 + 2^-9, which bfloat16 would round to 1."""
    up_EDF = torch.tensor([1.0, 2.0**-9], dtype=torch.bfloat16).view(1, 1, 2)
    down_EFD = torch.ones(1, 2, 1, dtype=torch.bfloat16)
    x_TD = torch.ones(3, 1, dtype=torch.bfloat16)
    plan = _three_tokens_to([1.0])
    weight_N = plan.weight_N.clone().requires_grad_()
    y_TD = grouped_ffn_torch(x_TD, replace(plan, weight_N=weight_N), None, up_EDF, down_EFD, activation("relu"))
    y_TD.sum().backward()
    assert weight_N.grad.tolist() == [1 + 2.0**-9] * 3


def test_sequential_experts_add_up_in_float32():
    """Trap 17."""

    def run(x_TD, plan, up_EDF, _down_EFD):
        experts = SequentialExperts([torch.nn.Linear(8, 8, bias=False) for _ in up_EDF]).bfloat16()
        with torch.no_grad():
            for expert, weight in zip(experts, up_EDF, strict=True):
                expert.weight.copy_(weight)
        return experts(x_TD, plan)

    _check_the_sum_is_in_float32(run)


@pytest.mark.parametrize("name", TOKEN_CHOICE_NAMES)
def test_the_gradient_of_a_token_adds_up_in_float32_over_its_experts(name):
    """Trap 17: the backward's sum too. The float64 gradient is met to the rounding of the parts, not of the sum."""
    torch.manual_seed(3)
    layer = Setting(name, {"num_experts": 32, "top_k": 32}).layer(16).eval().bfloat16()
    x_TD = tokens(20, 16, torch.bfloat16).requires_grad_()
    layer(x_TD)[0].backward(torch.ones(20, 16, dtype=torch.bfloat16))
    exact_TD = x_TD.detach().double().requires_grad_()
    layer.double()(exact_TD)[0].backward(torch.ones(20, 16, dtype=torch.float64))
    error = (x_TD.grad.double() - exact_TD.grad).norm() / exact_TD.grad.norm()
    assert isinstance(layer.experts, GatedExperts | MLPExperts)
    assert float(error) < 0.02
