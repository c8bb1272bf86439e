"""Every recipe under the same conditions: the runs of the page that compares them."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from moesaic import recipes
from moesaic.core.errors import CheckpointError, ConfigError
from moesaic.lab.images import COMPARED, image_setup, needs_digits, run_images
from moesaic.lab.small import TWIN, Kind, Outcome, Setup, adapts
from moesaic.lab.text import run, run_adapted

SEEDS = (0, 1, 2)


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """One run of the gallery.

    Attributes:
        kind: what is trained.
        recipe: which, or ``twin``.
        seed: of the run.
    """

    kind: Kind
    recipe: str
    seed: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    """A run that gave no figures.

    Attributes:
        task: which.
        reason: in one line.
        refused: whether the recipe cannot be built that small; otherwise something broke.
    """

    task: Task
    reason: str
    refused: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Gallery:
    """What the runs of a gallery measured.

    Attributes:
        setup: the numbers that all of them shared.
        outcomes: one for each run that came to its end.
        failures: one for each run that did not.
    """

    setup: Setup
    outcomes: tuple[Outcome, ...] = ()
    failures: tuple[Failure, ...] = ()

    def of(self, kind: Kind, name: str) -> list[Outcome]:
        """The outcomes of one recipe, by seed."""
        found = [one for one in self.outcomes if (one.kind, one.recipe) == (kind, name)]
        return sorted(found, key=lambda one: one.seed)

    def names(self, kind: Kind) -> list[str]:
        """Recipes with outcomes, oldest first, without the twin."""
        found = {one.recipe for one in self.outcomes if one.kind == kind}
        return [name for name in recipes.names() if name in found]

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "setup": asdict(self.setup),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}",
            "outcomes": [one.to_dict() for one in self.outcomes],
            "failures": [asdict(one) for one in self.failures],
        }


def load(path: Path) -> Gallery:
    """Read the figures that a gallery left beside its page; failed runs are left out, so that they are tried again.

    Raises:
        CheckpointError: if there are none, or they are something else.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        outcomes = tuple(Outcome(**one) for one in values["outcomes"])
        return Gallery(setup=Setup(**values["setup"]), outcomes=outcomes)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"The figures of a gallery could not be read from {path}: {error}. Start anew without --resume."
        ) from error


def tasks_of(names: Sequence[str], seeds: Sequence[int]) -> list[Task]:
    """What has to be run to show recipes in their places, and the dense twin in each.

    Designs that change a trained dense model start from one; those in which tokens see later ones classify images,
    beside two that are seen in both places; all others learn text from scratch.

    Args:
        names: of recipes, or ``twin``.
        seeds: of the runs; all recipes run with the first one before any runs with the second.
    Raises:
        ConfigError: if a recipe is unknown.
    """
    places: dict[Kind, list[str]] = {"text": [TWIN], "adapted": [TWIN], "images": [TWIN]}
    for name in names:
        if name == TWIN:
            continue
        if recipes.get(name).causality == "never":
            places["images"].append(name)
        elif adapts(name):
            places["adapted"].append(name)
        else:
            places["text"].append(name)
            places["images"] += [name] if name in COMPARED else []
    # The language twin is what the others are compared with, and what adapted models start from.
    wanted = [(kind, name) for kind, found in places.items() if len(found) > 1 or kind == "text" for name in found]
    return [Task(kind=kind, recipe=name, seed=seed) for seed in seeds for kind, name in wanted]


def every_recipe(
    *,
    names: Sequence[str] | None = None,
    seeds: Sequence[int] = SEEDS,
    setup: Setup | None = None,
    jobs: int = 1,
    before: Gallery | None = None,
    done: Callable[[Gallery, str], None] = lambda _so_far, _last: None,
) -> Gallery:
    """Train every recipe, and the dense twin, with every seed. A run that breaks stops no other.

    Args:
        names: recipes; None for all.
        seeds: of the runs.
        setup: the numbers that the runs share.
        jobs: processes to run side by side, each with one thread.
        before: a gallery to go on with: what it has is not run again.
        done: called after each run with all that there is so far, and with what the run gave, in words.
    Raises:
        BackendError: before any run, if images are wanted and scikit-learn is not there.
        ConfigError: if a recipe is unknown, or the gallery to go on with had other numbers.
    """
    setup = setup or (Setup() if before is None else before.setup)
    if before is not None and before.setup != setup:
        raise ConfigError(
            f"a gallery goes on with the numbers that it began with, {before.setup}, got {setup}. "
            "Give the same ones, or start anew."
        )
    so_far = before or Gallery(setup=setup)
    have = {Task(kind=one.kind, recipe=one.recipe, seed=one.seed) for one in so_far.outcomes}
    tasks = [task for task in tasks_of(recipes.names() if names is None else names, seeds) if task not in have]
    if any(task.kind == "images" for task in tasks):
        needs_digits()
    for task, result in _results(tasks, setup, jobs):
        if isinstance(result, Failure):
            so_far = replace(so_far, failures=(*so_far.failures, result))
            said = result.reason
        else:
            so_far = replace(so_far, outcomes=(*so_far.outcomes, result))
            said = f"{result.score:.3f}"
        done(so_far, f"{task.recipe}, seed {task.seed}: {said}")
    return so_far


def _results(tasks: Sequence[Task], setup: Setup, jobs: int) -> Iterator[tuple[Task, Outcome | Failure]]:
    """All side by side; if a process dies, those without a result again, one by one: so it is seen which one dies."""
    left = list(tasks)
    for task, result in _side_by_side(tasks, setup, jobs):
        left.remove(task)
        yield task, result
    for task in left:
        alone = list(_side_by_side([task], setup, 1))
        died = Failure(task=task, reason="its process died; it may have run out of memory", refused=False)
        yield alone[0] if alone else (task, died)


def _side_by_side(tasks: Sequence[Task], setup: Setup, jobs: int) -> Iterator[tuple[Task, Outcome | Failure]]:
    """Results as they come, until a process dies."""
    # Spawned, so that no process inherits another's threads or random state.
    pool = ProcessPoolExecutor(jobs, mp_context=get_context("spawn"))
    try:
        waiting = {pool.submit(one_run, task, setup): task for task in tasks}
        for future in as_completed(waiting):
            yield waiting[future], future.result()
    except BrokenProcessPool:
        return
    finally:
        # Who stops early waits for no run that has not begun.
        pool.shutdown(cancel_futures=True)


def one_run(task: Task, setup: Setup) -> Outcome | Failure:
    """Run one task in this process, on one thread; whatever it raises becomes a failure."""
    torch.set_num_threads(1)
    try:
        if task.kind == "images":
            return run_images(task.recipe, task.seed, image_setup(setup))
        return (run if task.kind == "text" else run_adapted)(task.recipe, task.seed, setup)
    except ConfigError as error:
        return Failure(task=task, reason=str(error), refused=True)
    except Exception as error:
        return Failure(task=task, reason=f"{type(error).__name__}: {' '.join(str(error).split())}", refused=False)
