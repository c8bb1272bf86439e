"""How a model is laid over devices: which part of it each one holds, and what has to divide what."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from moesaic.core.errors import ConfigError
from moesaic.zoo import Attention, LatentAttention, Layer, LinearAttention, ModelShape


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """Degrees of parallelism.

    Devices are numbered with tensor parallelism fastest, then data, then pipeline stages, so that neighbours share a
    node. What is not experts is cut over ``tp`` and ``pp`` and repeated over ``dp = devices / (tp * pp)`` ranks.
    Experts are dealt out to ``ep`` of the ``tp * dp`` devices of a stage, each expert whole, and repeated over the rest
    ("parallel folding", arXiv:2504.14960): so ``ep`` and ``tp`` share devices and need not multiply.

    Attributes:
        devices: in all.
        tp: devices that each matrix outside of experts is cut over, its tokens too between them.
        pp: stages that layers are dealt out to, in order.
        ep: devices that the experts of one layer are dealt out to.
        fsdp: data-parallel ranks that split states; 1 for plain replicas.
        shard: what they split: "all" of weights, gradients and optimizer, fetching weights layer by layer (FSDP, ZeRO
            3), or the "optimizer" alone (ZeRO 1).
        uneven: whether stages may differ by one layer.
        interleave: pieces of a stage that are run in turns to shorten the pipeline's idle time.
    Raises:
        ConfigError: if a degree is not positive, or if devices or ranks cannot be divided so.
    """

    devices: int = 1
    tp: int = 1
    pp: int = 1
    ep: int = 1
    fsdp: int = 1
    shard: Literal["all", "optimizer"] = "all"
    uneven: bool = False
    interleave: int = 1

    def __post_init__(self) -> None:
        for name in ("devices", "tp", "pp", "ep", "fsdp", "interleave"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}. Give 1 to do without.")
        if self.shard not in ("all", "optimizer"):
            raise ConfigError(f"shard must be 'all' or 'optimizer', got {self.shard!r}. Choose one of them.")
        if self.devices % (self.tp * self.pp):
            raise ConfigError(
                f"devices must be a multiple of tp * pp = {self.tp} * {self.pp} = {self.tp * self.pp}, got "
                f"{self.devices}. {self._nearest(self.tp * self.pp)}"
            )
        if self.dp % self.fsdp:
            raise ConfigError(
                f"fsdp must divide the {self.dp} data-parallel ranks that devices={self.devices}, tp={self.tp} and "
                f"pp={self.pp} leave, got {self.fsdp}. These do: {_divisors(self.dp)}."
            )
        if (self.dp * self.tp) % self.ep:
            raise ConfigError(
                f"ep must divide the {self.dp * self.tp} devices of a stage (devices={self.devices}, pp={self.pp}), "
                f"got {self.ep}. These do: {_divisors(self.dp * self.tp)}."
            )

    def _nearest(self, step: int) -> str:
        below = self.devices // step * step
        return f"{below} or {below + step} would fit." if below else f"{step} would fit."

    @property
    def dp(self) -> int:
        """Data-parallel ranks."""
        return self.devices // (self.tp * self.pp)

    @property
    def expert_copies(self) -> int:
        """Devices that hold the same experts."""
        return self.dp * self.tp // self.ep

    @property
    def expert_fsdp(self) -> int:
        """Devices that split the states of the same experts: as many as ``fsdp`` and their copies allow."""
        return math.gcd(self.fsdp, self.expert_copies)

    def check(self, shape: ModelShape) -> None:
        """See that the model can be cut so.

        Raises:
            ConfigError: naming the numbers that do not divide, and what would fit.
        """
        for experts in dict.fromkeys(shape.mixtures):
            if experts.num_experts % self.ep:
                raise ConfigError(
                    f"ep must divide the {experts.num_experts} experts of a layer of {shape.name}, got {self.ep}. "
                    f"These do: {_divisors(experts.num_experts)}."
                )
        depth = shape.depth
        if self.pp > depth or (depth % self.pp and not self.uneven):
            hint = "" if self.pp > depth else ", or let stages differ by one layer with uneven stages"
            raise ConfigError(
                f"pp must divide the {depth} layers of {shape.name}, got {self.pp}. These do: {_divisors(depth)}{hint}."
            )
        heads = math.gcd(*_heads(shape)) if _heads(shape) else self.tp
        if heads % self.tp:
            raise ConfigError(
                f"tp must divide the heads of every layer of {shape.name} ({_listed(_heads(shape))}), got {self.tp}. "
                f"These do: {_divisors(heads)}."
            )

    def stages(self, shape: ModelShape) -> tuple[Stage, ...]:
        """Deal the layers out, earlier stages getting the one more where they differ."""
        layers = (*shape.encoder, *shape.layers)
        each, more = divmod(len(layers), self.pp)
        # The last stage has the head, and the first keeps the most micro-batches: the middle takes what is over.
        order = sorted(range(self.pp), key=lambda number: (number in (self.pp - 1, 0), number))
        sizes = {number: each + (rank < more) for rank, number in enumerate(order)}
        found, start = [], 0
        for number in range(self.pp):
            stop = start + sizes[number]
            found.append(Stage(number=number, first=start, layers=layers[start:stop], of=self.pp))
            start = stop
        return tuple(found)


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """The layers of one pipeline stage.

    Attributes:
        number: from 0.
        first: the first one's index among all layers.
        layers: in order.
        of: how many stages there are.
    """

    number: int
    first: int
    layers: tuple[Layer, ...]
    of: int

    @property
    def has_embeddings(self) -> bool:
        """Whether tokens come in here."""
        return self.number == 0

    @property
    def has_head(self) -> bool:
        """Whether the loss is taken here."""
        return self.number == self.of - 1


def _heads(shape: ModelShape) -> list[int]:
    return sorted(
        {
            m.heads
            for layer in (*shape.encoder, *shape.layers)
            for m in layer.mixers
            if isinstance(m, Attention | LatentAttention | LinearAttention)
        }
    )


def _listed(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, numbers))


def _divisors(number: int) -> str:
    found = [divisor for divisor in range(1, number + 1) if number % divisor == 0]
    return _listed(found) if len(found) <= 12 else f"{_listed(found[:10])} ... {found[-1]}"
