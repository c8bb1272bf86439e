"""One small language model of one recipe, trained and measured: what the experiments repeat."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch

from moesaic import recipes
from moesaic.core.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from moesaic.train.material import Material


@dataclass(frozen=True, kw_only=True, slots=True)
class Setup:
    """The numbers that every run of an experiment shares.

    Attributes:
        backbone: family of the model around the layers.
        width: D.
        layers: transformer blocks, each with an MoE layer.
        num_experts: E.
        active_hidden: hidden width of a gated dense network with as many parameters as a token may meet in one layer.
        context: tokens of a sequence.
        batch_size: sequences of a step.
        steps: optimizer steps.
        lr: highest learning rate.
        tokenizer: as for ``moesaic train``.
        dtype: as for ``moesaic train``: "float32", or "bfloat16" for autocast.
    """

    backbone: str = "qwen3"
    width: int = 64
    layers: int = 2
    num_experts: int = 8
    active_hidden: int = 192
    context: int = 128
    batch_size: int = 16
    steps: int = 200
    lr: float = 4e-3
    tokenizer: str = "bpe:1024"
    dtype: str = "float32"


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What one run measured.

    Attributes:
        recipe: its name; ``twin`` for the dense model.
        seed: of weights, noise and the order of the text.
        bits_per_byte: on held-out text, mean over domains.
        load_max_over_mean: on held-out text, mean over layers.
        drop_rate: share of rows that dispatch dropped, on held-out text.
        experts_per_token: rows that dispatch kept, over tokens, on held-out text.
        tokens_per_s: of training, from the median step.
        active_params: of one layer, as the layer itself counts them.
        total_params: of one layer.
        hidden: F that gives as many active parameters as asked.
    """

    recipe: str
    seed: int
    bits_per_byte: float
    load_max_over_mean: float
    drop_rate: float
    experts_per_token: float
    tokens_per_s: float
    active_params: int
    total_params: int
    hidden: int

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)


TWIN = "twin"


def layer_options(name: str, setup: Setup) -> dict[str, Any]:
    """The options of a recipe at the size of an experiment: E experts, one choice where one was published, else two."""
    published = recipes.get(name).options
    options: dict[str, Any] = {"num_experts": setup.num_experts}
    if isinstance(published.get("top_k"), int):
        options["top_k"] = min(2, published["top_k"])
    return options


def hidden_of_equal_activity(name: str, setup: Setup) -> int:
    """The F with which a token meets as many parameters as in the dense network of ``active_hidden``; at least 1.

    Raises:
        ConfigError: if even F = 1 gives more.
    """
    wanted = 3 * setup.width * setup.active_hidden
    small, more = (_active_params(name, setup, hidden) for hidden in (64, 128))
    slope = (more - small) / 64
    hidden = round(64 + (wanted - small) / slope) if slope > 0 else 0
    if hidden < 1:
        raise ConfigError(
            f"recipe {name} needs at least {small - 64 * slope:.0f} active parameters in a layer of width "
            f"{setup.width}, got room for {wanted}. Raise active_hidden."
        )
    return hidden


def _active_params(name: str, setup: Setup, hidden: int) -> int:
    return _layer(name, setup, hidden).num_active_params


def _layer(name: str, setup: Setup, hidden: int) -> Any:
    options = layer_options(name, setup)
    if "vocab_size" in recipes.get(name).options:
        options["vocab_size"] = 64
    with torch.device("meta"):
        return recipes.get(name).layer(setup.width, hidden=hidden, **options)


@dataclass(kw_only=True, slots=True)
class StepTimes:
    """Seconds of each training step, by a clock that the Trainer's callbacks read."""

    seconds: list[float] = field(default_factory=list)

    def callback(self) -> Any:
        """A callback that notes when steps begin and end."""
        from transformers import TrainerCallback

        seconds = self.seconds

        class Clock(TrainerCallback):
            started = 0.0

            def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                self.started = time.perf_counter()

            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                seconds.append(time.perf_counter() - self.started)

        return Clock()


def run(name: str, seed: int, setup: Setup) -> Outcome:
    """Train one recipe, or the dense twin, and measure it.

    Args:
        name: of the recipe, or ``twin``.
        seed: of everything random.
        setup: the numbers.
    Raises:
        ConfigError: if the recipe cannot be built that small.
    """
    from moesaic.hf import moe_layers

    times = StepTimes()
    material = material_of(setup)
    model = trained(name, seed, setup, callbacks=[times.callback()])
    bits, routing = measure(model, material)
    layers = [] if name == TWIN else list(moe_layers(model).values())
    dense = 3 * setup.width * setup.active_hidden
    return Outcome(
        recipe=name,
        seed=seed,
        bits_per_byte=bits,
        tokens_per_s=setup.batch_size * setup.context / statistics.median(times.seconds),
        active_params=layers[0].num_active_params if layers else dense,
        total_params=layers[0].num_params if layers else dense,
        hidden=setup.active_hidden if name == TWIN else hidden_of_equal_activity(name, setup),
        **routing,
    )


