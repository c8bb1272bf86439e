"""``moesaic bench``: how fast the layer is, beside transformers' own and beside the limit, in one run."""

from __future__ import annotations

import typer

from moesaic.cli.bench import decode, layer, memory, model, page, scale

app = typer.Typer(
    help="Measure speed and memory beside transformers' implementations and beside the dense limit, in one run.",
    epilog="Example: moesaic bench layer --case fine --dtype float32",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for verb in (layer, model, decode, memory, scale, page):
    verb.add_to(app)
