"""Every recipe on the same text, with the same tokens and active parameters: the page that compares them."""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

import torch

from moesaic import recipes
from moesaic.core.errors import ConfigError
from moesaic.core.files import replacing_file
from moesaic.lab.small import TWIN, Outcome, Setup, run

SEEDS = (0, 1, 2)


@dataclass(frozen=True, kw_only=True, slots=True)
class Gallery:
    """What the runs of a gallery measured.

    Attributes:
        setup: the numbers that all of them shared.
        outcomes: one for each recipe and seed that ran.
        refused: recipes that cannot be built that small, and why.
    """

    setup: Setup
    outcomes: tuple[Outcome, ...]
    refused: dict[str, str]

    def of(self, name: str) -> list[Outcome]:
        """The outcomes of one recipe, by seed."""
        return sorted((one for one in self.outcomes if one.recipe == name), key=lambda one: one.seed)

    def to_dict(self) -> dict[str, object]:
        """As JSON values."""
        return {
            "setup": asdict(self.setup),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}",
            "outcomes": [one.to_dict() for one in self.outcomes],
            "refused": self.refused,
        }


def gallery(
    *,
    names: Sequence[str] | None = None,
    seeds: Sequence[int] = SEEDS,
    setup: Setup | None = None,
    jobs: int = 1,
    done: Callable[[Outcome], None] = lambda _one: None,
) -> Gallery:
    """Train every recipe, and the dense twin, with every seed.

    Args:
        names: recipes; None for all, and the twin.
        seeds: of the runs.
        setup: the numbers that the runs share.
        jobs: processes to run side by side, each with one thread.
        done: called after each run.
    """
    setup = setup or Setup()
    wanted = [TWIN, *recipes.names()] if names is None else list(names)
    for name in wanted:
        if name != TWIN:
            recipes.get(name)
    tasks = [(name, seed) for name in wanted for seed in seeds]
    outcomes, refused = [], {}
    for name, result in _results(tasks, setup, jobs):
        if isinstance(result, str):
            refused[name] = result
        else:
            outcomes.append(result)
            done(result)
    order = {name: index for index, name in enumerate(wanted)}
    outcomes.sort(key=lambda one: (order[one.recipe], one.seed))
    return Gallery(setup=setup, outcomes=tuple(outcomes), refused=refused)


def _results(tasks: list[tuple[str, int]], setup: Setup, jobs: int) -> Iterator[tuple[str, Outcome | str]]:
    # Spawned, so that no process inherits another's threads or random state.
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        waiting = {pool.submit(_one, name, seed, setup): name for name, seed in tasks}
        for future in as_completed(waiting):
            yield waiting[future], future.result()


def _one(name: str, seed: int, setup: Setup) -> Outcome | str:
    torch.set_num_threads(1)
    try:
        return run(name, seed, setup)
    except ConfigError as error:
        return str(error)


def write(result: Gallery, page: Path) -> None:
    """Write the page, and the figures beside it as JSON."""
    for path, text in (
        (page, _page(result)),
        (page.with_suffix(".json"), json.dumps(result.to_dict(), indent=1) + "\n"),
    ):
        with replacing_file(path) as partial:
            partial.write_text(text, encoding="utf-8")


def _page(result: Gallery) -> str:
    setup = result.setup
    tokens = setup.steps * setup.batch_size * setup.context
    seeds = sorted({one.seed for one in result.outcomes})
    parts = [
        "# Gallery",
        "",
        "Every recipe trained on the text that ships with Moesaic, by `moesaic lab gallery`: the same tokens in the",
        "same order, and experts sized so that a token meets as many parameters as in the dense twin's layer.",
        "",
        f"- {tokens:,} tokens, {setup.layers} layers of width {setup.width} ({setup.backbone}), {setup.num_experts} "
        f"experts, context {setup.context}, {setup.batch_size} sequences a step, {setup.steps} steps, "
        f"learning rate {setup.lr}, tokenizer {setup.tokenizer}.",
        f"- {len(seeds)} seeds; figures are the mean and half the distance from the lowest to the highest seed.",
        f"- Measured on {result.to_dict()['machine']}.",
        "",
        "So few tokens show that a design learns, balances and at what speed here; they do not rank designs at scale.",
        "",
        "## Causal in evaluation",
        "",
        _table(result, [TWIN, *_names(result, "causal", "in evaluation")]),
    ]
    ahead = _names(result, "never")
    if ahead:
        parts += [
            "",
            "## Designs that look ahead",
            "",
            "A token's experts depend on later tokens of its sequence here, so the model is told something about the",
            "token that it predicts: these bits per byte are not comparable with those above, and Moesaic refuses to",
            "generate from such a model.",
            "",
            _table(result, ahead),
        ]
    if result.refused:
        parts += ["", "## Not run", ""] + [f"- `{name}`: {why}" for name, why in sorted(result.refused.items())]
    return "\n".join(parts) + "\n"


def _names(result: Gallery, *causality: str) -> list[str]:
    run_names = {one.recipe for one in result.outcomes}
    return [name for name in recipes.names() if name in run_names and recipes.get(name).causality in causality]


def _table(result: Gallery, names: Sequence[str]) -> str:
    lines = [
        "| recipe | year | bits per byte | max/mean load | dropped | experts per token | tokens/s | "
        "active / all parameters of a layer |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in names:
        runs = result.of(name)
        if not runs:
            continue
        year = "" if name == TWIN else str(recipes.get(name).year)
        cells = [
            _spread([one.bits_per_byte for one in runs], 3),
            _spread([one.load_max_over_mean for one in runs], 2),
            _spread([100 * one.drop_rate for one in runs], 1) + " %",
            _spread([one.experts_per_token for one in runs], 2),
            _spread([one.tokens_per_s for one in runs], 0),
            f"{runs[0].active_params:,} / {runs[0].total_params:,}",
        ]
        shown = "dense twin" if name == TWIN else f"`{name}`"
        lines.append(f"| {shown} | {year} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _spread(values: Sequence[float], digits: int) -> str:
    half = (max(values) - min(values)) / 2
    return f"{statistics.fmean(values):,.{digits}f} ± {half:,.{digits}f}"
