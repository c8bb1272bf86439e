"""An LSTM language model with a feed-forward network between its layers: where the sparsely-gated layer first stood."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, GenerationMixin, PreTrainedModel, initialization
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput
from transformers.utils.generic import can_return_tuple
from transformers.utils.output_capturing import capture_outputs

from moesaic.core.errors import ConfigError, ShapeError
from moesaic.hf.lstm_config import LstmConfig


class LstmFeedForward(nn.Module):
    """What the mixture takes the place of: D to F and back, without biases.

    Shape:
        ``(B, P, D)`` -> ``(B, P, D)``.
    """

    def __init__(self, config: LstmConfig) -> None:
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Work on each position by itself."""
        output: Tensor = self.down_proj(self.act_fn(self.up_proj(hidden_states)))
        return output


class LstmBlock(GradientCheckpointingLayer):  # type: ignore[no-untyped-call]
    """An LSTM layer and, in every block but the last, the feed-forward network after it, each with its residual.

    Shape:
        ``(B, P, D)`` -> ``(B, P, D)``.
    """

    def __init__(self, config: LstmConfig, *, has_feed_forward: bool) -> None:
        super().__init__()
        self.lstm = nn.LSTM(config.hidden_size, config.hidden_size, batch_first=True)
        self.feed_forward = LstmFeedForward(config) if has_feed_forward else None
        self.dropout = nn.Dropout(config.dropout)
        self.sigmoid_after = config.sigmoid_after

    def forward(self, hidden_states: Tensor, order_BP: Tensor | None) -> Tensor:
        """Read the sequences, in the order of ``order_BP`` if it is given, and leave every position where it was."""
        hidden_states = hidden_states + cast(Tensor, self.dropout(self._recur(hidden_states, order_BP)))
        if self.feed_forward is None:
            return hidden_states
        output: Tensor = self.feed_forward(hidden_states)
        if self.sigmoid_after:
            output = output.sigmoid()
        return hidden_states + cast(Tensor, self.dropout(output))

    def _recur(self, x_BPD: Tensor, order_BP: Tensor | None) -> Tensor:
        if order_BP is None:
            y_BPD: Tensor = self.lstm(x_BPD)[0]
            return y_BPD
        index_BPD = order_BP.unsqueeze(-1).expand_as(x_BPD)
        moved_BPD: Tensor = self.lstm(x_BPD.gather(1, index_BPD))[0]
        return torch.zeros_like(moved_BPD).scatter(1, index_BPD, moved_BPD)


class LstmPreTrainedModel(PreTrainedModel):  # type: ignore[no-untyped-call]
    """How the LSTM models draw their weights."""

    config_class = LstmConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    # As transformers declares them.
    _no_split_modules = ["LstmBlock"]  # noqa: RUF012
    _can_record_outputs = {"hidden_states": LstmBlock}  # noqa: RUF012

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)  # type: ignore[no-untyped-call]
        if isinstance(module, nn.LSTM):
            draw: Any = initialization
            for name, parameter in module.named_parameters():
                if name.startswith("weight"):
                    draw.normal_(parameter, std=self.config.initializer_range)
                else:
                    draw.zeros_(parameter)
            # Gates lie in the order input, forget, cell, output. One of the two biases opens the forget gate, as
            # Jozefowicz et al. 2015 found best; Shazeer et al. do not say what they did.
            bias: Any = module.bias_ih_l0
            gates = torch.arange(4, device=bias.device).repeat_interleave(module.hidden_size)
            draw.copy_(bias, (gates == 1).to(bias.dtype))


