"""``moesaic generate``: text from a trained model, as it comes."""

from __future__ import annotations

import json
import time
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moesaic.cli.pages import ask_for_large_pages

if TYPE_CHECKING:
    from moesaic.train.load import Trained


def add_to(app: typer.Typer) -> None:
    """Add the verb."""
    example = 'Example: moesaic generate runs/a --prompt "It is a truth" --max-new-tokens 80'
    app.command("generate", epilog=example)(generate)


def generate(
    path: Annotated[Path, typer.Argument(help="A run folder, or a model folder.", show_default=False)],
    prompt: Annotated[str, typer.Option(help="The text to go on from.")] = "",
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to write, at most.", min=1)] = 80,
    temperature: Annotated[float, typer.Option(help="0 always takes the likeliest token.", min=0.0)] = 0.8,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest tokens of this mass.", min=0.0, max=1.0)] = 0.95,
    seed: Annotated[int, typer.Option(help="The same seed writes the same text.", min=0)] = 0,
    domain: Annotated[
        int | None, typer.Option(help="The text's domain, for recipes that ask: 0, 1, ...", min=0, show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print text and speed as JSON at the end.")] = False,
) -> None:
    """Let a trained model go on with a text.

    Domains are numbered in the order in which training lists their bits per byte.
    """
    ask_for_large_pages()
    from moesaic.hf import domains
    from moesaic.train import load_trained

    trained = load_trained(path)
    input_ids = _encode(trained, prompt, max_new_tokens)
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        # top_p = 0 would leave no token at all.
        sampling = {"do_sample": True, "temperature": temperature, "top_p": max(top_p, 1e-6), "top_k": 0}
    if not as_json:
        print(prompt, end="", flush=True)
    start_s = time.perf_counter()
    screen = None if as_json else _Screen(trained, _num_given(trained, input_ids))
    with nullcontext() if domain is None else domains(domain):
        output = _generate(trained, input_ids, seed, screen, max_new_tokens, sampling)
    spent_s = time.perf_counter() - start_s
    text = trained.tokenizer.decode(output, skip_special_tokens=True)
    if as_json:
        figures = {"new_tokens": len(output), "tokens_per_s": len(output) / spent_s}
        print(json.dumps({"prompt": prompt, "text": text, **figures}, indent=1))


def _encode(trained: Trained, prompt: str, max_new_tokens: int) -> list[int]:
    """Give the begin-of-text token and the prompt, as in training."""
    from moesaic.core.errors import ConfigError

    tokenizer: Any = trained.tokenizer
    input_ids = [tokenizer.bos_token_id, *tokenizer.encode(prompt, add_special_tokens=False)]
    config = trained.model.config
    longest = int(getattr(config, "max_position_embeddings", 0) or 0)
    wanted = len(input_ids) + max_new_tokens
    if config.is_encoder_decoder:
        # Each stack has read half of the context in training; T5's relative positions set no limit.
        longest = trained.run.config.context // 2 if trained.run else 0
        wanted = max(len(input_ids), max_new_tokens)
    is_absolute = hasattr(config, "n_positions")
    if is_absolute and wanted > longest:
        left = longest - len(input_ids)
        raise ConfigError(
            f"this model has {longest} positions, prompt and new tokens need {wanted}. "
            f"Shorten the prompt by {wanted - longest} tokens"
            + (f", or lower --max-new-tokens to {left}." if left > 0 else ".")
        )
    if longest and wanted > longest:
        typer.echo(f"Note: the model was trained on {longest} tokens at a time; text beyond them is worse.", err=True)
    return input_ids


def _generate(
    trained: Trained, input_ids: list[int], seed: int, streamer: Any, max_new_tokens: int, sampling: dict[str, Any]
) -> list[int]:
    import torch
    from transformers import set_seed

    from moesaic.train.quiet import quiet_transformers

    set_seed(seed)
    model: Any = trained.model
    end = trained.tokenizer.eos_token_id
    ids = torch.tensor([input_ids], device=model.device)
    with quiet_transformers():
        output = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            eos_token_id=end,
            pad_token_id=end,
            streamer=streamer,
            **sampling,
        )
    new: list[int] = output[0, _num_given(trained, input_ids) :].tolist()
    return new


def _num_given(trained: Trained, input_ids: list[int]) -> int:
    """Tokens before the first new one: the prompt; or, where an encoder reads that, the one the decoder starts from."""
    return 1 if trained.model.config.is_encoder_decoder else len(input_ids)


class _Screen:
    """Prints text as its tokens come; bytes of an unfinished character wait for the rest."""

    def __init__(self, trained: Trained, num_prompt: int):
        self.tokenizer = trained.tokenizer
        self.left = num_prompt
        self.tokens: list[int] = []
        self.printed = 0

    def put(self, value: Any) -> None:
        """Take tokens; the first come from the prompt."""
        new = value.reshape(-1).tolist()
        skip = min(self.left, len(new))
        self.left -= skip
        self.tokens += new[skip:]
        self._print(self._text().rstrip("\N{REPLACEMENT CHARACTER}"))

    def end(self) -> None:
        """Print what is left, and a new line."""
        self._print(self._text())
        print(flush=True)

    def _text(self) -> str:
        return str(self.tokenizer.decode(self.tokens, skip_special_tokens=True))

    def _print(self, text: str) -> None:
        print(text[self.printed :], end="", flush=True)
        self.printed = max(self.printed, len(text))
