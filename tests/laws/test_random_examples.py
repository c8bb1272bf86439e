"""Properties that hold for any shapes, ties, masks and logits, searched for a counter-example."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moesaic import ConfigError, MoELayer, Plan, Routing, balance, recipes
from moesaic.dispatch import Capacity, Sort
from moesaic.telemetry.summary import RoutingSummary
from tests.dispatch.test_capacity import table_of
from tests.laws.settings import TOKEN_CHOICE_NAMES
from tests.oracle import dispatch as oracle

WIDTH = 3
# Whole numbers, so that ties are common; far ones, so that scores saturate and underflow.
ENTRIES = st.sampled_from([0.0, 1.0, -1.0, 2.0, -2.0, 100.0, -100.0, 1e4, -1e4])


@st.composite
def batches(draw) -> tuple[str, MoELayer, torch.Tensor, torch.Tensor | None]:
    """A layer of any recipe and size, its router and tokens made of few values, and a mask or none."""
    name = draw(st.sampled_from(TOKEN_CHOICE_NAMES))
    num_experts = draw(st.integers(1, 9))
    top_k = draw(st.integers(1, num_experts))
    num_tokens = draw(st.integers(0, 9))
    torch.manual_seed(draw(st.integers(0, 9)))
    try:
        layer = recipes.get(name).layer(WIDTH, hidden=2, num_experts=num_experts, top_k=top_k, init_std=0.5)
    except ConfigError:  # one choice with a constant weight
        layer = recipes.get(name).layer(WIDTH, hidden=2, num_experts=num_experts, top_k=2, init_std=0.5)
    weight = draw(st.lists(ENTRIES, min_size=num_experts * WIDTH, max_size=num_experts * WIDTH))
    layer.router.weight.data.copy_(torch.tensor(weight).view(num_experts, WIDTH))
    small = st.sampled_from([0.0, 1.0, -1.0, 0.5])
    x_TD = torch.tensor(draw(st.lists(small, min_size=num_tokens * WIDTH, max_size=num_tokens * WIDTH)))
    valid_T = draw(st.none() | st.lists(st.booleans(), min_size=num_tokens, max_size=num_tokens))
    valid_T = None if valid_T is None else torch.tensor(valid_T, dtype=torch.bool)
    return name, layer, x_TD.view(num_tokens, WIDTH), valid_T


@given(batches())
def test_any_batch_gives_a_sound_table(batch):
    _, layer, x_TD, valid_T = batch
    routing = layer.router(x_TD, valid_T)
    num_tokens, top_k = x_TD.shape[0], layer.router.top_k
    expert_TK = routing.expert_N.view(num_tokens, top_k)
    assert all(len(set(line)) == top_k for line in expert_TK.tolist())
    assert all(0 <= e < layer.router.num_experts for e in routing.expert_N.tolist())
    assert routing.weight_N.isfinite().all()
    assert (routing.weight_N >= 0).all()
    assert routing.probability_TE.isfinite().all()
    assert routing.probability_TE.sum(dim=-1).tolist() == pytest.approx([1.0] * num_tokens, abs=1e-5)
    # Best first, by what selection went by; of equal ones the lowest index.
    by_TE = routing.logits_TE if layer.router.bias_E is None else routing.scores_TE + layer.router.bias_E
    for line, chosen in zip(by_TE.tolist(), expert_TK.tolist(), strict=True):
        assert chosen == sorted(range(len(line)), key=lambda e: (-line[e], e))[:top_k]


@given(batches())
def test_any_batch_gives_finite_outputs_losses_and_gradients(batch):
    name, layer, x_TD, valid_T = batch
    x_TD.requires_grad_()
    y_TD, routing = layer(x_TD, valid_T)
    terms = [term for term in recipes.get(name).balance if isinstance(term, balance.LossTerm)]
    loss = y_TD.square().mean() if y_TD.numel() else y_TD.sum()
    loss = loss + sum(term(routing) for term in terms) + 1e-9 * balance.z_loss(routing)
    loss.backward()
    assert loss.isfinite()
    assert x_TD.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in layer.parameters())
    for term in terms:
        value = float(term.loss(routing).detach())
        most = math.inf if term.loss is balance.z_loss else layer.router.num_experts * (1 + 1e-5)
        assert 0 <= value <= most, term.name
    num_valid = x_TD.shape[0] if valid_T is None else int(valid_T.sum())
    assert int(routing.load_E.sum()) == num_valid * layer.router.top_k
    summary = RoutingSummary.of(routing)
    assert 0 <= summary.drop_rate < 1
    assert 0 <= summary.entropy <= math.log(layer.router.num_experts) + 1e-5
    assert 1 <= summary.load_max_over_mean <= layer.router.num_experts


@st.composite
def tables(draw) -> Routing:
    """Any table: choices, weights with ties, a mask."""
    num_experts = draw(st.integers(1, 6))
    top_k = draw(st.integers(1, num_experts))
    num_tokens = draw(st.integers(0, 12))
    lines = [draw(st.permutations(range(num_experts)))[:top_k] for _ in range(num_tokens)]
    weight = draw(
        st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=num_tokens * top_k, max_size=num_tokens * top_k)
    )
    valid = draw(st.lists(st.booleans(), min_size=num_tokens, max_size=num_tokens))
    scores_TE = torch.full((num_tokens, num_experts), 1 / num_experts)
    return Routing.from_choices(
        torch.tensor(lines, dtype=torch.int64).view(num_tokens, top_k),
        torch.tensor(weight).view(num_tokens, top_k),
        scores_TE,
        scores_TE,
        torch.tensor(valid, dtype=torch.bool),
    )


def _assert_sound(routing: Routing, plan: Plan) -> None:
    assert sorted(plan.row_N.tolist()) == list(range(routing.num_rows))
    end = int(plan.offset_E[-1])
    kept = plan.row_N[:end].tolist()
    assert kept == sorted(kept, key=lambda row: (int(routing.expert_N[row]), row))
    assert set(kept) == {row for row, keep in enumerate(plan.kept_N.tolist()) if keep}
    assert plan.load_E.cumsum(0).tolist() == plan.offset_E.tolist()
    assert torch.equal(plan.token_N, routing.token_N[plan.row_N])
    assert torch.equal(plan.weight_N, routing.weight_N[plan.row_N])
    assert not (plan.kept_N & ~routing.valid_N).any()


@given(
    tables(),
    st.sampled_from(["position", "score"]),
    st.sampled_from([0.1, 0.5, 1.0, 1.1, 1.25, 3.0]),
    st.integers(0, 4),
)
def test_any_table_under_any_capacity_keeps_the_rows_of_plain_loops(routing, drop, factor, minimum):
    plan = Capacity(factor, minimum=minimum, drop=drop)(routing)
    _assert_sound(routing, plan)
    expected = oracle.keep_by_capacity(
        table_of(routing),
        routing.valid_T.tolist(),
        num_experts=routing.num_experts,
        factor=factor,
        minimum=minimum,
        drop=drop,
    )
    assert plan.kept_N.tolist() == expected


@given(tables())
def test_any_table_sorts_into_a_sound_plan(routing):
    plan = Sort()(routing)
    _assert_sound(routing, plan)
    assert torch.equal(plan.kept_N, routing.valid_N)


@given(tables(), st.integers(1, 4))
def test_losses_of_any_table_cut_by_sequence_lie_between_0_and_the_number_of_experts(routing, length):
    routing = Routing(
        **{name: getattr(routing, name) for name in Routing.__slots__}
        | {"sequence_T": torch.arange(routing.num_tokens) // length}
    )
    value = float(balance.sequence_loss(routing))
    # Probabilities are uniform: whatever the load, the loss is that of balance, or 0 where there is no token.
    assert value == pytest.approx(1.0 if routing.valid_T.any() else 0.0, abs=1e-6)
