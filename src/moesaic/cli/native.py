"""``moesaic native``: compile the kernels in C for this machine."""

from __future__ import annotations

from typing import Annotated

import typer


def add_to(app: typer.Typer) -> None:
    """Add the verb."""
    app.command(
        name="native",
        help=(
            "Compile the CPU kernels in C for this machine, in seconds, and keep them in the user's cache. "
            "From then on kernel='auto' takes them wherever they are faster."
        ),
        epilog="Example: moesaic native",
    )(_native)


def _native(
    compiler: Annotated[
        str | None, typer.Option(help="C compiler, by name or path; by default cc, gcc or clang.", show_default=False)
    ] = None,
    remove: Annotated[bool, typer.Option("--remove", help="Delete what was compiled instead.")] = False,
) -> None:
    from moesaic.kernels.native.build import build, compiled_path

    if remove:
        path = compiled_path()
        typer.echo(f"removed {path}" if path.exists() else f"nothing to remove at {path}")
        path.unlink(missing_ok=True)
        return
    made = build(compiler)
    typer.echo(f"wrote {made.path}")
    many = " and ".join(str(dtype).removeprefix("torch.") for dtype in made.products)
    typer.echo("few rows, in generation: float32 and bfloat16")
    typer.echo(f"many rows: {many or 'left to PyTorch, since this processor has no AVX512'}")
