"""Trees are numbered level by level, and keep what they had when they are split or cut."""

import numpy as np
import pytest

from moesaic.classic.tree import ROOT, Tree

UNEVEN = Tree((ROOT, ROOT, 0, 0, 0, 1, 1, 3, 3))
"""Two, of which the first has three and the second two; the first's second has two."""


@pytest.mark.parametrize(
    ("branching", "num_branches", "num_experts"),
    [((), 0, 1), ((3,), 3, 3), ((2, 2), 6, 4), ((2, 3), 8, 6), ((2, 2, 2, 2), 30, 16)],
)
def test_a_full_tree_has_the_product_of_its_branching_as_experts(branching, num_branches, num_experts):
    tree = Tree.full(branching)
    assert (tree.num_branches, tree.num_experts) == (num_branches, num_experts)


def test_the_path_to_an_expert_is_its_branch_and_all_above_it():
    assert UNEVEN.leaf_E.tolist() == [2, 4, 5, 6, 7, 8]
    assert np.flatnonzero(UNEVEN.path_AE[:, 4]).tolist() == [0, 3, 7]


def test_gates_are_grouped_by_their_number_of_children():
    pairs, triples = UNEVEN.gates
    assert pairs.tolist() == [[0, 1], [5, 6], [7, 8]]
    assert triples.tolist() == [[2, 3, 4]]
    assert UNEVEN.group_A.tolist() == [0, 0, 1, 1, 1, 2, 2, 3, 3]


def test_the_root_alone_is_one_expert_and_no_gate():
    alone = Tree.full(())
    assert alone.leaf_E.tolist() == [ROOT]
    assert alone.gates == ()
    assert alone.path_AE.shape == (0, 1)


def test_a_split_puts_a_gate_with_copies_in_an_expert_s_place():
    graft = Tree.full((2,)).split(0)
    assert graft.tree.parents == (ROOT, ROOT, 0, 0)
    assert graft.branch_A.tolist() == [0, 1, ROOT, ROOT]
    # Numbered by where they end: the untouched one comes first now.
    assert graft.expert_E.tolist() == [1, 0, 0]


def test_the_root_can_be_split_in_three():
    graft = Tree.full(()).split(0, into=3)
    assert graft.tree == Tree.full((3,))
    assert graft.expert_E.tolist() == [0, 0, 0]


def test_a_sibling_left_alone_takes_the_place_of_its_gate():
    graft = Tree.full((2, 2)).without(1)
    assert graft.tree.parents == (ROOT, ROOT, 1, 1)
    assert graft.branch_A.tolist() == [0, 1, 4, 5]
    assert graft.expert_E.tolist() == [0, 2, 3]


def test_a_sibling_with_children_hands_them_up():
    graft = UNEVEN.without(UNEVEN.leaf_E.tolist().index(5))
    assert graft.tree.parents == (ROOT, ROOT, 0, 0, 0, 3, 3)
    assert graft.tree.num_experts == UNEVEN.num_experts - 1
    below_root = Tree((ROOT, ROOT, 0, 0)).without(0)
    assert below_root.tree == Tree.full((2,))
    assert below_root.branch_A.tolist() == [2, 3]
    assert below_root.expert_E.tolist() == [1, 2]


def test_the_last_but_one_leaves_an_expert_without_gates():
    graft = Tree.full((2,)).without(0)
    assert graft.tree == Tree.full(())
    assert graft.expert_E.tolist() == [1]


@pytest.mark.parametrize("expert", range(6))
def test_what_is_split_and_cut_again_is_the_tree_that_it_was(expert):
    split = UNEVEN.split(expert)
    copies = np.flatnonzero(split.expert_E == expert)
    back = split.tree.without(int(copies[0]))
    assert back.tree == UNEVEN
    assert split.expert_E[back.expert_E].tolist() == list(range(6))
