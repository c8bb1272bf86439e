"""The options of verbs that look at text, and the batches that come of them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

Data = Annotated[
    str, typer.Option(help="Text to see what experts do on: builtin, a file or a folder.", show_default=True)
]
Tokens = Annotated[int, typer.Option(help="Tokens of it to read.", min=1)]
Context = Annotated[
    int | None,
    typer.Option(help="Tokens that the model reads at a time; 256 or as many as it can.", min=2, show_default=False),
]
_CONTEXT = 256


def batches(source: Path, data: str, tokens: int, context: int | None) -> list[dict[str, Any]]:
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
    return text_batches(data, tokenizer, num_tokens=tokens, context=context or min(_CONTEXT, longest))
