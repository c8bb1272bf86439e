"""``moesaic serve``: a trained mixture behind HTTP, with a page that shows each token's experts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moesaic.cli.pages import ask_for_large_pages


def add_to(app: typer.Typer) -> None:
    """Add the verb."""
    example = "Example: moesaic serve runs/a --port 8000, then open http://127.0.0.1:8000/"
    app.command("serve", epilog=example)(serve)


def serve(
    path: Annotated[Path, typer.Argument(help="A run folder, or a model folder.", show_default=False)],
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="The port; 0 takes a free one.")] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(envvar="MOESAIC_API_KEY", help="What clients must send as bearer token.", show_default=False),
    ] = None,
    allow_host: Annotated[
        list[str] | None, typer.Option(help="A name by which clients may call this machine.", show_default=False)
    ] = None,
    name: Annotated[str | None, typer.Option(help="The model's name. [default: its folder's]")] = None,
    trace: Annotated[
        Path | None, typer.Option(help="A routing trace of the model. [default: that of its report, if any]")
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="New tokens of one answer, at most.")] = 1024,
    max_context: Annotated[int, typer.Option(help="Tokens of prompt and answer together, at most.")] = 8192,
    max_active: Annotated[int, typer.Option(help="Answers that are written at a time.")] = 8,
    max_waiting: Annotated[int, typer.Option(help="Requests that may wait; more get status 429.")] = 64,
    grace: Annotated[float, typer.Option(help="Seconds that running answers have when the service stops.")] = 10.0,
) -> None:
    """Serve a model: a page that shows each token's experts, OpenAI's interface under /v1, and /metrics.

    Only this machine can reach it, unless --host says otherwise; that needs an API key. Ctrl-C or SIGTERM stops it:
    running answers are finished first.
    """
    ask_for_large_pages()
    from moesaic.serve import Settings
    from moesaic.serve import serve as run

    settings = Settings(
        host=host,
        port=port,
        api_key=api_key,
        allow_hosts=tuple(allow_host or ()),
        max_tokens=max_tokens,
        max_context=max_context,
        max_active=max_active,
        max_waiting=max_waiting,
        grace_s=grace,
    )

    def ready(url: str) -> None:
        typer.echo(f"The page is at {url}, OpenAI's interface at {url}v1. Ctrl-C stops the service.")

    run(path, settings, name=name, trace=trace, ready=ready)
