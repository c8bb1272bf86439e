"""What is run, what becomes of runs that break, and the page."""

import json
import os
from dataclasses import replace

import pytest

from moesaic import recipes
from moesaic.core.errors import CheckpointError, ConfigError
from moesaic.lab import Failure, Gallery, Outcome, Setup, Task, every_recipe
from moesaic.lab.gallery import load, one_run, tasks_of
from moesaic.lab.page import save, spread, words, write


def outcome(kind="text", recipe="switch", seed=0, score=2.5, **more):
    figures = {"load_max_over_mean": 1.5, "drop_rate": 0.01, "experts_per_token": 1.0, "tokens_per_s": 1e4}
    return Outcome(
        kind=kind, recipe=recipe, seed=seed, score=score, active_params=10, total_params=40, hidden=5, **figures | more
    )


def places(tasks):
    return {(task.kind, task.recipe) for task in tasks}


def test_every_recipe_has_a_place_and_the_twin_stands_in_each():
    found = places(tasks_of(recipes.names(), [0]))
    assert {name for _, name in found} == {*recipes.names(), "twin"}
    assert {kind for kind, name in found if name == "twin"} == {"text", "adapted", "images"}
    looking_ahead = {name for name in recipes.names() if recipes.get(name).causality == "never"}
    assert {name for kind, name in found if kind == "images"} == looking_ahead | {"switch", "mixtral", "twin"}
    assert {name for kind, name in found if kind == "text"}.isdisjoint(looking_ahead)


def test_a_partial_gallery_runs_what_it_is_compared_with_and_no_more():
    assert places(tasks_of(["hash"], [0])) == {("text", "twin"), ("text", "hash")}
    assert places(tasks_of(["mole", "twin"], [0])) == {("text", "twin"), ("adapted", "twin"), ("adapted", "mole")}
    with pytest.raises(ConfigError, match="recipe must be one of"):
        tasks_of(["quantum"], [0])


def test_the_first_seed_of_all_comes_before_the_second_of_any():
    assert [task.seed for task in tasks_of(["hash", "mixtral"], [4, 7])] == [4] * 5 + [7] * 5


@pytest.mark.slow
def test_runs_come_back_from_their_processes_and_those_there_are_kept(tiny):
    seen = []
    result = every_recipe(names=["hash"], seeds=[0], setup=tiny, done=lambda so_far, last: seen.append(last))
    assert {one.recipe for one in result.outcomes} == {"twin", "hash"}
    assert result.failures == ()
    assert len(seen) == 2
    assert seen[-1].startswith(("twin, seed 0: ", "hash, seed 0: "))
    again = every_recipe(names=["hash"], seeds=[0], before=result, done=lambda *_: pytest.fail("it was run before"))
    assert again == result
    with pytest.raises(ConfigError, match="a gallery goes on with the numbers that it began with"):
        every_recipe(names=["hash"], seeds=[0], before=result, setup=replace(tiny, steps=9))


def test_what_a_run_raises_becomes_a_failure_in_one_line(tiny, monkeypatch):
    refused = one_run(Task(kind="text", recipe="mixtral", seed=0), replace(tiny, active_hidden=1))
    assert refused.refused
    assert "Raise active_hidden." in refused.reason

    def burst(*_):
        raise RuntimeError("two\n  lines")

    monkeypatch.setattr("moesaic.lab.gallery.run", burst)
    failed = one_run(Task(kind="text", recipe="mixtral", seed=0), tiny)
    assert (failed.refused, failed.reason) == (False, "RuntimeError: two lines")


def die_on_switch(task, setup):
    """Stands in for a run that takes its process with it, as one that runs out of memory does."""
    if task.recipe == "switch":
        os._exit(1)
    return outcome(recipe=task.recipe, seed=task.seed)


@pytest.mark.slow
def test_a_process_that_dies_takes_no_other_run_with_it(monkeypatch):
    from moesaic.lab.gallery import _results

    monkeypatch.setattr("moesaic.lab.gallery.one_run", die_on_switch)
    tasks = [Task(kind="text", recipe=name, seed=0) for name in ("twin", "switch", "hash", "glam")]
    results = dict(_results(tasks, Setup(), 2))
    assert set(results) == set(tasks)
    died = [one for one in results.values() if isinstance(one, Failure)]
    assert [(one.task.recipe, one.refused, one.reason) for one in died] == [
        ("switch", False, "its process died; it may have run out of memory")
    ]


