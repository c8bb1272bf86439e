"""One network, cut into the experts of one layer: partition, gate, and the factor that makes up for what is missing."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from moesaic.convert.grow.likeness import filled_layer, given, likeness, unit
from moesaic.convert.layout.dense import hidden_of, run_dense
from moesaic.convert.layout.room import SMALL_HIDDEN, Filled, Room
from moesaic.convert.weights import gates, partition
from moesaic.convert.weights.gates import Gate
from moesaic.convert.weights.parts import scaled, silenced, take, take_one, times
from moesaic.convert.weights.stack import DenseFFN
from moesaic.core.errors import ConfigError
from moesaic.kernels.activations import activation

Method = Literal["random", "cluster", "coactivation", "importance"]
GateKind = Literal["zero", "random", "centers", "from-data", "moefication"]

_NEEDS_TEXT = ("coactivation", "importance", "from-data", "moefication", "fit")
_HELD_OUT = 4
"""One in so many tokens is kept back to tell how much of the network's output the layer gives."""

_SAME, _TINY = 1e-9, 1e-30


@dataclass(frozen=True, kw_only=True, slots=True)
class Splitting:
    """How networks are cut; see :func:`moesaic.split` for what each means."""

    method: Method = "random"
    gate: GateKind = "centers"
    scale: Literal["fit", "slices", "published"] | float = "slices"
    rows: Literal["up", "gate"] = "up"
    cosine: bool = False
    active_share: float = 0.1
    overlap: bool = False
    hidden: int | None = None
    spread: float = 0.02

    def __post_init__(self) -> None:
        known: dict[str, tuple[str, ...]] = {
            "method": ("random", "cluster", "coactivation", "importance"),
            "gate": ("zero", "random", "centers", "from-data", "moefication"),
        }
        for name, values in known.items():
            if getattr(self, name) not in values:
                raise ConfigError(f"{name} must be one of {', '.join(values)}, got {getattr(self, name)!r}.")
        if isinstance(self.scale, str):
            if self.scale not in ("fit", "slices", "published"):
                raise ConfigError(f"scale must be 'fit', 'slices', 'published' or a number, got {self.scale!r}.")
        elif not 0 < self.scale < math.inf:
            raise ConfigError(f"scale must be above 0, got {self.scale}. K lets each chosen slice count once.")
        if self.overlap and self.method != "importance":
            raise ConfigError(f"overlap is for method='importance', got {self.method!r}. Leave it out.")
        if self.spread <= 0:
            raise ConfigError(f"spread must be above 0, got {self.spread}. Use gate='zero' for equal logits.")

    @property
    def text_wanted_by(self) -> str | None:
        """The first setting that needs text; None where none does."""
        wanting = [name for name in ("method", "gate", "scale") if getattr(self, name) in _NEEDS_TEXT]
        return f"{wanting[0]}={getattr(self, wanting[0])!r}" if wanting else None


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Cut:
    """One layer's split.

    Attributes:
        neuron_EF: neurons of each expert.
        shared_F: neurons of the expert that every token visits; None where there is none.
        router: tensors of the layer that are set.
        factor: of the routed experts' outputs.
        shared_factor: of the shared expert's output.
        keeps: whether the function is kept.
        missing: share of the network's output that the layer does not give, on tokens held back; None without text.
    """

    room: Room
    neuron_EF: Tensor
    shared_F: Tensor | None
    router: Mapping[str, Tensor]
    factor: float = 1.0
    shared_factor: float = 1.0
    keeps: bool = False
    missing: float | None = None

    @property
    def num_idle(self) -> int:
        """Neurons that are in no expert."""
        used = set(self.neuron_EF.flatten().tolist()) | set([] if self.shared_F is None else self.shared_F.tolist())
        return self.room.network.hidden - len(used)

    def fill(self, ffn: DenseFFN) -> Filled:
        """The layer's networks."""
        parts = len(self.neuron_EF)
        experts = scaled(take(ffn, self.neuron_EF, parts=parts), self.factor)
        if self.shared_F is None:
            return Filled(experts=experts)
        shared = take_one(ffn, self.shared_F)
        return Filled(experts=experts, shared=replace(shared, down_FD=times(shared.down_FD, self.shared_factor)))

    def move(self, ffn: DenseFFN) -> Filled:
        """The same for moments."""
        shared = None if self.shared_F is None else take_one(ffn, self.shared_F)
        return Filled(experts=take(ffn, self.neuron_EF), shared=shared)


