"""How many tokens of a batch each expert worked on whose outputs the loss depends on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from moesaic.core.plan import Plan
from moesaic.hf.peft.blocks import ExpertBlock


class Tokens:
    """Counts tokens by expert in backward, so that recomputed activations count once.

    A token that the loss does not depend on, such as the last one of a sequence, does not count: its experts rightly
    get no gradient.

    Args:
        blocks: whose experts to watch.
    """

    def __init__(self, blocks: Sequence[ExpertBlock]) -> None:
        self._blocks = blocks
        self._load = {block.index: torch.zeros(block.num_experts, dtype=torch.int64) for block in blocks}
        self._blocks_called: set[int] = set()
        self._experts_called: set[int] = set()
        self._unreadable: set[int] = set()
        self._given_rows: set[int] = set()

    def load_E(self, layer: int) -> Tensor | None:
        """Tokens of each expert of a layer; None if they cannot be told.

        That is so where experts are called with something unknown, or where the block runs and does not call them.
        """
        bypassed = layer in self._blocks_called - self._experts_called
        return None if bypassed or layer in self._unreadable else self._load[layer]

    def is_cut_off(self, layer: int) -> bool:
        """Whether experts of a layer worked on tokens and the loss depends on nothing that they returned."""
        return layer in self._given_rows and not bool(self._load[layer].any())

    @contextmanager
    def counting(self, modules: Mapping[str, nn.Module]) -> Iterator[None]:
        """Count in the forwards within and their backwards."""
        handles = []
        for block in self._blocks:
            called = _adder(self._blocks_called, block.index)
            handles.append(modules[block.path].register_forward_pre_hook(called))
            if not block.linears:
                hook = self._stack_hook(block)
                handles.append(modules[block.experts].register_forward_hook(hook, with_kwargs=True))
                continue
            self._experts_called.add(block.index)
            for (expert, projection), path in block.linears.items():
                if projection == "down":
                    handles.append(modules[path].register_forward_hook(self._module_hook(block, expert)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _stack_hook(self, block: ExpertBlock) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            self._experts_called.add(block.index)
            rows = _rows([*args, *kwargs.values()], block.num_experts)
            if rows is None or not isinstance(output, Tensor):
                self._unreadable.add(block.index)
                return
            expert_N, row_N = rows
            if bool((expert_N < block.num_experts).any()):
                self._given_rows.add(block.index)

            def count(gradient: Tensor) -> None:
                matters = gradient.reshape(-1, gradient.shape[-1]).ne(0).any(dim=-1)
                # Places beyond the experts are no experts: identity in LongCat-Flash, another rank's elsewhere.
                experts = expert_N[matters[row_N] & (expert_N < block.num_experts)]
                self._load[block.index] += torch.bincount(experts, minlength=block.num_experts).cpu()

            if output.requires_grad:
                output.register_hook(count)  # type: ignore[no-untyped-call]

        return hook

    def _module_hook(self, block: ExpertBlock, expert: int) -> Any:
        def hook(_module: nn.Module, _args: Any, output: Tensor) -> None:
            if output.numel():
                self._given_rows.add(block.index)

            def count(gradient: Tensor) -> None:
                matters = gradient.reshape(-1, gradient.shape[-1]).ne(0).any(dim=-1)
                self._load[block.index][expert] += int(matters.sum())

            if output.requires_grad:
                output.register_hook(count)  # type: ignore[no-untyped-call]

        return hook


def _adder(seen: set[int], layer: int) -> Any:
    def hook(_module: nn.Module, _args: Any) -> None:
        seen.add(layer)

    return hook


def _rows(given: Sequence[Any], num_experts: int) -> tuple[Tensor, Tensor] | None:
    """The expert of each row and the row of the output that it adds to, from what experts are called with.

    Rows of weight 0 are left out: they add nothing. ZAYA's router sends tokens that skip to expert 0 so.
    """
    x = given[0]
    for place, one in enumerate(given[1:], 1):
        if isinstance(one, Plan):  # ours
            num_rows = int(one.load_E.sum())
            expert_N = torch.arange(num_experts, device=one.load_E.device).repeat_interleave(one.load_E)
            counts_N = one.weight_N[:num_rows] != 0
            return expert_N[counts_N], one.token_N[:num_rows][counts_N]
        if isinstance(one, Tensor) and not one.is_floating_point() and one.ndim == 2:  # choices of each token
            row_TK = torch.arange(one.shape[0], device=one.device)[:, None].expand_as(one)
            weights = [other for other in given[place + 1 :] if isinstance(other, Tensor) and other.shape == one.shape]
            counts_TK = weights[0] != 0 if weights else torch.ones_like(one, dtype=torch.bool)
            return one[counts_TK], row_TK[counts_TK]
        if isinstance(one, list) and len(one) == num_experts:  # sizes of sorted rows: JetMoE
            load_E = torch.tensor(one, device=x.device)
            expert_N = torch.arange(num_experts, device=x.device).repeat_interleave(load_E)
            return expert_N, torch.arange(x.shape[0], device=x.device)
    if len(given) == 1 and isinstance(x, Tensor) and x.ndim == 2 and x.shape[0] % num_experts == 0:
        # Llama 4 gives every expert a row for every token, of zeros where it is not chosen.
        works_N = x.ne(0).any(dim=-1)
        row_N = torch.arange(x.shape[0], device=x.device)
        return (row_N // (x.shape[0] // num_experts))[works_N], row_N[works_N]
    return None
