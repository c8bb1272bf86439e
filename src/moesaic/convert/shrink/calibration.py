"""One pass over some text that tells what each expert was worth, from what the routers really decided."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moesaic.convert.checkpoint.source import Source
from moesaic.convert.layout.layouts import MoELayout
from moesaic.convert.progress import tracked
from moesaic.convert.shrink.saliency import ExpertStats, StatsSum
from moesaic.core.errors import ConfigError, ShapeError
from moesaic.core.plan import Plan
from moesaic.experts import GatedExperts, SharedExpert
from moesaic.hf.block import SparseBlock
from moesaic.layer import MoELayer

Batch = Mapping[str, Any] | Tensor

_NUMBERS = 1 << 24
"""Numbers in the outputs that are looked at in one go: 64 MiB of float32."""

_INDEX_NAMES = ("top_k_index", "router_indices")


class Watch(Protocol):
    """Looks at one layer's experts during forwards."""

    sums: StatsSum

    def hooks(self, valid_of: Callable[[int], Tensor | None]) -> list[Any]:
        """Begin to look; gives handles that end it.

        Args:
            valid_of: from a number of tokens to which of them are no padding; None for all.
        """


@torch.no_grad()
def calibrate(
    model: PreTrainedModel, batches: Iterable[Batch], *, every_expert: bool = False, max_tokens: int | None = None
) -> dict[str, ExpertStats]:
    """Run a model over some text and sum up what its experts do, layer by layer.

    Choices and weights are those that the layer used: they are read where they enter the experts, after groups, biases,
    normalisation, scaling and capacity, and never worked out a second time. Each expert's output is what the experts'
    own module returns for the row alone with weight 1, so that biases, clamps and layouts of any family are in it.
    (A number that a block multiplies its whole output by afterwards, as MiniMax-M3 does, is not: it ranks no expert.)

    Args:
        model: one of ours, or of a family of transformers whose experts take (tokens, indices, weights).
        batches: what the model is called with: ``input_ids`` alone, or keyword arguments; ``labels`` and what the
            model does not take are left out. Padding that ``attention_mask`` names counts for nothing.
        every_expert: also let every expert work on every token, for means and distances of outputs that do not depend
            on who served whom; costs E / K times the experts' work.
        max_tokens: stop after this many tokens that are no padding.
    Returns:
        Statistics by the module path of the layer's experts, in depth order.
    Raises:
        ConfigError: if the model has no experts that can be looked at, or there are no batches.
    """
    watches = watch_experts(model, every_expert=every_expert)
    was_training = {part: part.training for part in model.modules()}
    model.train(False)
    seen = 0
    try:
        with _watching(watches) as say_valid:
            for batch in tracked(batches, "looking at experts", _length(batches)):
                inputs = model_inputs(model, batch)
                seen += say_valid(inputs)
                model(**inputs)
                if max_tokens is not None and seen >= max_tokens:
                    break
    finally:
        for part, training in was_training.items():
            part.training = training
    if not seen:
        raise ConfigError(
            "calibrate needs at least one batch with tokens, got none. Give some text of the model's use."
        )
    return {path: watch.sums.result() for path, watch in watches.items()}


def statistics(
    source: Source,
    layouts: Mapping[str, MoELayout],
    *,
    batches: Iterable[Batch] | None,
    stats: Mapping[str, ExpertStats] | None,
    what: str,
    every_expert: bool = False,
    max_tokens: int | None = None,
) -> Mapping[str, ExpertStats]:
    """Those that were given, or those of a pass over the text.

    Args:
        source: the checkpoint; a folder is read into memory for the pass and let go.
        layouts: the layers that they are needed for, by the path of their experts.
        batches: text.
        stats: what :func:`calibrate` gave before.
        what: who asks, for messages.
        every_expert: see :func:`calibrate`.
        max_tokens: see there.
    Raises:
        ConfigError: if there is neither, or they belong to another model.
    """
    if stats is None:
        if batches is None:
            raise ConfigError(
                f"{what} needs text to see what experts do, or statistics, got neither. "
                "Pass batches, or the result of moesaic.convert.calibrate as stats."
            )
        model = source.model or load(source)
        stats = calibrate(model, batches, every_expert=every_expert, max_tokens=max_tokens)
    for path, layout in layouts.items():
        if path not in stats or stats[path].num_experts != layout.num_experts:
            found = f"{stats[path].num_experts} experts" if path in stats else "nothing"
            raise ConfigError(
                f"{what} needs statistics of {layout.num_experts} experts at {path}, got {found}. "
                "Calibrate the model that is converted."
            )
    return stats


