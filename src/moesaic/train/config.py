"""Every number of a training run, checked once."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeAlias

import torch

from moesaic.core.errors import ConfigError
from moesaic.train.backbone import ENCODER_DECODERS, FAMILIES, ROTARY, WITHOUT_ATTENTION

Option: TypeAlias = float | int | str | bool

BACKBONES = tuple(FAMILIES)
DTYPES = ("auto", "float32", "bfloat16")

# Settings that a resumed run may change: none of them reaches a weight.
FREE_TO_CHANGE = frozenset({"out", "eval_every", "eval_tokens", "save_every", "log_every", "keep"})

_POSITIVE = ("width", "layers", "steps", "batch_size", "grad_accumulation", "log_every", "keep")
_POSITIVE_OR_AUTO = ("heads", "hidden", "num_experts", "top_k", "eval_every", "eval_tokens", "save_every")
_NOT_NEGATIVE = ("warmup", "seed", "weight_decay")
_INDICES = re.compile(r"[0-9]+(,[0-9]+)*")
# What a model folder says for itself.
_OF_THE_MODEL = (
    *("recipe", "tokenizer", "backbone", "width", "layers", "moe_layers", "heads", "hidden", "num_experts", "top_k"),
    *("options", "aux_coefficients", "init_std", "twin"),
)
_WHOLE = (*_POSITIVE, *_POSITIVE_OR_AUTO, "warmup", "seed", "context")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """What to train, on what, for how long. ``None`` means: work it out from the others (done on construction).

    Args:
        out: the run folder.
        init: a model folder, such as ``moesaic convert`` writes, or a run folder, to go on from: its model with its
            weights in float32, and its tokenizer. Settings of the model are then the folder's and must be left out. A
            mixture of transformers is adopted, with ``balance`` if given.
        trainable: a regular expression; parameters are frozen unless it is found in their names. None to train all.
        recipe: a name from ``moesaic.recipes.names()``.
        data: ``builtin``, or a text file, JSON lines, Parquet or folder.
        tokenizer: ``bytes``, ``bpe:SIZE`` or a tokenizer folder.
        backbone: ``llama``, ``qwen3`` or ``gpt2``; ``jamba``, a hybrid of Mamba and attention; ``lstm``, with the MoE
            between its layers; ``t5``, whose encoder reads half the context and whose decoder writes the other half.
        width: size of the residual stream.
        layers: transformer blocks; of each of encoder and decoder in ``t5``; LSTM layers in ``lstm``.
        moe_layers: which feed-forward networks become MoE: ``all``; ``every-2``, the second of each pair; or indices
            in depth order, as in ``1,3``, the decoder's on from the encoder's.
        heads: attention heads; by default as many heads of 32 as fit. ``lstm`` has none.
        hidden: hidden size of one expert; by default ``2 * width``.
        num_experts: experts of each layer; by default the recipe's.
        top_k: experts that a token meets; by default the recipe's.
        context: tokens of one training sequence.
        options: further options of the recipe.
        aux_coefficients: how strongly balance losses pull, by name; by default as the recipe says.
        balance: losses and controllers in place of the recipe's, by their names in ``moesaic.balance.TERMS``, each
            with its number; or those of the mixture of transformers that ``init`` names, which has none of its own.
        init_std: standard deviation of the initial weights of MoE and twin; by default 0.02, and for widths below
            768 larger as one over the square root of the width, so that activations keep their size. ``t5`` draws its
            own weights by their fan-in, as published: there this is for the experts alone.
        steps: optimizer steps.
        batch_size: sequences of one micro-batch and device.
        grad_accumulation: micro-batches of one optimizer step.
        lr: highest learning rate; a cosine takes it to a tenth at the last step.
        warmup: steps over which the learning rate rises from 0; by default a twentieth of ``steps``.
        weight_decay: decoupled decay, on matrices only.
        clip: largest norm of the gradient.
        dtype: ``auto`` is float32 on a CPU and bfloat16 autocast on CUDA.
        seed: of weights, noise and the order of the data.
        twin: train the dense twin too.
        eval_every: steps between evaluations; by default a tenth of ``steps``.
        eval_tokens: held-out tokens of each domain that an evaluation during training reads, evenly spread; by
            default 16384, so that a short run is not mostly evaluation. The last evaluation always reads all.
        save_every: steps between checkpoints; by default a fifth of ``steps``.
        log_every: steps between lines of ``history.jsonl``.
        keep: checkpoints to keep.
    Raises:
        ConfigError: if a setting cannot be met.
    """

    out: Path
    init: str | None = None
    trainable: str | None = None
    recipe: str = "mixtral"
    data: str = "builtin"
    tokenizer: str = "bytes"
    backbone: str = "llama"
    width: int = 128
    layers: int = 4
    moe_layers: str = "all"
    heads: int | None = None
    hidden: int | None = None
    num_experts: int | None = None
    top_k: int | None = None
    context: int = 256
    options: Mapping[str, Option] = field(default_factory=dict)
    aux_coefficients: Mapping[str, float] = field(default_factory=dict)
    balance: Mapping[str, float] | None = None
    init_std: float | None = None
    steps: int = 1000
    batch_size: int = 16
    grad_accumulation: int = 1
    lr: float = 2e-3
    warmup: int | None = None
    weight_decay: float = 0.1
    clip: float = 1.0
    dtype: str = "auto"
    seed: int = 0
    twin: bool = False
    eval_every: int | None = None
    eval_tokens: int | None = None
    save_every: int | None = None
    log_every: int = 10
    keep: int = 2

    def __post_init__(self) -> None:
        _fill(self, "out", Path(self.out))
        self._check_numbers()
        self._check_choices()
        if self.init is None:
            self._check_backbone()
            _default(self, "hidden", 2 * self.width)
            _default(self, "init_std", 0.02 * max(1.0, math.sqrt(768 / self.width)))
            self._check_layer()
        else:
            self._check_nothing_of_the_model()
        _default(self, "warmup", self.steps // 20)
        _default(self, "eval_every", max(1, self.steps // 10))
        _default(self, "eval_tokens", 16384)
        _default(self, "save_every", max(1, self.steps // 5))
        if self.warmup is not None and self.warmup >= self.steps:
            raise ConfigError(
                f"warmup must be shorter than steps={self.steps}, got {self.warmup}. Lower warmup, or train longer."
            )

    def _check_numbers(self) -> None:
        for name in _WHOLE:
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
                raise ConfigError(f"{name} must be a whole number, got {value!r}. Pass {name} without a fraction.")
        for name in (*_POSITIVE, *_POSITIVE_OR_AUTO):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}. Raise {name}.")
        if self.context < 2:
            raise ConfigError(f"context must be at least 2, got {self.context}. Raise context.")
        for name in _NOT_NEGATIVE:
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise ConfigError(f"{name} must be 0 or more, got {value}. Raise {name}.")
        for name in ("lr", "clip", "init_std"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ConfigError(f"{name} must be a finite number above 0, got {value}. Raise {name}.")

    def _check_choices(self) -> None:
        for name, choices in (("backbone", BACKBONES), ("dtype", DTYPES)):
            value = getattr(self, name)
            if value not in choices:
                raise ConfigError(f"{name} must be one of {', '.join(choices)}, got {value!r}. Pick one of them.")
        if self.moe_layers not in ("all", "every-2") and not _INDICES.fullmatch(str(self.moe_layers)):
            raise ConfigError(
                f"moe_layers must be all, every-2 or indices such as 1,3, got {self.moe_layers!r}. Pick one of them."
            )
        if self.tokenizer == "":
            raise ConfigError("tokenizer must be bytes, bpe:SIZE or a folder, got an empty name. Use bytes.")

        if self.trainable is not None:
            try:
                re.compile(self.trainable)
            except re.error as error:
                raise ConfigError(
                    f"trainable must be a regular expression, got {self.trainable!r}: {error}. Write for example "
                    "trainable=experts."
                ) from error

    def _check_nothing_of_the_model(self) -> None:
        defaults = {item.name: _default_of(item) for item in fields(self)}
        for name in _OF_THE_MODEL:
            value = getattr(self, name)
            if value != defaults[name]:
                raise ConfigError(
                    f"with init the model is the one in {self.init}, got {name}={value!r} too. Leave {name} out, or "
                    "convert the model first."
                )

    def _check_layer(self) -> None:
        """Build one layer without memory, so that a recipe's own refusals come before any file is touched."""
        from moesaic import recipes

        for name in ("num_experts", "top_k"):
            if name in self.options:
                raise ConfigError(
                    f"{name} is a setting of its own and must not be among the options, got options with {name}="
                    f"{self.options[name]!r}. Pass {name} (--{name.replace('_', '-')}) instead."
                )
        options: dict[str, Any] = {"num_experts": self.num_experts, "top_k": self.top_k, **self.options}
        recipe = recipes.get(self.recipe)
        with torch.device("meta"):
            recipe.layer(self.width, hidden=self.hidden or 1, **options)

    def _check_backbone(self) -> None:
        if self.backbone in WITHOUT_ATTENTION:
            if self.heads is not None:
                raise ConfigError(
                    f"heads are for backbones with attention, which {self.backbone} has not, got {self.heads}. "
                    "Leave heads out."
                )
            if self.layers < 2:
                raise ConfigError(
                    f"layers must be at least 2 for {self.backbone}, so that the MoE stands between two of them, got "
                    f"{self.layers}. Raise layers."
                )
        else:
            _default(self, "heads", max(1, self.width // 32))
            self._check_attention(self.heads or 1)
        if self.backbone in ENCODER_DECODERS and self.context % 2:
            raise ConfigError(
                f"context must be even for {self.backbone}, half of it for the encoder and half for the decoder, got "
                f"{self.context}. Try context={self.context + 1}."
            )

    def _check_attention(self, heads: int) -> None:
        if self.width % heads:
            raise ConfigError(
                f"heads must divide width={self.width}, got {heads}. Try heads={math.gcd(self.width, heads)}."
            )
        if self.backbone in ROTARY and (self.width // heads) % 2:
            raise ConfigError(
                f"width / heads must be even for the rotary positions of {self.backbone}, got {self.width} / {heads} = "
                f"{self.width // heads}. Change heads or width."
            )

    @property
    def sparse_layers(self) -> str | list[int]:
        """``moe_layers`` as ``moesaic.sparsify`` takes it."""
        return [int(index) for index in self.moe_layers.split(",")] if self.moe_layers[0].isdigit() else self.moe_layers

    @property
    def tokens_per_step(self) -> int:
        """Positions that one device reads in one optimizer step."""
        return self.batch_size * self.grad_accumulation * self.context

    def settings(self) -> dict[str, Any]:
        """Every setting but ``out``, as JSON values; paths are absolute, so that a run resumes from anywhere."""
        values = {item.name: getattr(self, item.name) for item in fields(self) if item.name != "out"}
        values["options"] = dict(self.options)
        values["aux_coefficients"] = dict(self.aux_coefficients)
        values["balance"] = None if self.balance is None else dict(self.balance)
        for name in ("data", "tokenizer", "init"):
            value = values[name]
            if value not in ("builtin", "bytes", None) and Path(value).exists():
                values[name] = str(Path(value).resolve())
        return values

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any], out: Path) -> TrainConfig:
        """Build the config back from :meth:`settings`.

        Raises:
            ConfigError: if a name is not a setting.
        """
        known = {item.name for item in fields(cls)}
        for name in settings:
            if name not in known:
                raise ConfigError(
                    f"{name!r} is not a setting of a training run; there are {', '.join(sorted(known))}. "
                    "Correct the name, or use the version of Moesaic that wrote the run."
                )
        return cls(**{**settings, "out": out})


def _default_of(item: Field[Any]) -> Any:
    return item.default if item.default_factory is MISSING else item.default_factory()


def _fill(config: TrainConfig, name: str, value: Any) -> None:
    object.__setattr__(config, name, value)


def _default(config: TrainConfig, name: str, value: Any) -> None:
    if getattr(config, name) is None:
        _fill(config, name, value)
