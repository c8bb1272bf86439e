"""The options that verbs of ``moesaic convert`` share, each said once, and the groups of them that go together."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

Source = Annotated[
    Path,
    typer.Argument(help="A model folder, or a run folder, of which the newest model is taken.", show_default=False),
]
Out = Annotated[Path, typer.Option("--out", help="The folder to write; it must not exist.", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="Print the receipt as JSON.")]
Probe = Annotated[
    bool, typer.Option("--probe/--no-probe", help="Run both models on a small batch and compare their logits.")
]
Recipe = Annotated[str, typer.Option(help="See `moesaic recipes`.")]
TopK = Annotated[
    int | None, typer.Option(help="Experts that a token meets; the recipe's number if left out.", show_default=False)
]
Layers = Annotated[str, typer.Option(help="Networks that become layers: all, every-2, or indices 1,3.")]
Context = Annotated[
    int | None,
    typer.Option(help="Tokens that the model reads at a time; 256 or as many as it can.", min=2, show_default=False),
]
Align = Annotated[
    bool, typer.Option("--align/--no-align", help="Line up hidden neurons before averaging; slow if very wide.")
]
_CONTEXT = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class Mixture:
    """What a dense model becomes: which recipe, where, and with which numbers."""

    recipe: Recipe = "mixtral"
    num_experts: Annotated[
        int | None, typer.Option(help="Experts of a layer; the recipe's number if left out.", show_default=False)
    ] = None
    top_k: TopK = None
    layers: Layers = "all"

    def keywords(self) -> dict[str, Any]:
        """As the conversions of Python take them."""
        return {
            "recipe": self.recipe,
            "num_experts": self.num_experts,
            "top_k": self.top_k,
            "layers": layers_of(self.layers),
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Drawn:
    """What a recipe draws, and its options that have none of their own here."""

    seed: Annotated[int, typer.Option(help="Of routers, and of what else is drawn.")] = 0
    option: Annotated[
        list[str] | None,
        typer.Option("--option", help="An option of the recipe, key=value; repeatable.", show_default=False),
    ] = None

    def keywords(self) -> dict[str, Any]:
        """As the conversions of Python take them.

        Raises:
            ConfigError: if an option is not key=value.
        """
        return {"seed": self.seed, **options_of(self.option)}


@dataclass(frozen=True, kw_only=True, slots=True)
class Text:
    """Text on which a model is looked at before it is changed."""

    data: Annotated[
        str, typer.Option(help="Text to see what experts do on: builtin, a file or a folder.", show_default=True)
    ] = "builtin"
    tokens: Annotated[int, typer.Option(help="Tokens of it to read.", min=1)] = 65_536
    context: Context = None

    def batches(self, source: Path) -> list[dict[str, Any]]:
        """The text in the source's own tokens."""
        from moesaic.convert.checkpoint.run_folder import TOKENIZER, find_model
        from moesaic.convert.checkpoint.source import read_config
        from moesaic.convert.text import text_batches
        from moesaic.data import load_tokenizer

        place = find_model(source)
        longest = getattr(read_config(place.folder).get_text_config(), "max_position_embeddings", None) or _CONTEXT
        # A checkpoint of a run in mid-training leaves its tokenizer to the run.
        is_apart = place.run is not None and not (place.folder / "tokenizer.json").is_file()
        tokenizer = load_tokenizer(source / TOKENIZER if is_apart else place.folder)
        context = self.context or min(_CONTEXT, longest)
        return text_batches(self.data, tokenizer, num_tokens=self.tokens, context=context)


def layers_of(text: str) -> str | list[int]:
    """The layers as :func:`moesaic.sparsify` takes them."""
    return [int(one) for one in text.split(",")] if re.fullmatch(r"\d+(,\d+)*", text) else text


def options_of(texts: list[str] | None) -> dict[str, Any]:
    """Options of a recipe: numbers, true, false and null as JSON has them, anything else as text.

    Raises:
        ConfigError: if one is not key=value.
    """
    from moesaic.core.errors import ConfigError

    found: dict[str, Any] = {}
    for text in texts or []:
        name, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"--option must be key=value, got {text!r}. Write for example --option jitter=0.01.")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found


def number_of_experts(text: str, option: str) -> int | float:
    """A whole number, or a share.

    Raises:
        ConfigError: if it is neither.
    """
    from moesaic.core.errors import ConfigError

    try:
        return int(text) if text.isdigit() else float(text)
    except ValueError as error:
        raise ConfigError(
            f"{option} must be a number of experts, or a share of them such as 0.5, got {text!r}. Half is 0.5."
        ) from error