def load(source: Source) -> PreTrainedModel:
    """The model of a folder, in memory, in the type that it is stored in."""
    model_class: Any = type(source.blueprint.model)
    model: PreTrainedModel = model_class.from_pretrained(str(source.folder), dtype="auto", local_files_only=True)
    model.train(False)
    return model


def _length(batches: Iterable[Batch]) -> int:
    """How many batches there are; 0 where that shows only at the end."""
    return len(batches) if isinstance(batches, Sized) else 0


def watch_experts(model: nn.Module, *, every_expert: bool = False) -> dict[str, Watch]:
    """Find the experts of a model, by module path, and what looks at them.

    Raises:
        ConfigError: if there are none, or a layer of ours has no routing table.
    """
    found: dict[str, Watch] = {}
    for path, module in model.named_modules():
        if not isinstance(module, SparseBlock):
            continue
        layer = module.moe
        if not isinstance(layer, MoELayer):
            raise ConfigError(
                f"Experts can be told apart where a layer is a MoELayer, whose routing is a table, got "
                f"{type(layer).__name__} at {path}. Use a recipe in which tokens choose experts."
            )
        found[f"{path}.moe.experts"] = OurWatch(layer, every_expert=every_expert)
    for path, module in model.named_modules():
        if is_native_experts(module):
            block = model.get_submodule(path.rpartition(".")[0])
            gate = getattr(block, "shared_expert_gate", None)
            found[path] = NativeWatch(module, gate if isinstance(gate, nn.Linear) else None, every_expert=every_expert)
    if not found:
        raise ConfigError(
            f"{type(model).__name__} has no experts that can be looked at: what is needed are MoE layers of "
            "moesaic.sparsify, or a family whose experts are one module that takes (hidden_states, top_k_index, "
            "top_k_weights). Use such a model."
        )
    return found


def is_native_experts(module: nn.Module) -> bool:
    """Whether a module is the experts of a transformers family: it takes tokens, indices and weights.

    LongCat-Flash's is not counted, some of whose experts are none, and who cannot run one choice alone.
    """
    names = list(inspect.signature(type(module).forward).parameters)[1:]
    fits = len(names) == 3 and names[0] == "hidden_states" and names[1] in _INDEX_NAMES
    return fits and hasattr(module, "num_experts")


