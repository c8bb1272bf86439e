"""Look at the experts of a model while it runs: which rows they serve, and what each makes of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from moesaic.convert.shrink.saliency import ExpertStats, StatsSum
from moesaic.core.errors import ConfigError
from moesaic.experts import GatedExperts, SharedExpert
from moesaic.hf.block import SparseBlock
from moesaic.hf.layers import is_sparse
from moesaic.hf.native.router import Reporter
from moesaic.hf.native.work import Work, alone, looking
from moesaic.hf.reports import Place, Report
from moesaic.hf.scope import listening
from moesaic.hf.watching import on_our_kernels, places
from moesaic.hf.wrapped import plain_path
from moesaic.layer import MoELayer

_NUMBERS = 1 << 24
"""Numbers in the outputs that are looked at in one go: 64 MiB of float32."""


@contextmanager
def watching(model: nn.Module, *, every_expert: bool = False) -> Iterator[Watching]:
    """Look at the experts of every layer in the forwards that start within, in this thread.

    A mixture of transformers runs on our kernels for the time, adopted, and is left as it was.

    Raises:
        ConfigError: if there are no experts, a layer of ours has no routing table, or a family is not known.
    """
    with ExitStack() as stack:
        stack.enter_context(on_our_kernels(model))
        watches = Watching(model, every_expert=every_expert)
        stack.enter_context(listening(watches))
        stack.enter_context(looking(watches.see))
        for handle in watches.hooks():
            stack.callback(handle.remove)
        yield watches


class Watching:
    """The watches of a model's layers; hears from routers which tokens are padding.

    Args:
        model: ours or adopted.
        every_expert: let every expert work on every token too.
    """

    wants_balance = False
    batch_load_E = None

    def __init__(self, model: nn.Module, *, every_expert: bool) -> None:
        self.model = model
        self.path_of = {module: plain_path(path) for path, module in model.named_modules()}
        self.watches: dict[str, Watch] = {}
        found = places(model) if is_sparse(model) else {}
        self.places: Mapping[nn.Module, Place] = {
            block: place for block, place in found.items() if isinstance(block, Reporter)
        }
        for block, place in found.items():
            if isinstance(block, SparseBlock) and not isinstance(block.moe, MoELayer):
                raise ConfigError(
                    f"Experts can be told apart where a layer is a MoELayer, whose routing is a table, got "
                    f"{type(block.moe).__name__} at {place.layer}. Use a recipe in which tokens choose experts."
                )
            self.watches[place.layer] = Watch(every_expert=every_expert)
        if not found:
            raise ConfigError(
                f"{type(model).__name__} has no experts that can be looked at: what is needed are MoE layers of "
                "moesaic.sparsify, or of a family that moesaic.adopt takes. Use such a model."
            )

    def hear(self, place: Place, report: Report) -> None:
        """Take in which of the tokens that the experts will read next are no padding."""
        part_T, valid_T = report.frame.parts.get(report.block), report.routing.valid_T
        self.watches[place.layer].begin(valid_T if part_T is None else valid_T[part_T])

    def see(self, work: Work) -> None:
        """Take in what the experts of one layer are about to do."""
        path = self.path_of[work.experts]
        around = [layer for layer in self.watches if f"{path}.".startswith(f"{layer}.")]
        self.watches[max(around, key=len)].see(path, work)

    def settle(self) -> None:
        """Take in what was left until the forward was over."""
        for watch in self.watches.values():
            watch.settle()

    def results(self) -> dict[str, ExpertStats]:
        """What was seen of each layer that ran, by the path of its experts, in depth order."""
        return {watch.path: watch.sums.result() for watch in self.watches.values() if watch.sums is not None}

    def hooks(self) -> Iterator[Any]:
        """Look where no adoption reaches: at layers of ours, and at gates of shared experts."""
        for layer, watch in self.watches.items():
            block = self.model.get_submodule(layer)
            gate = getattr(block, "shared_expert_gate", None)
            if isinstance(block, SparseBlock):
                moe = cast(MoELayer, block.moe)
                yield moe.register_forward_pre_hook(_before_layer(watch))
                yield moe.experts.register_forward_pre_hook(_before_experts(watch, f"{layer}.moe.experts", moe))
            elif isinstance(gate, nn.Linear):
                yield gate.register_forward_hook(_after_gate(watch))


class Watch:
    """Sums up what one layer's experts do.

    Args:
        every_expert: let every expert work on every token too.
    Attributes:
        path: of the experts, once they were seen.
        sums: what was seen; None before.
    """

    def __init__(self, *, every_expert: bool) -> None:
        self.every_expert = every_expert
        self.path = ""
        self.sums: StatsSum | None = None
        self._valid_T: list[Tensor | None] = []
        self._gate_T: list[Tensor] = []

    def begin(self, valid_T: Tensor | None) -> None:
        """Say which tokens that the experts read next are no padding; None for all."""
        self._valid_T.append(None if valid_T is None else valid_T.bool())

    def gate(self, logit_T: Tensor) -> None:
        """Take in the logits of what the shared expert's output is multiplied by."""
        self._gate_T.append(logit_T.reshape(-1))

    def see(self, path: str, work: Work) -> None:
        """Take in the rows of experts at ``path``."""
        plan, valid_T = work.plan, self._valid_T[-1]
        if self.sums is None:
            self.path, self.sums = path, StatsSum(plan.num_experts)
        x_TD = work.x_TD if valid_T is None else work.x_TD[valid_T.to(work.x_TD.device)]
        self.sums.num_tokens += len(x_TD)
        expert_N = torch.arange(plan.num_experts, device=plan.load_E.device).repeat_interleave(plan.load_E)
        token_N, weight_N = plan.token_N[: len(expert_N)], plan.weight_N[: len(expert_N)]
        if valid_T is not None:
            real_N = valid_T.to(token_N.device)[token_N]
            expert_N, token_N, weight_N = expert_N[real_N], token_N[real_N], weight_N[real_N]
        for part in _slices(len(expert_N), x_TD.shape[-1]):
            rows_ND, which_N = work.x_TD[token_N[part]], expert_N[part]
            output_ND = work.each(rows_ND, which_N, _ones(rows_ND))
            # An expert that sees its input times the weight adds something else than weight times output.
            added_ND = work.each(rows_ND, which_N, weight_N[part]) if work.weighs_input else None
            self.sums.add_rows(which_N, weight_N[part], output_ND, added_ND)
        if self.every_expert:
            for output_ETD in _every(x_TD, plan.num_experts, work.each):
                self.sums.add_every(output_ETD)

    def settle(self) -> None:
        """Take in the gates of the forward that is over; which tokens are padding may have been known only later."""
        for logit_T, valid_T in zip(self._gate_T, self._valid_T, strict=False):
            if self.sums is not None:
                self.sums.add_gate((logit_T if valid_T is None else logit_T[valid_T.to(logit_T.device)]).sigmoid())
        self._gate_T.clear()
        self._valid_T.clear()


