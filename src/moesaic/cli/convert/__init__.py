"""``moesaic convert``: a checkpoint into another one, with a receipt."""

from __future__ import annotations

import typer

from moesaic.cli.convert import check, dense, export, merge, mix, prune, split, top_k, upcycle

app = typer.Typer(
    help="Transform a checkpoint: dense to MoE, MoE to smaller or dense, to the native family that others serve.",
    epilog="Example: moesaic convert export runs/a --out served",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for verb in (upcycle, split, mix, export, prune, merge, top_k, dense, check):
    verb.add_to(app)
