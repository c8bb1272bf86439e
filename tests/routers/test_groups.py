import math

import pytest
import torch

from moesaic import ConfigError
from moesaic.routers import GroupLimit, TopKRouter
from tests.oracle.router import in_best_groups


@pytest.mark.parametrize(("num_groups", "groups_kept", "best_per_group"), [(4, 2, 2), (4, 3, 1), (2, 1, 2), (12, 5, 1)])
def test_the_mask_agrees_with_plain_loops(num_groups, groups_kept, best_per_group):
    limit = GroupLimit(num_groups=num_groups, groups_kept=groups_kept, best_per_group=best_per_group)
    score_TE = torch.randn(50, 12, dtype=torch.float64)
    masked_TE = limit.mask(score_TE)
    for line, masked in zip(score_TE.tolist(), masked_TE.tolist(), strict=True):
        assert masked == in_best_groups(line, num_groups, groups_kept, best_per_group)


def test_equal_groups_are_taken_from_the_lowest_index_on():
    masked_TE = GroupLimit(num_groups=4, groups_kept=2).mask(torch.zeros(1, 8))
    assert masked_TE.tolist() == [[0, 0, 0, 0, -math.inf, -math.inf, -math.inf, -math.inf]]


def test_one_good_expert_wins_its_group_by_maximum_and_two_good_ones_by_sum():
    score_TE = torch.tensor([[0.9, 0.0, 0.5, 0.5]])
    by_max = GroupLimit(num_groups=2, groups_kept=1, best_per_group=1).mask(score_TE)
    by_sum = GroupLimit(num_groups=2, groups_kept=1, best_per_group=2).mask(score_TE)
    assert by_max.isfinite().tolist() == [[True, True, False, False]]
    assert by_sum.isfinite().tolist() == [[False, False, True, True]]


def test_groups_of_unequal_size_are_refused():
    with pytest.raises(ConfigError) as error:
        GroupLimit(num_groups=3, groups_kept=2).check(num_experts=16, top_k=4)
    assert str(error.value) == (
        "num_groups must divide num_experts=16, got 3. Change one so that every group holds as many experts."
    )


@pytest.mark.parametrize("groups_kept", [0, 5])
def test_keeping_no_group_or_more_than_there_are_is_refused(groups_kept):
    with pytest.raises(ConfigError) as error:
        GroupLimit(num_groups=4, groups_kept=groups_kept).check(num_experts=16, top_k=2)
    assert str(error.value) == (
        f"groups_kept must be between 1 and num_groups=4, got {groups_kept}. "
        "Keep fewer groups, or cut the experts into more."
    )


def test_groups_too_small_to_be_scored_are_refused():
    with pytest.raises(ConfigError) as error:
        GroupLimit(num_groups=6, groups_kept=4, best_per_group=2).check(num_experts=6, top_k=3)
    assert str(error.value) == (
        "each group must hold at least best_per_group=2 experts, got 1. Use fewer groups, or add experts."
    )


def test_a_limit_that_leaves_too_few_experts_is_refused():
    with pytest.raises(ConfigError) as error:
        GroupLimit(num_groups=8, groups_kept=2).check(num_experts=24, top_k=7)
    assert str(error.value) == (
        "the groups kept must hold at least top_k=7 experts, got 2 groups of 3. Keep more groups, or lower top_k."
    )


@pytest.mark.parametrize("best_per_group", [0, 3])
def test_a_group_score_that_nobody_published_is_refused(best_per_group):
    with pytest.raises(ConfigError) as error:
        GroupLimit(num_groups=2, groups_kept=1, best_per_group=best_per_group).check(num_experts=8, top_k=2)
    assert str(error.value) == (
        f"best_per_group must be 1 or 2, got {best_per_group}. DeepSeek-V2 uses 1, DeepSeek-V3 uses 2."
    )


def test_groups_say_which_device_each_expert_lives_on_and_how_many_a_token_may_visit():
    for groups_kept, top_k, visits in ((3, 6, 3), (3, 2, 2), (1, 2, 1)):
        limit = GroupLimit(num_groups=4, groups_kept=groups_kept, best_per_group=1)
        extras = TopKRouter(5, 12, top_k=top_k, groups=limit)(torch.zeros(2, 5)).extras
        assert extras["device_E"].tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
        assert int(extras["devices_per_token"]) == visits
    assert TopKRouter(5, 12, top_k=2)(torch.zeros(2, 5)).extras == {}


def test_groups_by_their_best_expert_stay_apart_where_scores_underflow():
    limit = GroupLimit(num_groups=4, groups_kept=2, best_per_group=1)
    router = TopKRouter(1, 8, top_k=3, normalize="scores", groups=limit)
    with torch.no_grad():
        router.weight[:, 0] = torch.tensor([-500.0, -400, -300, -200, -900, -800, 0, -600])
    # Softmax gives expert 6 all and the others 0: by scores, group 0 would tie with group 1 and win.
    assert router(torch.ones(1, 1)).expert_N.tolist() == [6, 3, 2]