def _before_layer(watch: Watch) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def look(layer: nn.Module, args: tuple[Any, ...]) -> None:
        watch.begin(args[1] if len(args) > 1 else None)
        shared = cast(MoELayer, layer).shared
        if isinstance(shared, SharedExpert) and shared.token_gate_D is not None:
            watch.gate(args[0] @ shared.token_gate_D)

    return look


def _before_experts(watch: Watch, path: str, layer: MoELayer) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    # Not the module itself, whose hooks these are.
    run: Callable[..., Tensor] = layer.experts.forward
    weighs_input = isinstance(layer.experts, GatedExperts) and layer.experts.weigh == "input"

    def look(experts: nn.Module, args: tuple[Any, ...]) -> None:
        x_TD, plan = args

        def each(rows_ND: Tensor, expert_N: Tensor, weight_N: Tensor) -> Tensor:
            return run(rows_ND, alone(expert_N, weight_N, plan.num_experts))

        watch.see(path, Work(experts=experts, x_TD=x_TD, plan=plan, each=each, weighs_input=weighs_input))

    return look


def _after_gate(watch: Watch) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
    return lambda _gate, _args, logit_T: watch.gate(logit_T)


def _every(x_TD: Tensor, num_experts: int, each: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Iterator[Tensor]:
    """What every expert makes of every token, some tokens at a time, (E, T, D)."""
    for part in _slices(len(x_TD), x_TD.shape[-1] * num_experts):
        rows_ND = x_TD[part].repeat(num_experts, 1)
        expert_N = torch.arange(num_experts, device=x_TD.device).repeat_interleave(len(rows_ND) // num_experts)
        yield each(rows_ND, expert_N, _ones(rows_ND)).view(num_experts, len(rows_ND) // num_experts, -1)


def _ones(rows_ND: Tensor) -> Tensor:
    return torch.ones(len(rows_ND), device=rows_ND.device, dtype=torch.promote_types(rows_ND.dtype, torch.float32))


def _slices(length: int, numbers_each: int) -> Iterator[slice]:
    step = max(1, _NUMBERS // numbers_each)
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))
