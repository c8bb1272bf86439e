"""All verbs under one command, and what becomes of errors."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from moesaic.cli import (
    bench,
    convert,
    doctor,
    generate,
    inspect,
    lab,
    lab_studies,
    native,
    plan,
    probe,
    recipes,
    serve,
    train,
    zoo,
)

app = typer.Typer(
    name="moesaic",
    help="Train Mixture-of-Experts language models, and see what their experts do.",
    epilog="Example: moesaic train --recipe mixtral --data builtin --out runs/a --steps 2000",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for verb in (train, plan, inspect, generate, doctor, serve, native):
    verb.add_to(app)
lab_studies.add_to(lab.app)
app.add_typer(recipes.app, name="recipes")
app.add_typer(zoo.app, name="zoo")
app.add_typer(convert.app, name="convert")
app.add_typer(bench.app, name="bench")
app.add_typer(lab.app, name="lab")
app.add_typer(probe.app, name="probe")


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"moesaic {version('moesaic')}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    pass


def run(arguments: Sequence[str] | None = None) -> int:
    """Run one command and give its exit code.

    Args:
        arguments: of the command; by default those of the process.
    Returns:
        0; 1 if the command failed; 2 if its arguments were bad. Errors of ours are one line on standard error.
    """
    from moesaic.core.errors import ConfigError, MoesaicError, StoppedElsewhereError

    try:
        app(args=None if arguments is None else list(arguments), prog_name="moesaic")
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except ConfigError as error:
        return _fail(str(error), 2)
    except StoppedElsewhereError:
        # The rank that stopped first says why, once.
        return 1
    except MoesaicError as error:
        return _fail(str(error), 1)
    except BrokenPipeError:
        # The reader of a pipe, such as `head`, has seen enough; keep Python from complaining when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        # A folder that may not be written, a name too long: the system's own words say which.
        if error.filename is None:
            return _fail(str(error), 1)
        return _fail(f"{error.filename}: {error.strerror}. Check the path, and who may read and write there.", 1)
    except KeyboardInterrupt:
        return _fail("Stopped.", 1)
    return 0


def _fail(message: str, code: int) -> int:
    # One line, whatever a library put into its message.
    print(f"moesaic: {' '.join(message.split())}", file=sys.stderr)
    return code
