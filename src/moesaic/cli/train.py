"""``moesaic train``: train an MoE, and its dense twin if asked, into a run folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from moesaic.cli import table
from moesaic.cli.needs import needs_for_report

_MODEL, _TRAINING, _RUN = "Model", "Training", "Run"


def add_to(app: typer.Typer) -> None:
    """Add the verb."""
    example = "Example: moesaic train --recipe mixtral --data builtin --out runs/a --steps 2000 --twin"
    app.command("train", epilog=f"{example}. Go on after Ctrl-C: moesaic train --resume --out runs/a")(train)


def _option(panel: str, text: str, *names: str) -> Any:
    return typer.Option(*names, help=text, rich_help_panel=panel, show_default=False)


def train(
    context: typer.Context,
    out: Annotated[Path, _option(_RUN, "The run folder.", "--out")],
    init: Annotated[Path | None, _option(_MODEL, "Go on from this folder's model; the rest is its own.")] = None,
    recipe: Annotated[str | None, _option(_MODEL, "See `moesaic recipes`. [default: mixtral]")] = None,
    backbone: Annotated[str | None, _option(_MODEL, "llama, qwen3, gpt2, jamba, lstm, t5. [default: llama]")] = None,
    width: Annotated[int | None, _option(_MODEL, "Size of the residual stream. [default: 128]")] = None,
    layers: Annotated[int | None, _option(_MODEL, "Blocks; of each stack in t5. [default: 4]")] = None,
    moe_layers: Annotated[str | None, _option(_MODEL, "With an MoE: all, every-2, or 1,3. [default: all]")] = None,
    heads: Annotated[int | None, _option(_MODEL, "Attention heads. [default: width / 32]")] = None,
    hidden: Annotated[int | None, _option(_MODEL, "Hidden size of one expert. [default: 2 * width]")] = None,
    num_experts: Annotated[int | None, _option(_MODEL, "Experts of a layer. [default: the recipe's]")] = None,
    top_k: Annotated[int | None, _option(_MODEL, "Experts that a token meets. [default: the recipe's]")] = None,
    context_: Annotated[int | None, _option(_MODEL, "Tokens of a sequence. [default: 256]", "--context")] = None,
    option: Annotated[list[str] | None, _option(_MODEL, "An option of the recipe, key=value; repeatable.")] = None,
    aux: Annotated[list[str] | None, _option(_MODEL, "Weight of a balance loss, name=number; repeatable.")] = None,
    balance: Annotated[list[str] | None, _option(_MODEL, "Instead of the recipe's, name=number; repeatable.")] = None,
    init_std: Annotated[float | None, _option(_MODEL, "Spread of the initial weights. [default: by width]")] = None,
    twin: Annotated[bool | None, _option(_MODEL, "Train the dense twin too.", "--twin/--no-twin")] = None,
    data: Annotated[str | None, _option(_TRAINING, "builtin, a file, or a folder. [default: builtin]")] = None,
    tokenizer: Annotated[str | None, _option(_TRAINING, "bytes, bpe:SIZE or a folder. [default: bytes]")] = None,
    trainable: Annotated[str | None, _option(_TRAINING, "Train what this regex is in. [default: all]")] = None,
    steps: Annotated[int | None, _option(_TRAINING, "Optimizer steps. [default: 1000]")] = None,
    batch_size: Annotated[int | None, _option(_TRAINING, "Sequences of a micro-batch. [default: 16]")] = None,
    grad_accumulation: Annotated[int | None, _option(_TRAINING, "Micro-batches of a step. [default: 1]")] = None,
    lr: Annotated[float | None, _option(_TRAINING, "Highest learning rate. [default: 0.002]")] = None,
    warmup: Annotated[int | None, _option(_TRAINING, "Steps of rising learning rate. [default: steps / 20]")] = None,
    weight_decay: Annotated[float | None, _option(_TRAINING, "Decay of matrices. [default: 0.1]")] = None,
    clip: Annotated[float | None, _option(_TRAINING, "Largest gradient norm. [default: 1]")] = None,
    dtype: Annotated[str | None, _option(_TRAINING, "auto, float32 or bfloat16. [default: auto]")] = None,
    seed: Annotated[int | None, _option(_TRAINING, "Of weights, noise and order. [default: 0]")] = None,
    eval_every: Annotated[int | None, _option(_RUN, "Steps between evaluations. [default: steps / 10]")] = None,
    eval_tokens: Annotated[int | None, _option(_RUN, "Tokens by domain in each but the last. [default: 16384]")] = None,
    save_every: Annotated[int | None, _option(_RUN, "Steps between checkpoints. [default: steps / 5]")] = None,
    log_every: Annotated[int | None, _option(_RUN, "Steps between lines of history.jsonl. [default: 10]")] = None,
    keep: Annotated[int | None, _option(_RUN, "Checkpoints to keep. [default: 2]")] = None,
    preset: Annotated[str | None, _option(_RUN, "Start from a named set of settings: demo.")] = None,
    resume: Annotated[bool, _option(_RUN, "Go on from the last good checkpoint.", "--resume")] = False,
    overwrite: Annotated[bool, _option(_RUN, "Replace the run in the folder.", "--overwrite")] = False,
    report: Annotated[bool, _option(_RUN, "Write report.html at the end.", "--report/--no-report")] = True,
    as_json: Annotated[bool, _option(_RUN, "Print the figures as JSON.", "--json")] = False,
) -> None:
    """Train a Mixture-of-Experts language model, with checkpoints, evaluation and a report.

    Ctrl-C finishes the step, saves, and says how to go on.
    """
    if report:
        needs_for_report()
    summary = _train(out, _settings(context.params), preset=preset, resume=resume, overwrite=overwrite)
    if _is_first():
        _show(summary, out, report=report, as_json=as_json)


_COMMANDS = ("out", "option", "aux", "balance", "context_", "preset", "resume", "overwrite", "report", "as_json")


def _settings(given: dict[str, Any]) -> dict[str, Any]:
    """Pick the settings that were given on the command line, under the names of ``TrainConfig``."""
    settings = {name: value for name, value in given.items() if value is not None and name not in _COMMANDS}
    if given["init"] is not None:
        settings["init"] = str(given["init"])
    if given["context_"] is not None:
        settings["context"] = given["context_"]
    if given["option"]:
        settings["options"] = {name: _value(text) for name, text in _pairs("--option", given["option"])}
    if given["aux"]:
        settings["aux_coefficients"] = {name: _number("--aux", text) for name, text in _pairs("--aux", given["aux"])}
    if given["balance"]:
        settings["balance"] = {name: _number("--balance", text) for name, text in _pairs("--balance", given["balance"])}
    return settings


def _train(
    out: Path, settings: dict[str, Any], *, preset: str | None, resume: bool, overwrite: bool
) -> dict[str, dict[str, Any]]:
    from moesaic import train as training
    from moesaic.core.errors import ConfigError
    from moesaic.train.presets import preset as settings_of

    if resume and overwrite:
        raise ConfigError("--resume goes on with a run and --overwrite deletes it, got both. Leave one out.")
    if preset is not None:
        settings = settings_of(preset) | settings
    if resume:
        return training.resume(out, changes=settings, show=True)
    config = training.TrainConfig.from_settings(settings, out)
    return training.train(config, overwrite=overwrite, show=True)


def _is_first() -> bool:
    """Tell whether this process shows the figures: under ``torchrun`` one of several does."""
    from moesaic.train import ranks

    return ranks.is_first()


def _show(summary: dict[str, dict[str, Any]], out: Path, *, report: bool, as_json: bool) -> None:
    if as_json:
        print(json.dumps(summary, indent=1))
    else:
        table.show_summary(summary)
    if report and "moe" in summary:
        _report(out, quiet=as_json)


def _report(out: Path, *, quiet: bool) -> None:
    page = out / "report.html"
    if not page.is_file() or page.stat().st_mtime < (out / "summary.json").stat().st_mtime:
        from moesaic.cli.report import Source, write_report

        write_report(Source(path=out), page)
    if not quiet:
        print(f"Report: {page}")


def _pairs(name: str, texts: list[str]) -> list[tuple[str, str]]:
    from moesaic.core.errors import ConfigError

    for text in texts:
        if "=" not in text:
            raise ConfigError(f"{name} must be key=value, got {text!r}. Write for example {name} jitter=0.01.")
    return [(text.split("=", 1)[0], text.split("=", 1)[1]) for text in texts]


def _value(text: str) -> Any:
    """Read a number, true, false or null as JSON does, and anything else as a string."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _number(name: str, text: str) -> float:
    from moesaic.core.errors import ConfigError

    try:
        return float(text)
    except ValueError as error:
        raise ConfigError(f"{name} must give a number, got {text!r}. Write for example {name} switch=0.01.") from error