@torch.no_grad()
def cut_network(room: Room, how: Splitting, ffn: DenseFFN, x_TD: Tensor | None) -> Cut:
    """Decide how one network is cut.

    Args:
        room: for the layer that it becomes.
        how: the method.
        ffn: the network.
        x_TD: what it reads on some text; None without text.
    """
    ffn, act = _wide(ffn), activation(room.network.activation)
    held_TD, hidden_TF = None, None
    if x_TD is not None:
        is_held_T = torch.arange(len(x_TD)) % _HELD_OUT == _HELD_OUT - 1
        x_TD, held_TD = x_TD[~is_held_T], x_TD[is_held_T]
        hidden_TF = hidden_of(ffn, x_TD, act)
    shared_F = _shared(room, ffn, hidden_TF)
    neuron_EF = _partition(room, how, ffn, x_TD, hidden_TF, shared_F)
    router = _router(room, how, ffn, neuron_EF, x_TD, hidden_TF)
    cut = Cut(room=room, neuron_EF=neuron_EF, shared_F=shared_F, router=router)
    cut = replace(cut, shared_factor=_shared_factor(cut), factor=unit(room, router) * _total(cut, how))
    if how.scale == "fit" and x_TD is not None:
        cut = replace(cut, factor=_fitted(cut, ffn, x_TD))
    keeps = how.gate == "zero" and not how.overlap and _keeps(cut)
    missing = None if held_TD is None else _missing(cut, ffn, held_TD)
    return replace(cut, keeps=keeps, missing=missing)


def _shared(room: Room, ffn: DenseFFN, hidden_TF: Tensor | None) -> Tensor | None:
    """The neurons that matter most, for the expert that every token visits."""
    if not room.shared_hidden:
        return None
    weight_F = partition.weight_importance(ffn) if hidden_TF is None else partition.importance(ffn, hidden_TF)[0]
    return weight_F.topk(room.shared_hidden).indices.sort().values


def _partition(
    room: Room,
    how: Splitting,
    ffn: DenseFFN,
    x_TD: Tensor | None,
    hidden_TF: Tensor | None,
    shared_F: Tensor | None,
) -> Tensor:
    """The neurons of each routed expert, among those that are not shared."""
    is_left_F = torch.ones(ffn.hidden, dtype=torch.bool)
    if shared_F is not None:
        is_left_F[shared_F] = False
    left_F = is_left_F.nonzero()[:, 0]
    rest, count, seed = take_one(ffn, left_F), room.num_experts, room.seed
    if how.method == "random":
        return left_F[partition.by_chance(len(left_F), count, seed)]
    if how.method == "cluster":
        return left_F[partition.by_weights(rest, count, seed, rows=how.rows, cosine=how.cosine)]
    assert x_TD is not None
    assert hidden_TF is not None
    hidden_TF = hidden_TF[:, left_F]
    if how.method == "coactivation":
        return left_F[partition.by_company(hidden_TF, count, seed, share=how.active_share)]
    group_T = partition.token_groups(x_TD, count, seed)
    importance_EF = partition.importance(rest, hidden_TF, group_T, count)
    return left_F[partition.by_importance(importance_EF, hidden=how.hidden, overlap=how.overlap)]


def _router(
    room: Room,
    how: Splitting,
    ffn: DenseFFN,
    neuron_EF: Tensor,
    x_TD: Tensor | None,
    hidden_TF: Tensor | None,
) -> dict[str, Tensor]:
    """The router's tensors, and the gate of a shared expert, which starts halfway open."""
    made: dict[str, Tensor] = {}
    if "shared.token_gate_D" in room.shapes:
        made["shared.token_gate_D"] = torch.zeros(room.shapes["shared.token_gate_D"])
    if how.gate == "random":
        return made
    if how.gate == "zero":
        gate = gates.zero_gate(room.num_experts, room.network.width)
        return made | gate.tensors(room.shapes)
    gate = gates.centers(ffn, neuron_EF)
    if x_TD is not None and hidden_TF is not None:
        gate = _fitted_gate(room, how, ffn, neuron_EF, x_TD, hidden_TF, gate)
    else:
        # Nothing is known of the tokens but that norms leave them with coordinates of about 1.
        draw = torch.Generator().manual_seed(room.seed)
        x_TD = torch.randn(256, room.network.width, generator=draw)
    if gates.has_hidden_layer(room.shapes) and gate.mix_EE is None:
        gate = gates.with_hidden_layer(gate, x_TD)
    return made | gate.with_spread(x_TD, how.spread).tensors(room.shapes)


def _fitted_gate(
    room: Room, how: Splitting, ffn: DenseFFN, neuron_EF: Tensor, x_TD: Tensor, hidden_TF: Tensor, start: Gate
) -> Gate:
    active = [hidden_TF[:, neuron_F] for neuron_F in neuron_EF]
    if how.gate == "from-data":
        voice_TE = gates.voices(take(ffn, neuron_EF), active)
        return gates.fit_linear(x_TD, voice_TE, bias="router.logit_bias_E" in room.shapes)
    if how.gate == "moefication":
        # Gated neurons may speak with either sign; those without a gate are active above 0.
        sums = [one.clamp_min(0).sum(1) if ffn.gate_DF is None else one.abs().sum(1) for one in active]
        has_layer = gates.has_hidden_layer(room.shapes)
        return gates.train_gate(x_TD, torch.stack(sums, dim=1), start, hidden_layer=has_layer, seed=room.seed)
    return start


