"""Sizes of cases, and what is refused."""

from dataclasses import replace

import pytest

from moesaic.bench.case import CASES, COARSE, FINE, VERY_FINE, Case, case
from moesaic.core.errors import ConfigError


def test_the_three_cases_of_a_cpu_have_the_published_sizes_and_equal_active_flops():
    assert [(one.num_experts, one.top_k, one.hidden) for one in (COARSE, FINE, VERY_FINE)] == [
        (8, 2, 1024),
        (64, 8, 256),
        (256, 8, 256),
    ]
    assert {one.flops for one in (COARSE, FINE, VERY_FINE)} == {6 * 4096 * 512 * 2048}
    assert FINE.with_shared().active_hidden == 4096
    assert FINE.num_rows == 32768


def test_a_tiny_draw_has_as_many_experts_and_choices_and_keeps_what_makes_the_case():
    tiny = replace(VERY_FINE, zipf=1.0).with_shared().tiny()
    assert (tiny.num_experts, tiny.top_k, tiny.zipf) == (256, 8, 1.0)
    assert tiny.num_tokens * tiny.width * tiny.hidden < 10**6
    assert tiny.shared_hidden > 0
    assert FINE.tiny().shared_hidden == 0


def test_a_load_has_a_name():
    assert (FINE.load, replace(FINE, zipf=1.5).load) == ("balanced", "Zipf 1.5")


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (
            {"num_experts": 17},
            "a case needs no more experts than its width of 16, got 17. Raise --width, or lower --experts.",
        ),
        ({"hidden": 0}, "hidden must be at least 1, got 0. Give the case a size."),
        ({"zipf": -2.0}, "zipf must be at least 0, got -2.0. 0 is balanced, 1 is Zipf's own law."),
        (
            {"top_k": 5},
            "top_k must be between 1 and num_experts=4, got 5. Lower top_k, or add experts.",
        ),
    ],
)
def test_sizes_that_cannot_be_are_refused(sizes, message):
    given = {"name": "x", "num_experts": 4, "top_k": 2, "hidden": 8, "width": 16} | sizes
    with pytest.raises(ConfigError) as error:
        Case(**given)
    assert str(error.value) == message


def test_an_unknown_case_is_refused_with_the_names_that_there_are():
    with pytest.raises(ConfigError) as error:
        case("finest")
    assert str(error.value) == (
        "case must be one of coarse, fine, very-fine, big-coarse, big-fine, got 'finest'. "
        "Pick one, and change its sizes."
    )
    assert case("fine") is CASES["fine"]
