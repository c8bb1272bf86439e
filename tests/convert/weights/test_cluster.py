"""Groups of exactly equal size: the balanced assignment against scipy's, and what k-means with it promises."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from moesaic.convert.weights.cluster import balanced_kmeans, cheapest_balanced
from moesaic.core.errors import ConfigError


def total(cost, group):
    return float(cost.double()[torch.arange(len(group)), group].sum())


def by_scipy(cost):
    """Each group as so many columns as it has places: exact, in time that grows with the cube of the items."""
    places = np.repeat(cost.double().numpy(), len(cost) // cost.shape[1], axis=1)
    return places[linear_sum_assignment(places)].sum()


@given(groups=st.integers(1, 7), size=st.integers(1, 9), skew=st.floats(0, 5), seed=st.integers(0, 99))
def test_the_assignment_is_as_cheap_as_scipys_and_balanced(groups, size, skew, seed):
    draw = torch.Generator().manual_seed(seed)
    cost = torch.randn(groups * size, groups, generator=draw) + skew * torch.randn(groups, generator=draw)
    group = cheapest_balanced(cost)
    assert torch.bincount(group, minlength=groups).tolist() == [size] * groups
    assert total(cost, group) == pytest.approx(by_scipy(cost), abs=1e-9)


@given(seed=st.integers(0, 99))
def test_costs_that_are_equal_or_whole_numbers_end_too(seed):
    cost = torch.randint(0, 3, (24, 6), generator=torch.Generator().manual_seed(seed))
    assert total(cost, cheapest_balanced(cost)) == by_scipy(cost)
    assert torch.bincount(cheapest_balanced(torch.zeros(24, 6))).tolist() == [4] * 6


def test_many_items_take_little_time_and_are_still_the_cheapest():
    torch.manual_seed(1)
    cost = torch.randn(768, 8) + torch.randn(8)
    assert total(cost, cheapest_balanced(cost)) == pytest.approx(by_scipy(cost), abs=1e-9)


def squares(points, group):
    means = torch.stack([points[group == index].mean(dim=0) for index in range(int(group.max()) + 1)])
    return float((points - means[group]).square().sum())


def test_clusters_that_are_there_are_found_and_numbered_by_their_first_point():
    torch.manual_seed(0)
    centres = 10 * torch.randn(5, 8)
    truth = torch.arange(5).repeat(6)
    points = centres[truth] + 0.1 * torch.randn(30, 8)
    for cosine in (False, True):
        assert torch.equal(balanced_kmeans(points, 5, seed=3, cosine=cosine), truth)


def test_equal_sizes_cost_no_more_than_any_other_balanced_choice_of_a_few_points():
    torch.manual_seed(0)
    points = torch.randn(8, 2, dtype=torch.float64)
    best = min(
        squares(points, torch.tensor([1 if index in chosen else 0 for index in range(8)]))
        for chosen in itertools.combinations(range(8), 4)
    )
    found = min(squares(points, balanced_kmeans(points, 2, seed=seed)) for seed in range(10))
    assert found == pytest.approx(best)


def test_it_is_a_balanced_partition_of_the_graph_whose_edges_are_products():
    """Squared distances are a constant less the weight inside groups over the group's size."""
    torch.manual_seed(0)
    active = (torch.rand(12, 40) < 0.3).double()
    edge = active @ active.T
    for seed in range(3):
        group = torch.randperm(12, generator=torch.Generator().manual_seed(seed)) % 3
        inside = sum(edge[group == index][:, group == index].sum() for index in range(3))
        assert squares(active, group) == pytest.approx(float(edge.trace() - inside / 4))


def test_one_seed_gives_one_answer_and_rounds_never_make_it_worse():
    torch.manual_seed(0)
    points = torch.randn(60, 7)
    assert torch.equal(balanced_kmeans(points, 6, seed=5), balanced_kmeans(points, 6, seed=5))
    costs = [squares(points, balanced_kmeans(points, 6, seed=5, rounds=rounds)) for rounds in range(1, 8)]
    assert all(later <= earlier + 1e-9 for earlier, later in itertools.pairwise(costs))
    assert costs[-1] < costs[0]


def test_points_that_are_all_alike_are_dealt_out():
    assert torch.bincount(balanced_kmeans(torch.ones(12, 3), 4)).tolist() == [3, 3, 3, 3]


def test_an_uneven_cut_names_numbers_that_work():
    with pytest.raises(ConfigError) as error:
        balanced_kmeans(torch.zeros(12, 2), 5)
    assert str(error.value) == (
        "12 points cannot be cut into 5 equal groups. Use a number that divides 12, such as 2, 3, 4, 6."
    )