def trained(
    name: str,
    seed: int,
    setup: Setup,
    *,
    prepare: Callable[[PreTrainedModel], None] = lambda _model: None,
    callbacks: Sequence[Any] = (),
    **options: Any,
) -> PreTrainedModel:
    """Train one model as ``moesaic train`` would, without a run folder.

    Args:
        name: of the recipe, or ``twin``.
        seed: of everything random.
        setup: the numbers.
        prepare: changes the untrained model.
        callbacks: of the Trainer, beside those of balance.
        **options: for :func:`moesaic.sparsify`.
    """
    from transformers import set_seed
    from transformers.trainer_callback import PrinterCallback

    from moesaic.train import BalanceCallback, MoeTrainer
    from moesaic.train.build import training_arguments
    from moesaic.train.order import collate
    from moesaic.train.quiet import quiet_transformers

    material = material_of(setup)
    with quiet_transformers(), TemporaryDirectory() as folder:
        set_seed(seed)
        model = build(name, setup, material, **options)
        prepare(model)
        args = training_arguments(train_config(seed, setup, Path(folder)), Path(folder))
        args.save_strategy = args.eval_strategy = args.logging_strategy = "no"  # type: ignore[assignment]
        trainer = MoeTrainer(
            model=model,
            args=args,
            train_dataset=material.blocks,
            data_collator=collate,
            processing_class=material.tokenizer,
            callbacks=[BalanceCallback(), *callbacks],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return model


def train_config(seed: int, setup: Setup, folder: Path) -> Any:
    """The settings of ``moesaic train`` that a run stands for."""
    from moesaic.train import TrainConfig

    return TrainConfig(
        out=folder,
        backbone=setup.backbone,
        tokenizer=setup.tokenizer,
        width=setup.width,
        layers=setup.layers,
        context=setup.context,
        batch_size=setup.batch_size,
        steps=setup.steps,
        lr=setup.lr,
        dtype=setup.dtype,
        seed=seed,
        eval_tokens=16384,
    )


@cache
def material_of(setup: Setup) -> Material:
    """The text, read once by each process."""
    from moesaic.train.material import Material

    return Material.load(train_config(0, setup, Path("unused")))


def build(name: str, setup: Setup, material: Material, **options: Any) -> PreTrainedModel:
    """The untrained model."""
    from moesaic.hf import sparsify
    from moesaic.train.backbone import Backbone

    backbone = Backbone(
        family=setup.backbone,
        width=setup.width,
        layers=setup.layers,
        heads=max(1, setup.width // 32),
        hidden=setup.active_hidden,
        context=setup.context,
        vocab_size=len(material.tokenizer),
        end_token=int(material.tokenizer.eos_token_id),
        init_std=0.02 * max(1.0, math.sqrt(768 / setup.width)),
    )
    model = backbone.build()
    if name == TWIN:
        return model
    return sparsify(model, name, hidden=hidden_of_equal_activity(name, setup), **layer_options(name, setup) | options)


def measure(model: PreTrainedModel, material: Material) -> tuple[float, Mapping[str, float]]:
    """Held-out bits per byte, and what the routers did meanwhile."""
    from moesaic.hf import is_sparse, observe
    from moesaic.telemetry.summary import RoutingSummary

    seen: dict[str, RoutingSummary] = {}

    def add(one: Any) -> None:
        new = RoutingSummary.of(one.routing)
        seen[one.layer] = seen[one.layer] + new if one.layer in seen else new

    if not is_sparse(model):
        bits = material.evaluator(model).bits_per_byte["mean"]
        return bits, {"load_max_over_mean": 1.0, "drop_rate": 0.0, "experts_per_token": 1.0}
    with observe(model, add):
        bits = material.evaluator(model).bits_per_byte["mean"]
    layers = list(seen.values())
    kept = [(int(one.load_E.sum()) - int(one.num_dropped)) / max(1, int(one.num_tokens)) for one in layers]
    return bits, {
        "load_max_over_mean": statistics.fmean(one.load_max_over_mean for one in layers),
        "drop_rate": statistics.fmean(one.drop_rate for one in layers),
        "experts_per_token": statistics.fmean(kept),
    }
