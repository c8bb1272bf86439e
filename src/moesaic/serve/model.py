"""A model that is served: what it reads, where it ends, how much fits."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from moesaic.core.errors import ConfigError
from moesaic.hf import adopt, is_sparse, moe_layers
from moesaic.hf.native.adopt import is_native_mixture
from moesaic.serve.refusal import BAD, RefusedError
from moesaic.train import load_trained


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ServedModel:
    """A causal language model with MoE layers, its tokenizer, and what a service has to know of them.

    Attributes:
        name: by which clients ask for it.
        model: the model, in evaluation mode; one of transformers is adopted, its experts untouched.
        tokenizer: its tokenizer.
        begins: tokens put before every text, as in training; empty where the tokenizer knows by itself.
        ends: tokens that end an answer.
        context: tokens that prompt and answer may have together; None where the model sets no limit.
        layers: module path of each MoE layer and how many experts it has, in depth order.
        recipe: of its MoE layers, or the class of the model.
        trace: a routing trace of this model, to know its experts from; None if there is none.
    """

    name: str
    model: Any
    tokenizer: Any
    begins: tuple[int, ...]
    ends: frozenset[int]
    context: int | None
    layers: dict[str, int]
    recipe: str
    trace: Path | None = None

    @property
    def has_chat_template(self) -> bool:
        """Whether the tokenizer says how a conversation is written."""
        return bool(getattr(self.tokenizer, "chat_template", None))

    def encode(self, text: str) -> list[int]:
        """The tokens of a prompt, with those that begin a text.

        Raises:
            RefusedError: if there are none.
        """
        ids = [*self.begins, *self.tokenizer.encode(text, add_special_tokens=not self.begins)]
        if not ids:
            raise RefusedError(
                BAD,
                "prompt is empty, and this model's tokenizer has no token to begin a text with. Send some text.",
                field="prompt",
            )
        return cast(list[int], ids)

    def encode_chat(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """The tokens of a conversation, up to where the model is to answer.

        Raises:
            RefusedError: if the tokenizer has no chat template, or the template does not take these messages.
        """
        if not self.has_chat_template:
            raise RefusedError(
                BAD,
                f"The model {self.name} has no chat template: it goes on with text and was not taught to talk. Send "
                "the text to /v1/completions.",
                field="messages",
                code="no_chat_template",
            )
        try:
            written = self.tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False)
        except Exception as error:  # templates are programs of the model's makers, and raise what they like
            reason = " ".join(str(error).split()).rstrip(".")
            raise RefusedError(
                BAD, f"The chat template does not take these messages: {reason}. Change them.", field="messages"
            ) from error
        return cast(list[int], self.tokenizer.encode(written, add_special_tokens=False))

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some tokens, those that only mark something left out."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def load_served(path: Path, *, name: str | None = None, trace: Path | None = None) -> ServedModel:
    """Read a model to be served.

    Args:
        path: a run folder, or a model folder of ours or of transformers.
        name: by which clients ask for it; the folder's own by default.
        trace: a routing trace of the model; by default the one that ``moesaic inspect`` wrote into the run folder.
    Raises:
        CheckpointError: if it cannot be read.
        ConfigError: if it has no MoE layers, has an encoder, or needs tokens that are not written yet.
    """
    trained = load_trained(path)
    beside = path / "report.trace.parquet"
    trace = trace or (beside if beside.is_file() else None)
    return prepare(
        trained.model,
        trained.tokenizer,
        name=name or path.resolve().name,
        trace=trace,
        as_trained=trained.run is not None,
    )


def prepare(
    model: Any, tokenizer: Any, *, name: str, trace: Path | None = None, as_trained: bool = False
) -> ServedModel:
    """Prepare a model that is in memory for being served; one of transformers is adopted.

    Args:
        model: a causal language model with MoE layers.
        tokenizer: of the model.
        name: by which clients ask for it.
        trace: a routing trace of the model.
        as_trained: put the token that begins a text before every prompt, as Moesaic's training does.
    Raises:
        ConfigError: if it has no MoE layers, has an encoder, or needs tokens that are not written yet.
    """
    if model.config.is_encoder_decoder:
        raise ConfigError(
            f"moesaic serve needs a model that goes on with a text, got {type(model).__name__}, which has an encoder. "
            "Use moesaic generate."
        )
    if not is_sparse(model):
        if not is_native_mixture(model):
            raise ConfigError(
                f"moesaic serve needs a model with MoE layers, got {type(model).__name__}, which has none. Name the "
                "run of a mixture; a dense twin can be heard with moesaic generate."
            )
        # For good, not request by request: adopting changes classes, which several threads would see.
        adopt(model, kernel=None)
    model.train(False)
    spec = getattr(model.config, "moesaic", None) or {}
    begin = tokenizer.bos_token_id
    found = ServedModel(
        name=name,
        model=model,
        tokenizer=tokenizer,
        begins=(int(begin),) if begin is not None and (as_trained or spec) else (),
        ends=_ends(model, tokenizer),
        context=int(getattr(model.config.get_text_config(), "max_position_embeddings", 0) or 0) or None,
        layers={path: layer.num_experts for path, layer in moe_layers(model).items()},
        recipe=str(spec.get("recipe") or type(model).__name__),
        trace=trace,
    )
    _try(found)
    return found


def keeps_cache(model: Any) -> bool:
    """Whether a model remembers what it has read; others read the whole text again for each token."""
    return bool(type(model)._supports_default_dynamic_cache())


def takes_logits_to_keep(model: Any) -> bool:
    """Whether a model can be told to predict after the last token only: a long prompt's other logits fill gigabytes."""
    return "logits_to_keep" in inspect.signature(type(model).forward).parameters


def _ends(model: Any, tokenizer: Any) -> frozenset[int]:
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    listed = configured if isinstance(configured, list) else [configured]
    return frozenset(int(token) for token in (*listed, tokenizer.eos_token_id) if token is not None)


def _try(found: ServedModel) -> None:
    """Let transformers write one token: what cannot generate says so now, not to the first client."""
    import torch

    from moesaic.train.quiet import quiet_transformers

    ids = torch.tensor([[*found.begins] or [min(found.ends, default=0)]], device=found.model.device)
    with quiet_transformers(), torch.inference_mode():
        found.model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=1, do_sample=False, pad_token_id=0
        )
