"""One dense network in the place of a mixture's experts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from moesaic.convert.checkpoint.blueprint import Blueprint
from moesaic.convert.checkpoint.source import Source, open_source
from moesaic.convert.layout.counts import shrinkable
from moesaic.convert.layout.dense import Network, networks
from moesaic.convert.layout.layouts import MoELayout, config_is_ours
from moesaic.convert.progress import tracked
from moesaic.convert.proof.probe import probe_batch
from moesaic.convert.run import Converted, convert
from moesaic.convert.shrink.calibration import Batch, load, statistics
from moesaic.convert.shrink.distillation import distill
from moesaic.convert.shrink.saliency import ExpertStats
from moesaic.convert.shrink.siblings import dense_config, network_of, stacks, with_hidden
from moesaic.convert.steps import Change, Step
from moesaic.convert.weights.combine import padded, scaled, side_by_side
from moesaic.convert.weights.joining import Joined, Weights, check_weights, joined, num_side_by_side
from moesaic.convert.weights.stack import DenseFFN
from moesaic.core.errors import ConfigError
from moesaic.experts import GatedExperts, SharedExpert
from moesaic.layer import MoELayer

Method = Literal["merge", "concat", "expert", "distill"]


def to_dense(
    source: str | Path | PreTrainedModel,
    *,
    method: Method = "merge",
    weights: Weights = "frequency",
    hidden: int | None = None,
    align: bool = True,
    batches: Iterable[Batch] | None = None,
    stats: Mapping[str, ExpertStats] | None = None,
    max_tokens: int | None = None,
    steps: int = 200,
    learning_rate: float = 1e-3,
    out: str | Path | None = None,
    probe: Any = "random",
    shard_bytes: int | None = None,
) -> Converted:
    """Turn a mixture into the dense model that its family descends from.

    The routers go. What they did on average stays: networks are scaled by the mean, over tokens, of what a token's
    weights add up to. Shared experts are laid beside them, exactly; one with a gate by its mean gate. Exact where all
    of a layer's experts are the same, or there is one, and a token's weights always add up to the same; else the
    receipt tells the gap, which distilling or training has to close.

    Args:
        source: a folder, or a model in memory, which stays as it is: one of ours, or of a family with a dense sibling.
        method: "merge": the weighted average of all experts, of one expert's size. "concat": the experts that matter
            most side by side, each times its mean weight. "expert": the one that matters most. "distill": "merge", or
            "concat" if ``hidden`` is given, then trained on ``batches`` to give what the mixture gives; see
            :func:`~moesaic.convert.shrink.distillation.distill`.
        weights: what each expert counts in the average, and who matters most: "frequency", the tokens that it served;
            "saliency", all that it added to the layer's output; "uniform".
        hidden: neurons of "concat", a multiple of an expert's, shared experts not counted; None for all experts.
        align: bring hidden neurons in the order of the heaviest expert's before averaging; cubic in F.
        batches: text to see what experts do on, and to distill on. Without text and ``stats``, "uniform" measures what
            weights add up to on random tokens; the others are refused.
        stats: from :func:`~moesaic.convert.shrink.calibration.calibrate`, in place of measuring.
        max_tokens: of the batches to read for statistics.
        steps: of "distill".
        learning_rate: of "distill".
        out: folder to write; None for a model in memory.
        probe: what the old and the new model are compared on; see :func:`~moesaic.convert.run.convert`.
        shard_bytes: see there.
    Raises:
        ConfigError: if the family has no dense sibling, or a layer has something that a dense network cannot hold.
        CheckpointError: see :func:`~moesaic.convert.run.convert`.
    """
    _check(method, weights, hidden)
    opened = open_source(source)
    plan = Plan.of(opened)
    counted = {path: num_side_by_side(hidden, *plan.sizes(path)) for path in plan.layouts}
    text = None if batches is None else list(batches)
    if text is None and (method == "distill" or (stats is None and weights != "uniform")):
        raise ConfigError(
            f"to_dense with method={method!r} and weights={weights!r} needs text to see what experts do, got none. "
            "Pass batches, or weights='uniform' with another method."
        )
    told = [probe_batch(opened.config, "random")] if text is None and stats is None else text
    seen = statistics(opened, plan.layouts, batches=told, stats=stats, max_tokens=max_tokens, what="to_dense")
    kind = method if method != "distill" else "merge" if hidden is None else "concat"
    change = plan.change(
        {
            path: joined(
                seen[path],
                method=kind,
                weights=weights,
                num_kept=counted[path],
                stack=plan.stack(path) if kind == "merge" and align else None,
            )
            for path in tracked(plan.layouts, "joining experts", len(plan.layouts))
        },
        {path: seen[path].shared_gate for path in plan.layouts},
        method=f"to_dense by {method}",
    )
    if told is not text and stats is None:
        change = replace(change, notes=("what weights add up to was measured on random tokens", *change.notes))
    if method == "distill":
        change = _distilled(plan, change, cast(list[Batch], text), steps, learning_rate)
    return convert(opened, change, out, probe=probe, shard_bytes=shard_bytes)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Plan:
    """A mixture and its dense sibling, before anything is decided.

    Attributes:
        source: the mixture.
        layouts: its MoE layers by the path of their experts.
        config: of the dense sibling, with networks as large as its own say.
        networks: of the dense sibling, in depth order.
    """

    source: Source
    layouts: Mapping[str, MoELayout]
    config: PreTrainedConfig
    networks: list[Network]

    @classmethod
    def of(cls, source: Source) -> Plan:
        """Look the mixture over.

        Raises:
            ConfigError: if it has no dense sibling, or a layer does not fit into one.
        """
        layouts = shrinkable(source.blueprint)
        if config_is_ours(source.config):
            _check_ours(source.blueprint, layouts)
        config = dense_config(source)
        found = stacks(layouts, networks(Blueprint.of(config).model))
        plan = cls(source=source, layouts=layouts, config=config, networks=found)
        for path, layout in layouts.items():
            _check_fit(layout, network_of(layout, found), source, path)
        return plan

    def sizes(self, path: str) -> tuple[int, int]:
        """Neurons of one expert of a layer, and how many experts it has."""
        layout = self.layouts[path]
        names = {name: torch.empty(self.source.names[name].shape, device="meta") for name in layout.weights}
        return layout.read(names).hidden, layout.num_experts

    def stack(self, path: str) -> Any:
        """A layer's experts, read."""
        layout = self.layouts[path]
        return layout.read({name: self.source.read(name) for name in layout.weights})

    def change(self, how: Mapping[str, Joined], gates: Mapping[str, float], *, method: str) -> Change:
        """The change that puts a dense network in the place of each MoE layer.

        Args:
            how: each layer's experts are joined, by their path.
            gates: what each layer's shared expert is multiplied by on average.
            method: name for the receipt.
        """
        mixtures = {network_of(layout, self.networks).prefix: path for path, layout in self.layouts.items()}
        needed = {path: self._neurons(path, how[path]) for path in self.layouts}
        dense = [network.hidden for network in self.networks if network.prefix not in mixtures]
        hidden = max([*needed.values(), *dense])
        names = [network.prefix for network in self.networks]
        steps: list[Step] = []
        notes = [f"every network has {hidden} neurons"]
        for network in self.networks:
            path = mixtures.get(network.prefix)
            if path is not None:
                steps += self._layer(path, network, how[path], gates[path], hidden)
                notes.append(f"{self.layouts[path].block}: {how[path]}{self._shared_in_words(path, gates[path])}")
            elif network.hidden != hidden:
                steps.append(_padding(network, hidden))
                notes.append(f"{network.prefix}: padded with zeros from {network.hidden} neurons")
        return Change(
            method=method, config=with_hidden(self.config, hidden, names), steps=tuple(steps), notes=tuple(notes)
        )

    def _neurons(self, path: str, how: Joined) -> int:
        one, _ = self.sizes(path)
        shared = self.layouts[path].shared
        beside = 0
        if shared is not None:
            meta = {name: torch.empty(self.source.names[name].shape, device="meta") for name in shared.names}
            beside = shared.read(meta).hidden
        return beside + (one if how.counts is not None else one * len(how.kept))

    def _layer(self, path: str, network: Network, how: Joined, gate: float, hidden: int) -> list[Step]:
        layout = self.layouts[path]
        shared = () if layout.shared is None else tuple(n for n in layout.shared.names if n != layout.shared.token_gate)
        takes = (*layout.weights, *shared)
        inside = [name for name in self.source.names if name.startswith(f"{layout.block}.") and name not in takes]
        rest = tuple(name for name in inside if self._is_router(layout, name))
        if len(rest) < len(inside):
            other = next(name for name in inside if name not in rest)
            raise ConfigError(
                f"{other} is neither of the experts nor of the router of {layout.block}, and has no place in a dense "
                "network. This model cannot become dense."
            )

        def fill(is_moment: bool, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
            stack = layout.read(tensors)
            ffn = how.moments(stack) if is_moment else how.network(stack)
            if layout.shared is not None:
                beside = layout.shared.read(tensors)
                ffn = side_by_side(ffn, beside if is_moment else scaled(beside, gate))
            return network.write(_with_biases(network, padded(ffn, hidden)))

        made = Step(takes=takes, gives=network.names, run=partial(fill, False), moments=partial(fill, True))
        gone = Step(takes=rest, gives=(), run=lambda _tensors: {}, why="a dense model has no router")
        return [made, gone] if rest else [made]

    def _is_router(self, layout: MoELayout, name: str) -> bool:
        gate = None if layout.shared is None else layout.shared.token_gate
        ours = (f"{layout.block}.moe.router.", f"{layout.block}.moe.coefficient")
        return name in layout.rows or name == gate or (config_is_ours(self.source.config) and name.startswith(ours))

    def _shared_in_words(self, path: str, gate: float) -> str:
        shared = self.layouts[path].shared
        if shared is None:
            return ""
        return " and the shared expert" + (f", times {gate:.3g}" if shared.token_gate is not None else "")


def _distilled(plan: Plan, change: Change, text: list[Batch], steps: int, learning_rate: float) -> Change:
    """The same change, whose networks are trained to give what the mixture's layers give."""
    source = plan.source
    teacher = source.model or load(source)
    student = cast(PreTrainedModel, convert(source, change, None, probe=None).model)
    pairs = {layout.block: network_of(layout, plan.networks).prefix for layout in plan.layouts.values()}
    done = distill(teacher, student, text, blocks=pairs, steps=steps, learning_rate=learning_rate)
    state = student.state_dict()

    def trained(names: tuple[str, ...], _tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: state[name] for name in names}

    # Moments of weights that were trained on the way would be moments of others.
    steps_done = tuple(
        replace(step, run=partial(trained, step.gives), moments=None) if step.gives else step for step in change.steps
    )
    return replace(change, steps=steps_done, notes=(*change.notes, str(done)))


def _padding(network: Network, hidden: int) -> Step:
    def run(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return network.write(padded(network.read(tensors), hidden))

    return Step(takes=network.names, gives=network.names, run=run, moments=run)


def _with_biases(network: Network, ffn: DenseFFN) -> DenseFFN:
    """Biases of 0 where the dense model has biases and the experts have none."""
    zeros = ffn.up_DF.new_zeros
    has = {one: one.has_bias for one in network.maps}
    gate_F, up_F, down_D = ffn.gate_F, ffn.up_F, ffn.down_D
    if network.gate is not None and has[network.gate] and gate_F is None:
        gate_F = zeros(ffn.hidden)
    if has[network.up] and up_F is None:
        up_F = zeros(ffn.hidden)
    if has[network.down] and down_D is None:
        down_D = zeros(ffn.width)
    return replace(ffn, gate_F=gate_F, up_F=up_F, down_D=down_D)


def _check(method: str, weights: str, hidden: int | None) -> None:
    if method not in get_args(Method):
        raise ConfigError(
            f"method must be one of {', '.join(get_args(Method))}, got {method!r}. 'merge' keeps one expert's size."
        )
    check_weights(weights)
    if hidden is not None and method not in ("concat", "distill"):
        raise ConfigError(
            f"hidden is a choice of methods 'concat' and 'distill', got {hidden} with {method!r}, whose network is as "
            "large as one expert. Leave it out."
        )


def _check_ours(blueprint: Blueprint, layouts: Mapping[str, MoELayout]) -> None:
    for layout in layouts.values():
        layer = blueprint.model.get_submodule(f"{layout.block}.moe")
        assert isinstance(layer, MoELayer)
        weighs_input = isinstance(layer.experts, GatedExperts) and layer.experts.weigh == "input"
        has = {
            "a network after the experts": layer.after is not None,
            "a learned mix of routed and shared outputs": layer.mix is not None,
            "a shared part that is no network": not isinstance(layer.shared, SharedExpert | None),
            "experts that weigh their input": weighs_input,
        }
        faults = [what for what, is_there in has.items() if is_there]
        if faults:
            raise ConfigError(
                f"A dense network cannot hold {' and '.join(faults)}, which {layout.block} has. "
                "Use another recipe, or distill into a dense model of your own with moesaic.convert.distill."
            )


def _check_fit(layout: MoELayout, network: Network, source: Source, path: str) -> None:
    meta = {name: torch.empty(source.names[name].shape, device="meta") for name in layout.weights}
    stack = layout.read(meta)
    has_gate = stack.gate_EDF is not None
    if has_gate != (network.gate is not None) or (
        config_is_ours(source.config) and layout.activation != network.activation
    ):
        kinds = [
            f"{'gated' if gated else 'plain'} with {act or 'an activation of their own'}"
            for gated, act in ((has_gate, layout.activation), (network.gate is not None, network.activation))
        ]
        raise ConfigError(
            f"The experts at {path} are {kinds[0]}, the dense model's networks are {kinds[1]}: they cannot take each "
            "other's place. Use a recipe with experts of the dense model's kind."
        )
    lacks = [
        name
        for name, bias, one in (
            ("gate", stack.gate_EF, network.gate),
            ("up", stack.up_EF, network.up),
            ("down", stack.down_ED, network.down),
        )
        if bias is not None and (one is None or not one.has_bias)
    ]
    if lacks:
        raise ConfigError(
            f"The experts at {path} have biases ({', '.join(lacks)}), and the dense model's networks have none. "
            "They have no place there."
        )
