"""What all verbs of ``moesaic bench`` take, and how they show what they measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    import torch

    from moesaic.bench.case import Case
    from moesaic.bench.result import Group, Result

AsJson = Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")]
Cases = Annotated[
    list[str] | None,
    typer.Option(
        "--case",
        help="coarse, fine, very-fine, big-coarse or big-fine. May be repeated. By default the first three, on a GPU "
        "the last two.",
        show_default=False,
    ),
]
Dtypes = Annotated[
    list[str] | None,
    typer.Option("--dtype", help="float32, bfloat16 or float16. May be repeated.", show_default=False),
]
Rounds = Annotated[int, typer.Option(min=5, help="Rounds in which all take their turns.")]
Threads = Annotated[int | None, typer.Option(min=1, help="Of PyTorch. [default: all]", show_default=False)]
Out = Annotated[
    Path | None, typer.Option(help="Write the figures there, as JSON: a file, or a folder for it.", show_default=False)
]
Quick = Annotated[bool, typer.Option("--quick", help="Tiny sizes, in seconds: shows that all works, not how fast.")]
Shared = Annotated[bool, typer.Option("--shared", help="With a shared expert.")]
Only = Annotated[
    list[str] | None, typer.Option(help="Contenders with this in their name. May be repeated.", show_default=False)
]
Device = Annotated[str, typer.Option(help="cpu or cuda.")]


def cases_of(
    names: list[str] | None, device: torch.device, *, shared: bool, quick: bool, **sizes: float | None
) -> list[Case]:
    """The cases that were asked for, or those of a device, in the sizes that were.

    Args:
        names: of the library.
        device: whose cases are the default.
        shared: with a shared expert.
        quick: as small as they get.
        sizes: fields of a case that replace those of the library; None leaves them.
    Raises:
        ConfigError: if a name is unknown, or sizes do not fit.
    """
    from dataclasses import replace

    from moesaic.bench.case import case

    default = ["big-coarse", "big-fine"] if device.type == "cuda" else ["coarse", "fine", "very-fine"]
    given = {name: value for name, value in sizes.items() if value is not None}
    cases = [replace(case(name), **given) for name in names or default]  # type: ignore[arg-type]
    cases = [one.with_shared() if shared else one for one in cases]
    return [one.tiny() if quick else one for one in cases]


def dtypes_of(names: list[str] | None, device: torch.device) -> list[torch.dtype]:
    """The dtypes that were asked for; by default both of a CPU, and bfloat16 of a GPU."""
    default = ["bfloat16"] if device.type == "cuda" else ["float32", "bfloat16"]
    return [dtype_of(name) for name in names or default]


def dtype_of(name: str) -> torch.dtype:
    """The dtype of a name.

    Raises:
        ConfigError: if it is none that is measured.
    """
    import torch

    from moesaic.core.errors import ConfigError

    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in known:
        raise ConfigError(f"dtype must be one of {', '.join(known)}, got {name!r}. Pick one of these.")
    return known[name]


def device_of(name: str) -> torch.device:
    """The device of a name.

    Raises:
        ConfigError: if there is no such kind.
        BackendError: if it is not there.
    """
    import torch

    from moesaic.core.errors import BackendError, ConfigError

    if name not in ("cpu", "cuda"):
        raise ConfigError(f"device must be cpu or cuda, got {name!r}. Pick one of these.")
    if name == "cuda" and not torch.cuda.is_available():
        raise BackendError("--device cuda needs a CUDA device, got none. Use --device cpu.")
    return torch.device(name)


@contextmanager
def measuring(threads: int | None) -> Iterator[Callable[[str], None]]:
    """Set the threads, and show on standard error what is being measured."""
    import os

    import torch
    from rich.console import Console

    before = torch.get_num_threads()
    torch.set_num_threads(threads or os.cpu_count() or 1)
    console = Console(stderr=True)
    try:
        with console.status("") as status:
            yield lambda line: status.update(line) if console.is_terminal else None
    finally:
        torch.set_num_threads(before)


def shower(*, as_json: bool) -> Callable[[Group], None]:
    """What becomes of a table as soon as it is there: printed, or nothing where JSON will be."""
    return (lambda _group: None) if as_json else show


def show(group: Group) -> None:
    """Print one table."""
    from rich.console import Console
    from rich.table import Table

    from moesaic.bench.show import columns, is_right, rows

    drawn = Table(title=group.title, title_justify="left")
    body = rows(group)
    kept = [at for at, _ in enumerate(columns(group)) if at == 0 or any(row[at] for row in body)]
    for at in kept:
        drawn.add_column(columns(group)[at], justify="right" if is_right(at) else "left", overflow="fold")
    for row in body:
        drawn.add_row(*(row[at] for at in kept))
    console = Console()
    # Into a file or a pipe, lines as long as they need to be.
    Console(width=None if console.is_terminal else 160).print(drawn)


def finish(result: Result, *, out: Path | None, as_json: bool) -> None:
    """Write and print what was asked for; into a folder under the names of the device and the verb."""
    if out is not None:
        from moesaic.core.files import replacing_file

        path = out if out.suffix == ".json" else out / f"{result.machine.slug}-{result.verb}.json"
        with replacing_file(path) as partial:
            partial.write(result.to_json().encode("utf-8"))
        typer.echo(f"Wrote {path}.", err=True)
    if as_json:
        print(result.to_json(), end="")
