"""The gallery as a page: tables of figures, and how they were come by."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path

from moesaic import recipes
from moesaic.core.files import replacing_file
from moesaic.lab.gallery import Gallery
from moesaic.lab.images import HELD_OUT, IMAGE_SIZE, PATCH_SIZE, image_setup
from moesaic.lab.picture import picture
from moesaic.lab.small import TWIN, Kind, Outcome

DENSE_TWIN = "dense twin"


def write(result: Gallery, page: Path) -> list[Path]:
    """Write the page, and beside it the picture and the figures as JSON; give the three.

    Raises:
        BackendError: without matplotlib.
    """
    drawing = page.with_suffix(".svg")
    text(drawing, picture(result))
    text(page, words(result, drawing.name))
    return [page, drawing, save(result, page)]


def save(result: Gallery, page: Path) -> Path:
    """Write the figures alone, as JSON beside the page: cheap enough to do after each run."""
    figures = page.with_suffix(".json")
    text(figures, json.dumps(result.to_dict(), indent=1) + "\n")
    return figures


def text(path: Path, content: str) -> None:
    """Write a file whole or not at all."""
    with replacing_file(path) as partial:
        partial.write(content.encode("utf-8"))


def words(result: Gallery, drawing: str) -> str:
    """The page.

    Args:
        result: what was measured.
        drawing: name of the picture beside it.
    """
    parts = [*_head(result, drawing), *_text(result), *_adapted(result), *_images(result), *_options(result)]
    if result.failures:
        parts += ["", "## Without figures", ""]
        parts += [
            f"- `{one.task.recipe}` ({one.task.kind}, seed {one.task.seed}), "
            f"{'refused' if one.refused else 'failed'}: {one.reason}"
            for one in sorted(result.failures, key=lambda one: (one.task.recipe, one.task.seed))
        ]
    return "\n".join(parts) + "\n"


def _head(result: Gallery, drawing: str) -> Iterator[str]:
    setup = result.setup
    tokens = setup.steps * setup.tokens_per_step
    num_seeds = len({one.seed for one in result.outcomes})
    yield from (
        "# Gallery",
        "",
        "Every recipe under the same conditions, by `moesaic lab gallery`: the same tokens in the same order, and",
        "experts sized so that a token meets as many parameters as in the dense twin's layer.",
        "",
        f"![Bits per byte and load of every recipe, with the spread over {num_seeds} seeds]({drawing})",
        "",
        f"- {tokens:,} tokens, {setup.layers} layers of width {setup.width} ({setup.backbone}), {setup.num_experts} "
        f"experts, context {setup.context}, {setup.batch_size} sequences a step, {setup.steps} steps, "
        f"learning rate {setup.lr}, tokenizer {setup.tokenizer}.",
        f"- {num_seeds} seed{'s' * (num_seeds > 1)}; figures are the mean and half the distance from the lowest to "
        "the highest.",
        "- Load and dropped rows are those on held-out data. Tokens per second are of training, on one thread of",
        f"  this machine: {result.to_dict()['machine']}.",
        "",
        "So few tokens show that a design learns, that it balances and what a step costs here. They do not rank",
        "designs: at scale, with the hundreds of experts that many were published with, the order is another.",
    )


def _text(result: Gallery) -> Iterator[str]:
    if result.of("text", TWIN) or result.names("text"):
        yield from ("", "## From scratch, on text", "")
        yield from ("Held-out bits per byte, the mean over the domains of the text that ships with Moesaic.", "")
        yield from _table(result, "text", "bits per byte", [(DENSE_TWIN, result.of("text", TWIN))])


def _adapted(result: Gallery) -> Iterator[str]:
    if not (result.of("adapted", TWIN) or result.names("adapted")):
        return
    steps = result.setup.steps
    yield from (
        "",
        "## From a trained dense model",
        "",
        "Low-rank experts change a model that is there. These start from the dense twin after its",
        f"{steps} steps, which then is frozen, and train for {steps} steps more; the last row of the dense model has",
        f"those {2 * steps} steps too, with all of its weights: what low-rank experts save is not seen here.",
        "",
    )
    if "mole" in result.names("adapted"):
        yield "`mole` is published for LoRAs that were trained one by one. There are none here: its own are drawn at"
        yield "random and trained together with its gate."
        yield ""
    dense = [
        (f"{DENSE_TWIN}, {steps} steps", result.of("text", TWIN)),
        (f"{DENSE_TWIN}, trained on", result.of("adapted", TWIN)),
    ]
    yield from _table(result, "adapted", "bits per byte", dense)


def _images(result: Gallery) -> Iterator[str]:
    if not (result.of("images", TWIN) or result.names("images")):
        return
    setup = image_setup(result.setup)
    yield from (
        "",
        "## On images",
        "",
        "In these designs a token's experts depend on all tokens of the batch or the sequence. A language model would",
        "be told about the token that it predicts, so they are seen where nothing is predicted from left to right: in",
        f"a vision transformer, {setup.layers} layers of width {setup.width} with MoE in the second half, on 1,797 "
        f"handwritten digits of",
        f"{IMAGE_SIZE} by {IMAGE_SIZE} pixels (scikit-learn's) in patches of {PATCH_SIZE} by {PATCH_SIZE}, "
        f"{setup.batch_size} images a step, {setup.steps} steps. Two token-choice",
        f"designs stand beside them. Accuracy is on {HELD_OUT} images held out: one image is {100 / HELD_OUT:.2f} %.",
        "",
    )
    yield from _table(result, "images", "accuracy", [(DENSE_TWIN, result.of("images", TWIN))])


def _options(result: Gallery) -> Iterator[str]:
    """What was set other than published, by option."""
    found: dict[tuple[str, str], set[str]] = {}
    for one in result.outcomes:
        for option, value in one.options.items():
            published = json.dumps(recipes.get(one.recipe).options[option])
            place = f" on {one.kind}" if one.kind == "images" and option == "segment" else ""
            shown = f"`{one.recipe}` ({published}){place}"
            found.setdefault((option, json.dumps(value)), set()).add(shown)
    if found:
        order = {f"`{name}`": index for index, name in enumerate(recipes.names())}
        yield from (
            "",
            "## Set other than published",
            "",
            f"{result.setup.num_experts} experts wherever there is more than one, sizes, the tokenizer's vocabulary "
            "and the model's initial spread; and, with",
            "what was published in brackets:",
            "",
        )
        for (option, value), names in sorted(found.items()):
            yield f"- `{option}={value}`: {', '.join(sorted(names, key=lambda name: order[name.split(' (')[0]]))}"


def _table(result: Gallery, kind: Kind, score: str, dense: Sequence[tuple[str, list[Outcome]]]) -> Iterator[str]:
    yield (
        f"| recipe | year | {score} | max/mean load | dropped | experts per token | tokens/s | "
        "active / all parameters of a layer |"
    )
    yield "|---|---|---|---|---|---|---|---|"
    rows = [*((name, "", runs) for name, runs in dense)]
    rows += [(f"`{name}`", str(recipes.get(name).year), result.of(kind, name)) for name in result.names(kind)]
    for name, year, runs in rows:
        if runs:
            yield f"| {name} | {year} | " + " | ".join(_cells(runs, is_dense=not year)) + " |"


def _cells(runs: Sequence[Outcome], *, is_dense: bool) -> list[str]:
    is_share = runs[0].kind == "images"
    routing = [
        spread([one.load_max_over_mean for one in runs], 2),
        spread([100 * one.drop_rate for one in runs], 1) + " %",
        spread([one.experts_per_token for one in runs], 2),
    ]
    return [
        spread([100 * one.score for one in runs], 1) + " %" if is_share else spread([one.score for one in runs], 3),
        *(["–"] * 3 if is_dense else routing),
        spread([one.tokens_per_s for one in runs], 0),
        f"{runs[0].active_params:,} / {runs[0].total_params:,}",
    ]


def spread(values: Sequence[float], digits: int) -> str:
    """Mean, and half the distance from the lowest to the highest, which one value alone does not have."""
    mean = f"{statistics.fmean(values):,.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {(max(values) - min(values)) / 2:,.{digits}f}"
