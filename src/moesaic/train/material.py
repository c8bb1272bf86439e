"""What a run reads: its tokenizer, and its text as token blocks. MoE and twin share one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesaic.core.errors import ConfigError
from moesaic.train.backbone import ENCODER_DECODERS
from moesaic.train.config import TrainConfig
from moesaic.train.evaluate import Evaluator
from moesaic.train.load import find_model

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from moesaic.data import PrefixBlocks, TokenBlocks


@dataclass(frozen=True, kw_only=True, slots=True)
class Material:
    """A run's tokenizer and text, read once and checked.

    Attributes:
        tokenizer: of the model.
        blocks: training text.
        evaluator: measures on held-out text during training.
        last_evaluator: measures on all held-out text.
        fingerprint: of the data.
    """

    tokenizer: PreTrainedTokenizerFast
    blocks: TokenBlocks | PrefixBlocks
    evaluator: Evaluator
    last_evaluator: Evaluator
    fingerprint: str

    @classmethod
    def load(cls, config: TrainConfig, *, tokenizer: Path | None = None, fingerprint: str | None = None) -> Material:
        """Read what a config asks for.

        Args:
            config: of the run.
            tokenizer: the run's own, kept from its first session; a BPE trained anew could break ties otherwise.
            fingerprint: what the data must have; None to take any.
        Raises:
            DataError: if the data cannot be read, or give no full block, or nothing is held out.
            ConfigError: if the fingerprint is another.
        """
        from moesaic.data import PrefixBlocks, TokenBlocks, load_corpus, load_tokenizer

        corpus = load_corpus(config.data)
        if fingerprint is not None and corpus.fingerprint != fingerprint:
            raise ConfigError(
                f"the data at {config.data} have changed since the run was started: their fingerprint was "
                f"{fingerprint}, now it is {corpus.fingerprint}. Restore the data, or start a new run."
            )
        own: Any = load_tokenizer(_tokenizer(config) if tokenizer is None else str(tokenizer), corpus)
        blocks_of = PrefixBlocks if config.backbone in ENCODER_DECODERS else TokenBlocks
        blocks = blocks_of(corpus.train, own, config.context)
        held_out: Any = blocks_of(corpus.held_out, own, config.context)
        during = Evaluator(held_out, max_tokens=config.eval_tokens)
        last = Evaluator(held_out)
        return cls(tokenizer=own, blocks=blocks, evaluator=during, last_evaluator=last, fingerprint=corpus.fingerprint)


def _tokenizer(config: TrainConfig) -> str:
    """A model that is there has its own."""
    return config.tokenizer if config.init is None else str(find_model(Path(config.init))[0])