@pytest.fixture
def whole():
    seeds = [
        outcome(recipe=name, seed=seed, score=2.5 + seed / 10, **more)
        for seed in (0, 1)
        for name, more in (("twin", {}), ("switch", {}), ("evo-moe", {"options": {"cooling_steps": 200}}))
    ]
    adapted = [outcome(kind="adapted", recipe=name, score=2.25) for name in ("twin", "mixlora")]
    images = [outcome(kind="images", recipe=name, score=0.975) for name in ("twin", "soft-moe")]
    failures = (
        Failure(task=Task(kind="text", recipe="hash", seed=1), reason="it fell over", refused=False),
        Failure(task=Task(kind="text", recipe="glam", seed=0), reason="too small", refused=True),
    )
    return Gallery(setup=Setup(), outcomes=(*seeds, *adapted, *images), failures=failures)


def test_the_page_shows_each_run_in_its_place(whole):
    page = words(whole, "gallery.svg")
    for line in (
        "![Bits per byte and load of every recipe, with the spread over 2 seeds](gallery.svg)",
        "| dense twin |  | 2.550 ± 0.050 | – | – | – | 10,000 ± 0 | 10 / 40 |",
        "| `switch` | 2021 | 2.550 ± 0.050 | 1.50 ± 0.00 | 1.0 ± 0.0 % | 1.00 ± 0.00 | 10,000 ± 0 | 10 / 40 |",
        "| dense twin, 200 steps |  | 2.550 ± 0.050 | – | – | – | 10,000 ± 0 | 10 / 40 |",
        "| dense twin, trained on |  | 2.250 | – | – | – | 10,000 | 10 / 40 |",
        "| `mixlora` | 2024 | 2.250 | 1.50 | 1.0 % | 1.00 | 10,000 | 10 / 40 |",
        "| `soft-moe` | 2023 | 97.5 % | 1.50 | 1.0 % | 1.00 | 10,000 | 10 / 40 |",
        "- `cooling_steps=200`: `evo-moe` (10000)",
        "- `glam` (text, seed 0), refused: too small",
        "- `hash` (text, seed 1), failed: it fell over",
    ):
        assert line in page.splitlines()


def test_a_page_has_no_section_for_what_was_not_run():
    page = words(Gallery(setup=Setup(), outcomes=(outcome(),)), "gallery.svg")
    assert [line for line in page.splitlines() if line.startswith("## ")] == ["## From scratch, on text"]


def test_page_picture_and_figures_lie_side_by_side_and_figures_are_read_back(whole, tmp_path):
    written = write(whole, tmp_path / "a.md")
    assert [path.name for path in written] == ["a.md", "a.svg", "a.json"]
    drawing = (tmp_path / "a.svg").read_text()
    for shown in ("switch", "mixlora", "soft-moe", "dense, trained on", "bits per byte, lower is better"):
        assert shown in drawing
    # Failed runs are tried again.
    assert load(tmp_path / "a.json") == replace(whole, failures=())
    assert json.loads((tmp_path / "a.json").read_text())["failures"][0]["reason"] == "it fell over"
    assert write(whole, tmp_path / "b.md")[1].read_text() == drawing


def test_figures_are_saved_without_a_page(whole, tmp_path):
    assert save(whole, tmp_path / "a.md") == tmp_path / "a.json"
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize("content", [None, "{", '{"setup": {}}', '{"setup": {"colour": 1}, "outcomes": []}'])
def test_figures_that_cannot_be_read_are_refused(content, tmp_path):
    path = tmp_path / "a.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(CheckpointError, match=r"The figures of a gallery could not be read from .*--resume\."):
        load(path)


@pytest.mark.parametrize(
    ("values", "shown"), [([1.5], "1.50"), ([1.0, 2.0], "1.50 ± 0.50"), ([2e3, 2e3], "2,000.00 ± 0.00")]
)
def test_spread_is_half_the_distance_from_lowest_to_highest(values, shown):
    assert spread(values, 2) == shown