def expert_width(room: Room, how: Splitting) -> int:
    """F of one expert, so that routed and shared experts have the network's neurons together.

    Raises:
        ConfigError: if they do not come out even.
    """
    if how.overlap and how.hidden is not None:
        return how.hidden
    neurons, count = room.network.hidden, room.num_experts
    # What the shared expert has may grow with the width of a routed one, by so many neurons for each of its own.
    base, growth = _shared_at(room, 0), _shared_at(room, 1)
    width, rest = divmod(neurons - base, count + growth)
    if rest or width < 1:
        fitting = [n for n in range(1, neurons + 1) if (neurons - base) % (n + growth) == 0 and n + growth <= neurons]
        near = sorted(sorted(fitting, key=lambda n: abs(n - count))[:3])
        with_shared = f" beside {growth} shared ones" if growth else ""
        raise ConfigError(
            f"The {neurons} neurons of {room.network.path} cannot be cut into {count} equal experts{with_shared}. "
            f"Use num_experts={' or '.join(map(str, near)) or 'another number'}."
        )
    return width


def _shared_at(room: Room, term: int) -> int:
    """The shared expert's width as ``base + growth * width``: the base, or the growth."""
    one, two = (
        int(tensor.shape[1]) if (tensor := room.built("meta", h).state_dict().get("shared.up_DF")) is not None else 0
        for h in (1, 2)
    )
    return two - one if term else one - (two - one)


def _total(cut: Cut, how: Splitting) -> float:
    """What the weights shall add up to."""
    if not isinstance(how.scale, str):
        return how.scale
    count = cut.room.num_experts
    router = getattr(cut.room.built("meta", 1), "router", None)
    chosen = float(getattr(router, "experts_per_token", count))
    return count / chosen if how.scale == "published" else chosen


def _shared_factor(cut: Cut) -> float:
    """One over what the layer makes of its shared expert."""
    room = cut.room
    if cut.shared_F is None:
        return 1.0
    small = _small_shared(room)

    def alone(ffn: DenseFFN) -> Filled:
        experts = take(ffn, torch.arange(SMALL_HIDDEN).expand(room.num_experts, -1))
        return Filled(experts=silenced(experts), shared=take_one(ffn, torch.arange(small)))

    return 1 / likeness(room, alone, small, cut.router).multiple


def _keeps(cut: Cut) -> bool:
    """Whether a small network, cut like this one, is kept by a layer of the same routing."""
    count, shared = cut.room.num_experts, 0 if cut.shared_F is None else _small_shared(cut.room)
    routed = count * SMALL_HIDDEN
    small = replace(
        cut,
        neuron_EF=torch.arange(routed).view(count, -1),
        shared_F=torch.arange(routed, routed + shared) if shared else None,
    )
    alike = likeness(cut.room, small.fill, routed + shared, cut.router)
    return alike.is_even and abs(alike.multiple - 1) < _SAME


def _small_shared(room: Room) -> int:
    return int(room.built("meta", SMALL_HIDDEN).state_dict()["shared.up_DF"].shape[1])


def _fitted(cut: Cut, ffn: DenseFFN, x_TD: Tensor) -> float:
    """The factor with which routed experts come closest to what the shared one leaves over.

    Least squares in which every token counts the same: in real models the network's output for a first token may be a
    thousand times as long as for the others.
    """
    wanted_TD, y_TD = _both(cut, ffn, x_TD)
    square_T1 = wanted_TD.square().sum(dim=1, keepdim=True).clamp_min(_TINY)
    if cut.shared_F is not None:
        shared = take_one(ffn, cut.shared_F)
        shared_TD = run_dense(shared, x_TD, activation(cut.room.network.activation))
        wanted_TD, y_TD = wanted_TD - shared_TD, y_TD - shared_TD
    best = float((y_TD * wanted_TD / square_T1).sum() / (y_TD.square() / square_T1).sum().clamp_min(_TINY))
    return cut.factor * best if best > 0 else cut.factor


def _missing(cut: Cut, ffn: DenseFFN, x_TD: Tensor) -> float:
    """The mean over tokens of the part of the network's output, in squares, that the layer does not give."""
    wanted_TD, y_TD = _both(cut, ffn, x_TD)
    off_T, square_T = (wanted_TD - y_TD).square().sum(dim=1), wanted_TD.square().sum(dim=1)
    return float((off_T / square_T.clamp_min(_TINY)).mean())


def _both(cut: Cut, ffn: DenseFFN, x_TD: Tensor) -> tuple[Tensor, Tensor]:
    """What the network gives, and what the layer does."""
    room = cut.room
    layer = filled_layer(room, cut.fill, ffn, cut.router, hidden=room.hidden)
    return run_dense(ffn, x_TD, activation(room.network.activation)), given(room, layer, x_TD)


def _wide(ffn: DenseFFN) -> DenseFFN:
    """A network in float32, on the CPU."""

    def wide(weight: Tensor | None) -> Tensor | None:
        return None if weight is None else weight.float().cpu()

    return DenseFFN(
        gate_DF=wide(ffn.gate_DF),
        up_DF=ffn.up_DF.float().cpu(),
        down_FD=ffn.down_FD.float().cpu(),
        gate_F=wide(ffn.gate_F),
        up_F=wide(ffn.up_F),
        down_D=wide(ffn.down_D),
    )