class OurWatch:
    """Looks at the experts of a :class:`~moesaic.MoELayer`.

    Args:
        layer: the layer.
        every_expert: let every expert work on every token too.
    """

    def __init__(self, layer: MoELayer, *, every_expert: bool) -> None:
        self.layer = layer
        self.every_expert = every_expert
        self.sums = StatsSum(layer.num_experts)
        self._valid_T: Tensor | None = None

    def hooks(self, valid_of: Callable[[int], Tensor | None]) -> list[Any]:
        """Begin to look; the layer itself knows its padding."""

        def before_layer(_layer: nn.Module, args: tuple[Any, ...]) -> None:
            x_TD = args[0]
            self._valid_T = args[1] if len(args) > 1 else None
            valid_TD = x_TD if self._valid_T is None else x_TD[self._valid_T.bool()]
            self.sums.num_tokens += len(valid_TD)
            shared = self.layer.shared
            if isinstance(shared, SharedExpert) and shared.token_gate_D is not None:
                self.sums.add_gate((valid_TD @ shared.token_gate_D).sigmoid())
            if self.every_expert:
                self._run_every(valid_TD)

        def before_experts(_experts: nn.Module, args: tuple[Any, ...]) -> None:
            self._run_rows(*args)

        return [
            self.layer.register_forward_pre_hook(before_layer),
            self.layer.experts.register_forward_pre_hook(before_experts),
        ]

    def _run_rows(self, x_TD: Tensor, plan: Plan) -> None:
        num_rows = int(plan.load_E.sum())
        expert_N = torch.arange(plan.num_experts, device=x_TD.device).repeat_interleave(plan.load_E)
        # An expert that sees its input times the weight adds something else than weight times output.
        weighs_input = isinstance(self.layer.experts, GatedExperts) and self.layer.experts.weigh == "input"
        for places in _slices(num_rows, x_TD.shape[-1]):
            rows_ND, weight_N, which_N = x_TD[plan.token_N[places]], plan.weight_N[places], expert_N[places]
            output_ND = self._each(rows_ND, which_N, torch.ones_like(weight_N))
            added_ND = self._each(rows_ND, which_N, weight_N) if weighs_input else None
            self.sums.add_rows(which_N, weight_N, output_ND, added_ND)

    def _run_every(self, x_TD: Tensor) -> None:
        for output_ETD in _every(x_TD, self.sums.num_experts, self._one_weight):
            self.sums.add_every(output_ETD)

    def _one_weight(self, rows_ND: Tensor, expert_N: Tensor) -> Tensor:
        weight_N = torch.ones(
            len(rows_ND), device=rows_ND.device, dtype=torch.promote_types(rows_ND.dtype, torch.float32)
        )
        return self._each(rows_ND, expert_N, weight_N)

    def _each(self, rows_ND: Tensor, expert_N: Tensor, weight_N: Tensor) -> Tensor:
        """What each row's expert returns for it alone; rows come sorted by expert."""
        load_E = torch.bincount(expert_N, minlength=self.sums.num_experts)
        place_N = torch.arange(len(rows_ND), device=rows_ND.device)
        plan = Plan(
            row_N=place_N,
            token_N=place_N,
            weight_N=weight_N,
            load_E=load_E,
            offset_E=load_E.cumsum(0),
            kept_N=torch.ones_like(place_N, dtype=torch.bool),
        )
        # Not the module itself: its hooks are these.
        return cast(Tensor, self.layer.experts.forward(rows_ND, plan))


