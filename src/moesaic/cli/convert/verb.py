"""From a function that converts to a verb of ``moesaic convert``: what all verbs have, a bar, and the receipt."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import MISSING, fields, is_dataclass
from inspect import Parameter
from typing import TYPE_CHECKING, Any, get_type_hints

import typer

from moesaic.cli.convert.options import AsJson, Out, Probe

if TYPE_CHECKING:
    from moesaic.convert import Converted


def add(app: typer.Typer, name: str, convert: Callable[..., Converted], *, example: str) -> None:
    """Make a function that converts a verb, whose own options stand between ``--out`` and ``--probe``.

    Args:
        app: gets the verb.
        name: of the verb.
        convert: takes its own arguments and options, as typer reads them, and ``out`` and ``probe`` as every
            conversion does. Where a parameter is a dataclass, its fields are options, and it gets them together.
        example: that the help ends with.
    """
    app.command(name, epilog=f"Example: moesaic convert {example}")(_command(convert))


def _command(convert: Callable[..., Converted]) -> Callable[..., None]:
    hints = _hints(convert)
    own = [one.name for one in inspect.signature(convert).parameters.values() if one.kind is not Parameter.VAR_KEYWORD]
    groups = {one: hints[one] for one in own if is_dataclass(hints[one])}

    @functools.wraps(convert)
    def run(*, as_json: bool, probe: bool, **given: Any) -> None:
        for one, group in groups.items():
            given[one] = group(**{field.name: given.pop(field.name) for field in fields(group)})
        with _working():
            converted = convert(**given, probe="random" if probe else None)
        _show(converted, as_json=as_json)

    defaults = {one: inspect.signature(convert).parameters[one].default for one in own}
    options = [_option("out", Out)]
    for one in own:
        options += _fields(groups[one]) if one in groups else [_option(one, hints[one], defaults[one])]
    options += [_option("probe", Probe, True), _option("as_json", AsJson, False)]
    run.__signature__ = inspect.Signature(options)  # type: ignore[attr-defined]  # what typer reads
    run.__annotations__ = {one.name: one.annotation for one in options}
    return run


def _hints(of: Any) -> dict[str, Any]:
    # What a verb returns is imported for mypy alone: with it would come torch.
    return get_type_hints(of, localns={"Converted": object}, include_extras=True)


def _fields(group: type[Any]) -> list[Parameter]:
    hints = _hints(group)
    return [
        _option(field.name, hints[field.name], Parameter.empty if field.default is MISSING else field.default)
        for field in fields(group)
    ]


def _option(name: str, hint: Any, default: Any = Parameter.empty) -> Parameter:
    return Parameter(name, Parameter.KEYWORD_ONLY, annotation=hint, default=default)


@contextmanager
def _working() -> Iterator[None]:
    """Draw a bar on standard error while a conversion runs, where that is a terminal; keep transformers quiet."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

    from moesaic.convert.progress import drawing
    from moesaic.train.quiet import quiet_transformers

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    tasks: dict[str, TaskID] = {}
    with quiet_transformers(), Progress(*columns, console=console, disable=not console.is_terminal) as bar:

        def draw(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total)
            bar.update(tasks[what], completed=done, total=total)

        with drawing(draw):
            yield


def _show(converted: Converted, *, as_json: bool) -> None:
    """Print the receipt: as JSON, or as one line and its notes."""
    receipt = converted.receipt
    if as_json:
        sys.stdout.write(receipt.to_json())
        return
    print(receipt)
    for note in receipt.notes:
        print(f"  {note}")
    if receipt.optimizer is not None:
        print(f"  optimizer: {receipt.optimizer}")
    print(f"Written to {converted.folder}, with its receipt in receipt.json.")
