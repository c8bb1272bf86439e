"""A tree of gates as arrays: its branches, who is whose sibling, and the path from the root to each expert."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Indices = NDArray[np.intp]

ROOT = -1
"""The parent of the branches at the top."""


@dataclass(frozen=True)
class Tree:
    """Gates at the nodes, experts at the leaves; a branch is any node but the root, and leads from its parent to it.

    A flat mixture is a tree of one gate, and a single expert a tree without branches.

    Attributes:
        parents: the parent of each branch, itself a branch or :data:`ROOT`. Level by level, so that siblings stand
            side by side.
    """

    parents: tuple[int, ...]

    @classmethod
    def full(cls, branching: Sequence[int]) -> Tree:
        """The tree in which every node of one level has the same number of children.

        Args:
            branching: children of a node, level by level: ``(2, 2, 2)`` is binary with 8 experts, ``(8,)`` is flat,
                ``()`` is one expert.
        """
        parents: list[int] = []
        level = [ROOT]
        for count in branching:
            first = len(parents)
            parents += [node for node in level for _ in range(count)]
            level = list(range(first, len(parents)))
        return cls(tuple(parents))

    @property
    def num_branches(self) -> int:
        """A: every node but the root."""
        return len(self.parents)

    @property
    def num_experts(self) -> int:
        """E: the leaves."""
        return len(self.leaf_E)

    @cached_property
    def leaf_E(self) -> Indices:
        """The branch that ends at each expert; :data:`ROOT` where the only expert is the root."""
        leaves = sorted(set(range(self.num_branches)) - set(self.parents))
        return np.array(leaves or [ROOT], dtype=np.intp)

    @cached_property
    def path_AE(self) -> Floats:
        """1 where a branch lies on the way from the root to an expert."""
        on_way = np.zeros((self.num_branches, self.num_experts))
        for expert, branch in enumerate(self.leaf_E):
            while branch != ROOT:
                on_way[branch, expert] = 1.0
                branch = self.parents[branch]
        return on_way

    @cached_property
    def start_G(self) -> Indices:
        """The first branch of each group of siblings."""
        starts = [one for one in range(self.num_branches) if one == 0 or self.parents[one] != self.parents[one - 1]]
        return np.array(starts, dtype=np.intp)

    @cached_property
    def group_A(self) -> Indices:
        """The group of siblings that each branch belongs to."""
        size_G = np.diff(self.start_G, append=self.num_branches)
        return np.repeat(np.arange(len(self.start_G)), size_G)

    @cached_property
    def gates(self) -> tuple[Indices, ...]:
        """The branches of each gate, (gates, children): an array for each number of children."""
        size_G = np.diff(self.start_G, append=self.num_branches)
        sizes = sorted(set(size_G.tolist()))
        return tuple(self.start_G[size_G == size][:, None] + np.arange(size) for size in sizes)

    def children(self, branch: int) -> list[int]:
        """The branches that start where this one ends."""
        return [one for one, parent in enumerate(self.parents) if parent == branch]

    def split(self, expert: int, into: int = 2) -> Graft:
        """Put a gate with ``into`` copies of an expert in that expert's place."""
        below = self._below()
        below[int(self.leaf_E[expert])] = [self.num_branches + one for one in range(into)]
        return self._numbered(below, dict.fromkeys(range(self.num_branches, self.num_branches + into), expert))

    def without(self, expert: int) -> Graft:
        """Take an expert off. Where it leaves one sibling alone, that one takes the place of their gate.

        The tree must have another expert.
        """
        below = self._below()
        leaf = int(self.leaf_E[expert])
        parent = self.parents[leaf]
        below[parent].remove(leaf)
        moved: dict[int, int] = {}
        if len(below[parent]) == 1:
            sibling = below[parent][0]
            below[parent] = below.pop(sibling, [])
            if not below[parent]:
                moved[parent] = int(np.flatnonzero(self.leaf_E == sibling)[0])
        return self._numbered(below, moved)

    def _below(self) -> dict[int, list[int]]:
        below: dict[int, list[int]] = {}
        for branch, parent in enumerate(self.parents):
            below.setdefault(parent, []).append(branch)
        return below

    def _numbered(self, below: dict[int, list[int]], moved: dict[int, int]) -> Graft:
        """Number the branches anew, level by level; ``moved`` has the experts of leaves that were none before."""
        expert_of = {int(branch): expert for expert, branch in enumerate(self.leaf_E)} | moved
        parents: list[int] = []
        order: list[int] = []
        level = [(ROOT, ROOT)]
        while level:
            following = []
            for number, node in level:
                for child in below.get(node, []):
                    following.append((len(order), child))
                    parents.append(number)
                    order.append(child)
            level = following
        tree = Tree(tuple(parents))
        leaves = [order[branch] if branch != ROOT else ROOT for branch in tree.leaf_E.tolist()]
        return Graft(
            tree=tree,
            branch_A=np.array([one if one < self.num_branches else ROOT for one in order], dtype=np.intp),
            expert_E=np.array([expert_of[leaf] for leaf in leaves], dtype=np.intp),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Graft:
    """A changed tree, and where its parts were before.

    Attributes:
        tree: the new tree.
        branch_A: the old number of each new branch; :data:`ROOT` for a branch that was not there.
        expert_E: the old number of each new expert.
    """

    tree: Tree
    branch_A: Indices
    expert_E: Indices