class NativeWatch:
    """Looks at the experts of a transformers family, through their module's own ``forward``.

    Args:
        experts: the module.
        shared_gate: gives the logit of what the shared expert's output is multiplied by; None where nothing is.
        every_expert: let every expert work on every token too.
    """

    def __init__(self, experts: nn.Module, shared_gate: nn.Linear | None, *, every_expert: bool) -> None:
        self.experts = experts
        self.shared_gate = shared_gate
        self.every_expert = every_expert
        self.sums = StatsSum(cast(int, experts.num_experts))

    def hooks(self, valid_of: Callable[[int], Tensor | None]) -> list[Any]:
        """Begin to look."""
        names = list(inspect.signature(type(self.experts).forward).parameters)[1:]

        def before(_experts: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = dict(zip(names, args, strict=False)) | kwargs
            x_TD, index_TK, weight_TK = (given[name] for name in names)
            x_TD = x_TD.reshape(-1, x_TD.shape[-1])
            index_TK, weight_TK = index_TK.reshape(len(x_TD), -1), weight_TK.reshape(len(x_TD), -1)
            valid_T = valid_of(len(x_TD))
            if valid_T is not None:
                valid_T = valid_T.to(x_TD.device)
                x_TD, index_TK, weight_TK = x_TD[valid_T], index_TK[valid_T], weight_TK[valid_T]
            self._run(x_TD, index_TK, weight_TK)

        def after_gate(_gate: nn.Module, _args: tuple[Any, ...], logit: Tensor) -> None:
            logit_T = logit.reshape(-1)
            valid_T = valid_of(len(logit_T))
            self.sums.add_gate((logit_T if valid_T is None else logit_T[valid_T.to(logit.device)]).sigmoid())

        handles = [self.experts.register_forward_pre_hook(before, with_kwargs=True)]
        return handles if self.shared_gate is None else [*handles, self.shared_gate.register_forward_hook(after_gate)]

    def _run(self, x_TD: Tensor, index_TK: Tensor, weight_TK: Tensor) -> None:
        self.sums.num_tokens += len(x_TD)
        expert_N, weight_N = index_TK.reshape(-1), weight_TK.reshape(-1)
        token_N = torch.arange(len(x_TD), device=x_TD.device).repeat_interleave(index_TK.shape[1])
        # Some choices are no experts: zero experts, skips, experts of other ranks.
        real_N = (expert_N < self.sums.num_experts).nonzero(as_tuple=True)[0]
        for places in _slices(len(real_N), x_TD.shape[-1]):
            row_N = real_N[places]
            output_ND = self._each(x_TD[token_N[row_N]], expert_N[row_N])
            self.sums.add_rows(expert_N[row_N], weight_N[row_N], output_ND)
        if self.every_expert:
            for output_ETD in _every(x_TD, self.sums.num_experts, self._each):
                self.sums.add_every(output_ETD)

    def _each(self, rows_ND: Tensor, expert_N: Tensor) -> Tensor:
        weight_N1 = torch.ones(len(rows_ND), 1, device=rows_ND.device, dtype=rows_ND.dtype)
        y_ND = self.experts.forward(rows_ND, expert_N[:, None], weight_N1)
        return cast(Tensor, y_ND).reshape(len(rows_ND), -1)


def _every(x_TD: Tensor, num_experts: int, each: Callable[[Tensor, Tensor], Tensor]) -> Iterator[Tensor]:
    """What every expert makes of every token, some tokens at a time, (E, T, D)."""
    for places in _slices(len(x_TD), x_TD.shape[-1] * num_experts):
        part_TD = x_TD[places]
        expert_N = torch.arange(num_experts, device=x_TD.device).repeat_interleave(len(part_TD))
        yield each(part_TD.repeat(num_experts, 1), expert_N).view(num_experts, *part_TD.shape)


def _slices(length: int, numbers_each: int) -> Iterator[slice]:
    step = max(1, _NUMBERS // numbers_each)
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))


@contextmanager
def _watching(watches: Mapping[str, Watch]) -> Iterator[Callable[[Mapping[str, Any]], int]]:
    """Let all watches look; yields a function that takes each batch in and gives its number of real tokens."""
    masks: list[Tensor | None] = [None]

    def say(inputs: Mapping[str, Any]) -> int:
        mask = inputs.get("attention_mask")
        masks[0] = None if mask is None or bool((mask != 0).all()) else (mask != 0).reshape(-1)
        if mask is not None:
            return int((mask != 0).sum())
        ids = inputs.get("input_ids", inputs.get("inputs_embeds"))
        return 1 if ids is None else int(ids.shape[0] * ids.shape[1])

    def valid_of(num_tokens: int) -> Tensor | None:
        if masks[0] is not None and len(masks[0]) != num_tokens:
            raise ShapeError(
                f"attention_mask must have one entry for each token that the experts' layer reads, {num_tokens}, got "
                f"{len(masks[0])}. Calibrate this model on batches without padding."
            )
        return masks[0]

    handles = [handle for watch in watches.values() for handle in watch.hooks(valid_of)]
    try:
        yield say
    finally:
        for handle in handles:
            handle.remove()


def model_inputs(model: PreTrainedModel, batch: Batch) -> dict[str, Any]:
    """What a model takes of a batch, where the model is; without labels."""
    given = {"input_ids": batch} if isinstance(batch, Tensor) else dict(batch)
    takes = inspect.signature(model.forward).parameters
    kept = {name: value for name, value in given.items() if name in takes and name != "labels"}
    return {name: value.to(model.device) if isinstance(value, Tensor) else value for name, value in kept.items()}