class LstmModel(LstmPreTrainedModel):  # type: ignore[no-untyped-call]
    """The language model without its softmax: embedding, then blocks of LSTM layer and feed-forward network."""

    def __init__(self, config: LstmConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.dropout = nn.Dropout(config.dropout)
        last = config.num_hidden_layers - 1
        self.layers = nn.ModuleList(LstmBlock(config, has_feed_forward=index < last) for index in range(last + 1))
        self.gradient_checkpointing = False
        self.post_init()  # type: ignore[no-untyped-call]

    @capture_outputs  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutput:
        """Read sequences.

        Args:
            input_ids: (B, P), or None where ``inputs_embeds`` are given.
            attention_mask: (B, P), 0 where padding is, on whichever side. Padding changes nothing at the tokens.
            inputs_embeds: (B, P, D).
            kwargs: what transformers passes to every model; nothing is done with it.
        Raises:
            ConfigError: unless exactly one of ``input_ids`` and ``inputs_embeds`` is given.
            ShapeError: if the mask is of another shape.
        """
        if (input_ids is None) == (inputs_embeds is None):
            given = "neither" if input_ids is None else "both"
            raise ConfigError(f"{type(self).__name__} reads input_ids or inputs_embeds, got {given}. Pass one of them.")
        hidden_states = self.dropout(self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds)
        order_BP = _tokens_first(attention_mask, hidden_states)
        for block in self.layers:
            hidden_states = block(hidden_states, order_BP)
        return BaseModelOutput(last_hidden_state=hidden_states)


class LstmForCausalLM(LstmPreTrainedModel, GenerationMixin):  # type: ignore[no-untyped-call]
    """The language model of Shazeer et al. 2017 (arXiv:1701.06538, section 5.1 and appendix C.1), dense or made sparse.

    Embedding, LSTM, feed-forward network, LSTM, softmax; with more LSTM layers, a feed-forward network between each and
    the next. A residual around every layer but the embedding and the softmax; dropout on each layer's output; a sigmoid
    on the feed-forward network's, before the dropout. ``moesaic.sparsify`` puts mixtures where the feed-forward
    networks stand. The published model has a sampled softmax over 793,471 words; this one has the whole softmax.

    It keeps no cache: ``generate`` reads the whole text again for each new token.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: LstmConfig) -> None:
        super().__init__(config)
        self.model = LstmModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()  # type: ignore[no-untyped-call]

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int = 0,
        **kwargs: Any,
    ) -> CausalLMOutput:
        """Predict each next token.

        Args:
            input_ids: (B, P), or None where ``inputs_embeds`` are given.
            attention_mask: (B, P), 0 where padding is, on whichever side.
            inputs_embeds: (B, P, D).
            labels: (B, P), as ``input_ids``, -100 where nothing is to be predicted; the loss shifts them.
            logits_to_keep: give logits for this many last positions only; 0 for all.
            kwargs: for the loss, such as ``num_items_in_batch``.
        """
        outputs = self.model(input_ids=input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds, **kwargs)
        logits = self.lm_head(outputs.last_hidden_state[:, -logits_to_keep:])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutput(loss=loss, logits=logits, hidden_states=outputs.hidden_states)

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def prepare_inputs_for_generation(  # type: ignore[override]  # there is no cache to prepare
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Give the whole text so far.

        Raises:
            ConfigError: if the prompt came as embeddings: without a cache they could not be gone on from.
        """
        if inputs_embeds is not None:
            raise ConfigError(
                f"{type(self).__name__} generates from input_ids, got inputs_embeds: it keeps no cache to go on from "
                "them. Pass token ids."
            )
        return {"input_ids": input_ids, "attention_mask": attention_mask}


def join_auto_classes() -> None:
    """Let ``AutoModel`` and ``AutoModelForCausalLM`` build the LSTM models."""
    AutoModel.register(LstmConfig, LstmModel, exist_ok=True)
    AutoModelForCausalLM.register(LstmConfig, LstmForCausalLM, exist_ok=True)


def _tokens_first(attention_mask: Tensor | None, hidden_states: Tensor) -> Tensor | None:
    """The positions of each sequence, (B, P), its tokens before its padding; None if there is no mask."""
    if attention_mask is None:
        return None
    if attention_mask.shape != hidden_states.shape[:2]:
        raise ShapeError(
            f"attention_mask must have one entry for each token, {tuple(hidden_states.shape[:2])}, "
            f"got {tuple(attention_mask.shape)}. An LSTM keeps no cache: pass the whole text with its mask."
        )
    return torch.argsort((attention_mask == 0).to(torch.uint8), dim=1, stable=True)
