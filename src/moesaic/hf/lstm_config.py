"""The configuration of the LSTM language model; the model is in lstm.py."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from moesaic.core.errors import ConfigError


class LstmConfig(PreTrainedConfig):  # type: ignore[no-untyped-call]
    """The numbers of an :class:`~moesaic.hf.lstm.LstmForCausalLM`, under transformers' usual names.

    Attributes:
        hidden_size: D, of embedding, LSTM layers and residual stream.
        intermediate_size: F of each feed-forward network.
        num_hidden_layers: LSTM layers, at least 2; a feed-forward network stands between each and the next.
        hidden_act: of the feed-forward networks.
        dropout: of each layer's output, in training; the published models have 0.1 to 0.4.
        sigmoid_after: put each feed-forward network's output through a sigmoid, as published.
        max_position_embeddings: tokens that the model was trained on at a time; it can read more.
    Raises:
        ConfigError: if there are fewer than 2 LSTM layers.
    """

    model_type = "moesaic-lstm"

    vocab_size: int = 257
    hidden_size: int = 512
    intermediate_size: int = 1024
    num_hidden_layers: int = 2
    hidden_act: str = "relu"
    dropout: float | int = 0.0
    sigmoid_after: bool = True
    initializer_range: float = 0.02
    max_position_embeddings: int = 256
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)  # type: ignore[no-untyped-call]
        if self.num_hidden_layers < 2:
            raise ConfigError(
                "An LSTM language model needs num_hidden_layers of at least 2, so that a feed-forward network stands "
                f"between two of them, got {self.num_hidden_layers}. Use 2."
            )
        # Whoever asks an Auto class for the model has a configuration first. The model itself cannot be told of when
        # transformers' configurations are read: it needs more of transformers than there is by then.
        from moesaic.hf.lstm import join_auto_classes

        join_auto_classes()
