"""The numbers of small models that the experiments share, and how one of them is trained."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import nn

from moesaic import recipes
from moesaic.core.errors import ConfigError
from moesaic.experts import LoRAExperts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TWIN = "twin"

Kind = Literal["text", "adapted", "images"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Setup:
    """The numbers that every run of an experiment shares.

    Attributes:
        backbone: family of the language model around the layers.
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

    @property
    def tokens_per_step(self) -> int:
        """Tokens that one optimizer step reads."""
        return self.batch_size * self.context


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What one run measured.

    Attributes:
        kind: "text": a language model from scratch. "adapted": one that was dense for as many steps before. "images":
            a classifier of images.
        recipe: its name; ``twin`` for the dense model.
        seed: of weights, noise and the order of the data.
        score: on what was held out: bits per byte, mean over domains; of images the share that was told rightly.
        load_max_over_mean: on what was held out, mean over layers.
        drop_rate: share of rows that dispatch dropped, on what was held out.
        experts_per_token: rows that dispatch kept, over tokens, on what was held out.
        tokens_per_s: of training, from the median step.
        active_params: of one layer, as the layer itself counts them.
        total_params: of one layer.
        hidden: F that gives as many active parameters as asked.
        options: of the recipe that were set other than published; the number of experts is not among them.
    """

    kind: Kind
    recipe: str
    seed: int
    score: float
    load_max_over_mean: float
    drop_rate: float
    experts_per_token: float
    tokens_per_s: float
    active_params: int
    total_params: int
    hidden: int
    options: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)


def options_of(name: str, setup: Setup) -> dict[str, Any]:
    """The options of a recipe at the size of an experiment.

    E experts, but one where one was published; one choice where one was published, else two; schedules that fit into
    the run and segments that fit into a sequence. Low-rank experts that wait for trained ones are trained.
    """
    published = recipes.get(name).options
    choices = published.get("top_k")
    fitting = {
        "num_experts": setup.num_experts if published["num_experts"] != 1 else 1,
        "top_k": choices if choices is None else min(2, choices),
        "cooling_steps": setup.steps,
        "segment": max(1, setup.context // 4),
        "train_experts": True,
    }
    return {name: value for name, value in fitting.items() if name in published and value is not None}


def changed_options(name: str, setup: Setup) -> dict[str, Any]:
    """What :func:`options_of` sets other than published, the number of experts left out."""
    published = recipes.get(name).options
    return {
        option: value
        for option, value in options_of(name, setup).items()
        if option != "num_experts" and value != published[option]
    }


def adapts(name: str) -> bool:
    """Whether a recipe changes a trained dense model, and makes no sense from scratch."""
    with torch.device("meta"):
        layer = cast(nn.Module, recipes.get(name).layer(16, hidden=16, **options_of(name, Setup())))
    return any(isinstance(part, LoRAExperts) for part in layer.modules())


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
    options = options_of(name, setup)
    if "vocab_size" in recipes.get(name).options:
        options["vocab_size"] = 64
    with torch.device("meta"):
        return recipes.get(name).layer(setup.width, hidden=hidden, **options).num_active_params


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


def fit(
    model: PreTrainedModel,
    data: Any,
    setup: Setup,
    *,
    seed: int,
    data_seed: int | None = None,
    collate: Callable[[Sequence[Any]], dict[str, Any]],
) -> float:
    """Train a model as ``moesaic train`` would, without a run folder.

    Args:
        model: trained in place.
        data: what it reads.
        setup: the numbers.
        seed: of noise.
        data_seed: of the order of the data; None for ``seed``.
        collate: from items of the data to a batch.
    Returns:
        Tokens per second, from the median step.
    Raises:
        NotFiniteError: if a loss is NaN or infinite.
    """
    from transformers.trainer_callback import PrinterCallback

    from moesaic.train import BalanceCallback, FiniteGuard, MoeTrainer
    from moesaic.train.build import training_arguments
    from moesaic.train.quiet import quiet_transformers

    times = StepTimes()
    with quiet_transformers(), TemporaryDirectory() as folder:
        args = training_arguments(train_config(seed, setup, Path(folder)), Path(folder))
        args.save_strategy = args.eval_strategy = args.logging_strategy = "no"
        args.data_seed = data_seed
        trainer = MoeTrainer(
            model=model,
            args=args,
            train_dataset=data,
            data_collator=collate,
            callbacks=[FiniteGuard(), BalanceCallback(), times.callback()],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return setup.tokens_per_step / statistics.median(times.seconds)


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


def measured(model: PreTrainedModel, score: Callable[[], float], setup: Setup) -> dict[str, Any]:
    """The figures of an :class:`Outcome` that a trained model gives by itself.

    Args:
        model: trained.
        score: runs the model over what was held out.
        setup: the numbers.
    """
    from moesaic.hf import is_sparse, moe_layers, observe
    from moesaic.telemetry.summary import RoutingSummary

    seen: dict[str, RoutingSummary] = {}

    def add(one: Any) -> None:
        new = RoutingSummary.of(one.routing)
        seen[one.layer] = seen[one.layer] + new if one.layer in seen else new

    if not is_sparse(model):
        dense = 3 * setup.width * setup.active_hidden
        routing = {"load_max_over_mean": 1.0, "drop_rate": 0.0, "experts_per_token": 1.0}
        return {"score": score(), "active_params": dense, "total_params": dense, **routing}
    with observe(model, add):
        result = score()
    layer = next(iter(moe_layers(model).values()))
    summaries = list(seen.values())
    kept = [(int(one.load_E.sum()) - int(one.num_dropped)) / max(1, int(one.num_tokens)) for one in summaries]
    return {
        "score": result,
        "active_params": layer.num_active_params,
        "total_params": layer.num_params,
        "load_max_over_mean": statistics.fmean(one.load_max_over_mean for one in summaries),
        "drop_rate": statistics.fmean(one.drop_rate for one in summaries),
        "experts_per_token": statistics.fmean(kept),
    }
