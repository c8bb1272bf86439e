"""The planner against the machine: memory of real training steps, predicted and measured."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from moesaic.core.living import Living
from moesaic.plan.layout import Layout
from moesaic.plan.memory import Job, stage_memory
from moesaic.zoo import Attention, Dense, Experts, LatentAttention, Layer, ModelShape

ABOUT = (
    "Small models that transformers builds, in float32, on this machine's CPU: two micro-batches, their gradients "
    "added up, AdamW; the peak is that of the second micro-batch.",
    "Measured: the bytes of all tensors alive, from the operation that first shows one until it is freed. Scratch that "
    "an operation makes and drops inside itself is not seen.",
    "Predicted: by the formulas of a plan, for operations as plain PyTorch does them one by one; nothing is fitted.",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """A small model, twice: as the planner sees it and as transformers builds it.

    Attributes:
        name: of the family.
        shape: of it.
        config: builds transformers' configuration of the same.
    """

    name: str
    shape: ModelShape
    config: Callable[[], Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Verified:
    """One step, predicted and measured, in bytes.

    Attributes:
        case: name of the family.
        recompute: whether layers were computed anew.
        tokens: of a micro-batch.
        states_predicted: weights, gradients and optimizer.
        states_measured: the same.
        kept_predicted: activations and logits at their most.
        kept_measured: the peak without the states.
        predicted: peak.
        measured: peak.
    """

    case: str
    recompute: bool
    tokens: int
    states_predicted: float
    states_measured: float
    kept_predicted: float
    kept_measured: float

    @property
    def predicted(self) -> float:
        """The whole peak."""
        return self.states_predicted + self.kept_predicted

    @property
    def measured(self) -> float:
        """The whole peak."""
        return self.states_measured + self.kept_measured

    @property
    def error(self) -> float:
        """Of the prediction, relative to what was measured."""
        return self.predicted / self.measured - 1


def cases(*, layers: int = 4, width: int = 128) -> tuple[Case, ...]:
    """Small models of five families.

    Args:
        layers: of each.
        width: of each, a multiple of 32.
    """
    return (
        _mixtral(layers, width),
        _qwen3(layers, width),
        _olmoe(layers, width),
        _qwen2(layers, width),
        _deepseek(layers, width),
    )


_VOCAB = 512


def _shape(name: str, width: int, *layers: Layer) -> ModelShape:
    return ModelShape(name=name, width=width, vocab=_VOCAB, layers=layers)


def _base(layers: int, width: int, heads: int) -> dict[str, Any]:
    return {
        "vocab_size": _VOCAB,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }


def _mixtral(layers: int, width: int) -> Case:
    from transformers import MixtralConfig

    attention = Attention(heads=8, kv_heads=4, head_dim=width // 8)
    layer = Layer(mixers=(attention,), feeds=(Experts(num_experts=8, top_k=2, hidden=2 * width),))
    more: dict[str, Any] = {
        "num_key_value_heads": 4,
        "intermediate_size": 2 * width,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    }
    return Case(
        name="mixtral",
        shape=_shape("mixtral", width, *(layer,) * layers),
        config=lambda: MixtralConfig(**_base(layers, width, 8), **more),
    )


def _qwen3(layers: int, width: int) -> Case:
    from transformers import Qwen3MoeConfig

    attention = Attention(heads=8, kv_heads=4, head_dim=width // 4, qk_norm="head")
    layer = Layer(mixers=(attention,), feeds=(Experts(num_experts=16, top_k=4, hidden=width // 2),))
    more: dict[str, Any] = {"num_key_value_heads": 4, "head_dim": width // 4, "moe_intermediate_size": width // 2}
    more |= {"num_experts": 16, "num_experts_per_tok": 4}
    return Case(
        name="qwen3_moe",
        shape=_shape("qwen3_moe", width, *(layer,) * layers),
        config=lambda: Qwen3MoeConfig(**_base(layers, width, 8), **more),
    )


def _olmoe(layers: int, width: int) -> Case:
    from transformers import OlmoeConfig

    attention = Attention(heads=8, kv_heads=8, head_dim=width // 8, qk_norm="full")
    layer = Layer(mixers=(attention,), feeds=(Experts(num_experts=16, top_k=4, hidden=width // 2),))
    more: dict[str, Any] = {
        "num_key_value_heads": 8,
        "intermediate_size": width // 2,
        "num_experts": 16,
        "num_experts_per_tok": 4,
    }
    return Case(
        name="olmoe",
        shape=_shape("olmoe", width, *(layer,) * layers),
        config=lambda: OlmoeConfig(**_base(layers, width, 8), **more),
    )


def _qwen2(layers: int, width: int) -> Case:
    from transformers import Qwen2MoeConfig

    experts = Experts(num_experts=16, top_k=4, hidden=width // 2, shared_hidden=width, shared_gate=True)
    layer = Layer(mixers=(Attention(heads=8, kv_heads=8, head_dim=width // 8, qkv_bias=True),), feeds=(experts,))
    more: dict[str, Any] = {
        "num_key_value_heads": 8,
        "moe_intermediate_size": width // 2,
        "shared_expert_intermediate_size": width,
    }
    more |= {"num_experts": 16, "num_experts_per_tok": 4}
    return Case(
        name="qwen2_moe",
        shape=_shape("qwen2_moe", width, *(layer,) * layers),
        config=lambda: Qwen2MoeConfig(**_base(layers, width, 8), **more),
    )


def _deepseek(layers: int, width: int) -> Case:
    from transformers import DeepseekV3Config

    # Values as wide as keys: with others, attention on a CPU stores its scores.
    mixer = LatentAttention(heads=8, q_rank=48, kv_rank=32, nope_dim=16, rope_dim=8, value_dim=24)
    experts = Experts(num_experts=16, top_k=4, hidden=width // 2, shared_hidden=width // 2, groups=4, groups_kept=2)
    first = Layer(mixers=(mixer,), feeds=(Dense(hidden=2 * width),))
    layer = Layer(mixers=(mixer,), feeds=(experts,))
    more: dict[str, Any] = {
        "q_lora_rank": 48,
        "kv_lora_rank": 32,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 24,
    }
    more |= {"moe_intermediate_size": width // 2, "intermediate_size": 2 * width, "n_routed_experts": 16}
    more |= {"num_experts_per_tok": 4, "n_group": 4, "topk_group": 2, "n_shared_experts": 1, "first_k_dense_replace": 1}
    return Case(
        name="deepseek_v3",
        shape=_shape("deepseek_v3", width, first, *(layer,) * (layers - 1)),
        config=lambda: DeepseekV3Config(**_base(layers, width, 8), num_key_value_heads=8, **more),
    )


def predict(case: Case, *, sequences: int, context: int, recompute: bool) -> tuple[float, float]:
    """Predict the states and the rest of the peak, in bytes."""
    job = Job(context=context, micro_batch=sequences, dtype="fp32", recompute=recompute, fused=False)
    layout = Layout()
    memory = stage_memory(case.shape, layout.stages(case.shape)[0], layout, job, load=1.0, in_flight=1)
    states = memory.weights + memory.gradients + memory.optimizer
    return states, memory.activations + memory.logits


def measure(case: Case, *, sequences: int, context: int, recompute: bool) -> tuple[int, int]:
    """Train two micro-batches, and measure the states and the rest of the second one's peak, in bytes."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
        case.config(), dtype=torch.float32
    )
    model.config.use_cache = False
    model.train()
    ids = torch.randint(_VOCAB, (sequences, context))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def half() -> None:
        model(input_ids=ids, labels=ids).loss.backward()

    with warnings.catch_warnings():
        # Newer versions of transformers call it otherwise, and older ones do not know that name.
        warnings.simplefilter("ignore", FutureWarning)
        if recompute:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        # The first step makes the optimizer's states; the next micro-batch's gradients are there for the second.
        half()
        optimizer.step()
        optimizer.zero_grad()
        half()
        gc.collect()
        held = _held(model, optimizer)
        living = Living([ids, *held, *model.buffers()])
        with living:
            half()
        optimizer.step()
    return sum(tensor.untyped_storage().nbytes() for tensor in held), living.peak_bytes


def _held(model: Any, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """Weights, gradients and states."""
    weights = list(model.parameters())
    gradients = [weight.grad for weight in weights if weight.grad is not None]
    states = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    return [*weights, *gradients, *states]


def verify(
    chosen: Sequence[Case] | None = None,
    *,
    sequences: int = 4,
    context: int = 256,
    say: Callable[[str], None] = lambda _line: None,
) -> Iterator[Verified]:
    """Predict and measure, family by family, with activations kept and computed anew.

    Args:
        chosen: by default all of :func:`cases`.
        sequences: of a micro-batch.
        context: tokens of each.
        say: told what is being done.
    """
    for case in cases() if chosen is None else chosen:
        for recompute in (False, True):
            say(f"{case.name}, {'computed anew' if recompute else 'kept'}")
            sizes = {"sequences": sequences, "context": context}
            states, kept = predict(case, **sizes, recompute=recompute)
            states_measured, kept_measured = measure(case, **sizes, recompute=recompute)
            yield Verified(
                case=case.name,
                recompute=recompute,
                tokens=sequences * context,
                states_predicted=states,
                states_measured=states_measured,
                kept_predicted=kept,
                kept_measured=kept_measured,
            )
