"""Studies of ``moesaic lab`` that look at what experts take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def add_to(app: typer.Typer) -> None:
    """Add the verbs to those of ``moesaic lab``."""
    example = "Example: moesaic lab three-domains --data folder --out three-domains.md"
    app.command("three-domains", epilog=example)(three_domains)
    app.command("mmlu", epilog="Example: moesaic lab mmlu --model runs/a --data folder --out mmlu.md")(mmlu)


def three_domains(
    data: Annotated[
        Path | None,
        typer.Option(
            help="Folder with wikipedia_en.jsonl.gz and dm_mathematics.jsonl.gz. [default: the text that ships]",
            show_default=False,
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="The page; its picture and figures go beside it.")] = Path(
        "three-domains.md"
    ),
    work: Annotated[Path, typer.Option(help="Folder for runs; what is finished is not run again.")] = Path(
        "runs/three-domains"
    ),
    quick: Annotated[bool, typer.Option("--quick", help="Tiny models on the text that ships, in seconds.")] = False,
) -> None:
    """Train with an auxiliary loss and without: whose experts take sides by domain?

    Takes half an hour on two cores.
    """
    from moesaic.lab.classic.drawn import needs
    from moesaic.lab.studies.three_domains import QUICK, Domains, study
    from moesaic.lab.studies.three_domains_page import write

    needs("matplotlib")
    plan = QUICK if quick else Domains()
    found = study(plan, None if quick else data, work, say=_say)
    _say(f"Wrote {', '.join(map(str, write(found, out)))}.")


def mmlu(
    model: Annotated[Path, typer.Option(help="Run folder or model folder.", show_default=False)],
    data: Annotated[Path, typer.Option(help="Folder with mmlu.jsonl.gz.", show_default=False)],
    out: Annotated[Path, typer.Option(help="The page; its picture and figures go beside it.")] = Path("mmlu.md"),
    of_each: Annotated[int, typer.Option(min=1, help="Questions of each subject.")] = 20,
    about: Annotated[str, typer.Option(help="What the model is, in words for the page.")] = "",
) -> None:
    """Let a mixture read the questions of 57 subjects: load, subjects and words that single an expert out."""
    from rich.console import Console
    from rich.progress import Progress

    from moesaic.lab.classic.drawn import needs
    from moesaic.lab.studies.mmlu import read_questions, study
    from moesaic.lab.studies.mmlu_page import write

    needs("matplotlib")
    texts = read_questions(data, of_each=of_each)
    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task("Reading questions", total=len(texts))
        found = study(model, texts, done=lambda read: progress.update(bar, completed=read))
    _say(f"Wrote {', '.join(map(str, write(found, about or f'The model of {model}.', out)))}.")


def _say(line: str) -> None:
    from rich.console import Console

    Console(stderr=True).print(line, highlight=False, soft_wrap=True)
